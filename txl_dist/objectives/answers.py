"""The answer to a question about a passage, found in what a head predicts of each window of the passage.

A passage that is longer than a segment is read in windows that overlap, each with the whole question. A token may then
be in several of them: an answer is taken from the window that shows most of what stands around its first token, as
XLNet's authors do (run_squad.py).
"""

from typing import NamedTuple

import numpy as np

from txl_dist.models.heads import SpanPredictions


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


def find_answer(predictions: SpanPredictions, tokens: np.ndarray, max_answer_tokens: int, n_best: int = 20) -> Answer:
    """Find the best parts of a passage for one question.

    Whether there is an answer is what the window says that is surest of one.

    Args:
        predictions: of all windows of the passage, on the CPU.
        tokens: int64 [windows, length], for each position the number of its token in the passage, or -1.
        max_answer_tokens: longer parts are not answers.
        n_best: how many to return at most.
    """
    start_log_prob, start, end_log_prob, end, no_answer = (field.numpy() for field in predictions)
    start_token = np.take_along_axis(tokens, start, axis=1)[:, :, None]
    may_start = np.take_along_axis(has_most_context(tokens), start, axis=1)[:, :, None]
    end_token = np.take_along_axis(tokens, end.reshape(len(end), -1), axis=1).reshape(end.shape)
    length = end_token - start_token + 1
    is_span = may_start & (length >= 1) & (length <= max_answer_tokens)
    log_prob = start_log_prob[:, :, None] + end_log_prob
    starts = np.broadcast_to(start_token, end.shape)
    found = map(Span, log_prob[is_span].tolist(), starts[is_span].tolist(), end_token[is_span].tolist())
    spans = sorted(found, key=lambda span: (-span.log_prob, span.start, span.end))
    return Answer(spans[:n_best], float(no_answer.min()))


def has_most_context(tokens: np.ndarray) -> np.ndarray:
    """Return for each position of each window whether no other window has more context of its token of the passage.

    Context is the smaller of what stands before and behind it, and a hundredth of all that the window has; of windows
    with equally much it is the first. Positions without a token have none.

    Args:
        tokens: those of `find_answer`, of each window in a row.
    """
    in_passage = tokens >= 0
    last = tokens.max(axis=1, keepdims=True)
    first = np.where(in_passage, tokens, last).min(axis=1, keepdims=True)
    window = np.arange(len(tokens))[:, None]
    contexts = np.full((len(tokens), tokens.max() + 2), -np.inf)  # the last column is that of -1
    contexts[window, tokens] = np.minimum(tokens - first, last - tokens) + 0.01 * (last - first + 1)
    has_most: np.ndarray = in_passage & (contexts.argmax(axis=0)[tokens] == window)
    return has_most
