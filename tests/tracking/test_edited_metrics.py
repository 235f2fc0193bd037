"""The table at the end, whatever somebody has done to metrics.jsonl."""

import json
from types import SimpleNamespace

import pytest

from txl_dist.runs.finished import finished_step
from txl_dist.tracking.metrics import read_metrics
from txl_dist.tracking.result import show_result

SPLITS = {f"{split}/{key}": 1.0 for split in ("valid", "test") for key in ("loss", "bits_per_byte", "perplexity")}
LAST = {"step": 20, "tokens": 2560, "train/loss": 1.0, "train/tokens_per_second": 9.0, **SPLITS}

DAMAGED = {
    "a text for a loss": json.dumps(LAST | {"train/loss": "x"}),
    "a list for a loss": json.dumps(LAST | {"test/loss": []}),
    "true for a loss": json.dumps(LAST | {"test/loss": True}),
    "a text for a speed": json.dumps(LAST | {"train/tokens_per_second": "fast"}),
    "huge tokens": json.dumps(LAST | {"tokens": 10**400}),
    "a huge loss": json.dumps(LAST | {"test/loss": 10**400}),
    "a fraction of a step": json.dumps(LAST | {"step": 20.0}),
    "true for a step": json.dumps(LAST | {"step": True}),
    "without tokens": json.dumps({"step": 20}),
    "a number": "7",
    "a list": "[]",
    "nested": '{"step": 20, "tokens": 1, "train/loss": ' + "[" * 100_000,
    "not UTF-8": "\udcff",
}


@pytest.fixture
def job(tmp_path):
    return SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), train=SimpleNamespace(max_steps=20), objective=None)


def write(job, content):
    with open(f"{job.run.dir}/metrics.jsonl", "w", errors="surrogateescape") as file:
        file.write(content)


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_line_of_anything_but_numbers_is_named_and_left_out(job, capsys, caplog, line):
    before = json.dumps(LAST | {"step": 10})
    write(job, f"{before}\n{line}\n")
    assert finished_step(job.run.dir) is None
    assert [metrics["step"] for metrics in read_metrics(job.run.dir)] == [10]
    caplog.clear()
    show_result(job, ["train", "valid"])
    assert "10 of 20, 2,560 tokens" in capsys.readouterr().out
    assert "metrics.jsonl: line 2 cannot be read" in caplog.text


def test_numbers_that_are_not_finite_are_shown(job, capsys):
    write(job, json.dumps(LAST | {"train/loss": float("nan"), "valid/perplexity": float("inf")}) + "\n")
    show_result(job, ["train", "valid"])
    assert "20 of 20" in capsys.readouterr().out
