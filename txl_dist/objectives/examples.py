"""What classification and question answering have in common: examples are read segment by segment, with memory.

    | padding | first text | <sep> | second text | <sep> | <cls> |

This is a whole number of segments: the first one begins with padding, which nobody sees, and so the last one ends with
the classifier piece, whatever the length. A position sees all others of its segment, if the model reads both ways, and
what the lane remembers of the example's segments before.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from txl_dist.config.schema import TrainJob
from txl_dist.data.examples import ExamplePlan, ExampleSource, Place
from txl_dist.data.index import Index
from txl_dist.data.lanes import Origin
from txl_dist.data.segments import NOT_SCORED, Segment, SegmentLoader
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.data.two_way import CLASSIFIER, SEPARATOR
from txl_dist.models.base import Batch, HeadBuilder
from txl_dist.objectives.base import Objective, Prediction, Score

FIRST, SECOND, MARK = 0, 1, 2  # the segment ids of both texts, each with its <sep>, and of <cls>
PADDING = 3


class Marks(NamedTuple):
    """The pieces around the texts of an example.

    Attributes:
        before: what stands before the first text.
        separator: stands behind each text.
        after: what stands behind all.
    """

    before: list[int]
    separator: int
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        """Return <sep> and <cls>; for a tokenizer that has none `<eos>`, with which a document begins and ends."""
        specials = tokenizer.specials
        if SEPARATOR in specials and CLASSIFIER in specials:
            return cls([], specials[SEPARATOR], [specials[CLASSIFIER]])
        return cls([tokenizer.eos], tokenizer.eos, [])

    def count(self, texts: int) -> int:
        """Return how many there are around so many texts."""
        return len(self.before) + texts + len(self.after)

    def around(self, *texts: np.ndarray, first: int = FIRST) -> tuple[np.ndarray, np.ndarray]:
        """Return texts with their marks, and the segment ids: int64 [n] both.

        Args:
            first: the segment id of the first text, FIRST or SECOND.
        """
        parts: list[Sequence[int] | np.ndarray] = [self.before]
        ids = [first] * len(self.before)
        for number, text in enumerate(texts):
            parts += [text, [self.separator]]
            ids += [number ^ first] * (len(text) + 1)
        tokens = np.concatenate([np.asarray(part, np.int64) for part in [*parts, self.after]])
        return tokens, np.array(ids + [MARK] * len(self.after), np.int64)


@dataclass(frozen=True)
class ExampleSegment(Segment):
    """One step of some lanes; what a lane that waits reads is padding. All arrays int64 [lanes, tgt_len] but

    Attributes:
        targets: [lanes, ...], what the head of the task asks for (models/heads.py).
        kind: FIRST, SECOND, MARK or PADDING.
        place: [lanes, 2], the example and the segment of it; -1 where there is nothing to say of it.
    """

    kind: np.ndarray
    place: np.ndarray


class ExampleObjective(Objective):
    """What is to be said of examples.

    Args:
        tokenizer: of the data.
        head: builds the head of the task.
    """

    def __init__(self, tokenizer: Tokenizer, head: HeadBuilder):
        self.marks = Marks.of(tokenizer)
        self.head = head

    # ------------------------------------------------------------------------------------ what each task says itself

    @property
    @abstractmethod
    def input_keys(self) -> tuple[str, ...]:
        """Return what the texts of an example are called."""

    @abstractmethod
    def count_segments(self, source: ExampleSource, tgt_len: int) -> np.ndarray:
        """Return how many segments each example has: int64 [examples]."""

    @abstractmethod
    def tokens_of(self, source: ExampleSource, example: int, tgt_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example with their marks, as they are read, and their kinds: int64 [n] both."""

    @abstractmethod
    def target(self, source: ExampleSource, place: Place, tgt_len: int, is_last: bool) -> np.ndarray | None:
        """Return what is asked at the end of a segment; None where nothing is.

        Args:
            is_last: whether it is the last one of its example.
        """

    @abstractmethod
    def no_target(self, tgt_len: int) -> np.ndarray:
        """Return what stands in place of a target where there is none."""

    @abstractmethod
    def measure(
        self, predictions: list[Prediction], source: ExampleSource, index: Index, split: str
    ) -> dict[str, float]:
        """Return the metrics of a split's predictions, such as the accuracy."""

    def confusions(self, predictions: list[Prediction], source: ExampleSource) -> dict[str, Any]:
        """Return for classes how often which is taken for which; nothing for other tasks."""
        return {}

    # -------------------------------------------------------------------------------------------------- what they share

    def segments(
        self, job: TrainJob, index: Index, lanes: Sequence[int], origin: Origin, start: int, stop: int
    ) -> "ExampleSegments":
        """Return what `lanes` read of the training split, from step `start` up to `stop`."""
        source = ExampleSource.of_split(index, "train")
        tgt_len = job.model.tgt_len
        counts = self.count_segments(source, tgt_len)
        plan = ExamplePlan(counts, job.data.num_lanes, tgt_len, job.run.seed, job.data.order, origin)
        return ExampleSegments(self, plan, source, lanes, tgt_len, start, stop, job.data.workers)

    def evaluation_segments(self, job: TrainJob, index: Index, split: str, lanes: Sequence[int]) -> "ExampleSegments":
        """Return what `lanes` read when all lanes together read each example of a split once."""
        source = ExampleSource.of_split(index, split)
        return self.one_pass(source, job.data.num_lanes, job.evaluated_model.tgt_len, lanes, job.data.workers)

    def one_pass(
        self, source: ExampleSource, num_lanes: int, tgt_len: int, lanes: Sequence[int], workers: int = 1
    ) -> "ExampleSegments":
        """Return what some of num_lanes lanes read when together they read each example once."""
        plan = ExamplePlan(self.count_segments(source, tgt_len), num_lanes, tgt_len)
        return ExampleSegments(self, plan, source, lanes, tgt_len, 0, plan.layout(0).steps, workers)

    def num_targets(self, tgt_len: int) -> int:
        """Return 0: no token is predicted."""
        return 0

    def batch(self, segment: Segment) -> Batch:
        """Return the fields of a segment, by name, with those that models ask for where all positions see each other.

        They are rank, segment, direction and positions for XLNet, and position for the Reformer.
        """
        assert isinstance(segment, ExampleSegment)
        inputs = torch.from_numpy(segment.inputs)
        lookback = torch.from_numpy(segment.lookback)
        return {
            "inputs": inputs,
            "lookback": lookback,
            "position": lookback,
            "rank": torch.zeros_like(inputs),
            "segment": torch.from_numpy(segment.kind),
            "direction": torch.ones_like(inputs[:, :1]),
            "positions": inputs[:, :0],
            "targets": torch.from_numpy(segment.targets),
            "place": torch.from_numpy(segment.place),
        }

    def losses(self, result: Tensor) -> Tensor:
        """Return the loss of each lane, [lanes, 1]: what a task's head returns first."""
        return result[:, :1]

    def is_scored(self, targets: Tensor) -> Tensor:
        """Return which lanes have a target: bool [lanes, 1]."""
        first = targets[:, :1]
        return ~first.isnan() if first.is_floating_point() else first != NOT_SCORED

    def metrics(self, score: Score, index: Index, split: str) -> dict[str, float]:
        """Return the loss, in nats or as a squared error, and the metrics of the task."""
        source = ExampleSource.of_split(index, split)
        return {"loss": score.loss, **self.measure(list(score.predictions), source, index, split)}

    def predictions(self, result: Tensor, batch: Batch) -> list[Prediction]:
        """Return what the head says of the examples of a batch, where there is something to say."""
        outputs = result[:, 1:].float().cpu().numpy()
        tgt_len = batch["inputs"].size(1)
        places = [Place(*place) for place in batch["place"].tolist()]
        known = [row for row, place in enumerate(places) if place.example >= 0]
        return [Prediction(places[row], outputs[row], tgt_len) for row in known]


class ExampleSegments(SegmentLoader):
    """Loads segments of examples, each row a function of (examples, plan, step), whoever reads it."""

    plan: ExamplePlan

    def __init__(
        self,
        objective: ExampleObjective,
        plan: ExamplePlan,
        source: ExampleSource,
        lanes: Sequence[int],
        tgt_len: int,
        start: int,
        stop: int,
        workers: int = 1,
    ):
        super().__init__(plan, source.reader, lanes, start, stop, workers)
        self.objective = objective
        self.source = source
        self.tgt_len = tgt_len

    def read(self, step: int) -> ExampleSegment:
        """Return the segment of one step."""
        shape = (len(self.lanes), self.tgt_len)
        inputs = np.full(shape, self.objective.marks.separator)
        kind = np.full(shape, PADDING)
        lookback = np.zeros(shape, np.int64)
        places = np.full((len(self.lanes), 2), -1)
        targets = np.stack([self.objective.no_target(self.tgt_len)] * len(self.lanes))
        for row, lane in enumerate(self.lanes):
            place = self.plan.place(lane, step)
            if place is None:
                continue
            known = self.plan.segments_read(step) * self.tgt_len  # to the lane; its memory may have been emptied since
            inputs[row], kind[row], lookback[row] = self.cut(place, known)
            is_last = place.segment == self.plan.segments[place.example] - 1
            target = self.objective.target(self.source, place, self.tgt_len, is_last)
            if target is not None:
                targets[row] = target
                places[row] = place
        return ExampleSegment(step, inputs, targets, lookback, kind, places)

    def cut(self, place: Place, known: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, kinds and lookback of a segment, int64 [tgt_len] each.

        Args:
            known: how many positions before the segment the lane has read at most.
        """
        tokens, kinds = self.objective.tokens_of(self.source, place.example, self.tgt_len)
        padding = int(self.plan.segments[place.example]) * self.tgt_len - len(tokens)
        begin = place.segment * self.tgt_len - padding  # in the tokens
        positions = np.arange(begin, begin + self.tgt_len)
        first = max(0, -begin)
        part = slice(max(0, begin), begin + self.tgt_len)
        inputs = np.full(self.tgt_len, self.objective.marks.separator)
        kind = np.full(self.tgt_len, PADDING)
        inputs[first:] = tokens[part]
        kind[first:] = kinds[part]
        return inputs, kind, np.minimum(positions.clip(min=0), known + np.arange(self.tgt_len))
