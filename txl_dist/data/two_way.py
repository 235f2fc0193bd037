"""Lanes that read forward and backward: where each stands, the text as it reads it, and pairs of stretches.

Half of the lanes may read the text backward, so that a model remembers what comes after, too (Yang et al. 2019, section
2.5). All is said in *reading positions*: in forward lanes those of the text; in backward lanes reading position r is
the text's -1 - r. Positions go round and round: those that differ by the length of the text are the same token.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from txl_dist.data.lanes import BEGINNING, LanePlan, Origin, Span
from txl_dist.data.samples import SampleReader

SEPARATOR = "<sep>"  # stands behind each of two stretches of text
CLASSIFIER = "<cls>"  # stands behind both
TRIES = 8  # to find a second stretch that is not the text of the first


class TwoWayPlan(LanePlan):
    """The endless streams of lanes in both directions; the text is read as it stands.

    Of num_lanes = 2p lanes, lane k < p starts at the k-th of p equal parts of the text and reads on, round and round;
    lane p + k starts at the end of the same part and reads backward, round and round. So an epoch, one part's length,
    reads every token once in each direction. With one direction there are as many parts as lanes.

    Args:
        starts: as of LanePlan.
        stride: how many tokens a lane moves on by in a step; it may read further ahead, and reads that again then.
        both_ways: whether half of the lanes read backward.
        origin: as of LanePlan.
    """

    def __init__(self, starts: np.ndarray, num_lanes: int, stride: int, both_ways: bool, origin: Origin = BEGINNING):
        super().__init__(starts, num_lanes, stride, origin=origin)
        assert not (both_ways and num_lanes % 2), num_lanes
        self.stride = stride
        self.num_parts = num_lanes // 2 if both_ways else num_lanes

    def direction(self, lane: int) -> int:
        """Return 1 for a lane that reads forward, -1 for one that reads backward."""
        return 1 if lane < self.num_parts else -1

    def part(self, lane: int) -> range:
        """Return the positions in the text of the part that a lane reads in its first epoch."""
        number = lane % self.num_parts
        return range(number * self.tokens // self.num_parts, (number + 1) * self.tokens // self.num_parts)

    def reading_part(self, lane: int) -> range:
        """Return the reading positions of that part."""
        part = self.part(lane)
        return part if self.direction(lane) == 1 else range(-part.stop, -part.start)

    def history(self, step: int) -> int:
        """Return how many tokens a lane has moved on by when `step` steps are done: those that it may remember."""
        return (step - self.origin.step) * self.stride

    def reading_position(self, lane: int, step: int) -> int:
        """Return the reading position of the first token that a lane reads at a step."""
        return self.reading_part(lane).start + self.origin.tokens // self.num_lanes + self.history(step)

    def spans(self, lane: int, step: int) -> list[Span]:
        """Return the spans of the text that a lane moves on by at a step, in the order of the text."""
        first = self.reading_position(lane, step)
        if self.direction(lane) == -1:
            first = -first - self.stride
        return [Span(at, length, self.history(step)) for at, length in pieces(first, self.stride, self.tokens)]

    @property
    def steps(self) -> int:
        """How many steps it takes until every token has been read at least once in each direction."""
        longest = max(len(self.part(lane)) for lane in range(self.num_parts))
        return -(-longest // self.stride)


def pieces(start: int, length: int, tokens: int) -> list[tuple[int, int]]:
    """Return position and length of each piece of a stretch that goes round a text of so many tokens."""
    ends = [*range((start // tokens + 1) * tokens, start + length, tokens), start + length]
    return [(begin % tokens, end - begin) for begin, end in pairwise([start, *ends])]


class DirectedText:
    """The text of a split as lanes of one direction read it.

    Args:
        direction: 1 or -1.
        sentence_starts: [sentences], the ascending positions in the text of each sentence's first token; None: not
            known, so that the text is one sentence.
    """

    def __init__(self, reader: SampleReader, tokens: int, direction: int, sentence_starts: np.ndarray | None = None):
        self.reader = reader
        self.length = tokens
        self.direction = direction
        known = sentence_starts is not None and len(sentence_starts)
        # int64 whatever the file says: numpy would compare unsigned positions as floats.
        self.starts = np.asarray(sentence_starts).view(np.int64) if known else np.zeros(1, np.int64)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Return the tokens int64 [length] from a reading position on, in reading order."""
        first = start if self.direction == 1 else -start - length
        parts = [self.reader.tokens(at, size) for at, size in pieces(first, length, self.length)]
        return np.concatenate(parts).astype(np.int64)[:: self.direction]

    # A backward reader comes to the border before the text's position t when it has read t, its position -1 - t: so at
    # its position -t.

    def sentences_between(self, start: int, stop: int) -> np.ndarray:
        """Return the reading positions, int64 ascending, from `start` up to `stop` at which a sentence begins."""
        if self.direction == 1:
            return self._between(start, stop)
        return -self._between(1 - stop, 1 - start)[::-1]

    def sentence_from(self, position: int) -> int:
        """Return the first reading position, from this one on, at which a sentence begins."""
        return self._after(position) if self.direction == 1 else -self._before(-position)

    def sentence_of(self, position: int) -> int:
        """Return the last reading position, up to this one, at which a sentence begins."""
        return self._before(position) if self.direction == 1 else -self._after(-position)

    def _between(self, start: int, stop: int) -> np.ndarray:
        found = [np.empty(0, np.int64)]
        for at, size in pieces(start, stop - start, self.length) if start < stop else []:
            low, high = np.searchsorted(self.starts, (at, at + size))
            found.append(self.starts[low:high] + (start - at))
            start += size
        return np.concatenate(found)

    def _after(self, position: int) -> int:
        rounds, at = divmod(position, self.length)
        number = int(np.searchsorted(self.starts, at))
        if number == len(self.starts):
            return (rounds + 1) * self.length + int(self.starts[0])
        return rounds * self.length + int(self.starts[number])

    def _before(self, position: int) -> int:
        rounds, at = divmod(position, self.length)
        number = int(np.searchsorted(self.starts, at, side="right")) - 1
        return (rounds - (number < 0)) * self.length + int(self.starts[number])


class Pair(NamedTuple):
    """Two stretches of text, A and B, in reading positions.

    Attributes:
        follows: whether B is what follows A.
    """

    a_begin: int
    a_length: int
    b_begin: int
    b_length: int
    follows: bool


def draw_pair(text: DirectedText, first: int, a_begin: int, total: int, part: range, rng: np.random.Generator) -> Pair:
    """Draw two stretches of text, of `total` tokens together (the authors' data_utils.py, `_split_a_and_b`).

    A ends where a sentence does, drawn from the ends within `total` tokens. With probability 1/2, or where no sentence
    ends there, B is a random stretch of the lane's part, widened to whole sentences; else B is what follows A. The
    longer of both is cut at its right until they fit.

    The authors' random B may be a piece of A. Here it is drawn again, up to 8 times, if it is text of the segment
    itself, where the model would find what it is to predict. In their parts of millions of tokens that never happens.

    Args:
        first: the reading position of the segment's first token.
        a_begin: that of A's first token.
        part: the reading positions from which a random B is drawn.
    """
    coin, cut, *places = rng.random(2 + TRIES).tolist()
    end = text.sentence_from(a_begin + total)
    cuts = text.sentences_between(a_begin + 1, a_begin + total)
    a_end = int(cuts[int(cut * len(cuts))]) if len(cuts) else end
    if len(cuts) and coin >= 0.5:
        return fitted(a_begin, a_end, a_end, end, total, follows=True)
    length = max(1, total - (a_end - a_begin))
    for place in places:
        begin = part.start + int(place * max(1, len(part) - length))
        b_begin = max(text.sentence_of(begin), part.start)
        b_end = max(min(text.sentence_from(begin + length), part.stop), begin + length)
        pair = fitted(a_begin, a_end, b_begin, b_end, total, follows=False)
        own_length = a_begin + pair.a_length - first
        if not overlap(first, own_length, pair.b_begin, pair.b_length, text.length):
            break
    return pair


def overlap(one: int, one_length: int, other: int, other_length: int, tokens: int) -> bool:
    """Return whether two stretches of a text of so many tokens, which goes round and round, have some in common."""
    return (other - one) % tokens < one_length or (one - other) % tokens < other_length


def fitted(a_begin: int, a_end: int, b_begin: int, b_end: int, total: int, follows: bool) -> Pair:
    """Cut the longer of two stretches, token by token, until they have `total` tokens together; equal ones B first."""
    a_length = a_end - a_begin
    b_length = b_end - b_begin
    excess = a_length + b_length - total
    assert excess >= 0, (a_length, b_length, total)
    cut = min(abs(a_length - b_length), excess)
    if a_length > b_length:
        a_length -= cut
    else:
        b_length -= cut
    rest = excess - cut
    return Pair(a_begin, a_length - rest // 2, b_begin, b_length - (rest + 1) // 2, follows)
