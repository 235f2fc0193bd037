"""Datasets, run directories and exports of earlier versions are read, continued, evaluated and converted.

Only commands and files are used here, as a user has them: how they are read may change, what comes out may not.
"""

import json
import platform
import random
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import load_file

import txl_dist

FIXTURE = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
OTHERS = {"train/tokens_per_second", "train/data_wait", "train/checkpoint_wait", "train/mfu"}  # at every start
OTHERS |= {"time", "train/step_loss"}  # that version 0.1 did not log
OVERRIDES = [
    "data.dir=dataset",
    "data.num_lanes=4",
    "data.order=documents",
    "data.reset_memory=document",
    "model.n_layer=2",
    "model.d_model=8",
    "model.n_head=2",
    "model.d_head=4",
    "model.d_inner=16",
    "model.dropout=0.0",
    "model.tgt_len=32",
    "model.mem_len=24",
    "optimizer.lr=1e-2",
    "optimizer.average_from=5",
    "train.max_steps=20",
    "train.eval_every=10",
    "checkpoint.every=10",
    "checkpoint.keep_last=1",
    "tracking.mode=disabled",
    "tracking.log_every=1",
]


@pytest.fixture
def old(tmp_path):
    """Copy all that version 0.1 has left."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "old"))


def close_to(number):
    """Expect the same number to the bit where the fixture was made, and to float32 rounding elsewhere."""
    return pytest.approx(number, rel=0 if made_here() else 1e-6, abs=0)


def made_here():
    return EXPECTED["torch"] == torch.__version__ and EXPECTED["machine"] == processor()


def processor():
    """Name the kind of processor, on which the order of sums in a product of matrices depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('vendor_id')} family {facts.get('cpu family')} model {facts.get('model')}"


def logged(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if is_of_old(key)} for line in lines]


def is_of_old(key):
    """Whether version 0.1 logged a metric, and the same at every start."""
    return key not in OTHERS and not key.startswith("memory/")


def tensors(run_dir):
    """Return all tensors of the only checkpoint, by the name of the file and their own."""
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    by_name = {}
    for path in checkpoint.glob("*.safetensors"):
        by_name |= {(path.name, name): tensor for name, tensor in load_file(path).items()}
    return by_name


def test_prepare_makes_the_same_dataset(run, tmp_path):
    """The same text is the same dataset, file by file, whatever version has prepared it."""
    (tmp_path / "text").mkdir()
    draw = random.Random(1)
    for number in range(24):
        names = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(3)]
        lines = [" ".join(draw.choices(["the", "and", "of", *names], k=6)) for _ in range(draw.randint(2, 7))]
        (tmp_path / f"text/{number:02d}.txt").write_text("\n".join(lines) + "\n")
    settings = ["corpus.valid_share=0.1", "corpus.test_share=0.1", "data.sample_tokens=512", "data.shard_samples=4"]
    source = ["corpus=text", "corpus.path=text", "tokenizer=bytes"]
    run("txl_dist.prepare", *source, *settings, "data.dir=dataset", cwd=tmp_path)

    index = json.loads((tmp_path / "dataset/index.json").read_text())
    old = json.loads((FIXTURE / "dataset/index.json").read_text())
    assert index.pop("written_by") == {"txl_dist": txl_dist.__version__}
    assert index.pop("sha256") != old.pop("sha256")
    assert index == old


def test_a_run_continues_as_it_did(run, old):
    """The dataset, the weights, the optimizer, the memories and the steps to be skipped are read."""
    run("txl_dist.train", *OVERRIDES, "run.dir=run", cwd=old)
    lines = logged(old / "run")
    expected = logged(FIXTURE / "finished")
    assert [line["step"] for line in lines] == [*range(1, 21), 20]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == {key: close_to(number) for key, number in wanted.items()}
    actual = tensors(old / "run")
    wanted = tensors(FIXTURE / "finished")
    assert actual.keys() == wanted.keys()
    rtol, atol = (0.0, 0.0) if made_here() else (1e-4, 1e-6)
    for key in wanted:
        torch.testing.assert_close(actual[key], wanted[key], rtol=rtol, atol=atol)
    (manifest,) = (json.loads(path.read_text()) for path in (old / "run").glob("checkpoints/*/checkpoint.json"))
    versions = {"txl_dist": txl_dist.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    assert manifest["state"]["written_by"] == {"ranks": 1, "precision": "fp32"} | versions


def test_a_finished_run_stays_as_it_is(run, old):
    before = {path: path.read_bytes() for path in (old / "finished").glob("checkpoints/*/*")}
    done = run("txl_dist.train", *OVERRIDES, "run.dir=finished", cwd=old)
    assert "step 20/20" not in done.stdout
    assert (old / "finished/metrics.jsonl").read_bytes() == (FIXTURE / "finished/metrics.jsonl").read_bytes()
    assert {path: path.read_bytes() for path in (old / "finished").glob("checkpoints/*/*")} == before


@pytest.mark.parametrize("weights", ["last", "average"])
def test_evaluate_scores_a_run_as_it_did(run, old, weights):
    done = run("txl_dist.evaluate", "run=run", f"average={str(weights == 'average').lower()}", "format=json", cwd=old)
    scored = json.loads(done.stdout)
    expected = EXPECTED["evaluate"][weights]
    numbers = {key: close_to(value) if isinstance(value, float) else value for key, value in expected.items()}
    assert {key: scored[key] for key in expected} == numbers


def test_convert_writes_and_reads_what_it_did(run, old):
    """A run becomes the export of then, and the export a run with the same weights."""
    run("txl_dist.convert", "run=run", "to=export_of_now", cwd=old)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        now, then = (json.loads((old / folder / name).read_text()) for folder in ("export_of_now", "export"))
        assert {key: now[key] for key in then} == then
    run("txl_dist.convert", "from=export", "run=imported", cwd=old)
    weights = load_file(old / "export/model.safetensors")
    for path in (old / "export_of_now/model.safetensors", *old.glob("imported/checkpoints/*/weights-*.safetensors")):
        loaded = load_file(path)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_inspect_finds_an_old_checkpoint_whole(run, old):
    done = run("txl_dist.inspect", "run=run", "verify=true", "format=json", cwd=old)
    assert json.loads(done.stdout)["step"] == 12
