"""Whatever happens to the files of a run, it ends with a clear message or resumes correctly, bitwise identical.

A run of 20 steps was killed after step 17; it has checkpoints of steps 10 and 15. Each damage is done to a copy of it,
and all copies are resumed in one process. Their results are compared with those of an undisturbed run.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from txl_dist.checkpoint.format import find_checkpoint, latest, steps
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import GenerateJob
from txl_dist.errors import UserError
from txl_dist.generate import generate
from txl_dist.runs.load import load_model

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
LENGTHS = {}
LATEST, OLDER = "checkpoints/step-000000015", "checkpoints/step-000000010"
WEIGHTS, OPTIMIZER, MEMORY = (f"{kind}-00000.safetensors" for kind in ("weights", "optimizer", "memory"))


# ---------------------------------------------------------------------------------------------- kinds of damage


def cut(size):
    """Truncate a file to so many bytes; a negative number is cut off its end, a function gets its path."""

    def harm(path):
        length = size(path) if callable(size) else size if size >= 0 else path.stat().st_size + size
        os.truncate(path, length)

    return harm


def flip(at, bit=0):
    """Flip one bit of the byte at a position, or at the first occurrence of a text."""

    def harm(path):
        content = bytearray(path.read_bytes())
        position = at
        if isinstance(at, bytes):
            position = content.index(at)
        elif callable(at):
            position = at(path)
        content[position] ^= 1 << bit
        path.write_bytes(content)

    return harm


def become(content):
    return lambda path: path.write_bytes(content)


def add(content):
    return lambda path: path.write_bytes(path.read_bytes() + content)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder_instead(path):
    path.unlink()
    path.mkdir()


def file_instead(path):
    shutil.rmtree(path)
    path.write_bytes(b"")


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def of(name, older=OLDER):
    """Replace a file by another one of the older checkpoint, or of the one given."""
    return lambda path: shutil.copyfile(path.parents[2] / older / name, path)


def swapped(one, two):
    def harm(path):
        os.replace(path / one, path / "aside")
        os.replace(path / two, path / one)
        os.replace(path / "aside", path / two)

    return harm


def copied(name):
    """Copy the older checkpoint over the latest one, or to another name beside it."""

    def harm(path):
        target = path.with_name(name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(path.parents[1] / OLDER, target)

    return harm


def header(path):
    """Return the number of bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def border(path):
    """Return where the second tensor of a safetensors file begins."""
    entries = json.loads(path.read_bytes()[8 : header(path)])
    ends = sorted(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    return header(path) + ends[0]


def line(number, change):
    """Replace line `number` of a file, from 0, by what `change` returns for it."""

    def harm(path):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number] = change(lines[number])
        path.write_bytes(b"".join(lines))

    return harm


# name -> which file is harmed, how, the step from which the run resumes, words that must be said about it
RESUMES = {}


def damage(file, step, words, **harms):
    for name, harm in harms.items():
        RESUMES[f"{Path(file).name.partition('-0')[0]} {name}".replace(".", " ")] = file, harm, step, words


damage(
    f"{LATEST}/{WEIGHTS}",
    10,
    WEIGHTS,
    cut_to_nothing=cut(0),
    cut_within_the_length=cut(4),
    cut_within_the_header=cut(100),
    cut_after_the_header=cut(header),
    cut_between_tensors=cut(border),
    cut_by_a_byte=cut(-1),
    longer=add(b"\0"),
    length_flipped=flip(0),
    high_byte_of_length_flipped=flip(6),
    brace_flipped=flip(8),
    name_flipped=flip(b"layers"),
    shape_flipped=flip(b"shape"),
    dtype_flipped=flip(b"F32", bit=2),
    first_number_flipped=flip(header),
    number_at_border_flipped=flip(border, bit=7),
    last_number_flipped=flip(-1, bit=6),
    missing=remove,
    empty_folder=folder_instead,
    dangling_link=dangling,
    of_another_step=of(WEIGHTS),
    foreign=become(b"PK\x03\x04 something else"),
)
damage(
    f"{LATEST}/{OPTIMIZER}", 10, OPTIMIZER, cut_by_a_byte=cut(-1), flipped=flip(-1), missing=remove,
    of_another_step=of(OPTIMIZER), header_flipped=flip(b"exp_avg"),
)  # fmt: skip
damage(
    f"{LATEST}/{MEMORY}", 10, MEMORY, cut_to_nothing=cut(0), flipped=flip(header), missing=remove,
    of_another_step=of(MEMORY), lane_flipped=flip(b"lane.1"),
)  # fmt: skip
damage(
    f"{LATEST}/checkpoint.json",
    10,
    "checkpoint.json",
    cut_to_nothing=cut(0),
    cut_in_half=cut(lambda path: path.stat().st_size // 2),
    without_its_end=cut(-2),
    step_flipped=flip(b"15,"),
    tokens_flipped=flip(b"1920"),
    learning_rate_flipped=flip(b"0.003"),
    seed_flipped=flip(lambda path: path.read_bytes().index(b'"seed": ') + 8),
    key_flipped=flip(b"origin"),
    hash_of_a_file_flipped=flip(lambda path: path.read_bytes().index(b'"sha256": ') + 12),
    its_own_hash_flipped=flip(lambda path: path.read_bytes().rindex(b'"sha256": ') + 12),
    its_own_hash_renamed=flip(lambda path: path.read_bytes().rindex(b"sha256")),
    version_flipped=flip(lambda path: path.read_bytes().index(b'"version": ') + 11),
    no_text=become(b"\xff\xfe\x00"),
    a_list=become(b"[]"),
    null=become(b"null"),
    an_empty_object=become(b"{}"),
    missing=remove,
    folder=folder_instead,
    of_another_step=of("checkpoint.json"),
)
damage(
    LATEST, 10, "step 15 skipped", folder_emptied=emptied, folder_a_file=file_instead,
    folder_of_another_step=copied("step-000000015"), files_swapped=swapped(WEIGHTS, OPTIMIZER), removed=remove,
)  # fmt: skip
RESUMES["step removed"] = LATEST, remove, 10, ""  # then there is nothing to say
damage(
    LATEST,
    15,
    "",
    foreign_file_beside=lambda path: (path / "notes.txt").write_text("mine"),
    half_written_beside=lambda path: shutil.copytree(path, path.with_name(".step-000000020.partial")),
    half_removed_beside=lambda path: shutil.copytree(path, path.with_name(".step-000000005.removed")),
    foreign_folder_beside=lambda path: path.with_name("step-notes").mkdir(),
    older_removed=lambda path: remove(path.parents[1] / OLDER),
    older_damaged=lambda path: remove(path.parents[1] / OLDER / WEIGHTS),
)
damage(LATEST, 10, "step 20 skipped", renamed=lambda path: path.rename(path.with_name("step-000000020")))
damage(
    "metrics.jsonl",
    15,
    "",
    last_line_cut=cut(-20),
    line_cut_after_the_checkpoint=line(16, lambda text: text[:30] + b"\n"),
    trailing_rubbish=add(b"\xff\x00\n{]\n"),
)
damage(
    "metrics.jsonl",
    15,
    "metrics.jsonl: line 5 cannot be read",
    middle_line_cut=line(4, lambda text: text[:30] + b"\n"),
    middle_line_flipped=line(4, lambda text: text.replace(b"{", b"z", 1)),
    middle_line_null=line(4, lambda _: b"null\n"),
    middle_line_empty=line(4, lambda _: b"\n"),
)
damage("metrics.jsonl", 15, "", missing=remove, emptied=cut(0))
damage("config.yaml", 15, "", cut=cut(40), flipped=flip(0), no_text=become(b"\xff\xfe"), missing=remove)
damage("tokenizer/tokenizer.json", 15, "", cut=cut(10), flipped=flip(b"256"), missing=remove)

LOSES_LINES = {name for name, (file, *_) in RESUMES.items() if file == "metrics.jsonl"}


# ------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def job(small):
    return [*small, "checkpoint.every=5"]


@pytest.fixture(scope="module")
def undisturbed(run, job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = [[*job, f"run.dir={folder / 'run'}"], [*job, f"run.dir={folder / 'killed'}", "train.stop_at=15"]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(HERE / "distributed/many_runs.py", folder / "jobs.json")
    return folder / "run"


@pytest.fixture(scope="module")
def killed(undisturbed):
    """The run as it was after step 17."""
    folder = undisturbed.with_name("killed")
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:17]))
    assert steps(folder) == [10, 15]
    return folder


@pytest.fixture(scope="module")
def resumed(run, job, killed, tmp_path_factory):
    """Resume all copies; return where they are, and the lines about each."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, (file, harm, _, _) in RESUMES.items():
        shutil.copytree(killed, folder / name)
        harm(folder / name / file)
    (folder / "jobs.json").write_text(json.dumps([[*job, f"run.dir={folder / name}"] for name in RESUMES]))
    done = run(HERE / "distributed/many_runs.py", folder / "jobs.json")
    lines = (done.stdout + done.stderr).splitlines()
    return folder, {name: "\n".join(line for line in lines if f"{folder / name}" in line) for name in RESUMES}


@pytest.mark.parametrize("name", RESUMES)
def test_the_run_resumes_from_the_latest_valid_checkpoint(resumed, undisturbed, metrics, name):
    folder, lines = resumed
    _, _, step, words = RESUMES[name]
    assert f"{folder / name}: resuming from step {step};" in lines[name] and words in lines[name]
    assert ("skipped: " in lines[name]) == (step == 10 and name != "step removed"), lines[name]
    assert [path.name for path in sorted((folder / name / "checkpoints").glob("*0*"))] == [
        "step-000000015",
        "step-000000020",
    ]
    one, two = latest(undisturbed), latest(folder / name, contents=True)
    assert (one.step, one.state, one.data) == (two.step, two.state, two.data)
    for kind in ("weights", "optimizer", "memory"):
        tensors, expected = two.tensors(kind), one.tensors(kind)
        assert tensors.keys() == expected.keys(), kind
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors), kind
    if name not in LOSES_LINES:
        for key in ("step", "train/loss", "train/grad_norm", "valid/loss", "test/loss"):
            values = [[line[key] for line in metrics(path) if key in line] for path in (folder / name, undisturbed)]
            assert values[0] == values[1], key
    last = (folder / name / "metrics.jsonl").read_text().splitlines()[-6:]
    assert [json.loads(line)["step"] for line in last] == [16, 17, 18, 19, 20, 20]
    assert (folder / name / "curve.png").is_file() and "num_lanes: 8" in (folder / name / "config.yaml").read_text()


@pytest.fixture
def copy(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def contents(folder):
    """Return all files of a run directory but its logs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder / "logs"]
    return {str(path): path.read_bytes() for path in paths}


def refused(run, *overrides, expect):
    done = run("txl_dist.train", *overrides, expect=expect)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 10, done.stderr
    return done.stderr


@pytest.mark.parametrize("harm", [flip(-1), cut(-1)], ids=["contents", "sizes"])
def test_with_no_valid_checkpoint_the_run_does_not_start_from_the_beginning(copy, run, job, harm):
    for checkpoint in (LATEST, OLDER):
        harm(copy / checkpoint / WEIGHTS)
    before = contents(copy)
    message = refused(run, *job, f"run.dir={copy}", expect=2)
    assert all(str(copy / checkpoint / WEIGHTS) in message for checkpoint in (LATEST, OLDER))
    assert f"remove {copy / 'checkpoints'} to start from the beginning" in message
    assert contents(copy) == before


@pytest.mark.parametrize("name, harm", [("metrics.jsonl", folder_instead), ("checkpoints", file_instead)])
def test_something_else_in_a_files_place_is_named(copy, run, job, name, harm):
    harm(copy / name)
    before = contents(copy)
    assert str(copy / name) in refused(run, *job, f"run.dir={copy}", expect=2)
    assert contents(copy) == before


def test_other_data_are_refused_whatever_is_damaged(copy, run, job, corpus, tmp_path):
    (copy / LATEST / MEMORY).unlink()
    prepare = [f"corpus.path={corpus}/00*", "corpus=text", "tokenizer=bytes", f"data.dir={tmp_path / 'other'}"]
    run("txl_dist.prepare", *prepare, "corpus.valid_share=0.2", "corpus.test_share=0.2")
    message = refused(run, *job, f"run.dir={copy}", f"data.dir={tmp_path / 'other'}", expect=2)
    assert "is not what the run in" in message


def test_other_lanes_than_those_of_the_checkpoint_that_is_left_are_refused(copy, run, job, tmp_path):
    """The latest one has the lanes that are given, as far as sizes show; the one that is left has others."""
    lanes = ["data.num_lanes=4", "run.on_lane_change=reset_memory"]
    run("txl_dist.train", *job, f"run.dir={copy}", *lanes, "train.stop_at=16")
    flip(-1)(copy / "checkpoints/step-000000016" / WEIGHTS)
    message = refused(run, *job, f"run.dir={copy}", lanes[0], "run.on_lane_change=refuse", expect=2)
    assert "data.num_lanes=4: the run in" in message


@pytest.fixture
def read_only(copy):
    """The run directory, where nothing can be written, whoever asks: root may write whatever the modes say."""
    bound = subprocess.run(["mount", "--bind", copy, copy], capture_output=True)
    if bound.returncode:
        pytest.skip(f"no file system can be mounted here: {bound.stderr.decode().strip()}")
    subprocess.run(["mount", "-o", "remount,bind,ro", copy], check=True)
    yield copy
    subprocess.run(["umount", copy], check=True)


def test_a_run_directory_that_cannot_be_written_is_named(read_only, run, job):
    message = refused(run, *job, f"run.dir={read_only}", expect=1)
    assert f"run.dir={read_only}: cannot be written" in message and "Read-only" in message


def test_metrics_that_cannot_be_kept_end_the_run(copy, run, job, full_disk):
    """A line or two still go into the last page of metrics.jsonl, then the disk is full."""
    kept = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:15]
    longer = (kept[:1] * more + kept for more in range(1, 100))
    content = next(text for text in map(b"".join, longer) if len(text) % 4096 > 3600)
    (full_disk / "metrics").write_bytes(content)
    with open(full_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(4096))
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to(full_disk / "metrics")
    message = refused(run, *job, f"run.dir={copy}", expect=1)
    assert f"{copy / 'metrics.jsonl'}: cannot be written: No space left on device" in message
    assert latest(copy, contents=True).step == 15


# ------------------------------------------------------------------------------------ reading a trained run


def test_the_latest_that_is_damaged_is_skipped_and_named(copy, caplog):
    (copy / LATEST / OPTIMIZER).unlink()
    model, checkpoint = load_model(str(copy), None, LENGTHS)
    assert checkpoint.step == 10 and f"step 15 skipped: {copy / LATEST / OPTIMIZER}" in caplog.text
    kept = checkpoint.tensors("weights")
    rows = {name: weight for name, weight in model.named_parameters() if weight.is_contiguous()}
    assert all(torch.equal(kept[name], weight) for name, weight in rows.items())
    assert find_checkpoint(str(copy), "best").step == 10  # the one evaluated at its very step
    with pytest.raises(UserError, match=OPTIMIZER):
        load_model(str(copy), 15, LENGTHS)


def test_a_checkpoint_that_is_asked_for_and_damaged_is_named(copy, run):
    cut(-1)(copy / LATEST / WEIGHTS)
    done = run("txl_dist.evaluate", f"run={copy}", "checkpoint=15", expect=2)
    assert f"{LATEST}/{WEIGHTS}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "harm",
    [cut(0), cut(20), flip(b"257"), flip(b"bytes"), flip(b"kind"), become(b"[]"), become(b"\xff"), remove],
    ids=["emptied", "cut", "number flipped", "kind flipped", "key flipped", "a list", "no text", "missing"],
)
def test_a_damaged_tokenizer_is_named(copy, harm):
    harm(copy / "tokenizer/tokenizer.json")
    given = dict.fromkeys(["tgt_len", "mem_len", "clamp_len", "same_length"])
    job = {"run": str(copy), "prompt": "the", "max_tokens": 1, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 1}
    job |= {"format": "text", "out": None}
    with pytest.raises(UserError, match="tokenizer"):
        generate(parse_config(GenerateJob, job | {"checkpoint": None, "average": False, "model": given}))
