"""Segments: what the lanes of one rank read at one step, as arrays, fetched ahead in the background."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from txl_dist.data.index import Index
from txl_dist.data.lanes import EvaluationPlan, LanePlan, ResetMemory
from txl_dist.data.samples import SampleReader

NOT_SCORED = -100  # the target of a position that holds no token: torch's own mark for it


@dataclass(frozen=True)
class Segment:
    """One step of some lanes; all arrays int64 [lanes, tgt_len].

    targets: the tokens of the lanes' spans, NOT_SCORED where a lane has ended or the token is lost.
    inputs: the token before each target; `<eos>` before a document's first, and for a lost one.
    reach: how many tokens back each position may look: those that the lane has read and may remember.
    """

    step: int
    inputs: np.ndarray
    targets: np.ndarray
    lookback: np.ndarray


class Segments:
    """Iterates over the segments of `lanes` for the steps from `start` up to `stop`.

    `workers` threads read ahead; their number changes nothing in what comes out. `waited` holds the seconds that the
    consumer has waited for data so far.

    Where the reader gives NOT_SCORED for tokens that are lost, what comes after such a gap is read as if a document
    began there: no position looks back into the gap or beyond it, up to `mem_len` tokens before the segment.

    Raises:
        UserError: where a shard disagrees with the index, naming shard and sample.
    """

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
        self.plan, self.reader, self.lanes, self.eos = plan, reader, lanes, eos
        self.start, self.stop, self.workers, self.mem_len = start, stop, workers, mem_len
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

    def read(self, step: int) -> Segment:
        shape = (len(self.lanes), self.plan.tgt_len)
        inputs, lookback = np.full(shape, self.eos), np.zeros(shape, np.int64)
        targets = np.full(shape, NOT_SCORED)
        for row, lane in enumerate(self.lanes):
            at = 0
            for span in self.plan.spans(lane, step):
                here = slice(at, at + span.length)
                before = min(1, span.position)  # the stream's first token has none before it: <eos> stands there
                tokens = self.reader.tokens(span.position - before, span.length + before)
                targets[row, here] = tokens[before:]
                inputs[row, at + 1 - before : at + span.length] = tokens[: span.length - 1 + before]
                lookback[row, here] = np.arange(span.history, span.history + span.length)
                at += span.length
            if self.reader.lost is not None:
                lookback[row] = np.minimum(lookback[row], self.since_gap(lane, step))
        inputs[inputs == NOT_SCORED] = self.eos
        return Segment(step, inputs, targets, lookback)

    def since_gap(self, lane: int, step: int) -> np.ndarray:
        """How many tokens each position of a segment has before it since the last gap; many, where memory holds none.

        int64 [tgt_len]. Looked for in the lane's own past, of which every start of a run finds the same.
        """
        remembered = range(max(self.plan.origin.step, step - -(-self.mem_len // self.plan.tgt_len)), step + 1)
        spans = [span for each in remembered for span in self.plan.spans(lane, each)]
        lost = np.concatenate([self.reader.tokens(span.position, span.length) == NOT_SCORED for span in spans])
        place = np.arange(len(lost))
        last = np.maximum.accumulate(np.where(lost, place, np.iinfo(np.int64).min // 2))
        return (place - last - 1).clip(min=0)[-self.plan.tgt_len :]


def whole_split(
    index: Index,
    name: str,
    num_lanes: int,
    tgt_len: int,
    reset_memory: ResetMemory,
    lanes: range,
    workers: int = 1,
    tokens: int | None = None,
) -> Segments:
    """The segments of `lanes` in one pass over a split, or its first `tokens`: all num_lanes score every token once."""
    starts = index.splits[name].document_starts
    if tokens is not None:
        starts = np.append(starts[starts < tokens], np.uint64(tokens))
    plan = EvaluationPlan(starts, num_lanes, tgt_len, reset_memory)
    return Segments(plan, SampleReader(index, name), lanes, index.eos, 0, plan.steps, workers)
