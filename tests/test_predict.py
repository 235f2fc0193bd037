"""Tasks as a user tries them: prepare, begin with a trained model, train, evaluate, predict."""

import json
import shutil

import pytest

from tests.examples import write_labels, write_squad
from txl_dist.checkpoint.format import latest, write_manifest
from txl_dist.errors import UserError
from txl_dist.evaluation.predicting import Predictor
from txl_dist.objectives.squad import AnswerScores
from txl_dist.runs.load import load_model

TASK = ["data.reset_memory=document", "data.order=documents", "model.tgt_len=32", "train.max_steps=120"]
TASK += ["train.eval_every=60", "checkpoint.every=60"]


@pytest.fixture(scope="module")
def language_model(run, small, tmp_path_factory):
    """A run that predicts text, by bytes."""
    run_dir = tmp_path_factory.mktemp("language_model") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}")
    return run_dir


@pytest.fixture(scope="module")
def classifier(run, small, language_model, tmp_path_factory):
    """A run that says the class of texts, begun with the weights of that one; how it was started; and its output."""
    folder = tmp_path_factory.mktemp("classifier")
    counts = (240, 30, 30)
    given = [*write_labels(folder, counts, longest=3), "tokenizer=bytes", f"data.dir={folder}/data", "workers=1"]
    run("txl_dist.prepare", "corpus=examples", *given)
    given = ["+experiment=sst2", f"run.init_from={language_model}", f"data.dir={folder}/data", f"run.dir={folder}/run"]
    given += [*TASK, "data.num_lanes=16", "optimizer.lr=3e-3", "schedule.warmup_steps=5", "tracking.mode=disabled"]
    return folder / "run", given, run("txl_dist.train", *given)


@pytest.fixture(scope="module")
def reader(run, small, tmp_path_factory):
    """A run that answers questions, and the file of those that it was tested by."""
    folder = tmp_path_factory.mktemp("reader")
    given = [*write_squad(folder), "tokenizer=bytes", f"data.dir={folder}/data", "workers=1"]
    run("txl_dist.prepare", "corpus=squad", *given)
    task = [
        "objective=span_qa",
        "objective.passage_first=false",
        "objective.max_question_tokens=20",
        "model.tgt_len=64",
    ]
    more = ["data.reset_memory=document", "train.max_steps=4", f"data.dir={folder}/data", f"run.dir={folder}/run"]
    run("txl_dist.train", *small, *task, *more)
    return folder / "run", folder / "test.json"


def test_a_task_is_learnt_and_shown(classifier, metrics):
    run_dir, _, done = classifier
    assert "starting with the weights of step 20" in done.stdout
    assert metrics(run_dir)[-1]["test/accuracy"] > 0.9
    assert "test accuracy" in done.stdout and f"txl_dist.predict run={run_dir}" in done.stdout
    assert "perplexity" not in done.stdout


def test_the_model_is_that_of_init_from(classifier, language_model):
    """With what is given besides; and the same command resumes it, whatever has become of the first weights."""
    ours, first = (latest(run_dir).config["model"] for run_dir in (classifier[0], language_model))
    assert {key: value for key, value in ours.items() if value != first[key]} == {"tgt_len": 32}


def test_a_run_resumes_without_the_weights_that_it_began_with(run, classifier, language_model):
    run_dir, given, _ = classifier
    moved = language_model.rename(language_model.parent / "moved")
    try:
        again = run("txl_dist.train", *given)
    finally:
        moved.rename(language_model)
    assert "120 of 120" in again.stdout + again.stderr


def test_evaluate_counts_which_class_is_taken_for_which(run, classifier, metrics):
    run_dir, *_ = classifier
    scored = json.loads(run("txl_dist.evaluate", f"run={run_dir}", "split=test", "format=json").stdout)
    logged = metrics(run_dir)[-1]
    for key in ("loss", "accuracy", "f1", "matthews"):
        assert scored[key] == pytest.approx(logged[f"test/{key}"], rel=1e-5), key
    assert scored["labels"] == ["bad", "good", "so-so"] and sum(map(sum, scored["confusions"])) == 30
    assert sum(scored["confusions"][n][n] for n in range(3)) == pytest.approx(30 * scored["accuracy"])
    shown = run("txl_dist.evaluate", f"run={run_dir}", "split=test").stdout
    assert "true \\ predicted" in shown and "so-so" in shown


def test_predictions_of_lines_and_of_json_are_those_of_python(run, classifier, tmp_path):
    run_dir, *_ = classifier
    texts = ["ba cdef .", "go fed be .", "so be ."]
    said = Predictor.open(str(run_dir), num_lanes=2).classify(texts)
    assert [one["label"] for one in said] == ["bad", "good", "so-so"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    by_line = run("txl_dist.predict", f"run={run_dir}", stdin="\n".join(texts)).stdout
    by_json = run("txl_dist.predict", f"run={run_dir}", f"file={tmp_path / 'texts.jsonl'}", "num_lanes=1").stdout
    for printed in (by_line, by_json):
        lines = [json.loads(line) for line in printed.splitlines()]
        assert [line["text"] for line in lines] == texts
        for line, one in zip(lines, said, strict=True):
            assert line["label"] == one["label"]
            assert line["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)


def test_answers_are_parts_of_their_passages_and_are_scored_as_in_training(run, reader, metrics):
    """As SQuAD's official script does by the file of predictions."""
    run_dir, file = reader
    printed = run("txl_dist.predict", f"run={run_dir}", f"file={file}", "output=squad").stdout
    predicted = json.loads(printed)
    paragraphs = [one for article in json.loads(file.read_text())["data"] for one in article["paragraphs"]]
    true = {}
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            true[question["id"]] = [answer["text"] for answer in question["answers"]]
            assert predicted[question["id"]] in paragraph["context"]
    scores = AnswerScores.of(predicted, dict.fromkeys(predicted, 0.0), true).metrics()
    logged = metrics(run_dir)[-1]
    assert scores["exact_match"] == pytest.approx(logged["test/exact_match"])
    assert scores["f1"] == pytest.approx(logged["test/answer_f1"])


def test_an_answer_is_always_given_without_a_threshold(run, reader):
    run_dir, file = reader
    printed = run("txl_dist.predict", f"run={run_dir}", f"file={file}", "threshold=null").stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    assert all(line["answer"] and line["start"] is not None and line["log_prob"] < 0 for line in lines)
    (one,) = Predictor.open(str(run_dir)).answer([("some words of a passage", "what ?")])
    assert one["answer"] and "some words of a passage"[one["start"] :].startswith(one["answer"])


@pytest.mark.parametrize("examples", [None, {"kind": "labels"}, {"kind": "none", "labels": [], "pairs": False}])
def test_a_checkpoint_that_does_not_say_what_its_examples_are(classifier, tmp_path, examples):
    """By whatever it came into the checkpoint, whose sums are right."""
    shutil.copytree(classifier[0], tmp_path / "run")
    folder = latest(tmp_path / "run").path
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["sha256"]
    manifest["data"]["examples"] = examples
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match="does not say what its examples are"):
        Predictor.open(str(tmp_path / "run"))


def test_what_predicts_no_text_says_so(run, classifier, language_model):
    run_dir, *_ = classifier
    for module, option in (("generate", "prompt=x"), ("score", "text=x"), ("look", "text=x")):
        refused = run(f"txl_dist.{module}", f"run={run_dir}", option, expect=2).stderr
        assert "has learnt a task, and predicts no text" in refused and "Traceback" not in refused
    with pytest.raises(UserError, match="predicts no text"):
        load_model(str(run_dir))
    refused = run("txl_dist.predict", f"run={language_model}", stdin="x", expect=2).stderr
    assert "has learnt no task" in refused
    refused = run("txl_dist.evaluate", f"run={run_dir}", "split=test", "sliding_window=true", expect=2).stderr
    assert "sliding_window: is for models that predict text" in refused


@pytest.mark.parametrize(
    "stdin, options, message",
    [
        ("a text\n\n \t \n", ["output=squad"], "output=squad: is for questions"),
        ('{"sentence": "x"}', [], "line 1: has no text; give an object with text"),
        ('{"text": "x"}\n{"text": " "}\n', [], "line 2: its text is ' ', not a text"),
        ('{"text": "x"}\n{"text": \n', [], "line 2: is not JSON"),
        ("x\n", ["input=json"], "line 1: is not JSON"),
        ("", ["file=nowhere"], "file=nowhere: there is no such file"),
    ],
)
def test_bad_input_is_named(run, classifier, stdin, options, message):
    refused = run("txl_dist.predict", f"run={classifier[0]}", *options, stdin=stdin, expect=2).stderr
    assert message in refused and "Traceback" not in refused
