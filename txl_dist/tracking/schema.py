"""The metrics of a run, each declared once: console, curve, dashboard, W&B and documentation show them by this.

Every key of metrics.jsonl but those of AXES is one of METRICS, or a member of a family of them.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Section = Literal["Loss", "Task", "Optimization", "Memory", "Speed", "Health", "Samples"]
SECTIONS: tuple[Section, ...] = ("Loss", "Task", "Optimization", "Memory", "Speed", "Health", "Samples")

AXES = {"tokens": "training tokens", "step": "optimizer steps", "time": "seconds since 1970"}  # on every line


@dataclass(frozen=True)
class Metric:
    """A number that is logged, or a family of numbers.

    Attributes:
        key: in metrics.jsonl. A word in braces stands for what distinguishes the members of a family.
        label: of its line in a chart; words in braces as in the key.
        meaning: for the documentation.
        is_exact: whether the same run logs the same value at every start; speeds are others each time.
        console: how it stands in a line of the console, with its value; None: it does not.
    """

    key: str
    label: str
    meaning: str
    is_exact: bool = True
    console: str | None = None

    @property
    def is_family(self) -> bool:
        """Return whether it stands for several keys."""
        return "{" in self.key

    def match(self, key: str) -> dict[str, str] | None:
        """Return what a key has in place of the words in braces; None for the key of another metric."""
        found = pattern(self.key).fullmatch(key)
        return found.groupdict() if found else None


@dataclass(frozen=True)
class Panel:
    """A chart: metrics with one axis.

    Attributes:
        title: unique.
        unit: of its values; empty for counts, shares and numbers without one.
        better: which values are better; None where neither are.
    """

    title: str
    section: Section
    unit: str
    better: Literal["lower", "higher"] | None
    metrics: tuple[Metric, ...]


@cache
def pattern(key: str) -> re.Pattern[str]:
    """Return the regular expression of a metric's keys."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+?)", re.escape(key)))


def find_metric(key: str) -> Metric | None:
    """Return the metric of a key in metrics.jsonl; None for a key that is not declared."""
    return next((metric for metric in METRICS if metric.match(key) is not None), None)


NATS = "nats per token"  # with permutation language modelling per predicted token, of a task per example


def of_evaluation(name: str, meaning: str, console: str | None = None, label: str = "") -> tuple[Metric, Metric]:
    """Return a metric of the validation split and the same of the test split.

    Args:
        name: of the key behind that of the split.
        console: its name in a line of the console; None: it stands in none.
        label: of its lines, behind the name of the split.
    """
    shown = {split: None if console is None else f"{split} {console} {{:.4f}}" for split in ("valid", "test")}
    return (
        Metric(f"valid/{name}", f"validation{label}", meaning, console=shown["valid"]),
        Metric(f"test/{name}", f"test{label}", "the same of the test split", console=shown["test"]),
    )


PANELS = (
    # ------------------------------------------------------------------------------------------------------- loss
    Panel(
        "Loss",
        "Loss",
        NATS,
        "lower",
        (
            Metric(
                "train/loss",
                "training",
                "the mean over the steps since the line before, but for those whose loss is not finite",
                console="train loss {:.4f}",
            ),
            Metric("valid/loss", "validation", "that of the whole validation split", console="valid loss {:.4f}"),
            Metric("test/loss", "test", "that of the whole test split", console="test loss {:.4f}"),
        ),
    ),
    Panel("Loss of a step", "Loss", NATS, "lower", (Metric("train/step_loss", "training", "that of this step alone"),)),
    Panel(
        "Perplexity",
        "Loss",
        "",
        "lower",
        (
            Metric("valid/perplexity", "validation", "exp(valid/loss)"),
            Metric("test/perplexity", "test", "exp(test/loss)"),
        ),
    ),
    Panel(
        "Bits per byte",
        "Loss",
        "bits per byte of text",
        "lower",
        (
            Metric(
                "valid/bits_per_byte",
                "validation",
                "the loss in bits; not of permutation language modelling",
                console="valid bits/byte {:.4f}",
            ),
            Metric("test/bits_per_byte", "test", "the same of the test split", console="test bits/byte {:.4f}"),
        ),
    ),
    Panel(
        "Bits per dimension",
        "Loss",
        "bits per number of a sequence",
        "lower",
        (
            Metric(
                "valid/bits_per_dimension",
                "validation",
                "the loss in bits, of `tokenizer=ids` in place of bits per byte; `<eos>` is not counted",
                console="valid bits/dim {:.4f}",
            ),
            Metric("test/bits_per_dimension", "test", "the same of the test split", console="test bits/dim {:.4f}"),
        ),
    ),
    # ------------------------------------------------------------------------------------------------------- task
    Panel(
        "Accuracy",
        "Task",
        "",
        "higher",
        of_evaluation("accuracy", "the share of examples that are said right", "accuracy"),
    ),
    Panel("F1", "Task", "", "higher", of_evaluation("f1", "that of class 1 of two, else the mean over the classes")),
    Panel(
        "Matthews correlation",
        "Task",
        "",
        "higher",
        of_evaluation("matthews", "of the predicted and the true classes, 0 for guesses"),
    ),
    Panel(
        "Pearson correlation", "Task", "", "higher", of_evaluation("pearson", "of predicted and true scores", "pearson")
    ),
    Panel("Spearman correlation", "Task", "", "higher", of_evaluation("spearman", "of their ranks")),
    Panel(
        "Exact match",
        "Task",
        "percent",
        "higher",
        (
            *of_evaluation(
                "exact_match", "answers that are one of the true ones, as SQuAD's script compares", "exact match"
            ),
            *of_evaluation("has_answer_exact_match", "those of questions with an answer", label=", with an answer"),
            *of_evaluation("no_answer_exact_match", "those of questions without one", label=", without an answer"),
            *of_evaluation(
                "best_exact_match", "with the best threshold for giving no answer", label=", best threshold"
            ),
        ),
    ),
    Panel(
        "F1 of answers",
        "Task",
        "percent",
        "higher",
        (
            *of_evaluation("answer_f1", "of the words of an answer and of the true one that is most like it", "F1"),
            *of_evaluation("has_answer_f1", "that of questions with an answer", label=", with an answer"),
            *of_evaluation("no_answer_f1", "that of questions without one", label=", without an answer"),
            *of_evaluation("best_answer_f1", "those with the best threshold for no answer", label=", best threshold"),
        ),
    ),
    Panel(
        "Threshold for no answer",
        "Task",
        "",
        None,
        of_evaluation("best_threshold", "above which no answer is given for the best F1 of this split"),
    ),
    # ----------------------------------------------------------------------------------------------- optimization
    Panel(
        "Learning rate",
        "Optimization",
        "",
        None,
        (Metric("train/lr", "learning rate", "that of this step", console="lr {:.2e}"),),
    ),
    Panel(
        "Norm of the gradient",
        "Optimization",
        "",
        None,
        (Metric("train/grad_norm", "all parameters", "the norm of this step's whole gradient, before clipping"),),
    ),
    Panel(
        "Norm of weights",
        "Optimization",
        "",
        None,
        (Metric("watch/weights/{part}", "{part}", "of a layer (`layer.0`) or another module, after this step"),),
    ),
    Panel(
        "Norm of gradients",
        "Optimization",
        "",
        None,
        (Metric("watch/gradients/{part}", "{part}", "of a part's gradient in this step, before clipping"),),
    ),
    Panel(
        "Norm of updates",
        "Optimization",
        "",
        None,
        (Metric("watch/updates/{part}", "{part}", "of the change of a part's weights in this step"),),
    ),
    Panel(
        "Root mean square of activations",
        "Optimization",
        "",
        None,
        (Metric("watch/activations_rms/{part}", "{part}", "of the numbers that leave a layer in this step"),),
    ),
    Panel(
        "Largest activation",
        "Optimization",
        "",
        None,
        (Metric("watch/activations_max/{part}", "{part}", "the largest absolute value among them"),),
    ),
    # ----------------------------------------------------------------------------------------------------- memory
    Panel(
        "Gain of memory",
        "Memory",
        NATS,
        "higher",
        (
            Metric(
                "memory/gain",
                "all positions",
                "by how much the loss on the beginning of the validation split is lower with memory than without",
            ),
            Metric(
                "memory/gain/from.{position}",
                "from position {position} on",
                "the same at the positions of a segment from this one up to the next such number",
            ),
        ),
    ),
    Panel(
        "Attention on memory",
        "Memory",
        "",
        None,
        (
            Metric("memory/share", "all heads", "the share of attention that is on the memory, not on the segment"),
            Metric(
                "memory/share/layer.{layer}.head.{head}", "layer {layer}, head {head}", "that of one head's attention"
            ),
        ),
    ),
    Panel(
        "Attention by distance",
        "Memory",
        "",
        None,
        (
            Metric(
                "memory/distance/layer.{layer}.head.{head}.from.{distance}",
                "layer {layer}, head {head}, from {distance} on",
                "the share of a head's attention at distances from this one, in tokens, up to the next such number; "
                "0: the token itself; ahead: what follows it",
            ),
        ),
    ),
    Panel(
        "Age of what is attended to",
        "Memory",
        "tokens",
        None,
        (Metric("memory/age/layer.{layer}", "layer {layer}", "the mean distance of attention on the memory"),),
    ),
    Panel(
        "Norm of what is attended to",
        "Memory",
        "",
        None,
        (Metric("memory/norm/layer.{layer}", "layer {layer}", "the mean norm of the remembered states"),),
    ),
    Panel(
        "Cosine of old and new state",
        "Memory",
        "",
        None,
        (
            Metric(
                "memory/drift/layer.{layer}",
                "layer {layer}",
                "between what a lane of training remembered before this step and after it; the mean over lanes",
            ),
        ),
    ),
    # ------------------------------------------------------------------------------------------------------ speed
    Panel(
        "Tokens per second",
        "Speed",
        "",
        "higher",
        (
            Metric(
                "train/tokens_per_second",
                "training",
                "of all ranks, without evaluations and checkpoints",
                is_exact=False,
                console="{:,.0f} tokens/s",
            ),
        ),
    ),
    Panel(
        "Model FLOPs utilisation",
        "Speed",
        "",
        "higher",
        (
            Metric(
                "train/mfu",
                "training",
                "the share of the GPUs' peak that the model uses; give `engine.peak_tflops` where the GPU is not a "
                "known one",
                is_exact=False,
                console="MFU {:.1%}",
            ),
        ),
    ),
    Panel(
        "Wait for data",
        "Speed",
        "",
        "lower",
        (Metric("train/data_wait", "training", "the share of the time that training waits for data", is_exact=False),),
    ),
    Panel(
        "Seconds beside training",
        "Speed",
        "seconds",
        "lower",
        (
            Metric("train/checkpoint_wait", "checkpoints", "that training has waited for checkpoints", is_exact=False),
            Metric("memory/seconds", "metrics of memory", "that the metrics `memory/...` have taken", is_exact=False),
            Metric("watch/seconds", "metrics of layers", "that the metrics `watch/...` have taken", is_exact=False),
        ),
    ),
    # ----------------------------------------------------------------------------------------------------- health
    Panel(
        "Skipped steps",
        "Health",
        "",
        "lower",
        (Metric("train/skipped_steps", "so far", "skipped steps so far, if there are any"),),
    ),
    Panel(
        "Dropped tokens",
        "Health",
        "",
        "lower",
        (
            Metric(
                "train/skipped_tokens",
                "since the line before",
                "of damaged samples since the line before, if there are any",
            ),
        ),
    ),
)

METRICS = tuple(metric for panel in PANELS for metric in panel.metrics)
