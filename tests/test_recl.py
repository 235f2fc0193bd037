"""Relative effective context length: the definition on made-up losses, and the command on real runs."""

import json

import numpy as np

from txl_dist.evaluation.context import effective_lengths


def losses(lookback, contexts, positions=100, hard=20):
    """Make the losses of a model: of hard tokens they fall by 0.05 per context up to `lookback`, all others are 1."""
    values = np.ones((len(contexts), positions))
    for i, context in enumerate(contexts):
        values[i, :hard] = 5 - 0.05 * (min(context, lookback) // contexts.step)
    return values


def test_a_context_counts_as_far_as_it_helps():
    contexts = range(10, 101, 10)
    models = np.array([losses(30, contexts), losses(70, contexts)])
    # Of the hardest 10 % all tokens gain, 5 % per step; of the harder half two in five, 2 %; of all one in five, < 1 %.
    assert effective_lengths(models, contexts) == [[30, 30, 10], [70, 70, 10]]


def test_a_gain_over_a_worse_model_does_not_count():
    """The weaker model gains with every context, but the stronger one is better already with the shortest."""
    contexts = range(10, 51, 10)
    weak = np.array([[5.0 - 0.1 * i] * 10 for i in range(5)])
    strong = np.full((5, 10), 3.0)
    assert effective_lengths(weak[None], contexts) == [[50, 50, 50]]
    assert effective_lengths(np.array([weak, strong]), contexts) == [[10, 10, 10], [10, 10, 10]]


def test_runs_are_compared_in_one_table(run, small, tmp_path):
    for name, mem_len in (("with", 24), ("without", 0)):
        run("txl_dist.train", *small, f"run.dir={tmp_path / name}", f"model.mem_len={mem_len}")
    options = [f"run={tmp_path}/*", "step=4", "max_context=12", "positions=40"]
    printed = json.loads(run("txl_dist.recl", *options, "format=json").stdout)
    assert list(printed) == [str(tmp_path / "with"), str(tmp_path / "without")]
    assert all(length in (4, 8, 12) for row in printed.values() for length in row.values())
    assert "r = 0.5" in run("txl_dist.recl", *options).stdout
    done = run("txl_dist.recl", f"run={tmp_path}/*", "split=test", "step=4", "max_context=99999999", expect=2)
    assert done.stderr.count("max_context=99999999: the split test") == 2
    assert "max_context=5" in run("txl_dist.recl", options[0], "step=4", "max_context=5", expect=2).stderr
