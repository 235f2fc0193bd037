"""The lanes of examples: which example each lane reads at each step, a segment at a time.

An example is a document, or a pair of them, of which something is to be said. A lane reads example after example, and
all of one: so a batch of examples is lanes, too, and what lane `l` reads at step `t` is a pure function of (examples,
seed, num_lanes). An example that is longer than a segment takes several steps.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from txl_dist.data.index import Index
from txl_dist.data.lanes import BEGINNING, Origin
from txl_dist.data.samples import SampleReader


class Place(NamedTuple):
    """Where a lane stands: in a segment of an example, both counted from 0."""

    example: int
    segment: int


class Layout(NamedTuple):
    """An epoch: its examples laid end to end, and cut in as many parts as there are lanes.

    Attributes:
        order: int64 [examples], the examples as they follow each other.
        ends: int64 [examples], the segment behind each of them, counted from the start of the epoch.
        parts: int64 [num_lanes + 1], the segment with which each lane begins; then the number of all segments. A lane
            has the examples that begin in its equal part of the segments, so lanes differ by less than an example.
    """

    order: np.ndarray
    ends: np.ndarray
    parts: np.ndarray

    @property
    def steps(self) -> int:
        """How many steps it takes until every lane has read its part."""
        return int(np.diff(self.parts).max())


class ExamplePlan:
    """The endless streams of examples, one per lane; in an epoch each example is read once.

    A lane that has read its part of an epoch before others have waits for them, and reads nothing.

    Args:
        segments: int64 [examples], how many segments each has, 1 or more.
        order: "corpus": as they stand; "documents": in an order drawn from (seed, epoch).
        origin: the lanes start at the share of the epoch that the run had read before.
    """

    def __init__(
        self,
        segments: np.ndarray,
        num_lanes: int,
        tgt_len: int,
        seed: int = 0,
        order: Literal["corpus", "documents"] = "corpus",
        origin: Origin = BEGINNING,
    ):
        self.segments = segments
        self.num_lanes = num_lanes
        self.seed = seed
        self.order = order
        self.origin = origin
        self.steps_before = origin.tokens // (num_lanes * tgt_len)  # of these lanes, as if they had read all so far
        self.epoch_ends: list[int] = []  # the step behind each epoch, as far as they were asked for
        self.counting = threading.Lock()  # segments are read by several threads
        # An epoch's layout serves all its steps; where an epoch ends, two are in use.
        self.layout = lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> Layout:
        order = np.arange(len(self.segments))
        if self.order == "documents":
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = self.segments[order].cumsum()
        starts = ends - self.segments[order]
        borders = np.arange(self.num_lanes + 1) * ends[-1] / self.num_lanes
        parts = np.append(starts, ends[-1])[np.searchsorted(starts, borders)]
        return Layout(order, ends, parts)

    def place(self, lane: int, step: int) -> Place | None:
        """Return what a lane reads at a step; None where it waits."""
        epoch, step = self._find_epoch(step - self.origin.step + self.steps_before)
        layout = self.layout(epoch)
        segment = int(layout.parts[lane]) + step
        if segment >= layout.parts[lane + 1]:
            return None
        row = int(np.searchsorted(layout.ends, segment, side="right"))
        example = int(layout.order[row])
        return Place(example, segment - int(layout.ends[row] - self.segments[example]))

    def segments_read(self, step: int) -> int:
        """Return how many segments a lane has read before a step, of which its memory may be."""
        return step - self.origin.step

    def _find_epoch(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, counted from the run's first one, and the step within it."""
        with self.counting:
            while not self.epoch_ends or self.epoch_ends[-1] <= step:
                before = self.epoch_ends[-1] if self.epoch_ends else 0
                self.epoch_ends.append(before + self.layout(len(self.epoch_ends)).steps)
        epoch = int(np.searchsorted(self.epoch_ends, step, side="right"))
        return epoch, step - (self.epoch_ends[epoch - 1] if epoch else 0)

    def describe(self, lane: int, step: int) -> str:
        """Say which example of the training split a lane reads at a step."""
        place = self.place(lane, step)
        return f"segment {place.segment} of example {place.example:,} of train" if place else "nothing"


@dataclass(frozen=True)
class ExampleSource:
    """Examples, wherever they come from.

    Attributes:
        first, second: int64 [examples], how many tokens their first and their second text have.
        tokens: returns those of both texts of an example, the first text's first.
        table: what is to be said of them, LABELLED or ANSWERED of data/format.py; None: not known.
        reader: of the split that they are from; None: they are from none.
    """

    first: np.ndarray
    second: np.ndarray
    tokens: Callable[[int], np.ndarray]
    table: np.ndarray | None = None
    reader: SampleReader | None = None

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of_split(cls, index: Index, name: str) -> "ExampleSource":
        """Return the examples of a split."""
        split = index.splits[name]
        assert split.examples is not None
        # int64 whatever the file says: differences of unsigned numbers would never be negative.
        starts = split.document_starts.astype(np.int64)
        first = split.examples["first"].astype(np.int64)
        reader = SampleReader(index, name)

        def tokens(example: int) -> np.ndarray:
            return reader.tokens(int(starts[example]), int(starts[example + 1] - starts[example]))

        return cls(first, np.diff(starts) - first, tokens, split.examples, reader)

    @classmethod
    def of_texts(cls, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "ExampleSource":
        """Return examples of encoded texts, the second of which may be empty."""
        first, second = (np.array([len(pair[side]) for pair in texts], np.int64) for side in (0, 1))
        return cls(first, second, lambda example: np.concatenate(texts[example]))
