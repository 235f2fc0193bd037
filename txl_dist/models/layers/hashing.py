"""Locality-sensitive hashing of vectors by random rotations, and the order in which chunks are cut.

    bucket = argmax [x R; -x R]        R normal, for each round another (Kitaev et al. 2020, section 2)

Several factors of a number of buckets are hashed apart: 64 x 128 buckets take 64 + 128 rotated directions.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from txl_dist.models.layers.chunked_attention import Chunks, Layout

ROTATED = 1 << 22  # numbers that are rotated at once


@torch.library.custom_op("txl_dist::rotations", mutates_args=())
def draw_rotations(seed: Tensor, n_head: int, d_head: int, rounds: int, directions: int) -> Tensor:
    """Draw the rotations of a layer, float32 [n_head, d_head, rounds, directions]; more rounds begin with the same.

    Args:
        seed: int64, one number.
    """
    drawn = []
    for number in range(rounds):
        generator = torch.Generator().manual_seed((int(seed) + number) % 2**63)
        drawn.append(torch.randn(n_head, d_head, directions, generator=generator))
    return torch.stack(drawn, dim=2).to(seed.device)


@draw_rotations.register_fake
def _(seed: Tensor, n_head: int, d_head: int, rounds: int, directions: int) -> Tensor:
    return seed.new_empty(n_head, d_head, rounds, directions, dtype=torch.float32)


@torch.no_grad()
def hash_vectors(x: Tensor, rotations: Tensor, n_buckets: Sequence[int]) -> Tensor:
    """Hash vectors: [lanes, n_head, length, d_head] -> int64 [lanes, n_head, rounds, length], below prod(n_buckets).

    Args:
        rotations: [n_head, d_head, rounds, sum(n_buckets) / 2].
        n_buckets: even factors of the number of buckets.
    """
    lanes, n_head, length, _ = x.shape
    rounds = rotations.size(2)
    flat = rotations.to(x.device, x.dtype).flatten(2)
    buckets = torch.zeros(lanes, n_head, rounds, length, dtype=torch.int64, device=x.device)
    block = max(1, ROTATED // (lanes * n_head * flat.size(-1)))
    for start in range(0, length, block):
        rotated = (x[:, :, start : start + block] @ flat).unflatten(-1, (rounds, -1)).transpose(2, 3)
        step = 1
        for factor, directions in zip(n_buckets, rotated.split([n // 2 for n in n_buckets], dim=-1), strict=True):
            largest = directions.max(-1)
            least = directions.min(-1)
            opposite = largest.values < -least.values
            bucket = torch.where(opposite, least.indices + factor // 2, largest.indices)
            buckets[..., start : start + block] += step * bucket
            step *= factor
    return buckets


def sort_within_buckets(buckets: Tensor, start: Tensor, n_buckets: Sequence[int], chunks: Chunks) -> Layout:
    """Sort by bucket, then by position; a query sees what is at most `chunks.reach` places before it in its own bucket.

    So where other buckets' positions stand changes nothing, and what a query sees depends on nothing behind it.

    Args:
        buckets: int64 [lanes, n_head, rounds, length].
        start: int64 [lanes, length], the first position that each may see, such as its document's.
    """
    lanes, n_head, rounds, length = buckets.shape
    order = sort_stably(buckets, prod(n_buckets))
    group = buckets.gather(-1, order)
    first = start[:, None, None].expand(buckets.shape).gather(-1, order)
    rank = torch.arange(length, device=buckets.device)
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[..., 1:] = (group[..., 1:] != group[..., :-1]) | (first[..., 1:] != first[..., :-1])
    lowest = torch.maximum(torch.where(begins, rank, 0).cummax(-1).values, rank - chunks.reach)
    position, lowest = (pad(x, chunks) for x in (order, lowest))
    lowest = lowest + torch.arange(rounds, device=buckets.device)[:, None] * lowest.size(-1)
    return Layout(*(x.flatten(0, 1).flatten(1).int() for x in (position, lowest)))


def sort_as_published(buckets: Tensor, start: Tensor, n_buckets: Sequence[int], chunks: Chunks) -> Layout:
    """Sort by bucket, then by position; a query sees what is before it in the text and stands in its window.

    So what it sees depends on where the borders of chunks fall, and that on the whole text. Arguments are those of
    `sort_within_buckets`.
    """
    order = sort_stably(buckets, prod(n_buckets))
    lowest = start[:, None, None].expand(buckets.shape).gather(-1, order)
    position, lowest = (pad(x, chunks).flatten(0, 1).flatten(1).int() for x in (order, lowest))
    return Layout(position, lowest, number=position)


def pad(x: Tensor, chunks: Chunks) -> Tensor:
    """Pad rounds [..., length] to whole chunks by `length`, `length` + 1, ...: numbers that no position sees."""
    length = x.size(-1)
    padding = torch.arange(length, length + -length % chunks.chunk_len, device=x.device)
    return torch.cat([x, padding.expand(*x.shape[:-1], -1)], dim=-1)


def unsorted(start: Tensor, n_head: int, chunks: Chunks) -> Layout:
    """Lay out one round in the order of the text, with `start` as in `sort_within_buckets`."""
    position = pad(torch.arange(start.size(1), dtype=torch.int32, device=start.device), chunks)
    lowest = pad(start.int(), chunks).repeat_interleave(n_head, dim=0)
    return Layout(position.expand(lowest.shape), lowest)


@torch.library.custom_op("txl_dist::sort_stably", mutates_args=())
def sort_stably(buckets: Tensor, count: int) -> Tensor:
    """Return the order of int64 [..., length] below `count`: int64, equal ones as they stand.

    On a CPU by numpy, whose sort of numbers of 16 bits counts digits.
    """
    if buckets.device.type == "cpu" and count <= 1 << 16:
        return torch.from_numpy(np.argsort(buckets.numpy().astype(np.uint16), axis=-1, kind="stable"))
    return buckets.argsort(stable=True, dim=-1)


@sort_stably.register_fake
def _(buckets: Tensor, count: int) -> Tensor:
    return torch.empty_like(buckets)
