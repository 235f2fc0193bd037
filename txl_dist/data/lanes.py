"""The lane plan: which tokens each lane reads at each step, and which rank computes it.

A lane is one row of the global batch followed through time: one contiguous stream of tokens. What lane `l` reads at
step `t` is a pure function of (the split's index, seed, num_lanes, tgt_len); no rank, worker or world size enters. So
the data state of a run is one number, the step, and any step is found without looking at the steps before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

ResetMemory = Literal["never", "document"]


class Span(NamedTuple):
    """`length` consecutive tokens of a split's stream, beginning at `position`.

    `history` is the number of tokens right before the span that the lane has read and may remember: tokens of the lane
    since the run began or, where memory is reset at documents, since the document began.
    """

    position: int
    length: int
    history: int


@dataclass(frozen=True)
class LaneSplit:
    """lane -> (data-parallel rank, micro-batch, row), with num_lanes = data_parallel x accumulation x micro_batch.

    A rank's lanes are neighbours, and so are a micro-batch's. With pipeline stages a lane has one rank in each stage,
    and a stage's ranks are neighbours: rank = stage x data_parallel + data-parallel rank, as DeepSpeed numbers them.
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
        """Ranks among which the lanes are divided."""
        return self.ranks // self.stages

    @property
    def micro_batch(self) -> int:
        """Rows of one micro-batch on one rank."""
        return self.num_lanes // (self.data_parallel * self.accumulation)

    def stage(self, rank: int) -> int:
        return rank // self.data_parallel

    def lanes(self, rank: int) -> range:
        """The lanes of one rank, in the order of their rows: micro-batch 0 first."""
        share, place = self.num_lanes // self.data_parallel, rank % self.data_parallel
        return range(place * share, (place + 1) * share)


@dataclass(frozen=True)
class Origin:
    """Where the lanes began, with empty memories: at the start of the run, or where it went on with other lanes.

    step: the first step of these lanes. tokens: what the run had read before it.
    """

    step: int = 0
    tokens: int = 0

    def tokens_at(self, step: int, tokens_per_step: int) -> int:
        """What the run has read when `step` steps are done."""
        return self.tokens + (step - self.step) * tokens_per_step


BEGINNING = Origin()


class LanePlan:
    """The endless streams of training.

    corpus: lane l starts at the l-th of num_lanes equal parts of the stream and reads on, round and round. In an epoch
        (one part's length) every token is read once, and a lane's stream is contiguous over all epochs.
    documents: every epoch the documents are laid end to end in an order drawn from (seed, epoch), and lane l reads the
        l-th of num_lanes equal parts of that. A document across the border of two parts is read in two pieces.

    Args:
        starts: [documents + 1] position of each document's first token, then the number of tokens of the split.
        tgt_len: tokens in a segment.
        reset_memory: 'document' ends a lane's history where a document (or piece) starts; 'never' lets it run on.
        origin: the lanes start at the share of the epoch that the run had read before, and without a history.
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
    ):
        # int64 whatever the file says: numpy would compare unsigned positions as floats.
        self.starts, self.num_lanes = np.asarray(starts).view(np.int64), num_lanes
        self.tgt_len, self.seed = tgt_len, seed
        self.order, self.reset_memory, self.origin = order, reset_memory, origin
        self.tokens = int(starts[-1])
        assert 0 < num_lanes <= self.tokens, (num_lanes, self.tokens)
        # An epoch's layout serves all its steps; two are alive where an epoch ends.
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def part(self, lane: int) -> range:
        """Positions of the lane-th of num_lanes equal parts of an epoch's stream: the first epoch of `lane`."""
        return range(lane * self.tokens // self.num_lanes, (lane + 1) * self.tokens // self.num_lanes)

    def spans(self, lane: int, step: int) -> list[Span]:
        """What `lane` reads at `step`: spans of tgt_len tokens together."""
        history = (step - self.origin.step) * self.tgt_len
        read = self.origin.tokens // self.num_lanes + history
        pieces = self._corpus(lane, read) if self.order == "corpus" else self._documents(lane, read)
        spans = []
        for position, length, since_start in pieces:
            may_remember = min(history, since_start) if self.reset_memory == "document" else history
            spans.append(Span(position, length, may_remember))
            history += length
        return spans

    def _corpus(self, lane: int, read: int) -> Iterator[tuple[int, int, int]]:
        position, missing = (self.part(lane).start + read) % self.tokens, self.tgt_len
        while missing:
            start, end = self._document_around(position) if self.reset_memory == "document" else (0, self.tokens)
            length = min(missing, end - position)
            yield position, length, position - start
            position, missing = (position + length) % self.tokens, missing - length

    def _document_around(self, position: int) -> tuple[int, int]:
        document = int(np.searchsorted(self.starts, position, side="right")) - 1
        return int(self.starts[document]), int(self.starts[document + 1])

    def _documents(self, lane: int, read: int) -> Iterator[tuple[int, int, int]]:
        part, missing = self.part(lane), self.tgt_len
        while missing:
            epoch, offset = divmod(read, len(part))
            order, ends = self._layout(epoch)
            place = part.start + offset
            row = int(np.searchsorted(ends, place, side="right"))
            document = int(order[row])
            start = int(self.starts[document])
            laid = int(ends[row]) - (int(self.starts[document + 1]) - start)  # where the document lies in the epoch
            length = min(missing, int(ends[row]) - place, part.stop - place)
            yield start + place - laid, length, place - max(laid, part.start)
            read, missing = read + length, missing - length

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and where each ends in the epoch's stream."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts) - 1)
        return order, np.cumsum(np.diff(self.starts)[order])


class EvaluationPlan(LanePlan):
    """One pass over the corpus as it stands: every token is read exactly once, whatever num_lanes.

    A lane ends with its part: its last segment may be short, or empty where other lanes' parts need one more step.
    """

    def __init__(self, starts: np.ndarray, num_lanes: int, tgt_len: int, reset_memory: ResetMemory = "never"):
        super().__init__(starts, num_lanes, tgt_len, reset_memory=reset_memory)

    @property
    def steps(self) -> int:
        longest = max(len(self.part(lane)) for lane in range(self.num_lanes))
        return -(-longest // self.tgt_len)

    def spans(self, lane: int, step: int) -> list[Span]:
        left = max(0, len(self.part(lane)) - step * self.tgt_len)
        spans = []
        for span in super().spans(lane, step) if left else []:
            spans.append(span._replace(length=min(span.length, left)))
            left -= spans[-1].length
            if not left:
                break
        return spans
