"""What a model is trained for: what lanes read, which batch is made of it, and what its predictions are worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.data.lanes import Origin
from txl_dist.data.segments import Segment, SegmentLoader
from txl_dist.models.base import Batch


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of `tokens` tokens: `nats` in total."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / self.tokens

    @property
    def bits(self) -> float:
        """Return the total in bits."""
        return self.nats / math.log(2)


class Objective(ABC):
    """What a model is to read and to predict, and how that counts."""

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

    def loss(self, nats: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss, in nats per target, and that of each lane, detached: [lanes].

        Args:
            nats: [lanes, targets], the negative log-likelihood of each target, 0 where not scored.
            weight: turns a mean over all targets into a mean over the scored ones of the global batch.
        """
        weighted = self.counted(nats) * weight
        return weighted.mean(), weighted.detach().mean(dim=1)

    def metrics(self, score: Score, num_bytes: int | None, num_dimensions: int | None = None) -> dict[str, float]:
        """Return what is logged of an evaluation.

        Args:
            num_bytes: of the text that was read; None if it was not text.
            num_dimensions: numbers of sequences that were read, `<eos>` not counted; None if it was text.
        """
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
