"""Lanes that read forward and backward, the text as they read it, and pairs of stretches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_dist.data.lanes import Origin
from txl_dist.data.two_way import DirectedText, TwoWayPlan, draw_pair, fitted, overlap

TOKENS = 211
STRIDE = 8


class Text:
    """A text whose tokens are their positions."""

    def tokens(self, start, length):
        assert 0 <= start <= start + length <= TOKENS
        return np.arange(start, start + length, dtype="<u2")


def plan(num_lanes=6, both_ways=True, **options):
    return TwoWayPlan(np.array([0, 50, TOKENS], np.uint64), num_lanes, STRIDE, both_ways, **options)


def read(plan, lane, steps):
    """Return the positions in the text of what a lane moves on by, in the order in which it reads."""
    text = DirectedText(Text(), TOKENS, plan.direction(lane))
    return np.concatenate([text.tokens(plan.reading_position(lane, step), STRIDE) for step in steps])


def test_half_of_the_lanes_read_the_same_parts_backward():
    lanes = plan()
    assert [lanes.direction(lane) for lane in range(6)] == [1, 1, 1, -1, -1, -1]
    assert [lanes.part(lane) for lane in range(3)] == [range(0, 70), range(70, 140), range(140, 211)]
    for lane in range(3):
        part = lanes.part(lane)
        assert lanes.part(3 + lane) == part
        on = np.arange(part.start, part.start + 100 * STRIDE) % TOKENS
        assert np.array_equal(read(lanes, lane, range(100)), on)
        back = np.arange(part.stop - 1, part.stop - 1 - 100 * STRIDE, -1) % TOKENS
        assert np.array_equal(read(lanes, 3 + lane, range(100)), back)


def test_in_one_direction_there_are_as_many_parts_as_lanes():
    lanes = plan(both_ways=False)
    assert [lanes.direction(lane) for lane in range(6)] == [1] * 6
    assert [lanes.part(lane).start for lane in range(6)] == [0, 35, 70, 105, 140, 175]


@pytest.mark.parametrize("both_ways", [True, False])
def test_a_pass_reads_every_token_in_each_direction(both_ways):
    lanes = plan(both_ways=both_ways)
    for direction in {lanes.direction(lane) for lane in range(6)}:
        own = [lane for lane in range(6) if lanes.direction(lane) == direction]
        positions = np.concatenate([read(lanes, lane, range(lanes.steps)) for lane in own])
        assert set(positions.tolist()) == set(range(TOKENS))
        positions = np.concatenate([read(lanes, lane, range(lanes.steps - 1)) for lane in own])
        assert len(set(positions.tolist())) < TOKENS


def test_the_spans_are_the_text_that_is_read():
    lanes = plan()
    for lane in range(6):
        for step in range(60):
            spans = lanes.spans(lane, step)
            positions = np.concatenate([np.arange(span.position, span.position + span.length) for span in spans])
            assert np.array_equal(positions[:: lanes.direction(lane)], read(lanes, lane, [step]))
            assert {span.history for span in spans} == {step * STRIDE}


def test_other_lanes_go_on_at_the_same_share_of_the_epoch():
    """After 30 of 70 tokens of each part, in both directions."""
    lanes = plan(num_lanes=2, origin=Origin(step=5, tokens=180))
    assert lanes.reading_position(0, 5) == 90 and lanes.reading_position(1, 5) == -TOKENS + 90
    assert lanes.history(5) == 0 and lanes.history(7) == 2 * STRIDE


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("starts", [[0], [0, 1, 2, 30, 31, 90, TOKENS - 1], [4, 100]])
def test_sentences_begin_where_a_reader_finds_them(direction, starts):
    """Followed by hand: each token has the number of its sentence; one begins where the number changes."""
    text = DirectedText(Text(), TOKENS, direction, np.array(starts, np.uint64))
    sentence_of = np.searchsorted(starts, np.arange(TOKENS), side="right") % len(starts)
    low, high = -2 * TOKENS, 2 * TOKENS
    read = text.tokens(low, high - low)
    number = sentence_of[read]
    is_start = number[1:] != number[:-1]
    if len(starts) == 1:  # it is followed by itself
        is_start = read[1:] == (starts[0] if direction == 1 else (starts[0] - 1) % TOKENS)
    expected = low + 1 + np.flatnonzero(is_start)
    for begin, end in [(low + 1, high), (-5, 40), (17, 17), (30, 31), (TOKENS - 3, TOKENS + 3)]:
        between = expected[(expected >= begin) & (expected < end)]
        assert np.array_equal(text.sentences_between(begin, end), between)
    for position in range(-TOKENS, TOKENS, 7):
        assert text.sentence_from(position) == expected[expected >= position][0]
        assert text.sentence_of(position) == expected[expected <= position][-1]


@given(st.integers(0, 60), st.integers(0, 60), st.data())
def test_the_longer_stretch_is_cut_token_by_token(a, b, data):
    total = data.draw(st.integers(0, a + b))
    pair = fitted(100, 100 + a, 500, 500 + b, total, follows=False)
    while a + b > total:
        if a > b:
            a -= 1
        else:
            b -= 1
    assert pair == (100, a, 500, b, False)


@given(st.integers(-50, 50), st.integers(1, 12), st.integers(-50, 50), st.integers(1, 12))
def test_stretches_overlap_where_they_have_a_token_in_common(one, one_length, other, other_length):
    tokens = 30
    both = {(one + i) % tokens for i in range(one_length)} & {(other + i) % tokens for i in range(other_length)}
    assert overlap(one, one_length, other, other_length, tokens) == bool(both)


class LongText:
    """20,000 tokens, and a sentence of 3 to 20 of them after another."""

    tokens = 20_000
    starts = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(3, 21, 3000))])
    starts = starts[starts < tokens].astype(np.uint64)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_pair_is_two_stretches_that_end_with_sentences(direction):
    text = DirectedText(None, LongText.tokens, direction, LongText.starts)
    part = range(4000, 12_000) if direction == 1 else range(-12_000, -4000)
    total = 61
    rng = np.random.default_rng(1)
    pairs = []
    for first in np.random.default_rng(2).integers(part.start, part.stop, 2000).tolist():
        pair = draw_pair(text, first, first + 64, total, part, rng)
        assert pair.a_begin == first + 64 and pair.a_length + pair.b_length == total
        assert pair.a_length > 0 and pair.b_length > 0
        a_end = pair.a_begin + pair.a_length
        if pair.follows:  # to the token, where A is not cut to make room for B
            assert pair.b_begin == text.sentence_of(pair.b_begin) and 0 <= pair.b_begin - a_end < 21
            assert pair.b_begin == a_end or pair.a_length > total // 2
        else:
            assert part.start <= pair.b_begin < part.stop
            assert pair.b_begin in (text.sentence_of(pair.b_begin), part.start)
            assert not overlap(first, a_end - first, pair.b_begin, pair.b_length, LongText.tokens)
        pairs.append(pair)
    assert np.mean([pair.follows for pair in pairs]) == pytest.approx(0.5, abs=0.04)
    ends = np.array([text.sentence_from(pair.a_begin + pair.a_length) for pair in pairs])
    lengths = np.array([pair.a_length for pair in pairs])
    whole = ends == [pair.a_begin + pair.a_length for pair in pairs]
    assert whole[lengths < total // 2].all() and whole.mean() > 0.5
    # Anywhere in the part.
    others = [pair.b_begin - part.start for pair in pairs if not pair.follows]
    assert np.histogram(others, bins=4, range=(0, len(part)))[0].min() > 200


def test_without_the_end_of_a_sentence_the_second_stretch_is_another():
    text = DirectedText(None, LongText.tokens, 1, np.array([0], np.uint64))
    rng = np.random.default_rng(3)
    for _ in range(50):
        pair = draw_pair(text, 5000, 5064, 61, range(4000, 12_000), rng)
        assert not pair.follows and pair.a_length + pair.b_length == 61 and pair.b_length > 0


def test_a_part_that_is_too_short_is_read_all_the_same():
    text = DirectedText(None, LongText.tokens, 1, LongText.starts)
    rng = np.random.default_rng(4)
    for first in range(4000, 4010):
        pair = draw_pair(text, first, first + 64, 61, range(4000, 4010), rng)
        assert pair.a_length + pair.b_length == 61 and pair.b_length > 0
