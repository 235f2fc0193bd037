"""What Hugging Face's config.json states of a fine-tuned XLNet, and our objective that is the same."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txl_dist.config.schema import ClassificationConfig, ObjectiveConfig, SpanQAConfig, TaskConfig
from txl_dist.config.sections import parse_section
from txl_dist.config.task_checks import questions_fit
from txl_dist.conversion.import_source import ImportedTask
from txl_dist.conversion.tensor_files import check_shapes
from txl_dist.conversion.xlnet.recipe import QUESTIONS
from txl_dist.conversion.xlnet.weights import HEADS, NOTHING, task_head_names
from txl_dist.data.format import Examples
from txl_dist.errors import ConfigError
from txl_dist.files.parsing import shown
from txl_dist.models.config import ModelConfig
from txl_dist.models.heads import BEAMS
from txl_dist.models.shapes import parameter_shapes
from txl_dist.objectives.registry import head_builder

CLASSIFIER = "XLNetForSequenceClassification"
BEAM = "XLNetForQuestionAnswering"
SIMPLE = "XLNetForQuestionAnsweringSimple"

SUMMARY: dict[str, Any] = {"summary_type": "last", "summary_use_proj": True, "summary_activation": "tanh"}
# Modules of heads that read examples otherwise: of a class for each token, and of classes without a summary.
OTHER_HEADS = ("classifier", "logits_proj")


def class_of(objective: TaskConfig) -> str:
    """Return Hugging Face's class of a model that has learnt a task."""
    if isinstance(objective, ClassificationConfig):
        return CLASSIFIER
    return BEAM if objective.head == "beam" else SIMPLE


# ----------------------------------------------------------------------------------------------------------------- out


def task_keys(objective: TaskConfig, examples: Examples, dropout: float) -> dict[str, Any]:
    """Return what config.json states of a task; without memories, for each call reads all of an example.

    Args:
        dropout: of the model, which the head has where the objective states none.
    """
    keys: dict[str, Any] = {"architectures": [class_of(objective)], "mem_len": None, "use_mems_eval": False}
    if isinstance(objective, ClassificationConfig):
        names = ["score"] if examples.kind == "scores" else examples.labels
        keys |= SUMMARY | {
            "summary_last_dropout": dropout if objective.dropout is None else objective.dropout,
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "regression" if examples.kind == "scores" else "single_label_classification",
        }
    elif objective.head == "beam":
        keys |= {"start_n_top": BEAMS, "end_n_top": BEAMS}
    return keys


def reading_notes(objective: TaskConfig, examples: Examples, tgt_len: int) -> Iterator[str]:
    """Yield how examples are given to Hugging Face's class, and what it returns."""
    yield "several examples at once: padding=True; <pad> stands on the left, and attention_mask hides it"
    if isinstance(objective, ClassificationConfig):
        yield f"an example is given as {'tokenizer(first, second)' if examples.pairs else 'tokenizer(text)'}"
        if objective.max_tokens is not None:
            yield (
                f"an example is cut by truncation=True, max_length={objective.max_tokens} (max_tokens); of a pair one "
                "token fewer of the first text may be left there, and one more of the second"
            )
        yield (
            f"an example of more than {tgt_len} tokens (tgt_len) is read here in segments with memory, there at once: "
            "then the numbers differ"
        )
        return
    order = "tokenizer(passage, question)" if objective.passage_first else "tokenizer(question, passage)"
    yield f"an example is given as {order}, the question cut to its first {objective.max_question_tokens} tokens"
    yield (
        f"a passage that does not fit into {tgt_len} tokens (tgt_len) is read in windows: here with the memory of "
        "those before, there each alone; then the numbers differ"
    )
    if objective.head == "beam":
        yield "p_mask is 0 for the passage and for <cls>, the last token, and 1 for all others"
        yield "what is called start_top_log_probs and end_top_log_probs are probabilities"
    else:
        yield "it has no p_mask: lower the logits of all tokens but those of the passage and <cls>, the last one"


# ------------------------------------------------------------------------------------------------------------------ in


def find_class(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which class of HEADS tensors are of, by the names of those of its head; None: of none."""
    for kind, modules in HEADS.items():
        if all(f"{module}.weight" in tensors for module in modules.values()):
            return kind
    return None


def has_head(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there is a head that says something of examples, kept here or not."""
    modules = {name.partition(".")[0] for name in tensors}
    return find_class(tensors) is not None or not modules.isdisjoint(OTHER_HEADS)


def read_task(
    path: Path, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], model: ModelConfig, pairs: bool
) -> ImportedTask:
    """Return the objective, the examples and the head of a fine-tuned model.

    Args:
        path: of its config.json, for messages.
        stated: the content of that.
        tensors: those of the head, by Hugging Face's names.
        model: what it became here.
        pairs: whether a classifier reads pairs of texts, where the config does not say so.

    Raises:
        ConfigError: where it is not a task that can be learnt here, or its tensors are not those that it states.
    """
    kind = find_class(tensors)
    problems = list(unsupported(path, kind, stated, tensors))
    if problems:
        raise ConfigError(problems)
    assert kind is not None
    objective = read_objective(kind, stated)
    if isinstance(objective, SpanQAConfig):
        problems += questions_fit(objective, model)
    if problems:
        raise ConfigError(problems)
    examples = read_examples(kind, stated, pairs)
    shapes = parameter_shapes(model, stated["vocab_size"], model.fewest_tensors, head_builder(objective, examples))
    names = task_head_names(kind, shapes)
    check_shapes(tensors, {theirs: shapes[ours] for ours, theirs in names.items()}, NOTHING)
    weights = {ours: tensors[theirs].to(torch.float32, copy=True) for ours, theirs in names.items()}
    return ImportedTask(f"Hugging Face's {kind}", asdict(objective), examples, weights)


def unsupported(
    path: Path, kind: str | None, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield what a config states of a head that ours cannot be."""
    body = "a run can begin with its body: run.init_from"
    if kind is None:
        yield f"{path}: its head ({shown(sorted(tensors))}) is none of {', '.join(HEADS)}; {body}"
    if kind != CLASSIFIER:
        return
    if stated.get("architectures") == ["XLNetForMultipleChoice"]:  # the tensors are those of a score
        yield f"{path}: architectures=XLNetForMultipleChoice: there is no such objective here; {body}"
    for key, value in SUMMARY.items():
        if stated.get(key, value) != value:
            yield f"{path}: {key}={shown(stated[key])}: must be {shown(value)}, as XLNet's authors have it; {body}"
    names = label_names(stated)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        yield f"{path}: id2label={shown(stated.get('id2label'))}: must name each class, from 0 on, and no two alike"
    problem = stated.get("problem_type")
    expected = "regression" if len(names) == 1 else "single_label_classification"
    if problem is not None and problem != expected:
        yield f"{path}: problem_type={shown(problem)}: must be {expected} for {len(names)} labels; {body}"


def label_names(stated: Mapping[str, Any]) -> list[Any]:
    """Return the names of the classes; [] where they are not numbered from 0 on."""
    given = stated.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # as transformers has it where none are stated
    return [given.get(str(label)) for label in range(len(given))] if isinstance(given, dict) else []


def read_objective(kind: str, stated: Mapping[str, Any]) -> TaskConfig:
    """Return the objective; what a config does not state is as in the recipe, or as in the exported folder."""
    if kind == CLASSIFIER:
        fixed = {"name": "classification"}
        keys: dict[str, Any] = {"max_tokens": None, "dropout": stated.get("summary_last_dropout", 0.1)}
    else:
        fixed = {"name": "span_qa", "head": "beam" if kind == BEAM else "simple"}
        keys = QUESTIONS
    own = stated.get("txl_dist", {}).get("objective", {})
    objective: TaskConfig = parse_section(
        "objective", ObjectiveConfig, fixed | keys | {key: own[key] for key in keys if key in own}
    )
    return objective


def read_examples(kind: str, stated: Mapping[str, Any], pairs: bool) -> Examples:
    """Return what kind of examples a model is for."""
    if kind != CLASSIFIER:
        return Examples(kind="answers", pairs=True)
    own = stated.get("txl_dist", {})
    pairs = pairs or bool(own.get("pairs"))
    names = label_names(stated)
    if len(names) == 1:
        return Examples(kind="scores", pairs=pairs)
    return Examples(kind="labels", labels=names, pairs=pairs)
