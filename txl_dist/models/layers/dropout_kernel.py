"""Dropout by Triton kernels: each reads a number once, writes it once, and draws the mask from the lane's seed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def drop(x: Tensor, seeds: Tensor, p: float, variational: bool, relu: bool = False) -> Tensor:
    """Drop numbers of [lanes, ..., positions, width], contiguous, with probability p; scale the others by 1 / (1 - p).

    Args:
        seeds: int64 [lanes].
        variational: drop the same of the width at all positions.
        relu: take max(x, 0) instead of x.
    """
    dropped = torch.empty_like(x)
    numbers = x[0].numel()
    positions, width = x.shape[-2:] if variational else (1, numbers)
    grid = triton.cdiv(numbers, BLOCK), len(seeds)
    drop_kernel[grid](x, dropped, seeds, numbers, positions * width, width, p, relu, BLOCK)
    return dropped


def pass_where_positive(gradient: Tensor, dropped: Tensor, p: float) -> Tensor:
    """Compute the gradient of `drop` with relu from its result: gradient / (1 - p) where that is above 0.

    Both are of one shape, contiguous.
    """
    passed = torch.empty_like(gradient)
    numbers = gradient.numel()
    gradient_kernel[triton.cdiv(numbers, BLOCK),](gradient, dropped, passed, numbers, p, BLOCK)
    return passed


@triton.jit
def drop_kernel(x, dropped, seeds, numbers, plane, width, p, RELU: tl.constexpr, BLOCK: tl.constexpr):
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
    if RELU:  # a comparison, which leaves NaN as it is
        number = tl.where(number < 0, 0.0, number).to(number.dtype)
    tl.store(dropped + where, tl.where(uniform < p, 0.0, number / (1 - p)).to(number.dtype), mask=exists)


@triton.jit
def gradient_kernel(gradient, dropped, passed, numbers, p, BLOCK: tl.constexpr):
    """Pass the gradient of BLOCK numbers."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = where < numbers
    number = tl.load(gradient + where, mask=exists)
    is_positive = tl.load(dropped + where, mask=exists) > 0
    tl.store(passed + where, tl.where(is_positive, number / (1 - p), 0.0).to(number.dtype), mask=exists)
