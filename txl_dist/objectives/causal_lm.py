"""Causal language modelling: predict each token from those before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from txl_dist.data.segments import Segment
from txl_dist.models.base import Batch
from txl_dist.objectives.base import Objective, Score


@dataclass(frozen=True)
class CausalLM(Objective):
    """The mean negative log-likelihood of the tokens of a segment.

    Attributes:
        first_scored: the first position of a segment that counts in training (train.loss).
    """

    first_scored: int = 0

    def batch(self, segment: Segment) -> Batch:
        """Return inputs, targets and lookback of a segment, int64 [lanes, length]."""
        return {
            "inputs": torch.from_numpy(segment.inputs),
            "targets": torch.from_numpy(segment.targets),
            "lookback": torch.from_numpy(segment.lookback),
        }

    def counted(self, targets: Tensor) -> Tensor:
        """Return the positions that count in training, of [lanes, length]."""
        return targets[:, self.first_scored :]

    def metrics(self, score: Score, num_bytes: int) -> dict[str, float]:
        """Return loss (nats per token), perplexity, and bits per byte of the text."""
        return super().metrics(score, num_bytes) | {"bits_per_byte": score.bits / num_bytes}
