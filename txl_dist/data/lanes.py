"""The lane plan: which tokens each lane reads at each step, and which rank computes that lane.

A lane is one row of the global batch followed through time: one contiguous stream of tokens. What lane `l` reads at
step `t` is a pure function of (the split's index, seed, num_lanes, tgt_len); no rank, worker or world size enters. So
the data state of a run is one number, the step, and any step is found without visiting the steps before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

ResetMemory = Literal["never", "document"]


class Span(NamedTuple):
    """Consecutive tokens of a split's stream, read by one lane.

    Attributes:
        position: of the first token in the stream.
        length: in tokens.
        history: how many tokens right before the span the lane has read and may remember: its tokens since the run
            began or, where memory is reset at documents, since the document began.
    """

    position: int
    length: int
    history: int


@dataclass(frozen=True)
class LaneSplit:
    """The division of the lanes: lane -> (data-parallel rank, micro-batch, row).

    num_lanes = data_parallel x accumulation x micro_batch. A rank's lanes are neighbours, and so are a micro-batch's.
    With pipeline stages a lane has one rank in each stage, and a stage's ranks are neighbours:
    rank = stage x data_parallel + data-parallel rank, as DeepSpeed numbers them.
    """

    num_lanes: int
    ranks: int
    accumulation: int
    stages: int = 1

    def __post_init__(self) -> None:
        assert self.ranks % self.stages == 0, self
        assert self.num_lanes % (self.data_parallel * self.accumulation) == 0, self

    @property
    def data_parallel(self) -> int:
        """How many ranks the lanes are divided among."""
        return self.ranks // self.stages

    @property
    def micro_batch(self) -> int:
        """How many rows one micro-batch has on one rank."""
        return self.num_lanes // (self.data_parallel * self.accumulation)

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // self.data_parallel

    def lanes(self, rank: int) -> range:
        """Return the lanes of one rank, in the order of their rows: micro-batch 0 first."""
        lanes_per_rank = self.num_lanes // self.data_parallel
        start = rank % self.data_parallel * lanes_per_rank
        return range(start, start + lanes_per_rank)


@dataclass(frozen=True)
class Origin:
    """The beginning of the lanes, with empty memories: the start of the run, or where it resumed with other lanes.

    Attributes:
        step: the first step of these lanes.
        tokens: how many the run had read before that step.
    """

    step: int = 0
    tokens: int = 0

    def tokens_at(self, step: int, tokens_per_step: int) -> int:
        """Return how many tokens the run has read when `step` steps are done."""
        return self.tokens + (step - self.step) * tokens_per_step


BEGINNING = Origin()


class LanePlan:
    """The endless streams of training, one per lane.

    Args:
        starts: uint64 [documents + 1], the position of each document's first token, then the length of the split.
        tgt_len: tokens in a segment.
        order: "corpus": lane l starts at the l-th of num_lanes equal parts of the stream and reads on, round and
            round. In an epoch (one part's length) every token is read once, and a lane's stream is contiguous over
            all epochs.
            "documents": every epoch the documents are laid end to end in an order drawn from (seed, epoch), and lane
            l reads the l-th of num_lanes equal parts of that. A document across the border of two parts is read in
            two pieces.
        reset_memory: "document" ends a lane's history where a document (or piece) starts; "never" lets it run on.
        origin: the lanes start at the share of the epoch that the run had read before, and without a history.
        unit: lanes start at a multiple of it, where there are as many of them as lanes: the length of the documents, so
            that none is cut (Index.aligned_length). Parts are then equal but for one unit.
    """

    def __init__(
        self,
        starts: np.ndarray,
        num_lanes: int,
        tgt_len: int,
        seed: int = 0,
        order: Literal["corpus", "documents"] = "corpus",
        reset_memory: ResetMemory = "never",
        origin: Origin = BEGINNING,
        unit: int = 1,
    ):
        # int64 whatever the file says: numpy would compare unsigned positions as floats.
        self.starts = np.asarray(starts).view(np.int64)
        self.tokens = int(starts[-1])
        self.num_lanes = num_lanes
        self.tgt_len = tgt_len
        self.seed = seed
        self.order = order
        self.reset_memory = reset_memory
        self.origin = origin
        self.unit = unit if unit * num_lanes <= self.tokens else 1
        assert 0 < num_lanes <= self.tokens, (num_lanes, self.tokens)
        # An epoch's layout serves all its steps; where an epoch ends, two are in use.
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def part(self, lane: int) -> range:
        """Return the positions of the lane-th of num_lanes equal parts of an epoch's stream."""
        units = -(-self.tokens // self.unit)  # the last one may be shorter
        start, stop = (number * units // self.num_lanes * self.unit for number in (lane, lane + 1))
        return range(start, min(stop, self.tokens))

    def spans(self, lane: int, step: int) -> list[Span]:
        """Return the spans that `lane` reads at `step`; together they have tgt_len tokens."""
        history = (step - self.origin.step) * self.tgt_len
        done = self.origin.tokens // self.num_lanes // self.unit * self.unit + history
        pieces = self._corpus(lane, done) if self.order == "corpus" else self._documents(lane, done)
        spans = []
        for position, length, since_start in pieces:
            may_remember = min(history, since_start) if self.reset_memory == "document" else history
            spans.append(Span(position, length, may_remember))
            history += length
        return spans

    def describe(self, lane: int, step: int) -> str:
        """Say which documents of the training split a lane reads at a step."""
        spans = self.spans(lane, step)
        begin = spans[0].position
        end = spans[-1].position + spans[-1].length - 1
        first, last = (int(np.searchsorted(self.starts, position, side="right")) - 1 for position in (begin, end))
        text = f"document {first:,} of train from its token {begin - int(self.starts[first]):,} on"
        return text if first == last else f"{text}, to document {last:,}"

    # Both orders yield (position, length, tokens since the document or piece started), for a lane that has read `done`
    # tokens.

    def _corpus(self, lane: int, done: int) -> Iterator[tuple[int, int, int]]:
        position = (self.part(lane).start + done) % self.tokens
        missing = self.tgt_len
        while missing:
            start, end = self._document_around(position) if self.reset_memory == "document" else (0, self.tokens)
            length = min(missing, end - position)
            yield position, length, position - start
            position = (position + length) % self.tokens
            missing -= length

    def _document_around(self, position: int) -> tuple[int, int]:
        document = int(np.searchsorted(self.starts, position, side="right")) - 1
        return int(self.starts[document]), int(self.starts[document + 1])

    def _documents(self, lane: int, done: int) -> Iterator[tuple[int, int, int]]:
        part = self.part(lane)
        missing = self.tgt_len
        while missing:
            epoch, offset = divmod(done, len(part))
            order, ends = self._layout(epoch)
            # `at` and `laid` are positions in the epoch's stream, `start` is one in the split's.
            at = part.start + offset
            row = int(np.searchsorted(ends, at, side="right"))
            end = int(ends[row])
            document = int(order[row])
            start = int(self.starts[document])
            laid = end - (int(self.starts[document + 1]) - start)
            length = min(missing, end - at, part.stop - at)
            yield start + at - laid, length, at - max(laid, part.start)
            done += length
            missing -= length

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in the order of an epoch, and where each ends in the epoch's stream."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts) - 1)
        return order, np.cumsum(np.diff(self.starts)[order])


class EvaluationPlan(LanePlan):
    """One pass over the corpus in its order: every token is read exactly once, whatever num_lanes.

    A lane ends with its part: its last segment may be short, or empty if other lanes' parts need one more step. With a
    unit, a lane's whole part may be empty.
    """

    def __init__(
        self, starts: np.ndarray, num_lanes: int, tgt_len: int, reset_memory: ResetMemory = "never", unit: int = 1
    ):
        super().__init__(starts, num_lanes, tgt_len, reset_memory=reset_memory)
        self.unit = unit

    @property
    def steps(self) -> int:
        """How many steps the pass takes."""
        longest = max(len(self.part(lane)) for lane in range(self.num_lanes))
        return -(-longest // self.tgt_len)

    def spans(self, lane: int, step: int) -> list[Span]:
        """Return the spans that `lane` reads at `step`: tgt_len tokens, or fewer at the end of its part."""
        left = max(0, len(self.part(lane)) - step * self.tgt_len)
        spans = []
        for span in super().spans(lane, step):
            if not left:
                break
            length = min(span.length, left)
            spans.append(span._replace(length=length))
            left -= length
        return spans
