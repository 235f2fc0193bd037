"""Segments: the tokens that the lanes of one rank read at one step, as arrays, read ahead in the background."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from txl_dist.data.index import Index
from txl_dist.data.lanes import EvaluationPlan, LanePlan, ResetMemory
from txl_dist.data.samples import SampleReader

NOT_SCORED = -100  # the target of a position that holds no token: the default of torch's `ignore_index`


@dataclass(frozen=True)
class Segment:
    """One step of some lanes; all arrays int64 [lanes, tgt_len].

    What an objective reads otherwise extends it: `step` and `targets` are what everybody needs.

    Attributes:
        inputs: the token before each target; `<eos>` before a document's first, and for a lost one.
        targets: the tokens of the lanes' spans; NOT_SCORED where a lane has ended or the token is lost.
        lookback: how many tokens back each position may look: those that the lane has read and may remember.
    """

    step: int
    inputs: np.ndarray
    targets: np.ndarray
    lookback: np.ndarray


class Plan(Protocol):
    """What each lane reads at each step, whoever reads it: a `LanePlan`, or an `ExamplePlan`."""

    def describe(self, lane: int, step: int) -> str:
        """Say what of the training split a lane reads at a step."""


class SegmentLoader(ABC):
    """Iterates over the segments of `lanes` for the steps from `start` up to `stop`, which threads read ahead.

    Args:
        reader: of the split that is read; None: what is read is from none.
        workers: threads that read ahead; their number changes nothing in the segments.

    Attributes:
        waited: seconds that the consumer has waited for data so far.

    Raises:
        UserError: while iterating, if a shard disagrees with the index, naming shard and sample.
    """

    def __init__(
        self,
        plan: Plan,
        reader: SampleReader | None,
        lanes: Sequence[int],
        start: int,
        stop: int,
        workers: int = 1,
    ):
        self.plan = plan
        self.reader = reader
        self.lanes = lanes
        self.start = start
        self.stop = stop
        self.workers = workers
        self.waited = 0.0

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[Segment]:
        ahead = 2 * self.workers + 2
        with ThreadPoolExecutor(self.workers, thread_name_prefix="segments") as pool:
            steps = iter(range(self.start, self.stop))
            coming = deque(pool.submit(self.read, step) for step in islice(steps, ahead))
            try:
                while coming:
                    began = time.perf_counter()
                    segment = coming.popleft().result()
                    self.waited += time.perf_counter() - began
                    coming.extend(pool.submit(self.read, step) for step in islice(steps, 1))
                    yield segment
            finally:
                for future in coming:
                    future.cancel()

    @abstractmethod
    def read(self, step: int) -> Segment:
        """Return the segment of one step; several threads call it."""


class Segments(SegmentLoader):
    """Loads each token with the one before it, or `<eos>` where it begins a document: what a causal model reads.

    If the reader fills in NOT_SCORED for tokens that are lost, the tokens after such a gap are read as if a document
    began there: no position looks back into the gap or beyond it.

    Args:
        mem_len: how many tokens before a segment are searched for gaps: those that a model may remember.
    """

    plan: LanePlan
    reader: SampleReader

    def __init__(
        self,
        plan: LanePlan,
        reader: SampleReader,
        lanes: Sequence[int],
        eos: int,
        start: int,
        stop: int,
        workers: int = 1,
        mem_len: int = 0,
    ):
        super().__init__(plan, reader, lanes, start, stop, workers)
        self.eos = eos
        self.mem_len = mem_len

    def read(self, step: int) -> Segment:
        """Return the segment of one step."""
        shape = (len(self.lanes), self.plan.tgt_len)
        inputs = np.full(shape, self.eos)
        targets = np.full(shape, NOT_SCORED)
        lookback = np.zeros(shape, np.int64)
        for row, lane in enumerate(self.lanes):
            start = 0
            for span in self.plan.spans(lane, step):
                end = start + span.length
                before = min(1, span.position)  # the stream's first token has none before it: <eos> stands there
                tokens = self.reader.tokens(span.position - before, span.length + before)
                targets[row, start:end] = tokens[before:]
                inputs[row, start + 1 - before : end] = tokens[: span.length - 1 + before]
                # It may not stand in the stream (tokenizer.end=false).
                first, last = np.searchsorted(self.plan.starts, (span.position, span.position + span.length))
                begins = self.plan.starts[first:last] - span.position
                inputs[row, start + begins] = self.eos
                lookback[row, start:end] = np.arange(span.history, span.history + span.length)
                start = end
            if self.reader.fill_value is not None:
                lookback[row] = np.minimum(lookback[row], self.since_gap(lane, step))
        inputs[inputs == NOT_SCORED] = self.eos
        return Segment(step, inputs, targets, lookback)

    def since_gap(self, lane: int, step: int) -> np.ndarray:
        """Count the tokens between each position of a segment and the last gap before it.

        The gap is looked for in the lane's own past, so every start of a run finds the same one; where none is within
        `mem_len` tokens, the count is larger than any memory.

        Returns:
            int64 [tgt_len].
        """
        segments_back = -(-self.mem_len // self.plan.tgt_len)
        first_step = max(self.plan.origin.step, step - segments_back)
        is_lost = []
        for past_step in range(first_step, step + 1):
            for span in self.plan.spans(lane, past_step):
                is_lost.append(self.reader.tokens(span.position, span.length) == NOT_SCORED)
        lost = np.concatenate(is_lost)
        position = np.arange(len(lost))
        last_lost = np.maximum.accumulate(np.where(lost, position, np.iinfo(np.int64).min // 2))
        return (position - last_lost - 1).clip(min=0)[-self.plan.tgt_len :]


def whole_split(
    index: Index,
    name: str,
    num_lanes: int,
    tgt_len: int,
    reset_memory: ResetMemory,
    lanes: Sequence[int],
    workers: int = 1,
    tokens: int | None = None,
) -> Segments:
    """Return the segments of `lanes` in one pass over a split, or over its first `tokens`.

    All num_lanes lanes together read every token once.
    """
    starts = index.splits[name].document_starts
    if tokens is not None:
        starts = np.append(starts[starts < tokens], np.uint64(tokens))
    plan = EvaluationPlan(starts, num_lanes, tgt_len, reset_memory, index.aligned_length(name))
    return Segments(plan, SampleReader(index, name), lanes, index.eos, 0, plan.steps, workers)
