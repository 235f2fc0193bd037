"""What is written in the background is what training had when it was copied; and all ranks learn what went wrong."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import without_torchrun
from txl_dist.checkpoint.format import directory, open_checkpoint, steps

HERE = Path(__file__).parent
EVERY = ["checkpoint.every=10", "train.eval_every=7"]

SPLITS = {
    "zero 0": (1, ["engine.zero_stage=0", "optimizer.average_from=5"]),
    "zero 1": (1, []),
    "zero 2 offload": (1, ["engine.zero_stage=2", "engine.offload=optimizer"]),
    "zero 3 offload": (2, ["engine.zero_stage=3", "engine.offload=parameters"]),
    "2 stages": (2, ["engine.pipeline_stages=2", "engine.gradient_accumulation=2"]),
    "2 stages zero 0": (2, ["engine.pipeline_stages=2", "engine.gradient_accumulation=2", "engine.zero_stage=0"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run, small):
    """Run each split twice: written at once, up to the checkpoint, and written late, while training continues."""
    folder = tmp_path_factory.mktemp("late")
    for processes in (1, 2):
        chosen = {name: options for name, (n, options) in SPLITS.items() if n == processes}
        for script, kind, more in (
            ("many_runs.py", "at once", ["train.stop_at=10"]),
            ("late_saves.py", "late", []),
        ):
            jobs = [
                [*small, *EVERY, *options, *more, f"run.dir={folder / kind / name}"] for name, options in chosen.items()
            ]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            run(HERE / script, str(folder / "jobs.json"), processes=processes)
    return folder


@pytest.mark.parametrize("name", SPLITS)
def test_a_checkpoint_holds_what_was_there_when_it_was_due(runs, name):
    """Nothing that training changes afterwards, in place, gets into it."""
    late, at_once = (open_checkpoint(directory(runs / kind / name, 10)) for kind in ("late", "at once"))
    assert steps(runs / "late" / name) == [10, 20] and not late.validate()
    for kind in ("weights", "optimizer", "memory"):
        one = late.tensors(kind)
        two = at_once.tensors(kind)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), kind
    assert late.state["optimizer"] == at_once.state["optimizer"]


def test_the_loss_of_a_checkpoint_is_that_of_its_very_step(runs, metrics):
    """Evaluated at 7, 14 and 20, saved at 10 and 20."""
    run_dir = runs / "late" / "2 stages"
    assert open_checkpoint(directory(run_dir, 10)).valid_loss is None
    lines = [line for line in metrics(run_dir) if "valid/loss" in line]
    assert [line["step"] for line in lines] == [7, 14, 20]
    assert open_checkpoint(directory(run_dir, 20)).valid_loss == lines[-1]["valid/loss"]


@pytest.fixture
def small_disk(tmp_path):
    """A run directory whose checkpoints have room for one, and no more; `df` is in the test's output."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_full_disk_ends_the_run_with_one_message_and_the_run_goes_on_with_more_room(
    small_disk, run, small, metrics, runs, processes
):
    split = ["engine.zero_stage=2"] if processes else []
    job = [*small, *split, "checkpoint.every=5", f"run.dir={small_disk.parent}"]
    done = run("txl_dist.train", *job, processes=processes, expect=1)
    assert without_torchrun(done.stderr).count("Stopped:") == 1 and "/txl_dist/" not in done.stderr  # no stack of ours
    assert f"{small_disk}/.step-000000010.partial" in done.stderr and "No space left" in done.stderr
    assert "the same command resumes from step 5" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["step-000000005"]
    assert metrics(small_disk.parent)[-1]["step"] in range(
        10, 16
    )  # known at a step's end, at the latest at the next save
    subprocess.run(["mount", "-o", "remount,size=5m", small_disk], check=True)
    again = run("txl_dist.train", *job, processes=processes)
    assert "resuming from step 5;" in again.stdout and steps(small_disk.parent) == [15, 20]
    expected = [line["train/loss"] for line in metrics(runs / "late" / "zero 1") if "train/loss" in line]
    losses = [line["train/loss"] for line in metrics(small_disk.parent) if "train/loss" in line]
    assert losses == pytest.approx(expected, rel=1e-5) and (processes or losses == expected)
