"""Dropout by one Triton kernel: it reads each number once, writes it once, and draws its mask from the lane's seed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def drop(x: Tensor, seeds: Tensor, p: float, variational: bool) -> Tensor:
    """Drop numbers of [lanes, ..., positions, width], contiguous, with probability p; scale the others by 1 / (1 - p).

    Args:
        seeds: int64 [lanes].
        variational: drop the same of the width at all positions.
    """
    dropped = torch.empty_like(x)
    numbers = x[0].numel()
    positions, width = x.shape[-2:] if variational else (1, numbers)
    kernel[triton.cdiv(numbers, BLOCK), len(seeds)](x, dropped, seeds, numbers, positions * width, width, p, BLOCK)
    return dropped


@triton.jit
def kernel(x, dropped, seeds, numbers, plane, width, p, BLOCK: tl.constexpr):
    """Drop BLOCK numbers of a lane; in each plane, [positions, width], all positions have the mask of the first."""
    lane = tl.program_id(1)
    seed = tl.load(seeds + lane)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    drawn = i // plane * width + i % width
    uniform = tl.rand(seed, drawn.to(tl.int32))
    exists = i < numbers
    where = lane.to(tl.int64) * numbers + i
    number = tl.load(x + where, mask=exists)
    tl.store(dropped + where, tl.where(uniform < p, 0.0, number / (1 - p)).to(number.dtype), mask=exists)
