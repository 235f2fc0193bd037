"""Dropout whose masks belong to lanes.

What is dropped is a function of run.seed, the step, the lane, the place in the model (a module's name) and the
position, and of nothing else. So a lane has the same masks in whichever micro-batch, rank or pipeline stage it is
computed; activation checkpointing draws them again; and a run has no random state to save.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from txl_dist.models.layers.transfer import to_device

CPU = torch.device("cpu")
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Noise:
    """The randomness of one training step for some lanes.

    Attributes:
        seeds: int64 [lanes], on the device that computes.
        shared: int64 [1], the seed of what all lanes have in common.
    """

    seeds: Tensor
    shared: Tensor

    @classmethod
    def of_step(cls, seed: int, step: int, lanes: Iterable[int], device: torch.device = CPU) -> "Noise":
        """Return the randomness of a run's step, counted from 0, for lanes of these numbers."""
        seeds = [hash64(f"{seed} {step} {lane}") for lane in (*lanes, "all")]
        return cls(*to_device(torch.tensor(seeds), device).split([len(seeds) - 1, 1]))

    def of_rows(self, rows: slice | Tensor) -> "Noise":
        """Return that of some of the lanes."""
        return Noise(self.seeds[rows], self.shared)

    def of_part(self, number: int) -> "Noise":
        """Return that of one of several parts of the text, which are computed one after the other."""
        part = mixed(torch.tensor(number, device=self.seeds.device))
        return Noise(mixed(self.seeds ^ part), self.shared)

    def of_all_lanes(self) -> "Noise":
        """Return that of what all lanes have in common, as if it was a lane."""
        return Noise(self.shared, self.shared)


class Mask(NamedTuple):
    """A mask that is drawn where it is used: numbers are dropped with probability p; seeds: int64 [lanes]."""

    p: float
    seeds: Tensor


class LaneDropout(nn.Module):
    """Draw masks; what they are applied to is up to the subclass, or to attention.

    Args:
        p: the probability to drop a number.

    Attributes:
        place: int64 [], identifies the module in its model; see `assign_places`. A tensor, as compiled layers would
            otherwise be compiled anew for each value.
    """

    place: Tensor

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.register_buffer("place", torch.zeros((), dtype=torch.int64), persistent=False)

    def mask(self, noise: Noise | None = None) -> Mask | None:
        """Return this module's mask; None where nothing is dropped, as in evaluation."""
        if not (self.training and self.p):
            return None
        assert noise is not None, "dropout in training needs the step's noise"
        return Mask(self.p, noise.seeds ^ self.place)


class Dropout(LaneDropout):
    """Dropout of [lanes, ..., positions, width].

    Args:
        variational: one mask of the width for all positions (Gal & Ghahramani 2016, section 4).
    """

    def __init__(self, p: float, variational: bool):
        super().__init__(p)
        self.variational = variational

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Drop numbers in training, and scale the others by 1 / (1 - p)."""
        mask = self.mask(noise)
        return x if mask is None else drop(x, mask, self.variational)


class ReluDropout(Dropout):
    """Dropout of the rectified [lanes, ..., positions, width]."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute max(x, 0); in training drop numbers of it, and scale the others by 1 / (1 - p)."""
        mask = self.mask(noise)
        if mask is not None and is_fused(x):
            dropped: Tensor = drop_relu_fused(x, mask.seeds, mask.p, self.variational)
            return dropped
        # Not in place: `x` may be a view, of which autograd would have to copy the whole.
        rectified = x.relu()
        return rectified if mask is None else drop(rectified, mask, self.variational)


class WordDropout(LaneDropout):
    """Dropout of words of the vocabulary: one is there or not, wherever it stands in a lane's segment.

    Gal & Ghahramani 2016, section 4.2.
    """

    def forward(self, embedded: Tensor, tokens: Tensor, noise: Noise | None = None) -> Tensor:
        """Drop words in training; embedded: [lanes, length, width] of the tokens, int64 [lanes, length]."""
        mask = self.mask(noise)
        if mask is None:
            return embedded
        uniform = (mixed(mixed(tokens) ^ mask.seeds[:, None]) & (1 << 24) - 1) / (1 << 24)
        return embedded * ((uniform >= mask.p) / (1 - mask.p)).to(embedded.dtype)[..., None]


def assign_places(model: nn.Module) -> None:
    """Identify every dropout by its name in the whole model; to be called before a pipeline cuts it."""
    for name, module in model.named_modules():
        if isinstance(module, LaneDropout):
            module.place.fill_(hash64(name))


def hash64(text: str) -> int:
    """Hash a text to a signed number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mixed(x: Tensor) -> Tensor:
    """Hash each number of int64 [...]: the finaliser of splitmix64 (Steele et al. 2014, section 5)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # a shift of int64 copies its sign
    return x ^ (x >> 31 & (1 << 33) - 1)


def is_fused(x: Tensor) -> bool:
    """Return whether a kernel drops the numbers of a tensor: it keeps no mask in memory."""
    return x.device.type != "cpu" and HAS_TRITON


def drop(x: Tensor, mask: Mask, variational: bool = False) -> Tensor:
    """Apply a mask to [lanes, ..., positions, width], with one row for all positions if it is variational."""
    if is_fused(x):
        dropped: Tensor = drop_fused(x, mask.seeds, mask.p, variational)
        return dropped
    *outer, positions, width = x.shape[1:]
    factor: Tensor = factors(mask.seeds, [*outer, 1 if variational else positions, width], mask.p, x.dtype)
    return x * factor


@torch.library.custom_op("txl_dist::dropout_factors", mutates_args=())
def factors(seeds: Tensor, shape: list[int], p: float, dtype: torch.dtype) -> Tensor:
    """Draw what numbers are multiplied by, 0 or 1 / (1 - p): int64 [lanes] -> [lanes, *shape].

    By numpy, whose generator is faster than torch's on a CPU (benchmarks/README.md).
    """
    drawn = np.empty([len(seeds), prod(shape)], np.float32)
    dropped_below = np.uint32(min(round(p * 2**32), 2**32 - 1))
    for row, seed in zip(drawn, seeds.tolist(), strict=True):
        random = np.random.SFC64(seed % 2**64).random_raw((row.size + 1) // 2).view(np.uint32)
        np.multiply(random[: row.size] >= dropped_below, np.float32(1 / (1 - p)), out=row)
    return torch.from_numpy(drawn).view(len(seeds), *shape).to(seeds.device, dtype)


@factors.register_fake
def _(seeds: Tensor, shape: list[int], p: float, dtype: torch.dtype) -> Tensor:
    return seeds.new_empty([len(seeds), *shape], dtype=dtype)


@torch.library.custom_op("txl_dist::dropout", mutates_args=())
def drop_fused(x: Tensor, seeds: Tensor, p: float, variational: bool) -> Tensor:
    """Compute `drop` by one kernel."""
    from txl_dist.models.layers import dropout_kernel  # imports triton, which is not installed everywhere

    dropped: Tensor = dropout_kernel.drop(x.contiguous(), seeds, p, variational)
    return dropped


def keep_mask(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
    """Keep what the mask is drawn from, for backward."""
    _, seeds, ctx.p, ctx.variational = inputs
    ctx.save_for_backward(seeds)


def drop_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """Draw the same mask again, and apply it to the gradient."""
    return drop_fused(gradient, *ctx.saved_tensors, ctx.p, ctx.variational), None, None, None


@torch.library.custom_op("txl_dist::dropout_of_relu", mutates_args=())
def drop_relu_fused(x: Tensor, seeds: Tensor, p: float, variational: bool) -> Tensor:
    """Compute `drop` of max(x, 0) by one kernel."""
    from txl_dist.models.layers import dropout_kernel

    dropped: Tensor = dropout_kernel.drop(x.contiguous(), seeds, p, variational, relu=True)
    return dropped


def keep_result(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
    """Keep the result, which whatever comes next keeps as well: it is above 0 where the gradient passes."""
    _, _, ctx.p, _ = inputs
    ctx.save_for_backward(output)


def drop_relu_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """Pass the gradient where the result is above 0."""
    return pass_where_positive(gradient, *ctx.saved_tensors, ctx.p), None, None, None


@torch.library.custom_op("txl_dist::dropout_of_relu_gradient", mutates_args=())
def pass_where_positive(gradient: Tensor, dropped: Tensor, p: float) -> Tensor:
    """Compute the gradient of `drop_relu_fused` from its result, by one kernel."""
    from txl_dist.models.layers import dropout_kernel

    passed: Tensor = dropout_kernel.pass_where_positive(gradient.contiguous(), dropped, p)
    return passed


def like_the_first(x: Tensor, *_: Any) -> Tensor:
    """Return a result without numbers: contiguous, of the first argument's shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for operator in (drop_fused, drop_relu_fused, pass_where_positive):
    operator.register_fake(like_the_first)
drop_fused.register_autograd(drop_gradient, setup_context=keep_mask)
drop_relu_fused.register_autograd(drop_relu_gradient, setup_context=keep_result)
