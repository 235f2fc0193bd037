"""What is logged is declared, and what is declared is logged."""

import pytest

from tests.examples import write_labels, write_scores, write_squad
from txl_dist.tracking.schema import AXES, METRICS, PANELS, SECTIONS, find_metric


@pytest.fixture(scope="module")
def logged(run, small, metrics, tmp_path_factory):
    """The keys of a run in which everything happens: a damaged sample, a skipped step, a known peak, watched layers.

    And of one of numbers that are not text, and of one of each kind of examples.
    """
    folder = tmp_path_factory.mktemp("everything")
    (folder / "skipped_steps.json").write_text('[{"step": 5, "why": "a test"}]')
    everything = ["engine.peak_tflops=1", "tracking.watch_every=10", "data.on_error=skip_sample"]
    run("txl_dist.train", *small, *everything, f"run.dir={folder}")
    numbers = tmp_path_factory.mktemp("numbers")
    corpus = [
        "corpus=duplication",
        "corpus.length=16",
        "corpus.num_train=64",
        "corpus.num_valid=8",
        "corpus.num_test=8",
    ]
    run("txl_dist.prepare", *corpus, f"data.dir={numbers}/data", "workers=1")
    steps = ["train.max_steps=1", f"data.dir={numbers}/data"]
    run("txl_dist.train", *small, *steps, f"run.dir={numbers}/run")
    lines = [*metrics(folder), *metrics(numbers / "run")]
    for name, write in (("labels", write_labels), ("scores", write_scores), ("answers", write_squad)):
        examples = tmp_path_factory.mktemp(name)
        corpus = "squad" if name == "answers" else "examples"
        given = [f"corpus={corpus}", *write(examples), "tokenizer=bytes", f"data.dir={examples}/data", "workers=1"]
        run("txl_dist.prepare", *given)
        task = ["objective=classification"]
        if name == "answers":
            task = ["objective=span_qa", "objective.passage_first=false", "objective.max_question_tokens=8"]
        more = ["data.reset_memory=document", "model.tgt_len=32", f"data.dir={examples}/data", "train.max_steps=1"]
        run("txl_dist.train", *small, *task, *more, f"run.dir={examples}/run")
        lines += metrics(examples / "run")
    return {key for line in lines for key in line}


def test_every_logged_key_is_declared_once(logged):
    for key in logged - set(AXES):
        assert len([metric for metric in METRICS if metric.match(key) is not None]) == 1, key


def test_every_declared_metric_is_logged(logged):
    never = [metric.key for metric in METRICS if not any(metric.match(key) is not None for key in logged)]
    assert not never


def test_every_line_has_the_axes(run, small, metrics, tmp_path):
    run("txl_dist.train", *small, f"run.dir={tmp_path}")
    assert all(set(AXES) <= set(line) for line in metrics(tmp_path))
    times = [line["time"] for line in metrics(tmp_path)]
    assert times == sorted(times)


def test_panels_are_told_apart():
    titles = [panel.title for panel in PANELS]
    assert len(titles) == len(set(titles))
    assert {panel.section for panel in PANELS} <= set(SECTIONS)
    labels = [(panel.title, metric.label) for panel in PANELS for metric in panel.metrics]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    "key, fields",
    [
        ("memory/share/layer.3.head.12", {"layer": "3", "head": "12"}),
        ("memory/distance/layer.0.head.1.from.ahead", {"layer": "0", "head": "1", "distance": "ahead"}),
        ("watch/weights/layer.7", {"part": "layer.7"}),
        ("memory/share", {}),
    ],
)
def test_a_family_is_found_by_its_key(key, fields):
    metric = find_metric(key)
    assert metric is not None and metric.match(key) == fields


def test_other_keys_are_not_found():
    assert find_metric("train/unknown") is None and find_metric("memory/share/layer.1") is None
