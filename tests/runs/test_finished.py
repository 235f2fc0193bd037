"""RUN_DIR/finished.json says whether a run is finished, whatever has become of its logs."""

import json
import shutil
from pathlib import Path

import pytest

MANY_RUNS = Path(__file__).parents[1] / "distributed/many_runs.py"
STEPS = ["train.max_steps=6", "train.eval_every=3", "checkpoint.every=3"]
MORE_STEPS = [*STEPS, "train.max_steps=8"]


@pytest.fixture(scope="module")
def start(run, small, tmp_path_factory):
    """Start some runs, given as (name, overrides), one after the other; return what they print."""
    folder = tmp_path_factory.mktemp("finished")

    def start(*runs):
        jobs = [[*small, *overrides, f"run.dir={folder / name}"] for name, overrides in runs]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        return run(MANY_RUNS, folder / "jobs.json").stdout

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def no_test_split(run, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "no_test_split"
    shares = ["corpus.valid_share=0.1", "corpus.test_share=0"]
    run("txl_dist.prepare", "corpus=text", "tokenizer=bytes", f"corpus.path={corpus}", f"data.dir={folder}", *shares)
    return f"data.dir={folder}"


@pytest.fixture(scope="module")
def first_starts(start, no_test_split):
    """A finished run; one that was finished and is trained further; one without a test split that is started twice."""
    untested = ("untested", [*STEPS, no_test_split])
    return start(
        ("finished", STEPS),
        ("continued", STEPS),
        ("continued", [*MORE_STEPS, "train.stop_at=7"]),
        untested,
        untested,
    )


def finished(run_dir):
    return json.loads((run_dir / "finished.json").read_text())


def test_the_last_step_and_the_scores_of_the_test_split_are_kept(start, first_starts, metrics):
    (scores,) = [line for line in metrics(start.folder / "finished") if "test/loss" in line]
    expected = {key: value for key, value in scores.items() if key.startswith("test/")}
    assert finished(start.folder / "finished") == {"step": 6, "metrics": expected}


def test_a_run_that_is_trained_further_is_no_longer_finished(start, first_starts):
    assert not (start.folder / "continued/finished.json").exists()


def test_a_run_without_a_test_split_is_finished_after_its_last_step(start, first_starts):
    assert finished(start.folder / "untested") == {"step": 6, "metrics": {}}
    assert first_starts.count(f"{start.folder / 'untested'}: starting;") == 1
    assert f"{start.folder / 'untested'}: resuming" not in first_starts


def forge(path):
    """Add a line to metrics.jsonl as if the run had done its last step and scored its test split."""
    with path.open("a") as file:
        file.write(json.dumps({"step": 8, "tokens": 1024, "test/loss": 1.0}) + "\n")


# What has become of the files of a finished run, and whether it must be trained or scored again.
CHANGES = {
    "metrics removed": (lambda folder: (folder / "metrics.jsonl").unlink(), False),
    "metrics emptied": (lambda folder: (folder / "metrics.jsonl").write_text(""), False),
    "metrics of a higher step": (lambda folder: forge(folder / "metrics.jsonl"), False),
    "written by version 0.1": (lambda folder: (folder / "finished.json").unlink(), False),
    "finished.json damaged": (lambda folder: (folder / "finished.json").write_text('{"step": "6"}'), True),
    "last checkpoint lost": (lambda folder: shutil.rmtree(folder / "checkpoints/step-000000006"), True),
}


@pytest.fixture(scope="module")
def second_starts(start, first_starts):
    for name, (change, _) in CHANGES.items():
        shutil.copytree(start.folder / "finished", start.folder / name)
        change(start.folder / name)
    forge(start.folder / "continued/metrics.jsonl")
    return start(*((name, STEPS) for name in CHANGES), ("continued", MORE_STEPS))


@pytest.mark.parametrize("name", CHANGES)
def test_the_file_alone_decides_whether_a_run_is_finished(start, second_starts, name):
    _, is_resumed = CHANGES[name]
    assert (f"{start.folder / name}: resuming from step" in second_starts) == is_resumed
    if name != "written by version 0.1":
        assert finished(start.folder / name) == finished(start.folder / "finished")


def test_a_damaged_file_is_named(start, second_starts):
    assert f"{start.folder / 'finished.json damaged' / 'finished.json'}: cannot be read (" in second_starts


def test_a_run_that_was_trained_further_is_finished_at_its_new_last_step(start, second_starts, metrics):
    assert f"{start.folder / 'continued'}: resuming from step 7" in second_starts
    lines = metrics(start.folder / "continued")
    assert [line["step"] for line in lines if "test/loss" in line] == [6, 8]
    assert finished(start.folder / "continued")["step"] == 8
    assert finished(start.folder / "continued")["metrics"]["test/loss"] == lines[-1]["test/loss"]
