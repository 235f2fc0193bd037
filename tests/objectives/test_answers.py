"""Answers that are found in a passage, by hand and against a slow writing of the definition."""

import numpy as np
import pytest
import torch

from txl_dist.models.heads import SpanHead, SpanPredictions
from txl_dist.objectives.answers import Span, find_answer, has_most_context


def windows(*rows):
    """Windows of positions that hold these tokens of the passage; "." is no token of it."""
    return np.array([[-1 if token == "." else int(token) for token in row] for row in rows])


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
    """Token 4 is in both, with more context in the first one, so no answer of the second may start there."""
    rows = windows(".01234567", "...456789")
    first = ({5: (-3.0, {5: -1.0})}, 0.25)
    for token, expected in {4: [Span(-4.0, 4, 4)], 6: [Span(-1.0, 6, 6), Span(-4.0, 4, 4)]}.items():
        position = token - 1
        second = ({position: (-0.5, {position: -0.5})}, -0.75)
        answer = find_answer(predictions(first, second), rows, 5)
        assert answer.spans == expected and answer.no_answer == -0.75


def test_the_window_with_most_context():
    """It is the one whose nearer end is farther away, else the longer one, else the first."""
    rows = windows(".012345", "..23456", ".......", "6789...", "...6789")
    marks = [".xxxx..", "....xxx", ".......", ".xxx...", "......."]
    assert [["x" if most else "." for most in row] for row in has_most_context(rows)] == [list(row) for row in marks]


def context_by_hand(row, token):
    held = [other for other in row if other >= 0]
    before, behind = sum(other < token for other in held), sum(other > token for other in held)
    return min(before, behind) + 0.01 * len(held)


def spans_by_hand(found, rows, max_answer_tokens):
    spans = []
    for window in range(len(found.start)):
        for beam, start in enumerate(found.start[window].tolist()):
            for rank, end in enumerate(found.end[window, beam].tolist()):
                first, last = int(rows[window, start]), int(rows[window, end])
                if first < 0 or last < first or last - first >= max_answer_tokens:
                    continue
                contexts = [context_by_hand(row, first) if first in row else 0 for row in rows]
                if contexts.index(max(contexts)) == window:
                    log_prob = found.start_log_prob[window, beam] + found.end_log_prob[window, beam, rank]
                    spans.append(Span(float(log_prob), first, last))
    return sorted(spans, key=lambda span: -span.log_prob)


@pytest.mark.parametrize("seed", range(5))
def test_all_windows_of_a_head(seed):
    torch.manual_seed(seed)
    rows = windows("..012345", ".3456789", "...6789.")
    possible = torch.from_numpy(rows >= 0).long()
    possible[:, -1] = 1
    targets = torch.cat([torch.zeros(3, 2, dtype=torch.int64), possible], dim=1)
    head = SpanHead(width=4, beams=4)
    head.initialise(1.0)
    found = SpanPredictions.unpack(head.outputs(torch.randn(*rows.shape, 4), targets).detach())
    answer = find_answer(found, rows, 3, n_best=100)
    expected = spans_by_hand(found, rows, 3)
    assert answer.spans == expected and len(expected) > 5
    assert answer.no_answer == min(found.no_answer.tolist())
