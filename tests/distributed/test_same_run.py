"""The same run, however it is cut, and wherever it is interrupted."""

import json
from pathlib import Path

import pytest
import torch

from txl_dist.engine.checkpoint import newest, steps

HERE = Path(__file__).parent
SPLITS = [(stage, accumulation, again) for stage in (0, 1, 2, 3) for accumulation in (1, 2) for again in (False, True)]
ALONE = [(0, 1, False), (1, 1, False), (1, 4, False), (2, 2, True), (3, 1, True)]


def name(stage, accumulation, again):
    return f"zero{stage}-accumulation{accumulation}" + ("-checkpointing" if again else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run, small):
    """20 steps under every split, on 1 and on 2 processes; and, with dropout, 20 steps in one go and in two starts."""
    folder = tmp_path_factory.mktemp("runs")

    def start(label, processes, jobs):
        told = folder / f"{label}.json"
        told.write_text(json.dumps([[*small, f"run.dir={folder / where}", *extra] for where, extra in jobs]))
        run(HERE / "many_runs.py", str(told), processes=processes)

    def split(stage, accumulation, again):
        return [
            f"engine.zero_stage={stage}",
            f"engine.gradient_accumulation={accumulation}",
            f"engine.activation_checkpointing={str(again).lower()}",
        ]

    def dropout(stage):
        return [f"engine.zero_stage={stage}", "model.dropout=0.1", "model.dropatt=0.1"]

    start("alone", 1, [(f"1/{name(*each)}", split(*each)) for each in ALONE])
    start(
        "two",
        2,
        [(f"2/{name(*each)}", split(*each)) for each in SPLITS]
        + [(f"whole/zero{stage}", dropout(stage)) for stage in range(4)]
        + [(f"parts/zero{stage}", [*dropout(stage), "train.stop_at=10"]) for stage in range(4)],
    )
    for stage in range(4):
        assert steps(folder / f"parts/zero{stage}") == [10]
    start("again", 2, [(f"parts/zero{stage}", dropout(stage)) for stage in range(4)])
    return folder


def losses(metrics, run_dir):
    return [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]


@pytest.mark.parametrize("where", [f"1/{name(*each)}" for each in ALONE] + [f"2/{name(*each)}" for each in SPLITS])
def test_every_split_is_the_same_run(runs, metrics, where):
    reference, run_dir = runs / f"1/{name(0, 1, False)}", runs / where
    assert losses(metrics, run_dir) == pytest.approx(losses(metrics, reference), rel=1e-5)
    assert len(losses(metrics, run_dir)) == 20
    for key in ("valid/loss", "test/loss", "train/grad_norm"):
        told = [[line[key] for line in metrics(each) if key in line] for each in (run_dir, reference)]
        assert told[0] == pytest.approx(told[1], rel=1e-4), key
    for kind in ("weights", "memory"):
        mine, theirs = (newest(each).tensors(kind) for each in (run_dir, reference))
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():  # memories by (layer, lane): the right lane, not just the same set
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_old(runs, metrics):
    """A change of the numbers, however small, is to be noticed; another processor rounds otherwise."""
    kept = json.loads((HERE / "exact_losses.json").read_text())
    assert losses(metrics, runs / f"1/{name(0, 1, False)}") == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_a_run_in_two_starts_is_the_run_in_one(runs, metrics, stage):
    whole, parts = runs / f"whole/zero{stage}", runs / f"parts/zero{stage}"
    for key in ("train/loss", "train/lr", "train/grad_norm", "valid/loss", "test/loss"):
        told = [[line[key] for line in metrics(each) if key in line] for each in (whole, parts)]
        assert told[0] == told[1], key
    assert [line["step"] for line in metrics(parts) if "train/loss" in line] == list(range(1, 21))
    for kind in ("weights", "optimizer", "memory"):
        one, two = newest(whole).tensors(kind), newest(parts).tensors(kind)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), kind
    assert newest(whole).state["optimizer"] == newest(parts).state["optimizer"]
