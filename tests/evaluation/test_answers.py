"""Answers that are found in a passage, by hand and against a slow writing of the definition."""

import numpy as np
import pytest
import torch

from txl_dist.evaluation.answers import Span, Windows, find_answer
from txl_dist.models.heads import SpanHead, SpanPredictions

LENGTH = 8


def windows(*rows, most_context=None):
    """Windows of positions that hold these tokens of the passage; "." is no token of it."""
    token = np.array([[-1 if token == "." else int(token) for token in row] for row in rows])
    marks = most_context or ["x" * LENGTH] * len(rows)
    return Windows(token, np.array([[mark == "x" for mark in row] for row in marks]))


def predictions(*lanes):
    """Of each window: {start: (log-probability, {end: log-probability})}, and what speaks for no answer."""
    fields = {"start_log_prob": [], "start": [], "end_log_prob": [], "end": []}
    for starts, _ in lanes:
        fields["start"].append(list(starts))
        fields["start_log_prob"].append([log_prob for log_prob, _ in starts.values()])
        fields["end"].append([list(ends) for _, ends in starts.values()])
        fields["end_log_prob"].append([list(ends.values()) for _, ends in starts.values()])
    tensors = {name: torch.tensor(field) for name, field in fields.items()}
    return SpanPredictions(**tensors, no_answer=torch.tensor([no_answer for _, no_answer in lanes]))


def test_the_best_span_is_one_of_the_passage():
    """Positions 2 to 5 hold tokens 0 to 3. Better ones end before they start, are too long, or lie elsewhere."""
    one = predictions(
        (
            {
                3: (-1.0, {2: -0.25, 4: -2.0, 7: -0.5}),
                2: (-2.0, {5: -0.5, 4: -1.5, 3: -4.0}),
                1: (0.0, {3: 0.0, 4: 0.0, 5: 0.0}),
            },
            0.5,
        )
    )
    answer = find_answer(one, windows("..0123.."), max_answer_tokens=3)
    assert answer.spans == [Span(-3.0, 1, 2), Span(-3.5, 0, 2), Span(-6.0, 0, 1)] and answer.no_answer == 0.5
    assert find_answer(one, windows("..0123.."), 4).spans[0] == Span(-2.5, 0, 3)
    assert find_answer(one, windows("..0123.."), 4, n_best=2).spans == [Span(-2.5, 0, 3), Span(-3.0, 1, 2)]
    assert find_answer(one, windows("......01"), 4).spans == []


def test_windows_that_overlap():
    """Token 3 is in both; the first window has more context of it, so it is the one whose answers may start there."""
    first = ({4: (-3.0, {4: -1.0})}, 0.25)
    second = ({1: (-0.5, {2: -0.5})}, -0.75)
    rows = windows(".0123...", "..345...")
    rows.token[1, 1] = 3
    rows.token[1, 2] = 4
    rows = rows._replace(has_most_context=np.array([[True] * 8, [True, False] + [True] * 6]))
    answer = find_answer(predictions(first, second), rows, 5)
    assert answer.spans == [Span(-4.0, 3, 3)] and answer.no_answer == -0.75
    rows.has_most_context[1, 1] = True
    assert find_answer(predictions(first, second), rows, 5).spans == [Span(-1.0, 3, 4), Span(-4.0, 3, 3)]


def spans_by_hand(found, rows, max_answer_tokens):
    spans = []
    for window in range(len(found.start)):
        for beam, start in enumerate(found.start[window].tolist()):
            for rank, end in enumerate(found.end[window, beam].tolist()):
                first, last = int(rows.token[window, start]), int(rows.token[window, end])
                if first < 0 or last < first or last - first >= max_answer_tokens:
                    continue
                if rows.has_most_context[window, start]:
                    log_prob = found.start_log_prob[window, beam] + found.end_log_prob[window, beam, rank]
                    spans.append(Span(float(log_prob), first, last))
    return sorted(spans, key=lambda span: -span.log_prob)


@pytest.mark.parametrize("seed", range(5))
def test_all_windows_of_a_head(seed):
    torch.manual_seed(seed)
    rows = windows("..012345", ".3456789", "...6789.", most_context=["xxxxxxx.", "xx.xxx..", "xxxx.xxx"])
    possible = torch.from_numpy(rows.token >= 0).long()
    possible[:, -1] = 1
    targets = torch.cat([torch.zeros(3, 2, dtype=torch.int64), possible], dim=1)
    head = SpanHead(width=4, beams=4)
    head.initialise(1.0)
    found = SpanPredictions.unpack(head.outputs(torch.randn(3, LENGTH, 4), targets).detach())
    answer = find_answer(found, rows, 3, n_best=100)
    expected = spans_by_hand(found, rows, 3)
    assert answer.spans == expected and len(expected) > 5
    assert answer.no_answer == min(found.no_answer.tolist())
