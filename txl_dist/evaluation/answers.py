"""The answer to a question about a passage, found in what a head predicts of each window of the passage.

A passage that is longer than a segment is read in windows that overlap, each with the whole question. A token may then
be in several of them: an answer is taken from the window that shows most of what stands around its first token, as
XLNet's authors do (run_squad.py).
"""

from typing import NamedTuple

import numpy as np

from txl_dist.models.heads import SpanPredictions


class Windows(NamedTuple):
    """What the segments of one question hold.

    Attributes:
        token: int64 [windows, length], for each position the number of its token in the passage, or -1.
        has_most_context: bool [windows, length], whether this window has the most context of that token.
    """

    token: np.ndarray
    has_most_context: np.ndarray


class Span(NamedTuple):
    """A part of a passage: its first and its last token, and the log-probability of both, in nats."""

    log_prob: float
    start: int
    end: int


class Answer(NamedTuple):
    """What is found for a question.

    Attributes:
        spans: the best first; none where no prediction is a part of the passage.
        no_answer: higher where it is likelier that there is no answer.
    """

    spans: list[Span]
    no_answer: float


def find_answer(predictions: SpanPredictions, windows: Windows, max_answer_tokens: int, n_best: int = 20) -> Answer:
    """Find the best parts of a passage for one question.

    Whether there is an answer is what the window says that is surest of one.

    Args:
        predictions: of the windows, on the CPU.
        max_answer_tokens: longer parts are no answers.
        n_best: how many to return at most.
    """
    start_log_prob, start, end_log_prob, end, no_answer = (field.numpy() for field in predictions)
    start_token = np.take_along_axis(windows.token, start, axis=1)[:, :, None]
    may_start = np.take_along_axis(windows.has_most_context, start, axis=1)[:, :, None]
    end_token = np.take_along_axis(windows.token, end.reshape(len(end), -1), axis=1).reshape(end.shape)
    length = end_token - start_token + 1
    is_span = may_start & (start_token >= 0) & (end_token >= 0) & (length >= 1) & (length <= max_answer_tokens)
    log_prob = start_log_prob[:, :, None] + end_log_prob
    starts = np.broadcast_to(start_token, end.shape)
    found = map(Span, log_prob[is_span].tolist(), starts[is_span].tolist(), end_token[is_span].tolist())
    spans = sorted(found, key=lambda span: (-span.log_prob, span.start, span.end))
    return Answer(spans[:n_best], float(no_answer.min()))
