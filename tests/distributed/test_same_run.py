"""The same run, however it is cut, and wherever it is interrupted."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from txl_dist.engine.checkpoint import newest, steps

HERE = Path(__file__).parent
MODELS = {
    "plain": [],
    "adaptive": ["model.cutoffs=[60,110]", "model.div_val=2", "model.tie_projections=true", "model.same_length=true"],
    "documents": ["data.order=documents", "data.reset_memory=document"],
}


def split(stage, accumulation=1, checkpointing=False, offload="none", precision="fp32"):
    return [
        f"engine.zero_stage={stage}",
        f"engine.gradient_accumulation={accumulation}",
        f"engine.activation_checkpointing={str(checkpointing).lower()}",
        f"engine.offload={offload}",
        f"engine.precision={precision}",
    ]


def name(model, processes, options):
    return "-".join([model, str(processes), *(option.partition("=")[2] for option in options)])


# Each model's first run is what its others are compared with.
RUNS = [
    *(("plain", 1, split(*each)) for each in [(0,), (1,), (1, 4), (2, 2, True), (3, 1, True)]),
    *(("plain", 2, split(stage, *each)) for stage in range(4) for each in product((1, 2), (False, True))),
    *(("plain", 2, split(stage, offload="optimizer")) for stage in (1, 2, 3)),
    ("plain", 2, split(3, offload="parameters")),
    *((model, 1, split(0)) for model in ("adaptive", "documents")),
    *((model, 2, split(stage, 2)) for model in ("adaptive", "documents") for stage in (1, 3)),
    *(("plain", 2, split(stage, precision="bf16")) for stage in (1, 2, 3)),
]
REFERENCE = {model: name(model, 1, split(0)) for model in MODELS}
FP32 = [each for each in RUNS if split(0)[-1] in each[2]]
DROPOUT = ["model.dropout=0.1", "model.dropatt=0.1"]
MOVES = {"one-to-two": (1, split(1), 2, split(2, 2)), "two-to-one": (2, split(3), 1, split(0))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run, small):
    """20 steps under every split; with dropout in one go and in two starts; and moved to another split half-way."""
    folder = tmp_path_factory.mktemp("runs")
    stop = ["train.stop_at=10"]

    def start(processes, jobs):
        told = folder / "jobs.json"
        told.write_text(json.dumps([[*small, f"run.dir={folder / where}", *extra] for where, extra in jobs]))
        run(HERE / "many_runs.py", str(told), processes=processes)

    def whole(processes):
        return [(name(*each), [*MODELS[each[0]], *each[2]]) for each in RUNS if each[1] == processes]

    def moving(processes, half):
        old = [(where, [*move[1], *stop]) for where, move in MOVES.items() if move[0] == processes]
        return old if half == 1 else [(where, move[3]) for where, move in MOVES.items() if move[2] == processes]

    start(1, whole(1) + moving(1, 1))
    start(
        2,
        whole(2)
        + [(f"whole/zero{stage}", [*split(stage), *DROPOUT]) for stage in range(4)]
        + [(f"parts/zero{stage}", [*split(stage), *DROPOUT, *stop]) for stage in range(4)]
        + moving(2, 1),
    )
    assert all(steps(folder / where) == [10] for where in [*MOVES, *(f"parts/zero{stage}" for stage in range(4))])
    start(2, [(f"parts/zero{stage}", [*split(stage), *DROPOUT]) for stage in range(4)] + moving(2, 2))
    start(1, moving(1, 2))
    return folder


def losses(metrics, run_dir):
    return [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]


def check_same(metrics, run_dir, reference):
    assert losses(metrics, run_dir) == pytest.approx(losses(metrics, reference), rel=1e-5)
    assert len(losses(metrics, run_dir)) == 20
    for key in ("valid/loss", "test/loss", "train/grad_norm"):
        mine, theirs = ([line[key] for line in metrics(each) if key in line] for each in (run_dir, reference))
        assert mine == pytest.approx(theirs, rel=1e-4), key
    for kind in ("weights", "memory"):
        mine, theirs = (newest(each).tensors(kind) for each in (run_dir, reference))
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():  # memories by (layer, lane): the right lane, not just the same set
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model, processes, options", FP32, ids=[name(*each) for each in FP32])
def test_every_split_is_the_same_run(runs, metrics, model, processes, options):
    check_same(metrics, runs / name(model, processes, options), runs / REFERENCE[model])


@pytest.mark.parametrize("where", MOVES)
def test_a_run_goes_on_under_another_split(runs, metrics, where):
    check_same(metrics, runs / where, runs / REFERENCE["plain"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(runs, metrics, stage):
    """bf16 has 8 bits: losses may differ in the third digit, and do (else it was not bf16)."""
    mine = losses(metrics, runs / name("plain", 2, split(stage, precision="bf16")))
    theirs = losses(metrics, runs / REFERENCE["plain"])
    assert mine == pytest.approx(theirs, rel=1e-2) and mine != pytest.approx(theirs, rel=1e-6)


def test_losses_are_those_of_old(runs, metrics):
    """A change of the numbers, however small, is to be noticed; another processor rounds otherwise."""
    kept = json.loads((HERE / "exact_losses.json").read_text())
    assert losses(metrics, runs / REFERENCE["plain"]) == pytest.approx(kept, rel=1e-5)


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
