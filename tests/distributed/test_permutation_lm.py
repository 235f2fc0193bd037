"""Permutation language modelling is the same run under every split and after every restart."""

import random

import pytest
import torch

from txl_dist.checkpoint.format import latest

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


@pytest.mark.parametrize(
    "splits",
    [
        [(2, ["engine.zero_stage=2", "engine.gradient_accumulation=2"])],
        [(2, ["engine.pipeline_stages=2", "engine.gradient_accumulation=4"]), (None, ["data.workers=3"])],
    ],
    ids=["data-parallel", "stages-then-one"],
)
def test_it_is_the_same_run_under_another_split(train, whole, metrics, request, splits):
    for number, (processes, options) in enumerate(splits):
        stop = ["train.stop_at=4"] if number + 1 < len(splits) else []
        run_dir, _ = train(request.node.callspec.id, *options, *stop, processes=processes)
    for key in ("train/loss", "train/grad_norm", "valid/loss", "test/loss"):
        actual, expected = ([line[key] for line in metrics(path) if key in line] for path in (run_dir, whole[0]))
        assert actual and actual == pytest.approx(expected, rel=1e-5), key
    for kind in ("weights", "memory"):
        actual, expected = (latest(path).tensors(kind) for path in (run_dir, whole[0]))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


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
