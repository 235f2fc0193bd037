"""The loss of a whole split."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.models.transformer_xl import TransformerXL


@dataclass(frozen=True)
class Score:
    """What a model needs to tell a text: `nats` for its `tokens`."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / self.tokens

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return loss, perplexity, and bits per byte of the text that has `num_bytes`."""
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": self.bits / num_bytes,
        }


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a finite number, whatever a loss is


@torch.no_grad()
def score(model: TransformerXL, segments: Iterable[Segment], device: torch.device, lanes: int) -> Score:
    """Read `segments` of some lanes in order, from empty memories; targets that are NOT_SCORED count nothing."""
    memory = model.empty_cache(lanes, device)
    nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for segment in segments:
        arrays = (segment.inputs, segment.targets, segment.lookback)
        losses, memory = model(*map(torch.from_numpy, arrays), memory)
        nats += losses.double().sum()
        tokens += int((segment.targets != NOT_SCORED).sum())
    return Score(nats.item(), tokens)


@torch.no_grad()
def losses_in_context(
    model: TransformerXL,
    stream: np.ndarray,
    positions: np.ndarray,
    context: int,
    eos: int,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """-log P(x_t | x_t-1, ..., x_t-context) in nats of the tokens at some positions, each read anew and alone.

    A model with memory reads its context in segments of tgt_len tokens, one without in a single segment.

    Args:
        stream: int64 [tokens].
        positions: int64 [n], computed side by side.
        starts: of documents, where the context ends with the token's document.

    Returns:
        float64 [n].
    """
    padded = np.concatenate([np.full(context, eos), stream])
    place = np.arange(context)
    inputs = torch.from_numpy(padded[positions[:, None] + place])
    begin = 0 if starts is None else starts[np.searchsorted(starts, positions, side="right") - 1].astype(np.int64)
    history = (positions - begin)[:, None] - (context - 1 - place)  # tokens before each input; negative: padding
    lookback = torch.from_numpy(np.minimum(history, place).clip(min=0))
    targets = torch.from_numpy(stream[positions])[:, None]

    mem_len = model.config.mem_len
    length = model.config.tgt_len if mem_len else context
    memory, ends = model.empty_cache(len(positions)), range(context, 0, -length)
    hidden = torch.empty(0)
    for end in reversed(ends):
        part = slice(max(0, end - length), end)
        hidden, memory = model.through_layers(model.embed(inputs[:, part]), lookback[:, part], memory)
    return model.predict(hidden[:, -1:], targets)[:, 0].double().cpu().numpy()
