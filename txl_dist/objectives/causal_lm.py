"""Causal language modelling: predict each token from those before it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CausalLM:
    """The mean negative log-likelihood of the tokens of a segment.

    Attributes:
        first_scored: the first position of a segment that counts in training (train.loss).
    """

    first_scored: int

    def counted(self, positions: Tensor) -> Tensor:
        """Return the positions that count in training, of [lanes, length]."""
        return positions[:, self.first_scored :]

    def loss(self, nats: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss, in nats per token, and that of each lane, detached: [lanes].

        Args:
            nats: [lanes, length], the negative log-likelihood of each target, 0 where not scored.
            weight: turns a mean over all positions into a mean over the scored ones of the global batch.
        """
        weighted = self.counted(nats) * weight
        return weighted.mean(), weighted.detach().mean(dim=1)
