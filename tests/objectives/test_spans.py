"""Which tokens of a stretch are predicted, in which order, and who sees whom: against the definitions."""

import numpy as np
import pytest

from txl_dist.objectives.spans import CUMULATIVE, draw_order, draw_targets, ranks


def visible_by_definition(inputs, is_masked, order, specials):
    """Return what each position of a stretch sees: of the content [n, n], and as a query [n, n].

    Literally as the authors define it (data_utils.py, `_local_perm`; modeling.py, `non_tgt_mask`).
    """
    is_special = np.isin(inputs, specials)
    is_context = ~is_masked & ~is_special
    is_target = is_masked & ~is_special
    index = np.where(is_context, -1, order)
    of_row = np.where(is_target, index, index + 1)
    perm_mask = (of_row[:, None] <= index[None, :]) & ~is_context[None, :]
    non_tgt_mask = perm_mask & ~np.eye(len(inputs), dtype=bool)  # the content stream always sees itself
    return ~non_tgt_mask, ~perm_mask


def blocks(one, other):
    """Return what positions of a segment see, where the first part sees nothing of the second, which sees all of it."""
    first, second = len(one), len(other)
    return np.block([[one, np.zeros((first, second), bool)], [np.ones((second, first), bool), other]])


def test_ranks_are_the_masks_of_the_authors():
    rng = np.random.default_rng(1)
    for _ in range(500):
        perm_size = int(rng.integers(1, 9))
        reuse_len, new = (perm_size * int(rng.integers(1, 6)) for _ in range(2))
        length = reuse_len + new
        inputs = rng.integers(5, 50, length)
        sep, cls = 3, 4
        is_special = np.zeros(length, bool)
        if new >= 5:
            is_special[[reuse_len + new // 2, length - 2, length - 1]] = True
            inputs[is_special] = [sep, sep, cls]
        is_masked = rng.random(length) < rng.random()  # special ones among them, as with the authors
        order = np.concatenate([draw_order(reuse_len, perm_size, rng), draw_order(new, perm_size, rng)])
        halves = (slice(0, reuse_len), slice(reuse_len, length))
        seen = [visible_by_definition(inputs[half], is_masked[half], order[half], (sep, cls)) for half in halves]
        content, query = (blocks(*parts) for parts in zip(*seen, strict=True))

        is_target = is_masked & ~is_special
        rank = ranks(~is_target & ~is_special, order, reuse_len)
        assert rank.min() >= 0
        assert np.array_equal(rank[None, :] <= rank[:, None], content)
        assert np.array_equal((rank[None, :] < rank[:, None])[is_target], query[is_target])


@pytest.mark.parametrize("length, perm_size", [(12, 12), (12, 4), (6, 1)])
def test_an_order_is_that_of_the_blocks_and_the_same_within_each(length, perm_size):
    rng = np.random.default_rng(5)
    orders = [draw_order(length, perm_size, rng) for _ in range(200)]
    for order in orders:
        by_block = order.reshape(-1, perm_size) - np.arange(0, length, perm_size)[:, None]
        assert sorted(order.tolist()) == list(range(length))
        assert (by_block == by_block[0]).all() and sorted(by_block[0].tolist()) == list(range(perm_size))
    firsts = {int(order[0]) for order in orders}
    assert firsts == set(range(perm_size))


def stretch(rng, length=64, specials=True):
    begins_word = rng.random(length) < 0.6
    is_special = np.zeros(length, bool)
    if specials:
        is_special[[0, 1, int(rng.integers(3, length - 1))]] = True
    return begins_word, is_special


@pytest.mark.parametrize("kind", ["words", "tokens"])
@pytest.mark.parametrize("specials", [True, False])
def test_exactly_so_many_are_chosen_and_never_a_special_one(kind, specials):
    rng = np.random.default_rng(6)
    for _ in range(300):
        begins_word, is_special = stretch(rng, specials=specials)
        begins_word &= rng.random() > 0.1  # a text without the start of a word, at times
        most = int((~is_special).sum())
        for count in (0, 1, 10, most - 1, int(rng.integers(most))):
            chosen = draw_targets(begins_word, is_special, count, kind, rng)
            assert chosen.sum() == count and not (chosen & is_special).any()


def runs(chosen):
    """Yield begin and end of each run of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def cuts(begins_word, is_special, chosen):
    """Count the runs that begin within a word, and those that end within one."""
    at_start = sum(not begins_word[begin] for begin, _ in runs(chosen))
    ends = [end for _, end in runs(chosen) if end < len(chosen)]
    return at_start, sum(not (begins_word[end] or is_special[end]) for end in ends)


def test_words_are_predicted_whole_and_tokens_are_not():
    rng = np.random.default_rng(7)
    at_start, at_end, tokens_at_start, tokens_at_end, number = 0, 0, 0, 0, 0
    for _ in range(400):
        begins_word, is_special = stretch(rng)
        chosen = draw_targets(begins_word, is_special, 10, "words", rng)
        one, other = cuts(begins_word, is_special, chosen)
        at_start += one
        at_end += other
        number += len(list(runs(chosen)))
        one, other = cuts(begins_word, is_special, draw_targets(begins_word, is_special, 10, "tokens", rng))
        tokens_at_start += one
        tokens_at_end += other
    assert at_start == 0
    assert at_end < 0.01 * number  # where no word was short enough
    assert tokens_at_end > 0.15 * number and tokens_at_start > 0


def test_a_word_that_is_too_long_is_predicted_from_its_start_on():
    begins_word = np.zeros(20, bool)
    begins_word[[0, 10]] = True
    for seed in range(20):
        chosen = draw_targets(begins_word, np.zeros(20, bool), 4, "words", np.random.default_rng(seed))
        assert [(begin, end) for begin, end in runs(chosen)] in ([(0, 4)], [(10, 14)])


def test_spans_are_2_19_words_long_on_average():
    assert CUMULATIVE[-1] == pytest.approx(1)
    probabilities = np.diff(CUMULATIVE, prepend=0)
    assert probabilities @ np.arange(1, 6) == pytest.approx(2.19, abs=0.005)
    # In a stretch in which every token is a word, and which is long enough: nothing is filled up.
    length = 20_000
    begins_word, is_special = np.ones(length, bool), np.zeros(length, bool)
    chosen = draw_targets(begins_word, is_special, 2000, "words", np.random.default_rng(8))
    lengths = [end - begin for begin, end in runs(chosen)]
    assert np.flatnonzero(chosen)[-1] < length - 100
    assert np.mean(lengths) == pytest.approx(2.19, abs=0.15) and max(lengths) <= 7
    counts = np.bincount(lengths, minlength=6)[1:6] / len(lengths)
    assert counts == pytest.approx(probabilities, abs=0.05)
    assert chosen[: np.flatnonzero(chosen)[-1]].mean() == pytest.approx(1 / 7, abs=0.01)


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_no_part_of_a_stretch_is_favoured(kind):
    """A word has two tokens on average, and its context is as much longer: spans go on to the end of the stretch."""
    rng = np.random.default_rng(10)
    chosen = []
    for _ in range(1500):
        begins_word = rng.random(240) < 0.5
        chosen.append(draw_targets(begins_word, np.zeros(240, bool), 34, kind, rng))
    shares = np.mean(chosen, axis=0).reshape(8, 30).mean(axis=1)
    assert shares.min() > 0.075 and shares.max() < 0.17, shares


def test_where_spans_are_too_few_single_ones_are_chosen_anywhere():
    """About a seventh come from spans: the others are everywhere, also at the end, which spans do not reach."""
    begins_word, is_special = np.ones(60, bool), np.zeros(60, bool)
    rng = np.random.default_rng(9)
    for kind in ("words", "tokens"):
        chosen = np.mean([draw_targets(begins_word, is_special, 20, kind, rng) for _ in range(2000)], axis=0)
        assert chosen.min() > 0.15 and chosen.mean() == pytest.approx(1 / 3)
