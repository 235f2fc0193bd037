"""A hybrid of the gated delta rule and attention is the same run under every split and after every restart."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.test_same_run import Split, check_same
from txl_dist.checkpoint.format import latest

# A document's first token reads b (q k) v, of which the norm keeps little but the sign where q k is next to 0: with the
# usual norm_eps rounding would be magnified a thousand times.
MODEL = [
    "model=gated_delta_net",
    "model.n_layer=4",
    "model.layers=[delta,attention]",
    "model.d_model=24",
    "model.n_head=2",
    "model.d_head=12",
    "model.d_value=8",
    "model.d_inner=32",
    "model.tgt_len=20",
    "model.mem_len=24",
    "model.init_std=0.2",
    "model.norm_eps=1e-2",
]
DOCUMENTS = ["data.order=documents", "data.reset_memory=document"]
SPLITS = [
    Split(1, acc=2, checkpointing=True),
    Split(2, zero=3, acc=2),
    Split(pp=2, zero=1, acc=2, checkpointing=True),
]
MOVE = (Split(2, zero=3, checkpointing=True), Split(pp=2, zero=1, acc=2))
PARTS = Split(2, zero=3)


@pytest.fixture(scope="module")
def runs(run, dataset, tmp_path_factory):
    """Runs of 20 steps: in one process, under every split, with a change of the split half-way, and in two starts."""
    folder = tmp_path_factory.mktemp("splits")
    often = ["train.max_steps=20", "train.eval_every=10", "checkpoint.every=10", "tracking.log_every=1"]
    given = [f"data.dir={dataset}", "data.num_lanes=8", "optimizer.lr=1e-3", "tracking.mode=disabled", *often]
    first = [("whole", Split(), []), ("documents", Split(), DOCUMENTS)]
    first += [(str(split), split, []) for split in SPLITS]
    first += [("documents-apart", Split(2, zero=1), DOCUMENTS), ("in-one", PARTS, [])]
    first += [("moved", MOVE[0], ["train.stop_at=10"]), ("in-two", PARTS, ["train.stop_at=10"])]
    second = [("moved", MOVE[1], []), ("in-two", PARTS, [])]
    for starts in (first, second):
        for processes in sorted({split.processes for _, split, _ in starts}):
            jobs = [
                [*MODEL, *given, *split.overrides, *more, f"run.dir={folder / name}"]
                for name, split, more in starts
                if split.processes == processes
            ]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            script = Path(__file__).parent / "many_runs.py"
            run(script, str(folder / "jobs.json"), "--no-curves", processes=processes, fresh=True)
    return folder


@pytest.mark.parametrize("name", [*map(str, SPLITS), "moved"])
def test_every_split_is_the_same_run(runs, metrics, name):
    check_same(metrics, runs / name, runs / "whole")


def test_every_split_is_the_same_run_of_documents(runs, metrics):
    check_same(metrics, runs / "documents-apart", runs / "documents")


def test_a_run_in_two_starts_is_the_run_in_one(runs, check_identical):
    check_identical(runs / "in-one", runs / "in-two")


def test_every_state_is_saved_by_its_name(runs):
    saved = latest(runs / "whole").tensors("memory")
    shapes = {(0, ""): (2, 12, 8), (0, ".conv"): (3, 64), (1, ""): (24, 24), (2, ""): (2, 12, 8)}
    for (layer, name), shape in shapes.items():
        assert saved[f"layer.{layer}.lane.7{name}"].shape == torch.Size(shape)
    assert "layer.1.lane.7.conv" not in saved and len(saved) == 8 * (2 + 1 + 2 + 1)


def test_other_commands_read_it(run, runs):
    """Segments and memories of other lengths, and text token by token."""
    losses = []
    for keys in ([], ["model.mem_len=60"], ["model.tgt_len=7"], ["model.tgt_len=130"]):
        done = run("txl_dist.evaluate", f"run={runs / 'whole'}", "split=test", "max_tokens=600", "format=json", *keys)
        losses.append(json.loads(done.stdout)["loss"])
    assert len(set(losses)) == 4 and max(losses) < min(losses) * 1.1
    written = run("txl_dist.generate", f"run={runs / 'whole'}", "prompt=abc", "max_tokens=20", "temperature=0").stdout
    assert written.startswith("abc") and len(written) > 5
    refused = run("txl_dist.evaluate", f"run={runs / 'whole'}", "sliding_window=true", expect=2)
    assert "gated_delta_net cannot read a segment alone" in refused.stderr
