"""Fine-tuned XLNets out to transformers 4 and 5 and in again: the same outputs for the same texts."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
    XLNetForTokenClassification,
    XLNetLMHeadModel,
)

from tests.conversion.exported_xlnet_tasks import outputs_of
from tests.conversion.third_party import assert_same, load_weights
from tests.conversion.xlnet_models import (
    LINES,
    convert_job,
    edit_config,
    hugging_face_model,
    import_run,
    refusal,
    save_folder,
)
from txl_dist.checkpoint.format import CheckpointWriter, latest
from txl_dist.config.schema import ClassificationConfig, SpanQAConfig
from txl_dist.convert import convert
from txl_dist.data.format import Examples
from txl_dist.errors import ConfigError
from txl_dist.evaluation.predicting import Predictor
from txl_dist.models import registry
from txl_dist.models.config import ModelConfig
from txl_dist.models.heads import SpanPredictions
from txl_dist.objectives.registry import head_builder
from txl_dist.runs.load import load_task

LENGTH = 64  # of a segment, which holds each example
LONG_ENOUGH = 68  # for a question of 64 tokens, as in the recipe
LABELS = ["bad", "good", "so-so"]
TEXTS = [[line] for line in LINES[:4]] + [["read"], ["(again) 3,800 pages of the sea , lost"]]
PAIRS = [[LINES[0], "a house"], ["the sea", LINES[9]], ["read", "lost"]]
QUESTIONS = [[LINES[0], "what was read ?"], [f"{LINES[7]} lost", "what"], ["In 1840, the sea of pages", "which year ?"]]
LABELLED = Examples(kind="labels", labels=LABELS, pairs=False)
ANSWERED = Examples(kind="answers", pairs=True)


class Case(NamedTuple):
    hub_class: str
    objective: ClassificationConfig | SpanQAConfig
    examples: Examples
    texts: list[list[str]]


def classifier(examples, texts, max_tokens=None, dropout=0.2):
    objective = ClassificationConfig("classification", max_tokens, dropout)
    return Case("XLNetForSequenceClassification", objective, examples, texts)


def answering(hub_class, head, passage_first=True, doc_stride=8):
    return Case(hub_class, SpanQAConfig("span_qa", head, passage_first, doc_stride, 20, 30), ANSWERED, QUESTIONS)


CASES = {
    "classes": classifier(LABELLED, TEXTS),
    "scores": classifier(Examples(kind="scores", pairs=False), TEXTS),
    "pairs": classifier(Examples(kind="labels", labels=LABELS, pairs=True), PAIRS, max_tokens=60, dropout=None),
    "beam": answering("XLNetForQuestionAnswering", "beam", doc_stride=None),
    "simple": answering("XLNetForQuestionAnsweringSimple", "simple"),
    "question first": answering("XLNetForQuestionAnswering", "beam", passage_first=False),
}


def write_task_run(run_dir, body, objective, examples):
    """Write a run that has learnt a task: the weights of an imported model, and a head large enough to matter."""
    checkpoint = latest(body)
    config: ModelConfig = registry.find("xlnet").Config(**checkpoint.config["model"])
    model = registry.build(config, checkpoint.data["vocab_size"], head=head_builder(objective, examples))
    checkpoint_weights = checkpoint.tensors("weights")
    torch.manual_seed(5)
    weights = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape) * 0.4 + float("layer_norm.weight" in name)
        weights[name] = checkpoint_weights.get(name, drawn)
    writer = CheckpointWriter(str(run_dir), step=0, rank=0)
    writer.add("weights", weights)
    state = checkpoint.state | {"imported": {"from": "nowhere", "title": "made up"}}
    data = checkpoint.data | {"examples": examples.model_dump()}
    writer.commit(writer.files, state, checkpoint.config | {"objective": asdict(objective)}, data)
    shutil.copytree(body / "tokenizer", run_dir / "tokenizer")
    return run_dir


def ordered(name, texts):
    """The texts of examples as Hugging Face's tokenizer takes them."""
    return [text[::-1] for text in texts] if name == "question first" else texts


@pytest.fixture(scope="module")
def cases(transformers5, tmp_path_factory):
    """A folder of runs, their exports, and what transformers 5 says of the texts."""
    folder = tmp_path_factory.mktemp("cases")
    lengths = {"tgt_len": LENGTH, "mem_len": 16}
    body = import_run(save_folder(hugging_face_model(), folder / "hf"), folder / "body", model=lengths)
    for name, case in CASES.items():
        (folder / name).mkdir()
        run_dir = write_task_run(folder / name / "run", body, case.objective, case.examples)
        convert(convert_job(run=run_dir, to=folder / name / "folder"))
    texts = {name: ordered(name, case.texts) for name, case in CASES.items()}
    (folder / "examples.json").write_text(json.dumps(texts))
    environment = os.environ | transformers5 | {"HF_HOME": str(folder / "hugging_face")}
    command = [sys.executable, Path(__file__).with_name("exported_xlnet_tasks.py"), folder]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def predicted(run_dir, texts):
    """What the model of a run says of examples, each of one segment: float32 [examples, ...]."""
    predictor = Predictor.open(str(run_dir))
    found = predictor.predict(predictor.source([tuple(text) for text in texts]))
    assert [prediction.place for prediction in found] == [(number, 0) for number in range(len(texts))]
    return torch.from_numpy(np.stack([prediction.outputs for prediction in found]))


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def compare(name, ours, theirs):
    """Compare outputs; positions are counted from the end, for theirs has less padding."""
    if name not in ("beam", "simple", "question first"):
        assert_near(ours, theirs["logits"])
        return
    ours = SpanPredictions.unpack(ours)
    shift = LENGTH - theirs["impossible"].size(1)
    if name == "simple":
        logits = torch.stack([theirs["start_logits"], theirs["end_logits"]])
        log_probs, position = logits.masked_fill(theirs["impossible"] > 0, -1e30).log_softmax(2).topk(5)
        assert torch.equal(ours.start[:, :5] - shift, position[0])
        assert torch.equal(ours.end[:, 0, :5] - shift, position[1])
        assert_near(ours.start_log_prob[:, :5], log_probs[0])
        assert_near(ours.end_log_prob[:, 0, :5], log_probs[1])
        return
    beams = ours.start.size(1)
    assert torch.equal(ours.start - shift, theirs["start_top_index"])
    assert torch.equal(ours.end.mT - shift, theirs["end_top_index"].unflatten(1, (beams, beams)))
    assert_near(ours.start_log_prob.exp(), theirs["start_top_log_probs"])
    assert_near(ours.end_log_prob.exp().mT, theirs["end_top_log_probs"].unflatten(1, (beams, beams)))
    assert_near(ours.no_answer, theirs["cls_logits"])


@pytest.mark.parametrize("name", CASES)
def test_all_versions_say_what_the_run_says(name, cases):
    texts = CASES[name].texts
    expected = predicted(cases / name / "run", texts)
    assert expected.std() > 0.01
    of_version_4, unexpected = outputs_of(cases / name / "folder", ordered(name, texts))
    compare(name, expected, of_version_4)
    compare(name, expected, load_file(cases / name / "output.safetensors"))
    assert unexpected == json.loads((cases / "unexpected.json").read_text())[name] == []


@pytest.mark.parametrize("name", CASES)
def test_the_folder_comes_back_as_the_run(name, cases, tmp_path):
    """Weights to the bit, and all that was learnt."""
    convert(convert_job(**{"from": cases / name / "folder"}, run=tmp_path / "run"))
    again, before = latest(tmp_path / "run"), latest(cases / name / "run")
    assert_same(load_weights(tmp_path / "run"), before.tensors("weights"))
    assert again.config == before.config and again.data == before.data
    assert again.state["imported"]["title"] == f"Hugging Face's {CASES[name].hub_class}"


NAMES = {"id2label": {"0": "no", "1": "neither", "2": "yes"}, "label2id": {"no": 0, "neither": 1, "yes": 2}}
FOREIGN = {
    "classes": (XLNetForSequenceClassification, NAMES | {"summary_last_dropout": 0.3}),
    "two classes": (XLNetForSequenceClassification, {}),
    "scores": (XLNetForSequenceClassification, {"id2label": {"0": "score"}, "label2id": {"score": 0}}),
    "beam": (XLNetForQuestionAnswering, {}),
    "simple": (XLNetForQuestionAnsweringSimple, {}),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_a_run_that_has_learnt_a_task(name, safe, tmp_path):
    """Exported again it is the same model, whose outputs are those of the run."""
    kind, config = FOREIGN[name]
    model = hugging_face_model(kind, **config)
    is_classifier = kind is XLNetForSequenceClassification
    folder = save_folder(model, tmp_path / "hf", safe)
    run_dir = import_run(folder, tmp_path / "run", pairs=is_classifier, model={"tgt_len": LONG_ENOUGH})
    convert(convert_job(run=run_dir, to=tmp_path / "folder"))
    again = kind.from_pretrained(tmp_path / "folder")
    assert_same(again.state_dict(), model.state_dict())
    if is_classifier:
        assert again.config.id2label == model.config.id2label
        assert again.config.summary_last_dropout == model.config.summary_last_dropout
    _, objective, _ = load_task(str(run_dir))
    assert objective.input_keys == (("text", "text_pair") if is_classifier else ("context", "question"))


def test_labels_are_those_of_the_folder(tmp_path):
    folder = save_folder(hugging_face_model(XLNetForSequenceClassification, **NAMES), tmp_path / "hf")
    (said,) = Predictor.open(str(import_run(folder, tmp_path / "run"))).classify([LINES[0]])
    assert list(said["probabilities"]) == ["no", "neither", "yes"]


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (XLNetForSequenceClassification, {"summary_type": "mean"}, "summary_type='mean': must be 'last'"),
        (XLNetForSequenceClassification, {"summary_activation": None}, "summary_activation=None: must be 'tanh'"),
        (XLNetForSequenceClassification, {"problem_type": "multi_label_classification"}, "problem_type='multi_label"),
        (XLNetForSequenceClassification, {"id2label": {"1": "a", "2": "b"}}, "id2label={'1': 'a', '2': 'b'}: must"),
        (XLNetForSequenceClassification, {"id2label": {"0": "a", "1": "a"}}, "no two alike"),
        (XLNetForSequenceClassification, {"id2label": NAMES["id2label"]}, "logits_proj.weight: has the shape [2, 16]"),
        (XLNetForSequenceClassification, {"summary_last_dropout": "x"}, "objective.dropout=x"),
        (XLNetForSequenceClassification, {"id2label": ["a", "b"]}, "id2label=['a', 'b']: must"),
        (XLNetForQuestionAnswering, {"txl_dist": {"objective": 3}}, "is damaged"),
        (XLNetForQuestionAnswering, {}, "model.tgt_len=6: holds no question of objective.max_question_tokens=64"),
        (XLNetForQuestionAnswering, {"txl_dist": {"objective": {"doc_stride": 0}}}, "objective.doc_stride=0"),
        (XLNetForTokenClassification, {}, "its head (['classifier.bias', 'classifier.weight']) is none of"),
        (XLNetForMultipleChoice, {}, "architectures=XLNetForMultipleChoice: there is no such objective"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(kind, changes, message, tmp_path):
    folder = edit_config(save_folder(hugging_face_model(kind), tmp_path / "hf"), **changes)
    text = refusal(folder, tmp_path / "run")
    assert message in text and len(text.splitlines()) <= 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [XLNetLMHeadModel, XLNetForQuestionAnsweringSimple])
def test_pairs_are_for_classifiers_that_are_imported(kind, tmp_path):
    folder = save_folder(hugging_face_model(kind), tmp_path / "hf")
    message = refusal(folder, tmp_path / "run", pairs=True, model={"tgt_len": LONG_ENOUGH})
    assert "pairs=true: is for a fine-tuned classifier" in message
    message = refusal(None, tmp_path / "run", to=tmp_path / "folder", pairs=True)
    assert "pairs=true: is for from=PATH" in message


def test_other_architectures_have_no_such_class(cases, make_config, tmp_path):
    checkpoint = latest(cases / "classes" / "run")
    (tmp_path / "run").mkdir()
    shutil.copytree(cases / "classes" / "run" / "tokenizer", tmp_path / "run" / "tokenizer")
    writer = CheckpointWriter(str(tmp_path / "run"), step=0, rank=0)
    writer.add("weights", {})
    config = checkpoint.config | {"model": asdict(make_config())}
    writer.commit(writer.files, checkpoint.state, config, checkpoint.data)
    with pytest.raises(ConfigError, match="Transformer-XL and Reformer have no such class here"):
        convert(convert_job(run=tmp_path / "run", to=tmp_path / "folder"))
