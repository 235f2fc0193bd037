"""What a task asks of its config and its data: one clear line for each problem, before anything starts."""

import pytest

from tests.examples import write_labels, write_squad


@pytest.fixture(scope="module")
def datasets(run, tmp_path_factory):
    """Examples with labels and with answers, prepared."""
    folder = tmp_path_factory.mktemp("examples")
    for name, corpus, write in (("labels", "examples", write_labels), ("answers", "squad", write_squad)):
        (folder / name).mkdir()
        given = [*write(folder / name, (12, 4, 4)), "tokenizer=bytes", f"data.dir={folder / name}/data", "workers=1"]
        run("txl_dist.prepare", f"corpus={corpus}", *given)
    return {name: f"data.dir={folder / name}/data" for name in ("labels", "answers")}


LABELS = ["objective=classification", "data.reset_memory=document"]
ANSWERS = ["objective=span_qa", "data.reset_memory=document"]
CASES = {
    "memory is reset": (
        "labels",
        ["objective=classification"],
        "data.reset_memory=never: objective=classification reads each example from its own beginning",
    ),
    "nothing is lost": ("labels", [*LABELS, "data.on_error=skip_sample"], "data.on_error=skip_sample: objective="),
    "no half": ("labels", [*LABELS, "train.loss=second_half"], "train.loss=second_half: is for objective=causal_lm"),
    "no prompts": ("labels", [*LABELS, "tracking.prompts=x"], "tracking.prompts: objective=classification predicts no"),
    "room": ("labels", [*LABELS, "objective.max_tokens=4"], "objective.max_tokens=4: leaves no text between the marks"),
    "lanes": (
        "labels",
        [*LABELS, "data.num_lanes=16"],
        "data.num_lanes=16: more lanes than the split train has examples",
    ),
    "memory": (
        "labels",
        [*LABELS, "model.mem_len=0"],
        "and the model remembers none; give model.mem_len, or objective.",
    ),
    "memory in evaluation": (
        "labels",
        [*LABELS, "evaluation.mem_len=0"],
        "evaluation.tgt_len=16: the longest example of",
    ),
    "labels are no answers": ("labels", ANSWERS, "holds examples with labels; give a data.dir that was prepared with"),
    "answers are no labels": ("answers", LABELS, "holds examples with answers; give a data.dir that was prepared with"),
    "examples are no text": ("labels", [], "holds examples with labels; give objective=classification, or another"),
    "passage first": ("answers", ANSWERS, "objective.passage_first=true: a model of model.name=transformer_xl reads"),
    "questions": (
        "answers",
        [*ANSWERS, "objective.passage_first=false"],
        "model.tgt_len=16: holds no question of objective.max_question_tokens=64",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(run, small, datasets, case, tmp_path):
    data, options, message = CASES[case]
    given = [*small, datasets[data], f"run.dir={tmp_path / 'run'}", *options]
    refused = run("txl_dist.train", *given, expect=2).stderr
    assert message in refused and "Traceback" not in refused
    assert not (tmp_path / "run").exists()


def test_text_has_no_examples(run, small, tmp_path):
    refused = run("txl_dist.train", *small, *LABELS, f"run.dir={tmp_path / 'run'}", expect=2).stderr
    assert "holds text to be predicted; give a data.dir that was prepared with corpus=examples" in refused


def test_an_example_that_is_cut_needs_no_memory(run, small, datasets, metrics, tmp_path):
    cut = [
        "model.mem_len=0",
        "objective.max_tokens=16",
        "train.max_steps=2",
        "train.eval_every=2",
        "checkpoint.every=2",
    ]
    run("txl_dist.train", *small, datasets["labels"], *LABELS, *cut, f"run.dir={tmp_path / 'run'}")
    assert 0 <= metrics(tmp_path / "run")[-1]["test/accuracy"] <= 1


def test_a_model_of_nowhere_is_asked_for(run, datasets):
    refused = run("txl_dist.train", "+experiment=sst2", datasets["labels"], expect=2).stderr
    assert "run.init_from: is missing, whose model model=init_from is" in refused
    refused = run("txl_dist.train", "+experiment=sst2", datasets["labels"], "run.init_from=nowhere", expect=2).stderr
    assert "run.init_from=nowhere: is neither a run directory with a checkpoint nor a third-party one" in refused


def test_only_language_models_are_planned(run, datasets):
    options = ["objective=classification", "data.reset_memory=document", datasets["labels"], "device=H100"]
    assert "only the training of language models is planned" in run("txl_dist.plan", *options, expect=2).stderr
