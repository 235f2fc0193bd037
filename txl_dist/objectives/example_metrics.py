"""Metrics of examples: how well classes and scores are predicted, by the formulas of scikit-learn and SciPy.

A quotient without a denominator, such as the correlation with predictions that are all the same, is 0.
"""

import numpy as np
from rich.table import Table

WHOLE_TABLE = 10  # up to so many classes every count is shown
MOST_FREQUENT = 20  # confusions that are shown of more classes


def classification_metrics(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of predicted classes.

    F1 is that of class 1 if there are two classes, else the mean over all classes that are predicted or true in some
    example (macro). The correlation is that of Gorodkin 2004, which for two classes is Matthews' (1975).

    Args:
        predicted, true: int [examples], class numbers.
    """
    hits = np.bincount(true[predicted == true], minlength=num_classes).astype(float)
    of_predicted = np.bincount(predicted, minlength=num_classes).astype(float)
    of_true = np.bincount(true, minlength=num_classes).astype(float)
    occurs = of_predicted + of_true > 0
    counted = np.arange(num_classes) == 1 if num_classes == 2 else occurs
    f1 = [quotient(2 * hit, total) for hit, total in zip(hits[counted], (of_predicted + of_true)[counted], strict=True)]
    examples = float(len(true))
    covariance = hits.sum() * examples - of_predicted @ of_true
    variances = (examples**2 - of_predicted @ of_predicted) * (examples**2 - of_true @ of_true)
    return {
        "accuracy": float(hits.sum() / examples),
        "f1": float(np.mean(f1)),
        "matthews": quotient(covariance, np.sqrt(variances)),
    }


def score_metrics(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return the correlations of predicted scores, float [examples], with the true ones: Pearson's and Spearman's."""
    return {"pearson": correlation(predicted, true), "spearman": correlation(ranks(predicted), ranks(true))}


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of two float [n]."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # rounding of their mean would leave something to divide by
        return 0.0
    return float(np.corrcoef(x.astype(float), y.astype(float))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each of [n] values, from 1; equal ones share the mean of theirs."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[number]
    return shared


def quotient(numerator: float, denominator: float) -> float:
    """Divide; by 0 the result is 0."""
    return float(numerator / denominator) if denominator else 0.0


def count_confusions(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often each class (row) is taken for which (column): int64 [num_classes, num_classes].

    Args:
        predicted, true: int [examples], class numbers.
    """
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (true, predicted), 1)
    return counts


def confusion_table(counts: np.ndarray, labels: list[str]) -> Table:
    """Show how often which class was predicted for which; of many classes only the most frequent confusions.

    Args:
        counts: those of `count_confusions`.
        labels: the names of all classes, in the order of their numbers.
    """
    if len(labels) <= WHOLE_TABLE:
        headings = ["true \\ predicted", *labels]
        rows = [[label, *(f"{count:,}" for count in row)] for label, row in zip(labels, counts.tolist(), strict=True)]
    else:
        headings = ["true", "predicted", "examples"]
        confusions = [(-int(counts[pair]), pair) for pair in np.ndindex(*counts.shape) if pair[0] != pair[1]]
        most_frequent = [(count, pair) for count, pair in sorted(confusions)[:MOST_FREQUENT] if count]
        rows = [[labels[row], labels[column], f"{-count:,}"] for count, (row, column) in most_frequent]
    table = Table(*headings, box=None, padding=(0, 3, 0, 0))
    for cells in rows:
        table.add_row(*cells)
    return table
