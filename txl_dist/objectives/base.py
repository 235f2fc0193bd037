"""What a model is trained for: what lanes read, which batch is made of it, and what its predictions are worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from txl_dist.config.schema import TrainJob
from txl_dist.data.examples import Place
from txl_dist.data.index import Index
from txl_dist.data.lanes import Origin
from txl_dist.data.segments import NOT_SCORED, Segment, SegmentLoader
from txl_dist.models.base import Batch, HeadBuilder


class Prediction(NamedTuple):
    """What the head of a task says where a segment ends.

    Attributes:
        place: the segment.
        outputs: float32 [width], a row of `TaskHead.outputs`.
        tgt_len: the length of the segment.
    """

    place: Place
    outputs: np.ndarray
    tgt_len: int


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of `tokens` tokens: `nats` in total.

    Of examples these are the losses of so many targets, and `predictions` what was said of each.
    """

    nats: float
    tokens: int
    predictions: Sequence[Prediction] = ()

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / self.tokens

    @property
    def bits(self) -> float:
        """Return the total in bits."""
        return self.nats / math.log(2)


class Objective(ABC):
    """What a model is to read and to predict, and how that counts.

    Attributes:
        head: builds what says something of examples; None: running text is read, and tokens are predicted.
    """

    head: HeadBuilder | None = None

    @property
    def reads_examples(self) -> bool:
        """Return whether examples are read, and no running text."""
        return self.head is not None

    @abstractmethod
    def segments(
        self, job: TrainJob, index: Index, lanes: Sequence[int], origin: Origin, start: int, stop: int
    ) -> SegmentLoader:
        """Return what `lanes` read of the training split, from step `start` up to `stop`.

        Args:
            origin: where these lanes began.
        """

    @abstractmethod
    def evaluation_segments(self, job: TrainJob, index: Index, split: str, lanes: Sequence[int]) -> SegmentLoader:
        """Return what `lanes` read when all data.num_lanes lanes together read a split once.

        It is read with the lengths of job.evaluated_model, and is the same every time.
        """

    @abstractmethod
    def num_targets(self, tgt_len: int) -> int:
        """Return how many positions of a segment of tgt_len tokens a model computes predictions for."""

    @abstractmethod
    def batch(self, segment: Segment) -> Batch:
        """Turn a segment into what a model takes, int64 on the CPU: a pure function of segment, step and lanes."""

    def counted(self, targets: Tensor) -> Tensor:
        """Return the part of [lanes, targets] that counts in training."""
        return targets

    def is_scored(self, targets: Tensor) -> Tensor:
        """Return which targets there are: bool, of the shape of the losses."""
        return targets != NOT_SCORED

    def losses(self, result: Tensor) -> Tensor:
        """Return the losses [lanes, targets] in what a model returns in evaluation."""
        return result

    def predictions(self, result: Tensor, batch: Batch) -> list[Prediction]:
        """Return what a model, which returns `result` for a batch, says of examples; nothing of running text."""
        return []

    def loss(self, nats: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss, in nats per target, and that of each lane, detached: [lanes].

        Args:
            nats: [lanes, targets], the negative log-likelihood of each target, 0 where not scored.
            weight: turns a mean over all targets into a mean over the scored ones of the global batch.
        """
        weighted = self.counted(nats) * weight
        return weighted.mean(), weighted.detach().mean(dim=1)

    def metrics(self, score: Score, index: Index, split: str) -> dict[str, float]:
        """Return what is logged of an evaluation of a whole split."""
        return {"loss": score.loss, "perplexity": perplexity(score.loss)}


def perplexity(nats: float) -> float:
    """Return exp(nats), limited to a finite number."""
    return math.exp(min(nats, 700.0))


def micro_batches(batch: Batch, count: int) -> Iterator[tuple[slice, Batch]]:
    """Split a batch into micro-batches of equally many lanes; yield the rows of each with it."""
    size = len(batch["inputs"]) // count
    for number in range(count):
        rows = slice(number * size, (number + 1) * size)
        yield rows, {name: field[rows] for name, field in batch.items()}
