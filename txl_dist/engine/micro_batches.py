"""Micro-batches: the rows of a segment that pass through the model together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from txl_dist.data.segments import NOT_SCORED, Segment


def row_slices(rows: int, micro_batches: int) -> list[slice]:
    """Return the rows of each micro-batch; all have as many."""
    size = rows // micro_batches
    return [slice(number * size, (number + 1) * size) for number in range(micro_batches)]


def segment_tensors(segment: Segment, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets and lookback of some rows of a segment, int64 [rows, length] on the CPU."""
    inputs = torch.from_numpy(segment.inputs[rows])
    targets = torch.from_numpy(segment.targets[rows])
    lookback = torch.from_numpy(segment.lookback[rows])
    return inputs, targets, lookback


@torch.no_grad()
def score_micro_batches(
    forward: Callable[..., tuple[Tensor, Any]], caches: list[Any], segments: Iterable[Segment], device: torch.device
) -> tuple[Tensor, int]:
    """Read segments in order, each micro-batch of lanes with a memory of its own.

    Args:
        forward: runs the model, as `LanguageModel.forward`.
        caches: the empty memory of each micro-batch; they are used up.
        device: of the losses.

    Returns:
        The nats, float64, and how many tokens are scored.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for segment in segments:
        for number, rows in enumerate(row_slices(len(segment.inputs), len(caches))):
            losses, caches[number] = forward(*segment_tensors(segment, rows), caches[number])
            nats += losses.double().sum()
        tokens += int((segment.targets != NOT_SCORED).sum())
    return nats, tokens
