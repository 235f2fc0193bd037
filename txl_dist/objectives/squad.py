"""Metrics of answers, as the official script of SQuAD 2.0 computes them (Rajpurkar et al. 2018).

An answer is compared with each of the true ones, whichever it is most like, without case, punctuation, articles and
white space. It counts in percent: as exactly equal, and by the F1 of its words. "No answer" is the empty text: right
where the question has no answer.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

Metric = Literal["exact_match", "f1"]


@dataclass(frozen=True)
class AnswerScores:
    """How right the predicted answer of each question is, if it is given; all arrays float64 [questions], from 0 to 1.

    Attributes:
        exact_match, f1: of the answers.
        no_answer: higher where it is likelier that there is no answer; any numbers.
        has_answer: bool [questions], whether there is one.
    """

    exact_match: np.ndarray
    f1: np.ndarray
    no_answer: np.ndarray
    has_answer: np.ndarray

    @classmethod
    def of(
        cls, predictions: Mapping[str, str], no_answer: Mapping[str, float], answers: Mapping[str, Sequence[str]]
    ) -> "AnswerScores":
        """Compare predicted answers with the true ones.

        Args:
            predictions: by the question's id; "" for none.
            no_answer: by id, what a threshold decides by.
            answers: by id; [] where there is none.
        """
        exact_match = []
        f1 = []
        for name, true in answers.items():
            words = normalised_words(predictions[name])
            true_words = [normalised_words(answer) for answer in true]
            true_words = [answer for answer in true_words if answer] or [[]]
            exact_match.append(max(float(words == answer) for answer in true_words))
            f1.append(max(f1_of_words(words, answer) for answer in true_words))
        return cls(
            np.array(exact_match),
            np.array(f1),
            np.array([no_answer[name] for name in answers], dtype=np.float64),
            np.array([bool(true) for true in answers.values()]),
        )

    def metrics(self, threshold: float = math.inf) -> dict[str, float]:
        """Return exact_match and f1, in percent.

        If some questions have no answer, add those of the questions with answers and of those without, such as
        has_answer_f1 and no_answer_f1.

        Args:
            threshold: no answer is given to questions whose `no_answer` is above it; others get the predicted one.
        """
        is_withheld = self.no_answer > threshold
        parts = {"": np.ones_like(self.has_answer)}
        if not self.has_answer.all():
            parts |= {"has_answer_": self.has_answer, "no_answer_": ~self.has_answer}
        by_metric: dict[str, np.ndarray] = {"exact_match": self.exact_match, "f1": self.f1}
        metrics = {}
        for prefix, is_part in parts.items():
            for metric, given in by_metric.items():
                scores = np.where(is_withheld, ~self.has_answer, given)[is_part]
                if scores.size:
                    metrics[prefix + metric] = 100 * float(scores.mean())
        return metrics

    def best_threshold(self, metric: Metric) -> tuple[float, float]:
        """Return the threshold by which a metric is highest, the lowest of several, and what it is then, in percent.

        A threshold is one of the numbers of `no_answer`, or is just below all of them. (The official script counts
        questions of equal numbers one by one, and so may find what no threshold reaches.)
        """
        given = self.exact_match if metric == "exact_match" else self.f1
        order = np.argsort(self.no_answer, kind="stable")
        numbers = self.no_answer[order]
        gains = (given - ~self.has_answer)[order]
        totals = np.count_nonzero(~self.has_answer) + np.concatenate([[0.0], np.cumsum(gains)])
        is_reached = np.concatenate([[True], numbers[1:] > numbers[:-1], [True]])
        totals[~is_reached] = -np.inf
        best = int(np.argmax(totals))
        threshold = numbers[best - 1] if best else np.nextafter(numbers[0], -np.inf)
        return float(threshold), 100 * float(totals[best]) / len(numbers)


def normalised_words(text: str) -> list[str]:
    """Return the words that are compared: lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def f1_of_words(predicted: list[str], true: list[str]) -> float:
    """Return the harmonic mean of precision and recall of words, whatever their order; without words 1 if both are."""
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))
