"""An architecture of another package, installed beside this one: trained, split, resumed, evaluated as one of ours."""

import os
from pathlib import Path

import pytest
import torch

from txl_dist.checkpoint.format import latest

CHOSEN = ["hydra.searchpath=[pkg://other_models.conf]", "model=recurrent", "model.dropout=0.2"]
SPLITS = {
    "zero-3": (2, ["engine.zero_stage=3"]),
    "stages": (2, ["engine.pipeline_stages=2"]),
    "both": (
        4,
        ["engine.pipeline_stages=2", "engine.gradient_accumulation=2", "engine.activation_checkpointing=true"],
    ),
}
HALF = ["train.stop_at=10"]


@pytest.fixture(scope="module")
def command(run, other_package):
    """Run a command of ours where the package is installed."""

    def command(module, *overrides, **options):
        repo = Path(__file__).parents[2]
        return run(module, *overrides, PYTHONPATH=f"{repo}{os.pathsep}{other_package}", fresh=True, **options)

    return command


@pytest.fixture(scope="module")
def train(command, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    size = ["data.num_lanes=8", "optimizer.lr=3e-3", "train.max_steps=20", "train.eval_every=10"]
    often = ["checkpoint.every=10", "tracking.log_every=1", "tracking.mode=disabled"]

    def train(name, processes=1, *more, **options):
        given = [*CHOSEN, f"data.dir={dataset}", *size, *often, f"run.dir={folder / name}", *more]
        command("txl_dist.train", *given, processes=processes if processes > 1 else None, **options)
        return folder / name

    return train


def test_its_values_are_found_without_a_warning(command):
    done = command("txl_dist.train", *CHOSEN, "--cfg", "job")
    assert "name: recurrent" in done.stdout and not done.stderr


@pytest.fixture(scope="module")
def whole(train):
    return train("whole")


def check_same(metrics, run_dir, reference):
    for key in ("train/loss", "train/grad_norm", "valid/loss", "test/loss"):
        actual, expected = ([line[key] for line in metrics(path) if key in line] for path in (run_dir, reference))
        assert actual and actual == pytest.approx(expected, rel=1e-5), key
    for kind in ("weights", "memory"):
        actual, expected = (latest(path).tensors(kind) for path in (run_dir, reference))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert (actual[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("split", ["zero-3", "both"])
def test_every_split_is_the_same_run(train, whole, metrics, split):
    processes, overrides = SPLITS[split]
    check_same(metrics, train(split, processes, *overrides), whole)


def test_gradients_flow_through_several_segments_under_every_split(train, metrics):
    """A step of three segments, also where each is recomputed, and where the run goes on under another split."""
    three = ["train.tbptt=3", "model.tgt_len=6"]
    whole = train("three", 1, *three)
    assert metrics(whole)[0]["tokens"] == 8 * 3 * 6
    split = ["engine.zero_stage=3", "engine.gradient_accumulation=2", "engine.activation_checkpointing=true"]
    check_same(metrics, train("three-split", 2, *three, *split), whole)
    train("three-moved", 2, *three, "engine.zero_stage=2", *HALF)
    check_same(metrics, train("three-moved", 1, *three), whole)


def test_a_run_goes_on_under_another_split(train, whole, metrics):
    (before, first), (after, second) = SPLITS["zero-3"], SPLITS["stages"]
    assert latest(train("moved", before, *first, *HALF)).step == 10
    check_same(metrics, train("moved", after, *second), whole)


def test_every_state_is_saved_under_its_name(whole):
    names = {f"layer.{layer}.lane.{lane}{end}" for layer in range(2) for lane in range(8) for end in ("", ".before")}
    memory = latest(whole).tensors("memory")
    assert memory.keys() == names and all(torch.count_nonzero(value) for value in memory.values())


def test_other_commands_know_it(command, whole, metrics):
    result = command("txl_dist.evaluate", f"run={whole}", "split=test", "num_lanes=8").stdout
    loss = next(line["test/loss"] for line in metrics(whole) if "test/loss" in line)
    assert f"{loss:.4f}" in result and "mem_len" not in result
    assert command("txl_dist.generate", f"run={whole}", "prompt=the ", "max_tokens=5").stdout.startswith("the ")
    assert "layer x lane" in command("txl_dist.inspect", f"run={whole}").stdout
    recl = command("txl_dist.recl", f"run={whole}", "split=test", "step=8", "max_context=16", "positions=9")
    assert str(whole) in recl.stdout


def test_what_it_cannot_do_is_said(command, whole, tmp_path):
    for module, overrides, words in [
        ("evaluate", ["sliding_window=true"], "sliding_window=true: recurrent cannot read a segment alone"),
        ("evaluate", ["model.mem_len=9"], "model.mem_len: there is no such key"),
        ("convert", [f"to={tmp_path / 'out'}"], "holds a model of recurrent, for which there is no exported form"),
    ]:
        assert words in command(f"txl_dist.{module}", f"run={whole}", *overrides, expect=2).stderr


def test_without_the_package_its_name_is_unknown(run, whole):
    done = run("txl_dist.evaluate", f"run={whole}", expect=2, fresh=True)
    assert (
        "model.name=recurrent: is not an architecture that is installed here; these are: gated_delta_net, reformer"
        in done.stderr
    )
