"""Permutation language modelling (Yang et al. 2019): predict some tokens of a segment in a random order.

A segment is read in reading order, which in half of the lanes is that of the reversed text:

    | reused: reuse_len tokens | A | <sep> | B | <sep> | <cls> |       or, without pairs, | reused | what follows |

A follows what is reused, and is reused in the next step: that makes a lane's memory contiguous. B is what follows A, or
a stretch from anywhere. The targets of both parts, reused and new, are drawn apart, and so is their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from txl_dist.config.schema import PermutationLMConfig, TrainJob, reuse_len_of
from txl_dist.data.index import Index
from txl_dist.data.lanes import BEGINNING, Origin
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import Segment, SegmentLoader
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.data.two_way import CLASSIFIER, SEPARATOR, DirectedText, TwoWayPlan, draw_pair
from txl_dist.models.base import Batch
from txl_dist.models.config import ModelConfig
from txl_dist.objectives.base import Objective
from txl_dist.objectives.spans import draw_order, draw_targets, ranks

EVALUATION_SEED = 0  # of the draws in evaluation, so that all runs and all steps are asked for the same


class Pieces(NamedTuple):
    """The pieces of a vocabulary by what they mean.

    Attributes:
        begins_word: bool [vocab].
        separator, classifier: -1 where no pairs are read.
    """

    begins_word: np.ndarray
    separator: int = -1
    classifier: int = -1


@dataclass(frozen=True)
class PermutedSegment(Segment):
    """One step of some lanes, in reading order; all arrays int64.

    Attributes:
        inputs: [lanes, tgt_len], the tokens themselves: what is predicted stands here, too.
        targets: [lanes, num_predict], the tokens at `positions`.
        lookback: [lanes, tgt_len], how many tokens back each position may look: those that the lane has read.
        rank: [lanes, tgt_len], which positions see which (spans.ranks).
        segment: [lanes, tgt_len], 0 for what is reused and A, 1 for B, each with its <sep>, 2 for <cls>.
        direction: [lanes, 1], 1 for a lane that reads forward, -1 for one that reads backward.
        positions: [lanes, num_predict], ascending.
    """

    rank: np.ndarray
    segment: np.ndarray
    direction: np.ndarray
    positions: np.ndarray


class PermutationLM(Objective):
    """The mean negative log-likelihood of num_predict tokens of a segment, each from those before it in a random order.

    Args:
        tokenizer: of the data; with pairs it has <sep> and <cls>.
    """

    def __init__(self, config: PermutationLMConfig, tokenizer: Tokenizer):
        self.config = config
        self.pieces = Pieces(tokenizer.word_starts())
        if config.pairs:
            specials = tokenizer.specials
            self.pieces = Pieces(tokenizer.word_starts(), specials[SEPARATOR], specials[CLASSIFIER])

    def num_targets(self, tgt_len: int) -> int:
        """Return num_predict."""
        return self.config.num_predict

    def segments(
        self, job: TrainJob, index: Index, lanes: Sequence[int], origin: Origin, start: int, stop: int
    ) -> "PermutedSegments":
        """Return what `lanes` read of the training split, from step `start` to the last one."""
        plan = self.plan(job, index, "train", job.model, origin)
        return self._loader(job, index, "train", plan, job.model, lanes, start, stop, job.run.seed)

    def evaluation_segments(self, job: TrainJob, index: Index, split: str, lanes: Sequence[int]) -> "PermutedSegments":
        """Return what `lanes` read of a whole split, once in each direction; the draws are the same every time."""
        plan = self.plan(job, index, split, job.evaluated_model)
        return self._loader(job, index, split, plan, job.evaluated_model, lanes, 0, plan.steps, EVALUATION_SEED)

    def plan(
        self, job: TrainJob, index: Index, split: str, model: ModelConfig, origin: Origin = BEGINNING
    ) -> TwoWayPlan:
        """Return where the lanes stand in a split."""
        starts = index.splits[split].document_starts
        return TwoWayPlan(starts, job.data.num_lanes, reuse_len_of(model), self.config.directions == "both", origin)

    def _loader(
        self,
        job: TrainJob,
        index: Index,
        split: str,
        plan: TwoWayPlan,
        model: ModelConfig,
        lanes: Sequence[int],
        start: int,
        stop: int,
        seed: int,
    ) -> "PermutedSegments":
        sentences = index.splits[split].sentence_starts
        reader = SampleReader(index, split)
        drawing = Drawing(self.config, self.pieces, model.tgt_len, plan.stride, seed)
        return PermutedSegments(plan, reader, lanes, drawing, sentences, start, stop, job.data.workers)

    def batch(self, segment: Segment) -> Batch:
        """Return the arrays of a segment, by name."""
        assert isinstance(segment, PermutedSegment)
        names = ("inputs", "lookback", "rank", "segment", "direction", "positions", "targets")
        return {name: torch.from_numpy(getattr(segment, name)) for name in names}


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and of how many tokens.

    Attributes:
        tgt_len: tokens of a segment, special ones included.
        reuse_len: how many of them are reused.
        seed: of all that is drawn, with the lane and the step.
    """

    config: PermutationLMConfig
    pieces: Pieces
    tgt_len: int
    reuse_len: int
    seed: int


class PermutedSegments(SegmentLoader):
    """Loads segments of permuted order: each row a function of (text, seed, lane, step), whoever reads it.

    Args:
        sentence_starts: of the split; needed for pairs.
    """

    plan: TwoWayPlan

    def __init__(
        self,
        plan: TwoWayPlan,
        reader: SampleReader,
        lanes: Sequence[int],
        drawing: Drawing,
        sentence_starts: np.ndarray | None,
        start: int,
        stop: int,
        workers: int = 1,
    ):
        super().__init__(plan, reader, lanes, start, stop, workers)
        self.drawing = drawing
        self.texts = {direction: DirectedText(reader, plan.tokens, direction, sentence_starts) for direction in (1, -1)}

    def read(self, step: int) -> PermutedSegment:
        """Return the segment of one step."""
        rows = len(self.lanes)
        tgt_len = self.drawing.tgt_len
        num_predict = self.drawing.config.num_predict
        inputs = np.empty((rows, tgt_len), np.int64)
        targets = np.empty((rows, num_predict), np.int64)
        rank = np.empty((rows, tgt_len), np.int64)
        segment = np.empty((rows, tgt_len), np.int64)
        positions = np.empty((rows, num_predict), np.int64)
        direction = np.array([[self.plan.direction(lane)] for lane in self.lanes], np.int64).reshape(rows, 1)
        for row, lane in enumerate(self.lanes):
            rng = np.random.default_rng((self.drawing.seed, lane, step))
            inputs[row], segment[row] = self.read_tokens(lane, step, rng)
            is_target, rank[row] = self.draw(inputs[row], segment[row], self.plan.direction(lane), rng)
            positions[row] = np.flatnonzero(is_target)
            targets[row] = inputs[row, positions[row]]
        lookback = np.tile(self.plan.history(step) + np.arange(tgt_len), (rows, 1))
        return PermutedSegment(step, inputs, targets, lookback, rank, segment, direction, positions)

    def read_tokens(self, lane: int, step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that a lane reads at a step, and the segment of each: int64 [tgt_len] both."""
        drawing = self.drawing
        text = self.texts[self.plan.direction(lane)]
        first = self.plan.reading_position(lane, step)
        if not drawing.config.pairs:
            return text.tokens(first, drawing.tgt_len), np.zeros(drawing.tgt_len, np.int64)
        a_begin = first + drawing.reuse_len
        total = drawing.tgt_len - drawing.reuse_len - 3
        pair = draw_pair(text, first, a_begin, total, self.plan.reading_part(lane), rng)
        separator = [drawing.pieces.separator]
        up_to_a = text.tokens(first, drawing.reuse_len + pair.a_length)
        b = text.tokens(pair.b_begin, pair.b_length)
        tokens = np.concatenate([up_to_a, separator, b, separator, [drawing.pieces.classifier]])
        return tokens, np.repeat([0, 1, 2], [len(up_to_a) + 1, len(b) + 1, 1])

    def draw(
        self, tokens: np.ndarray, segment: np.ndarray, direction: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw which positions of a segment are predicted, bool [tgt_len], and return the ranks, int64 [tgt_len]."""
        drawing = self.drawing
        is_special = np.zeros(drawing.tgt_len, bool)
        if drawing.config.pairs:
            # By their places: the text itself may hold such pieces.
            is_special[-2:] = True
            is_special[np.searchsorted(segment, 1) - 1] = True
        begins_word = drawing.pieces.begins_word[tokens]
        first = drawing.config.first_targets(drawing.tgt_len, drawing.reuse_len)
        counts = (first, drawing.config.num_predict - first)
        halves = (slice(0, drawing.reuse_len), slice(drawing.reuse_len, drawing.tgt_len))
        is_target = np.empty(drawing.tgt_len, bool)
        order = np.empty(drawing.tgt_len, np.int64)
        for half, count in zip(halves, counts, strict=True):
            starts, specials = (array[half][::direction] for array in (begins_word, is_special))
            is_target[half] = draw_targets(starts, specials, count, drawing.config.spans, rng)[::direction]
        for half in halves:
            order[half] = draw_order(half.stop - half.start, drawing.config.perm_size, rng)
        return is_target, ranks(~is_target & ~is_special, order, drawing.reuse_len)
