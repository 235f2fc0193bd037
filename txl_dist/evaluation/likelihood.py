"""Losses of a model: of segments read with memory, and of single tokens, each in a context of its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.models.base import LanguageModel


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

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return loss (nats per token), perplexity, and bits per byte of a text of `num_bytes`."""
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": self.bits / num_bytes,
        }


def perplexity(nats: float) -> float:
    """Return exp(nats), limited to a finite number."""
    return math.exp(min(nats, 700.0))


@torch.no_grad()
def score(model: LanguageModel, segments: Iterable[Segment], device: torch.device, lanes: int) -> Score:
    """Read `segments` of some lanes in order, from empty memories; targets that are NOT_SCORED count nothing."""
    memory = model.empty_cache(lanes, device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for segment in segments:
        arrays = (segment.inputs, segment.targets, segment.lookback)
        losses, memory = model(*map(torch.from_numpy, arrays), memory)
        nats += losses.double().sum()
        tokens += int((segment.targets != NOT_SCORED).sum())
    return Score(nats.item(), tokens)


@torch.no_grad()
def losses_in_context(
    model: LanguageModel,
    stream: np.ndarray,
    positions: np.ndarray,
    context: int,
    eos: int,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Compute -log P(x_t | x_t-1, ..., x_t-context) for the tokens at some positions, each from scratch.

    A model with memory reads the context in segments of tgt_len tokens, one without memory in a single segment.

    Args:
        stream: int64 [tokens].
        positions: int64 [n], computed as one batch.
        context: in tokens.
        eos: the token before the first one of the stream.
        starts: of documents, int64 [documents]; then no context reaches back beyond the token's document.

    Returns:
        float64 [n], in nats.
    """
    padded = np.concatenate([np.full(context, eos), stream])
    offsets = np.arange(context)
    inputs = torch.from_numpy(padded[positions[:, None] + offsets])
    begin = 0 if starts is None else starts[np.searchsorted(starts, positions, side="right") - 1].astype(np.int64)
    history = (positions - begin)[:, None] - (context - 1 - offsets)  # tokens before each input; negative: padding
    lookback = torch.from_numpy(np.minimum(history, offsets).clip(min=0))
    targets = torch.from_numpy(stream[positions])[:, None]

    length = model.config.tgt_len if model.config.lookback else context
    memory = model.empty_cache(len(positions))
    hidden = torch.empty(0)
    # The first segment may be shorter: the last one ends with the context.
    for end in reversed(range(context, 0, -length)):
        part = slice(max(0, end - length), end)
        hidden, memory = model.through_layers(model.embed(inputs[:, part]), lookback[:, part], memory)
    return model.predict(hidden[:, -1:], targets)[:, 0].double().cpu().numpy()
