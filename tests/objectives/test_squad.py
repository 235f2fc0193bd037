"""Metrics of answers against slow writings of the official script's definitions."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from txl_dist.objectives.squad import AnswerScores

DEV = Path(__file__).parents[3] / "shared" / "data" / "squad2" / "dev.json"

# Question, true answers, prediction, number that speaks for no answer, exact match, F1.
CASES = [
    ("case, articles, punctuation", ["The Eiffel Tower!"], "eiffel  tower", 0.1, 1, 1),
    ("the best of several", ["Paris, France", "Paris"], "the Paris", 0.4, 1, 1),
    ("some words, one twice", ["a big big red car"], "big big bus bus", 0.2, 0, 2 * 2 / (4 + 4)),
    ("nothing in common", ["blue"], "red", 0.9, 0, 0),
    ("none given", ["blue"], "", 0.3, 0, 0),
    ("an answer without a word is not one", ["the", "red"], "", 0.45, 0, 0),
    ("none, and none given", [], "", 0.8, 1, 1),
    ("none, but one given", [], "red", 0.6, 0, 0),
    ("none, and no word given", [], "the ...", 0.7, 1, 1),
    ("a word that has an article in it", ["theatre"], "atre", 0.5, 0, 0),
]


def scores_of(cases):
    names, answers, predictions, no_answer, *_ = zip(*cases, strict=True)
    return AnswerScores.of(
        dict(zip(names, predictions, strict=True)),
        dict(zip(names, no_answer, strict=True)),
        dict(zip(names, answers, strict=True)),
    )


def test_each_answer():
    scores = scores_of(CASES)
    assert scores.exact_match.tolist() == [case[4] for case in CASES]
    assert scores.f1.tolist() == pytest.approx([case[5] for case in CASES])
    assert scores.has_answer.tolist() == [bool(case[1]) for case in CASES]


def test_metrics_of_questions_with_and_without_answers():
    found = scores_of(CASES).metrics()
    assert found == {
        "exact_match": pytest.approx(100 * 4 / 10),
        "f1": pytest.approx(100 * 4.5 / 10),
        "has_answer_exact_match": pytest.approx(100 * 2 / 7),
        "has_answer_f1": pytest.approx(100 * 2.5 / 7),
        "no_answer_exact_match": pytest.approx(100 * 2 / 3),
        "no_answer_f1": pytest.approx(100 * 2 / 3),
    }
    assert set(scores_of(CASES[:6]).metrics()) == {"exact_match", "f1"}
    assert set(scores_of(CASES[6:9]).metrics()) == {"exact_match", "f1", "no_answer_exact_match", "no_answer_f1"}


def test_above_the_threshold_no_answer_is_given():
    """One at the threshold is given."""
    found = scores_of(CASES).metrics(threshold=0.5)
    assert found["no_answer_f1"] == 100 and found["has_answer_f1"] == pytest.approx(100 * 2.5 / 7)
    found = scores_of(CASES).metrics(threshold=0.35)  # that of "the best of several" is 0.4
    assert found["has_answer_exact_match"] == pytest.approx(100 * 1 / 7)


def metrics_by_hand(scores, threshold, metric):
    given = getattr(scores, metric)
    total = 0.0
    for number, (no_answer, has_answer) in enumerate(zip(scores.no_answer, scores.has_answer, strict=True)):
        total += float(not has_answer) if no_answer > threshold else given[number]
    return 100 * total / len(given)


def assert_best(scores, metric):
    threshold, best = scores.best_threshold(metric)
    assert best == pytest.approx(scores.metrics(threshold)[metric])
    candidates = [scores.no_answer.min() - 1, *np.unique(scores.no_answer)]
    by_hand = [metrics_by_hand(scores, candidate, metric) for candidate in candidates]
    assert best == pytest.approx(max(by_hand))
    lowest = candidates[int(np.argmax(np.array(by_hand) > best - 1e-9))]
    assert threshold == lowest or lowest < scores.no_answer.min() > threshold


@pytest.mark.parametrize("metric", ["exact_match", "f1"])
def test_best_threshold(metric):
    """Also where questions have the same number: a threshold takes all or none of them."""
    assert_best(scores_of(CASES), metric)
    for seed in range(200):
        rng = random.Random(seed)
        cases = [(number, *rng.choice(CASES)[1:3], rng.randint(-2, 2)) for number in range(rng.randint(1, 8))]
        assert_best(scores_of(cases), metric)


# ------------------------------------------------------------------------- the official script's way, on its own data


def normalise_by_hand(text):
    text = "".join(ch for ch in text.lower() if ch not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_by_hand(true, predicted):
    true, predicted = normalise_by_hand(true).split(), normalise_by_hand(predicted).split()
    if not true or not predicted:
        return float(true == predicted)
    left, same = list(true), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(true)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.skipif(not DEV.is_file(), reason="needs the dev set of SQuAD 2.0")
def test_all_of_the_dev_set():
    """With made-up predictions: true answers, parts of the passage, and none."""
    rng = random.Random(1)
    answers, predictions, no_answer = {}, {}, {}
    for article in json.loads(DEV.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            words = paragraph["context"].split()
            for question in paragraph["qas"]:
                texts = [answer["text"] for answer in question["answers"]]
                start = rng.randrange(len(words))
                anything = " ".join(words[start : start + rng.randint(1, 4)])
                answers[question["id"]] = texts
                predictions[question["id"]] = rng.choice(["", anything, *texts, *texts])
                no_answer[question["id"]] = rng.gauss(0 if texts else 1, 1)
    scores = AnswerScores.of(predictions, no_answer, answers)
    for number, (name, true) in enumerate(answers.items()):
        true = [answer for answer in true if normalise_by_hand(answer)] or [""]
        predicted = predictions[name]
        exact = max(normalise_by_hand(answer) == normalise_by_hand(predicted) for answer in true)
        assert scores.exact_match[number] == exact
        assert scores.f1[number] == pytest.approx(max(f1_by_hand(answer, predicted) for answer in true))
    for metric in ("exact_match", "f1"):
        for threshold in (-0.5, 0.7):
            assert scores.metrics(threshold)[metric] == pytest.approx(metrics_by_hand(scores, threshold, metric))
        threshold, best = scores.best_threshold(metric)
        official = official_best(scores, metric)
        assert (threshold, best) == pytest.approx(official)
        assert best > scores.metrics()[metric] + 1


def official_best(scores, metric):
    """find_best_thresh of the official script, where all numbers differ and the best is above 0."""
    given = getattr(scores, metric)
    current = best = int((~scores.has_answer).sum())
    best_threshold = 0.0
    for number in sorted(range(len(given)), key=lambda number: scores.no_answer[number]):
        current += given[number] if scores.has_answer[number] else given[number] - 1
        if current > best:
            best = current
            best_threshold = scores.no_answer[number]
    return best_threshold, 100 * best / len(given)
