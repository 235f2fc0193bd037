"""What permutation language modelling draws for a stretch of tokens: which of them are predicted, in which order.

All arrays are of one stretch [n]; those that say where words begin are in the order of the text, whoever reads it how.
"""

from typing import Literal

import numpy as np

SpanKind = Literal["words", "tokens"]

MAX_WORDS = 5  # of a span; n has a probability proportional to 1 / n, so that it is 2.19 on average
CONTEXT = 6  # of a span of n, 6n words or tokens around it are no targets of other spans

_shares = 1 / np.arange(1, MAX_WORDS + 1)
CUMULATIVE = np.cumsum(_shares / _shares.sum())


def draw_targets(
    begins_word: np.ndarray, is_special: np.ndarray, count: int, kind: SpanKind, rng: np.random.Generator
) -> np.ndarray:
    """Draw which tokens of a stretch are predicted: exactly `count`, and never a special one.

    Spans are drawn from left to right (the authors' data_utils.py, `_sample_mask`): n of 1 to 5, and a context of 6n on
    both sides of the span, which starts at a word. One that reaches the end of the stretch is dropped. They make up
    about a seventh of the stretch; what is missing of `count` is drawn at random.

    Args:
        begins_word: bool, in the order of the text.
        is_special: bool; a span ends before a special token.
        kind: words: a span is n whole words in a context of 6n words, and what is missing are whole words as well; only
            where none is short enough the beginning of one. tokens: as in the authors' code, a span is n tokens from
            the start of a word on in a context of 6n tokens, and what is missing are single tokens.

    Returns:
        bool.
    """
    length = len(begins_word)
    begins = np.flatnonzero(begins_word & ~is_special)
    # A word ends where the next one begins, at a special token, or with the stretch.
    borders = np.append(np.flatnonzero(begins_word | is_special), length)
    limits = np.append(np.flatnonzero(is_special), length)
    sizes = 1 + np.searchsorted(CUMULATIVE, rng.random(length), side="right").clip(max=MAX_WORDS - 1)
    shares = rng.random(length)
    chosen = np.zeros(length, bool)
    missing = count
    cursor = 0  # the first word (or token) behind the last span and its context
    for size, share in zip(sizes.tolist(), shares.tolist(), strict=True):
        if not missing:
            break
        size = min(size, missing)
        before = int(share * CONTEXT * size)
        after = CONTEXT * size - before
        number = cursor + before if kind == "words" else int(np.searchsorted(begins, cursor + before))
        if number >= len(begins):
            break
        begin = int(begins[number])
        limit = int(limits[np.searchsorted(limits, begin)])
        if kind == "words":
            ends = borders[np.searchsorted(borders, begin, side="right") :][:size]
            ends = ends[ends <= min(limit, begin + missing)]
            end = int(ends[-1]) if len(ends) else begin
            cursor = number + size + after
        else:
            end = min(begin + size, limit)
            cursor = end + after
        if end == length:
            break
        chosen[begin:end] = True
        missing -= end - begin
    if missing:
        _fill(chosen, begins, borders, is_special, missing, kind, rng)
    return chosen


def _fill(
    chosen: np.ndarray,
    begins: np.ndarray,
    borders: np.ndarray,
    is_special: np.ndarray,
    missing: int,
    kind: SpanKind,
    rng: np.random.Generator,
) -> None:
    """Choose `missing` tokens more, at random."""
    if kind == "words":
        words = rng.permutation(begins[~chosen[begins]])
        ends = borders[np.searchsorted(borders, words, side="right")]
        for begin, end in zip(words.tolist(), ends.tolist(), strict=True):
            if end - begin <= missing:
                chosen[begin:end] = True
                missing -= end - begin
        for begin in words[~chosen[words]][:1].tolist():  # all that are left are longer than what is missing
            chosen[begin : begin + missing] = True
            missing = 0
    rest = np.flatnonzero(~chosen & ~is_special)
    chosen[rng.permutation(rest)[:missing]] = True


def draw_order(length: int, perm_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the place of each token in the order of prediction: int64, a permutation of 0 ... length - 1.

    Blocks of perm_size tokens follow each other as in the stretch; within them one permutation is drawn, the same in
    all blocks (the authors' data_utils.py, `_local_perm`).
    """
    assert length % perm_size == 0, (length, perm_size)
    return (np.arange(0, length, perm_size)[:, None] + rng.permutation(perm_size)).reshape(-1)


def ranks(is_context: np.ndarray, order: np.ndarray, reuse_len: int) -> np.ndarray:
    """Return the rank of each token of a segment: who sees whom, in one number.

    Position i sees the content at j if rank[j] <= rank[i], and is predicted from those of a lower rank. So context,
    what is neither predicted nor special, is seen by all and sees context alone; the rest see those before them in the
    order. The first reuse_len tokens see none of the others, which see all of them: what becomes memory knows nothing
    of what is read again.

    Args:
        is_context: bool.
        order: int64, the places of the first reuse_len tokens, and those of the others, each beginning with 0.

    Returns:
        int64.
    """
    others = np.arange(len(order)) >= reuse_len
    return others * (reuse_len + 1) + np.where(is_context, 0, 1 + order)
