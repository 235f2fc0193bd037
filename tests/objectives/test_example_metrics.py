"""Metrics of classes and scores against slow computations by their definitions."""

from itertools import product
from math import sqrt

import numpy as np
import pytest

from txl_dist.objectives.example_metrics import (
    classification_metrics,
    confusion_table,
    count_confusions,
    score_metrics,
)
from txl_dist.tracking.console import PlainConsole


def drawn(num_classes, examples=60, seed=1):
    """Classes of which the last is rare, and predictions that are right half of the time."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_classes, examples)
    predicted = np.where(rng.random(examples) < 0.5, true, rng.integers(0, num_classes, examples))
    return predicted, true


def f1_by_hand(predicted, true, number):
    both = sum(p == t == number for p, t in zip(predicted, true, strict=True))
    if not both:
        return 0.0
    precision = both / sum(p == number for p in predicted)
    recall = both / sum(t == number for t in true)
    return 2 * precision * recall / (precision + recall)


def matthews_by_hand(predicted, true, num_classes):
    """Gorodkin 2004, equation 8: by the covariances of one-hot vectors, from the confusion matrix."""
    table = np.zeros((num_classes, num_classes))
    for p, t in zip(predicted, true, strict=True):
        table[t, p] += 1
    numbers = range(num_classes)
    above = sum(table[k, k] * table[l, m] - table[k, l] * table[m, k] for k, l, m in product(numbers, repeat=3))
    rows = sum(table[k].sum() * (table.sum() - table[k].sum()) for k in numbers)
    columns = sum(table[:, k].sum() * (table.sum() - table[:, k].sum()) for k in numbers)
    return above / sqrt(rows) / sqrt(columns)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_classification_metrics(num_classes):
    predicted, true = drawn(num_classes)
    if num_classes == 7:  # one class is never true and never predicted, one is never predicted
        true[true == 2] = 3
        predicted[(predicted == 2) | (predicted == 5)] = 3
    found = classification_metrics(predicted, true, num_classes)
    classes = [1] if num_classes == 2 else sorted({*predicted, *true})
    assert found["accuracy"] == np.mean([p == t for p, t in zip(predicted, true, strict=True)])
    assert found["f1"] == pytest.approx(np.mean([f1_by_hand(predicted, true, number) for number in classes]))
    assert found["matthews"] == pytest.approx(matthews_by_hand(predicted, true, num_classes))


def test_two_classes_have_matthews_correlation_of_1975():
    predicted, true = drawn(2)
    expected = np.corrcoef(predicted, true)[0, 1]  # the phi coefficient
    assert classification_metrics(predicted, true, 2)["matthews"] == pytest.approx(expected)
    assert classification_metrics(true, true, 2) == {"accuracy": 1.0, "f1": 1.0, "matthews": pytest.approx(1.0)}
    assert classification_metrics(1 - true, true, 2) == {"accuracy": 0.0, "f1": 0.0, "matthews": pytest.approx(-1.0)}


def test_what_is_not_defined_is_0():
    same, classes = np.zeros(4, dtype=int), np.array([0, 1, 1, 0])
    assert classification_metrics(same, classes, 2) == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    assert classification_metrics(same, same, 2) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    tenth = np.full(3, 0.1)
    assert tenth.std() > 0  # by rounding
    assert score_metrics(tenth, np.array([1.0, 2.0, 4.0])) == {"pearson": 0.0, "spearman": 0.0}


def pearson_by_hand(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def rank_by_hand(values):
    """Half of the equal ones, itself among them, and all lower ones."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def test_score_metrics():
    rng = np.random.default_rng(3)
    true = rng.integers(0, 6, 40) / 2  # with ties, as people's scores have
    predicted = (np.exp(true) + rng.normal(0, 3, 40)).astype(np.float32)
    found = score_metrics(predicted, true)
    assert found["pearson"] == pytest.approx(pearson_by_hand(predicted.tolist(), true.tolist()))
    ranks = rank_by_hand(predicted.tolist()), rank_by_hand(true.tolist())
    assert found["spearman"] == pytest.approx(pearson_by_hand(*ranks))
    assert score_metrics(np.exp(true), true)["spearman"] == pytest.approx(1.0)


def printed(table):
    console = PlainConsole(record=True, width=200)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines()]


def test_confusions_of_few_classes():
    predicted, true = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 0, 2, 0])
    assert printed(confusion_table(count_confusions(predicted, true, 3), ["[red]", "green", "blue"])) == [
        ["true", "\\", "predicted", "[red]", "green", "blue"],
        ["[red]", "2", "1", "0"],
        ["green", "0", "1", "0"],
        ["blue", "0", "0", "1"],
    ]


def test_confusions_of_many_classes():
    labels = [f"class{number}" for number in range(40)]
    true = np.concatenate([np.full(50, 7), np.repeat(3, 4), np.arange(40)])
    predicted = np.concatenate([np.full(50, 7), np.repeat(9, 4), (np.arange(40) + 1) % 40])
    heading, first, second, *others = printed(confusion_table(count_confusions(predicted, true, len(labels)), labels))
    assert heading == ["true", "predicted", "examples"]
    assert first == ["class3", "class9", "4"] and second == ["class0", "class1", "1"]
    assert len(others) == 18
