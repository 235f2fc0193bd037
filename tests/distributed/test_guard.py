"""Faults while a run trains: bad steps, processes that hang or are killed, memory that is used up."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import without_torchrun
from tests.tracking.services.wandb_files import read_starts
from txl_dist.checkpoint.format import directory, latest, open_checkpoint, steps
from txl_dist.tracking.events import read_events

FAULTY = Path(__file__).parent / "faulty_runs.py"
FAULTS = {5: "loss", 8: "gradient"}
SPLITS = {
    "zero-0": ["engine.zero_stage=0", "engine.gradient_accumulation=2"],
    "zero-1": ["engine.zero_stage=1"],
    "zero-2": ["engine.zero_stage=2", "engine.gradient_accumulation=2"],
    "zero-3": ["engine.zero_stage=3"],
    "offload": ["engine.zero_stage=2", "engine.offload=optimizer"],
    "pipeline-0": ["engine.zero_stage=0", "engine.pipeline_stages=2", "engine.gradient_accumulation=2"],
    "pipeline-1": ["engine.zero_stage=1", "engine.pipeline_stages=2", "engine.gradient_accumulation=2"],
}
ROLLED_BACK = ["zero-1", "zero-3", "pipeline-1"]
SKIP, ROLLBACK = ["guard.on_bad_step=skip"], ["guard.on_bad_step=rollback"]


@pytest.fixture(scope="module")
def train(run, small, tmp_path_factory):
    """Runs of 12 steps with faults, several in one process group: (run directory, overrides, faults) each."""
    folder = tmp_path_factory.mktemp("guard")
    short = [*small, "train.max_steps=12", "train.eval_every=100", "checkpoint.keep_last=20"]

    def train(*runs, processes=None, expect=0):
        file = folder / "jobs.json"
        jobs = [([*short, f"run.dir={folder / name}", *more], faults) for name, more, faults in runs]
        file.write_text(json.dumps(jobs))
        return run(FAULTY, str(file), processes=processes, expect=expect)

    train.folder = folder
    return train


@pytest.fixture(scope="module")
def skipped(train):
    """Runs that skip the faults (in one process, and under each split in two), with all their checkpoints.

    And runs that were rolled back (back-*), beside runs that knew the bad steps beforehand (known-*). More steps than
    guard.max_bad_steps that are to be skipped later are not a reason to stop.
    """
    every = ["checkpoint.every=1"]
    now_and_then = ["checkpoint.every=3", "tracking.log_every=4"]
    (train.folder / "one").mkdir()
    later = [{"step": step, "why": "later"} for step in range(50, 70)]
    (train.folder / "one/skipped_steps.json").write_text(json.dumps(later))
    for name in ROLLED_BACK:
        (train.folder / f"known-{name}").mkdir()
        known = [{"step": step, "why": "known"} for step in FAULTS]
        (train.folder / f"known-{name}/skipped_steps.json").write_text(json.dumps(known))
    train(("one", [*SPLITS["zero-0"], *SKIP, *every], FAULTS))
    train(
        *((name, [*split, *SKIP, *every], FAULTS) for name, split in SPLITS.items()),
        *((f"back-{name}", [*SPLITS[name], *ROLLBACK, *now_and_then], FAULTS) for name in ROLLED_BACK),
        *((f"known-{name}", [*SPLITS[name], *now_and_then], FAULTS) for name in ROLLED_BACK),
        processes=2,
    )
    return train.folder


def losses(metrics, run_dir):
    return {line["step"]: line["train/loss"] for line in metrics(run_dir) if "train/loss" in line}


def equal(one, two, kinds=("weights", "optimizer", "memory")):
    tensors = [(one.tensors(kind), two.tensors(kind)) for kind in kinds]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in tensors)


@pytest.mark.parametrize("name", ["one", *SPLITS])
def test_a_skipped_step_changes_nothing_but_the_memory(skipped, metrics, name):
    at = {step: open_checkpoint(directory(skipped / name, step)) for step in steps(skipped / name)}
    for step in FAULTS:
        assert equal(at[step - 1], at[step], ("weights", "optimizer"))
        assert at[step - 1].state["optimizer"] == at[step].state["optimizer"]
        assert not equal(at[step], at[step + 1], ("weights",))
    assert all(tensor.isfinite().all() for tensor in at[12].tensors("memory").values())
    # The lane that has read nan keeps what it remembered before; the others do not. After 24 tokens none has any of it.
    before, after = at[4].tensors("memory"), at[5].tensors("memory")
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert kept == {"layer.0.lane.0", "layer.1.lane.0"}
    lines = metrics(skipped / name)
    assert [line.get("train/skipped_steps", 0) for line in lines if "train/loss" in line] == [0] * 4 + [1] * 3 + [2] * 5
    assert [line["tokens"] for line in lines if "train/loss" in line] == [128 * step for step in range(1, 13)]


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_skips_the_same(skipped, metrics, name):
    split = losses(metrics, skipped / name)
    one = losses(metrics, skipped / "one")
    del split[5], one[5]  # nan
    assert split == pytest.approx(one, rel=1e-5)
    for key, value in latest(skipped / "one").tensors("weights").items():
        assert (latest(skipped / name).tensors("weights")[key] - value).norm() <= 1e-5 * value.norm(), key


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_a_run_that_was_rolled_back_is_the_run_that_knew_the_bad_steps(skipped, metrics, name):
    """To the bit: at step 6 it finds out about step 5, at 8 about 8, and resumes from steps 3 and 6."""
    back = skipped / f"back-{name}"
    known = skipped / f"known-{name}"
    assert steps(back) == steps(known) == [3, 6, 9, 12]
    for step in steps(back):
        assert equal(open_checkpoint(directory(back, step)), open_checkpoint(directory(known, step))), step
    assert [entry["step"] for entry in json.loads((back / "skipped_steps.json").read_text())] == list(FAULTS)
    assert losses(metrics, back) == losses(metrics, known)
    assert [line["step"] for line in metrics(back) if "train/loss" in line] == [4, 8, 12]


def test_what_was_skipped_is_skipped_again_after_a_restart(train):
    """The gradient was wrong once, and the process was killed before the next checkpoint."""
    often = ["checkpoint.every=4", *SKIP]
    train(("whole", often, {5: "gradient"}), ("parts", [*often, "train.stop_at=7"], {5: "gradient"}))
    parts = train.folder / "parts"
    (parts / "checkpoints/step-000000007").rename(parts / "away")
    train(("parts", often, {}))
    assert equal(latest(train.folder / "whole"), latest(parts))


def test_a_run_may_begin_with_skipped_steps(train, metrics):
    """A checkpoint of nothing else has no optimizer states under ZeRO 0; a run is resumed from it all the same.

    The file has the name of version 0.1.
    """
    runs = {"begun": [], "begun-0": ["engine.zero_stage=0"], "begun-1": ["engine.zero_stage=1"]}
    for name in runs:
        (train.folder / name).mkdir()
        (train.folder / name / "passed_steps.json").write_text('[{"step": 1, "why": "x"}, {"step": 2, "why": "x"}]')
    options = ["checkpoint.every=1", "optimizer.average_from=2", "engine.zero_stage=0"]
    train(*((name, [*options, *(["train.stop_at=2"] if more else [])], {}) for name, more in runs.items()))
    train(*((name, [*options, *more], {}) for name, more in runs.items() if more))
    assert equal(latest(train.folder / "begun"), latest(train.folder / "begun-0"))
    one, other = (losses(metrics, train.folder / name) for name in ("begun", "begun-1"))
    assert len(one) == 12 and other == pytest.approx(one, rel=1e-6)


def test_skipped_steps_that_cannot_be_read_or_written_are_reported_once(train, run, small, tmp_path):
    (tmp_path / "skipped_steps.json").write_text('[{"step": 12}]')
    done = run("txl_dist.train", *small, f"run.dir={tmp_path}", processes=2, expect=1)
    message = f"{tmp_path}/skipped_steps.json: at [0].why: Field required"
    assert without_torchrun(done.stderr).count(message) == 1
    assert done.stderr.count("exitcode  : 2") == 2 and list(tmp_path.iterdir()) == [tmp_path / "skipped_steps.json"]
    (train.folder / "unwritable/.partial-skipped_steps.json").mkdir(parents=True)
    done = train(("unwritable", [*SKIP, "engine.zero_stage=1"], {5: "gradient"}), processes=2, expect=1)
    assert without_torchrun(done.stderr).count("skipped_steps.json: cannot be written: ") == 1
    assert "Is a directory" in done.stderr
    assert done.stderr.count("exitcode  : 1") == 2


@pytest.mark.parametrize("fault, why", [("loss", "the loss is nan"), ("gradient", "the gradient is not finite")])
def test_a_bad_step_ends_the_run_before_it_reaches_a_checkpoint(train, fault, why):
    """It is found when the checkpoint of step 6 is due, which is sooner than the log's step."""
    where = f"stopped-{fault}"
    late = ["tracking.log_every=10", "checkpoint.every=3", "engine.zero_stage=0"]
    done = train((where, late, {5: fault}), processes=2, expect=1)
    assert without_torchrun(done.stderr).count("step 5:") == 1 and why in done.stderr
    assert ("lane 0, loss nan: reads document 0 of train from its token 64 on" in done.stderr) == (fault == "loss")
    assert "resumes from step 3" in done.stderr and "Traceback" not in done.stderr.partition("torch/distributed")[0]
    assert steps(train.folder / where) == [3] and done.stderr.count("exitcode  : 1") == 2


def test_a_run_that_diverges_is_not_rolled_back_for_ever(train):
    wild = ["optimizer.lr=1e30", "optimizer.clip=0.0", "schedule.warmup_steps=0", "guard.max_bad_steps=2"]
    done = train(("wild", [*wild, *ROLLBACK, "engine.zero_stage=0"], {}), expect=1)
    assert done.stdout.count("Training resumes from the beginning") == 2
    assert "step 4: the loss is nan" in done.stderr and "guard.max_bad_steps=2" in done.stderr


@pytest.fixture(scope="module")
def spoilt(run, tmp_path_factory):
    """64 documents of one length, so that lane 3 of 8 begins with document 24; the next one begins with noise."""
    folder, rng = tmp_path_factory.mktemp("spoilt"), random.Random(1)
    for number in range(64):
        text = "".join(rng.choices("abcd ", k=400))
        noise = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=32)) if number == 25 else ""
        (folder / f"{number:03d}.txt").write_text(noise + text[len(noise) :])
    (folder / "valid.text").write_text("abcd " * 100)
    keys = [f"corpus.train={folder}/*.txt", f"corpus.valid={folder / 'valid.text'}", f"data.dir={folder / 'data'}"]
    run("txl_dist.prepare", "corpus=text", "tokenizer=bytes", *keys, "data.sample_tokens=256")
    return folder / "data"


def test_bad_data_are_a_spike(train, spoilt, metrics):
    more = [f"data.dir={spoilt}", "train.max_steps=40", "guard.spike=8", "guard.window=10", "optimizer.lr=1e-2"]
    done = train(
        ("spike-skip", [*more, *SKIP], {}),
        ("spike-back", [*more, *ROLLBACK, "tracking.log_every=5"], {}),
        ("spike-none", [*more, "guard.spike=null"], {}),
    )
    first = 401 // 16 + 1  # the step in which lane 3 reads the first token of document 25; two have most of the noise
    skip, back = (
        json.loads((train.folder / name / "skipped_steps.json").read_text()) for name in ("spike-skip", "spike-back")
    )
    assert skip == back and [entry["step"] for entry in skip] == [first, first + 1]
    assert equal(latest(train.folder / "spike-skip"), latest(train.folder / "spike-back"))
    report = re.search(rf"step {first}: the loss is ([\d.]+), above .* guard.spike=8 .*\n(.*)\n", done.stdout)
    assert float(report[1]) == pytest.approx(losses(metrics, train.folder / "spike-skip")[first], abs=1e-4)
    assert re.match(r"lane 3, loss [\d.]+: reads document 24 of train from its token 400 on, to document 25", report[2])
    assert not (train.folder / "spike-none/skipped_steps.json").exists()


def test_a_lack_of_memory_is_reported_with_what_takes_less(train):
    done = train(("memory", ["engine.gradient_accumulation=2"], {2: "out of memory"}), processes=2, expect=1)
    ours = done.stderr.split("torch/distributed")[0]
    assert "rank 0 has no memory left" in ours and "Tried to allocate 2.00 GiB" in ours
    assert "engine.gradient_accumulation than 2" in ours and "activation_checkpointing=true" in ours


@pytest.fixture
def start(train, small):
    """Start two processes that train for ever; return torchrun, its two children, and a file of their output."""
    started = []

    def start(name, *more):
        run_dir = train.folder / name
        file = train.folder / f"{name}.json"
        # In the first run the libraries are imported, which may take its time.
        jobs = [([*small, f"run.dir={run_dir}-before", "train.max_steps=1", "train.eval_every=100"], {})]
        jobs += [([*small, f"run.dir={run_dir}", "train.max_steps=1000000", "train.eval_every=1000000", *more], {})]
        file.write_text(json.dumps(jobs))
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(FAULTY), str(file)]
        output = file.with_suffix(".txt")
        with output.open("w") as stream:
            torchrun = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream)
        started.append(torchrun)
        until = time.monotonic() + 300
        while not re.search(r"^step +20/1000000", output.read_text(), re.MULTILINE):
            assert torchrun.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.2)
        return torchrun, psutil.Process(torchrun.pid).children(), output

    yield start
    for torchrun in started:
        for process in psutil.Process(torchrun.pid).children() if torchrun.poll() is None else []:
            process.kill()
        torchrun.kill()
        torchrun.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_ends_the_run_with_all_stacks(start, rank):
    keys = ["guard.stall_timeout=10", "checkpoint.every=1000000", "tracking.mode=offline"]
    torchrun, processes, output = start(f"stopped-{rank}", *keys)
    stopped = next(process for process in processes if process.environ()["RANK"] == str(rank))
    began = time.monotonic()
    stopped.suspend()
    assert torchrun.wait(timeout=200) != 0
    assert time.monotonic() - began < 60  # 10, and some for a busy machine
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
    heads = re.split(r"--- rank (\d) \(process (\d+) on .*\) stands here:\n", output.read_text())
    assert "Nothing was done for" in heads[0] and "after step" in heads[0]
    assert [heads[1], heads[4]] == ["0", "1"] and {heads[2], heads[5]} == {str(process.pid) for process in processes}
    for stacks in (heads[3], heads[6]):
        assert re.search(r'txl_dist/training/loop.py", line \d+ in loop', stacks), stacks
    if rank != 0:  # rank zero, which could do so, has told the trackers
        run_dir = output.with_suffix("")
        end = read_events(str(run_dir))[-1]
        assert (end["event"], end["reason"]) == ("end", "failed")
        assert end["detail"] in heads[0].splitlines() and end["detail"].startswith("Nothing was done for")
        (part,) = read_starts(run_dir)
        assert [(alert.title, alert.level) for alert in part["alert"]] == [("Training has failed", "ERROR")]
        assert end["detail"] in part["alert"][0].text and part["exit"] == 1


def test_a_process_that_is_killed_ends_the_others(start):
    torchrun, processes, output = start("killed", "checkpoint.every=1000000")
    processes[1].send_signal(signal.SIGKILL)
    assert torchrun.wait(timeout=200) != 0
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
    assert "Signal 9 (SIGKILL) received by PID" in output.read_text()
