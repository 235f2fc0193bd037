"""The loss of a whole split."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.models.memory import Memory


@dataclass(frozen=True)
class Score:
    """What a model needs to tell a text: `nats` for its `tokens`."""

    nats: float
    tokens: int

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """loss (nats a token), perplexity, and bits a byte of the text that has `num_bytes`."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / num_bytes,
        }


@torch.no_grad()
def score(model: nn.Module, segments: Iterable[Segment], memory: Memory, micro_batches: int = 1) -> Score:
    """Read `segments` in order with a memory of their own; the rows of each are computed in `micro_batches` parts.

    Targets that are NOT_SCORED count nothing.
    """
    device = memory.current.device
    nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for segment in segments:
        for rows in row_slices(len(segment.inputs), micro_batches):
            loss, remembered = model(*to_device(segment, rows, device), memory.read(rows))
            memory.write(rows, remembered)
            nats += loss.double().sum()
        memory.commit()
        tokens += int((segment.targets != NOT_SCORED).sum())
    return Score(nats.item(), tokens)


def row_slices(rows: int, micro_batches: int) -> list[slice]:
    """The rows of each micro-batch."""
    share = rows // micro_batches
    return [slice(i * share, (i + 1) * share) for i in range(micro_batches)]


def to_device(segment: Segment, rows: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inputs, targets and reach of some rows of a segment."""
    arrays = (segment.inputs[rows], segment.targets[rows], segment.reach[rows])
    inputs, targets, reach = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return inputs, targets, reach
