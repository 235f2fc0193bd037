"""Permutation language modelling is the same run under every split and after every restart."""

import json
import random
from pathlib import Path

import pytest

from tests.distributed.test_same_run import Split, check_same

LANES, REUSED = 8, 16
MODEL = [
    "model=xlnet",
    "model.n_layer=2",
    "model.d_model=32",
    "model.n_head=2",
    "model.d_head=16",
    "model.d_inner=64",
    "model.tgt_len=40",
    f"model.reuse_len={REUSED}",
    "model.mem_len=24",
]
OBJECTIVE = ["objective=permutation_lm", "objective.num_predict=9", "objective.perm_size=8"]


@pytest.fixture(scope="module")
def sentences(run, tmp_path_factory):
    """Documents of sentences, prepared with XLNet's tokenizer."""
    folder = tmp_path_factory.mktemp("sentences")
    draw = random.Random(1)
    for split, documents in (("train", 150), ("valid", 12), ("test", 12)):
        lines = []
        for _ in range(documents):
            for _ in range(draw.randint(2, 6)):
                lines.append(" ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(7)) + " .")
            lines.append("")
        (folder / f"{split}.txt").write_text("\n".join(lines))
    texts = [f"corpus.{split}={folder}/{split}.txt" for split in ("train", "valid", "test")]
    cut = ["data.sample_tokens=256", "data.shard_samples=16", "tokenizer.vocab_size=300"]
    options = ["corpus=text", "corpus.document=blank_line", "tokenizer=xlnet"]
    run("txl_dist.prepare", *options, *texts, *cut, f"data.dir={folder}/data")
    return folder / "data"


@pytest.fixture(scope="module")
def train(run, sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    often = ["train.max_steps=8", "train.eval_every=4", "checkpoint.every=4", "tracking.log_every=1"]
    given = [f"data.dir={sentences}", f"data.num_lanes={LANES}", "optimizer.lr=3e-3", "tracking.mode=disabled", *often]

    def train(name, *more, processes=None, objective=OBJECTIVE, expect=0):
        options = [*MODEL, *objective, *given, f"run.dir={folder / name}", *more]
        done = run("txl_dist.train", *options, processes=processes, expect=expect)
        return done if expect else (folder / name, done)

    return train


@pytest.fixture(scope="module")
def whole(train):
    return train("whole")


def test_a_run_logs_the_loss_per_predicted_token(whole, metrics):
    run_dir, done = whole
    lines = metrics(run_dir)
    assert [line["tokens"] for line in lines[:3]] == [LANES * REUSED * step for step in (1, 2, 3)]
    evaluated = [key for key in lines[-1] if key.startswith("test/")]
    assert evaluated == ["test/loss", "test/perplexity"]
    assert f"{LANES} lanes of {REUSED} tokens per step" in done.stderr + done.stdout
    assert "test loss" in done.stdout and "nats per predicted token" in done.stdout


# With every kind of dropout, as the model has it by default.
SPLITS = [
    *(Split(1, acc=acc, checkpointing=acc == 4) for acc in (2, 4)),
    *(Split(2, zero=stage, acc=2) for stage in range(4)),
    Split(2, zero=3, checkpointing=True),
    Split(2, zero=2, offload="optimizer"),
    Split(2, zero=3, offload="parameters"),
    Split(4, zero=1),
    *(Split(pp=2, zero=stage, acc=2) for stage in (0, 1)),
    Split(pp=2, zero=1, acc=4, checkpointing=True),
    Split(pp=4, zero=1, acc=4),
    Split(2, 2, zero=1, acc=2),
]
MOVES = [
    (Split(2, zero=3), Split(1)),
    (Split(1), Split(pp=2, zero=1, acc=2)),
    (Split(pp=4, zero=1, acc=4), Split(2, zero=2)),
    (Split(4, zero=1), Split(2, 2, zero=1, acc=2, checkpointing=True)),
]


@pytest.fixture(scope="module")
def runs(run, sentences, tmp_path_factory):
    """One run of 20 steps in one process, under every split, and with a change of the split half-way."""
    folder = tmp_path_factory.mktemp("splits")
    often = ["train.max_steps=20", "train.eval_every=10", "checkpoint.every=10", "tracking.log_every=1"]
    given = [f"data.dir={sentences}", f"data.num_lanes={LANES}", "optimizer.lr=3e-3", "tracking.mode=disabled", *often]
    first = [("whole", Split(), []), *((str(split), split, []) for split in SPLITS)]
    first += [(f"{before}-to-{after}", before, ["train.stop_at=10"]) for before, after in MOVES]
    second = [(f"{before}-to-{after}", after, []) for before, after in MOVES]
    for starts in (first, second):
        for processes in sorted({split.processes for _, split, _ in starts}):
            jobs = [
                [*MODEL, *OBJECTIVE, *given, *split.overrides, *more, f"run.dir={folder / name}"]
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


@pytest.mark.parametrize("before, after", MOVES, ids=[f"{before}-to-{after}" for before, after in MOVES])
def test_a_run_goes_on_under_another_split(runs, metrics, before, after):
    check_same(metrics, runs / f"{before}-to-{after}", runs / "whole")


def test_other_commands_read_it_from_left_to_right(run, whole):
    """Whatever the cache: with a memory of all before it segments of any length have the same loss."""
    run_dir, _ = whole
    losses = []
    for tgt_len in (7, 40):
        lengths = [f"model.tgt_len={tgt_len}", "model.reuse_len=7", "model.mem_len=3000", "max_tokens=600"]
        evaluated = run("txl_dist.evaluate", f"run={run_dir}", "split=test", "num_lanes=2", "format=json", *lengths)
        losses.append(json.loads(evaluated.stdout)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    prompt = "abc dead beef ."
    written = run("txl_dist.generate", f"run={run_dir}", f"prompt={prompt}", "max_tokens=5", "temperature=0").stdout
    assert written.startswith(prompt) and len(written) > len(prompt)


def test_a_token_is_scored_from_both_sides(run, whole):
    run_dir, _ = whole
    scored = {}
    for context in ("left", "both"):
        options = [f"run={run_dir}", "text=abc dead beef .", "format=json", f"context={context}"]
        scored[context] = json.loads(run("txl_dist.score", *options).stdout)
    left, both = (scored[context]["tokens"] for context in ("left", "both"))
    assert [token["token"] for token in left] == [token["token"] for token in both]
    assert all(one["log_prob"] != other["log_prob"] for one, other in zip(left, both, strict=True))
    assert scored["both"]["next"] == [] and len(scored["left"]["next"]) == 5
    assert "log-probability" in run("txl_dist.score", f"run={run_dir}", "text=abc", "context=both").stdout


def test_a_restart_changes_nothing(train, whole, check_identical):
    train("restarted", "train.stop_at=4")
    run_dir, _ = train("restarted")
    check_identical(run_dir, whole[0])


def test_another_objective_is_another_run(train, whole):
    refused = train("whole", objective=[], expect=2).stderr
    assert "objective.name=causal_lm: the run in" in refused and "was started with permutation_lm" in refused


def test_the_same_model_can_be_trained_causally(train, metrics):
    run_dir, _ = train("causal", objective=[])
    assert metrics(run_dir)[-1]["test/bits_per_byte"] > 0
