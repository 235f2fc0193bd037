"""The Reformer is the same run under every split and after every restart, reversed in backward or not."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_same_run import Split, check_same
from txl_dist.checkpoint.format import latest

# Weights are so large that attention chooses; the activation has no edge, at which rounding would choose a gradient.
MODEL = [
    "model=reformer",
    "model.n_layer=4",
    "model.d_model=24",
    "model.n_head=2",
    "model.d_head=12",
    "model.d_inner=32",
    "model.n_hashes=2",
    "model.n_buckets=8",
    "model.lsh_chunk_len=8",
    "model.local_chunk_len=8",
    "model.tgt_len=40",
    "model.axial_shape=[8,6]",
    "model.axial_widths=[8,16]",
    "model.ff_chunk_len=16",
    "model.dropatt_lsh=0.1",
    "model.init_std=0.2",
    "model.activation=gelu_tanh",
]
DOCUMENTS = ["data.order=documents", "data.reset_memory=document"]
SPLITS = [
    Split(1, checkpointing=True),
    Split(1, acc=2),
    Split(1, acc=4, checkpointing=True),
    *(Split(2, zero=stage, acc=2, checkpointing=True) for stage in range(4)),
    Split(2, zero=3),
    Split(4, zero=1, checkpointing=True),
    *(Split(pp=2, zero=stage, acc=2, checkpointing=True) for stage in (0, 1)),
    Split(pp=2, zero=1, acc=2),
    Split(pp=4, zero=1, acc=4, checkpointing=True),
    Split(2, 2, zero=1, acc=2, checkpointing=True),
]
MOVES = [
    (Split(2, zero=3, checkpointing=True), Split(1)),
    (Split(1, checkpointing=True), Split(pp=2, zero=1, acc=2, checkpointing=True)),
    (Split(pp=4, zero=1, acc=4, checkpointing=True), Split(2, zero=2, checkpointing=True)),
    (Split(4, zero=1), Split(2, 2, zero=1, acc=2, checkpointing=True)),
]
WITH_DOCUMENTS = [Split(1, checkpointing=True), Split(2, zero=1, acc=2, checkpointing=True)]
PARTS = [Split(2, zero=3, acc=2, checkpointing=True), Split(pp=2, zero=1, acc=2, checkpointing=True)]


@pytest.fixture(scope="module")
def runs(run, dataset, tmp_path_factory):
    """Runs of 20 steps: in one process, under every split, with a change of the split half-way, and in two starts."""
    folder = tmp_path_factory.mktemp("splits")
    often = ["train.max_steps=20", "train.eval_every=10", "checkpoint.every=10", "tracking.log_every=1"]
    given = [f"data.dir={dataset}", "data.num_lanes=8", "optimizer.lr=1e-3", "tracking.mode=disabled", *often]
    first = [("whole", Split(), []), ("documents", Split(), DOCUMENTS)]
    first += [(str(split), split, []) for split in SPLITS]
    first += [(f"documents-{split}", split, DOCUMENTS) for split in WITH_DOCUMENTS]
    first += [(f"{before}-to-{after}", before, ["train.stop_at=10"]) for before, after in MOVES]
    first += [(f"parts-{split}", split, ["train.stop_at=10"]) for split in PARTS]
    second = [(f"{before}-to-{after}", after, []) for before, after in MOVES]
    second += [(f"parts-{split}", split, []) for split in PARTS]
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


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_is_the_same_run(runs, metrics, split):
    check_same(metrics, runs / str(split), runs / "whole")


@pytest.mark.parametrize("split", WITH_DOCUMENTS, ids=str)
def test_every_split_is_the_same_run_of_documents(runs, metrics, split):
    check_same(metrics, runs / f"documents-{split}", runs / "documents")


@pytest.mark.parametrize("before, after", MOVES, ids=[f"{before}-to-{after}" for before, after in MOVES])
def test_a_run_goes_on_under_another_split(runs, metrics, before, after):
    check_same(metrics, runs / f"{before}-to-{after}", runs / "whole")


@pytest.mark.parametrize("split", PARTS, ids=str)
def test_a_run_in_two_starts_is_the_run_in_one(runs, metrics, check_identical, split):
    check_identical(runs / str(split), runs / f"parts-{split}")


def test_nothing_is_remembered(runs):
    assert latest(runs / "whole").tensors("memory") == {}


def test_other_commands_read_it(run, runs):
    """Segments of other lengths, more rounds, and text token by token."""
    losses = []
    for keys in ([], ["model.n_hashes=4"], ["model.hash_draw=1"], ["model.tgt_len=48"], ["model.tgt_len=7"]):
        done = run("txl_dist.evaluate", f"run={runs / 'whole'}", "split=test", "max_tokens=600", "format=json", *keys)
        losses.append(json.loads(done.stdout)["loss"])
    assert len(set(losses)) == 5 and max(losses) < min(losses) * 1.1
    written = run("txl_dist.generate", f"run={runs / 'whole'}", "prompt=abc", "max_tokens=20", "temperature=0").stdout
    assert written.startswith("abc") and len(written) > 5
    scored = json.loads(run("txl_dist.score", f"run={runs / 'whole'}", "text=abc dead", "format=json").stdout)
    assert len(scored["tokens"]) > 1
    for command, keys, words in (
        ("generate", ["prompt=abc", "max_tokens=100"], "model.axial_shape: has 48 positions"),
        ("evaluate", ["model.tgt_len=49"], "there are only 48 positions"),
    ):
        failed = run(f"txl_dist.{command}", f"run={runs / 'whole'}", *keys, expect=2)
        assert words in failed.stderr and "Traceback" not in failed.stderr
