"""What a layer remembers of a text that it reads token by token: keys and values, and which positions hash alike."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from txl_dist.models.layers.state import Cache

FEW = 64  # positions for which there is room at first


class TextCache(Cache):
    """Keep keys and values of all positions; of each bucket of each round the last positions, in a ring.

    Lanes may have read different numbers of tokens.

    Attributes:
        length: int64 [lanes], the tokens that each lane has read.
        states: [2 (keys, values), lanes, n_head, room, d_head].
        ring: int32 [lanes, n_head, rounds, buckets, size], positions, -1 where there is none yet; None: no buckets.
        count: int64 [lanes, n_head, rounds, buckets], the tokens that were put into each bucket.
    """

    def __init__(self, states: Tensor, length: Tensor):
        self.states = states
        self.length = length
        self.ring: Tensor | None = None
        self.count: Tensor | None = None

    @classmethod
    def empty(cls, lanes: int, n_head: int, weight: Tensor, d_head: int, device: torch.device | None) -> "TextCache":
        """Return a cache of lanes that begin; keys have the dtype of a weight."""
        states = weight.new_empty(2, lanes, n_head, 0, d_head, device=device)
        return cls(states, torch.zeros(lanes, dtype=torch.int64, device=states.device))

    @property
    def is_empty(self) -> bool:
        """Return whether nothing has been read."""
        return self.states.size(3) == 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append a segment to every lane: [lanes, n_head, length, d_head]."""
        segment = torch.stack([key, value])
        length = key.size(2)
        room = self.states.size(3)
        if room == 0:
            self.states = segment
        else:
            if int(self.length.max()) + length > room:
                more = segment.new_empty(*self.states.shape[:3], max(FEW, room // 2, length), segment.size(-1))
                self.states = torch.cat([self.states, more], dim=3)
            at = self.length[:, None] + torch.arange(length, device=self.length.device)
            lane = torch.arange(len(at), device=at.device)[:, None]
            self.states[:, lane, :, at] = segment.movedim((1, 3), (0, 1))
        self.length = self.length + length

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [lanes, n_head, n, d_head] at int [lanes, n_head, n]; anything where that is -1."""
        index = positions.clamp(min=0).long()[..., None].expand(-1, -1, -1, self.states.size(-1))
        key, value = (states.gather(2, index) for states in self.states)
        return key, value

    def fill_buckets(self, buckets: Tensor, n_buckets: Sequence[int], size: int) -> None:
        """Note where the last `size` tokens of each bucket stand, of int64 [lanes, n_head, rounds, length]."""
        number = prod(n_buckets)
        order = buckets.argsort(stable=True, dim=-1)
        group = buckets.gather(-1, order)
        self.count = torch.zeros(*buckets.shape[:3], number, dtype=torch.int64, device=buckets.device)
        self.count.scatter_add_(-1, buckets, torch.ones_like(buckets))
        begin = self.count.cumsum(-1) - self.count
        rank = torch.arange(buckets.size(-1), device=buckets.device) - begin.gather(-1, group)
        is_last = rank >= self.count.gather(-1, group) - size
        slot = torch.where(is_last, group * size + rank % size, number * size)  # behind the last: thrown away
        ring = torch.full((*buckets.shape[:3], number * size + 1), -1, dtype=torch.int32, device=buckets.device)
        ring.scatter_(-1, slot, order.int())
        self.ring = ring[..., :-1].unflatten(-1, (number, size))

    def in_buckets(self, buckets: Tensor) -> Tensor:
        """Return the positions in buckets, int64 [lanes, n_head, rounds] -> int32 [lanes, n_head, rounds, size]."""
        assert self.ring is not None
        index = buckets[..., None, None].expand(*buckets.shape, 1, self.ring.size(-1))
        return self.ring.gather(3, index)[:, :, :, 0]

    def add_to_buckets(self, buckets: Tensor) -> None:
        """Note the last token in its buckets, int64 [lanes, n_head, rounds]."""
        assert self.ring is not None and self.count is not None
        count = self.count.gather(-1, buckets[..., None])
        size = self.ring.size(-1)
        slot = buckets[..., None] * size + count % size
        position = (self.length - 1).int()[:, None, None, None].expand(slot.shape)
        self.ring.flatten(-2).scatter_(-1, slot, position)
        self.count.scatter_add_(-1, buckets[..., None], torch.ones_like(count))

    def copy(self) -> "TextCache":
        """Return a cache of the same content."""
        copied = TextCache(self.states.clone(), self.length)
        copied.ring, copied.count = (x if x is None else x.clone() for x in (self.ring, self.count))
        return copied

    def concat(self, others: Sequence[Any]) -> "TextCache":
        """Return a cache of the lanes of this one and then of the others."""
        caches = [self, *others]
        room = max(cache.states.size(3) for cache in caches)
        padded = []
        for cache in caches:
            missing = cache.states.new_empty(*cache.states.shape[:3], room - cache.states.size(3), cache.states.size(4))
            padded.append(torch.cat([cache.states, missing], dim=3))
        joined = TextCache(torch.cat(padded, dim=1), torch.cat([cache.length for cache in caches]))
        if self.ring is not None:
            joined.ring = torch.cat([cache.ring for cache in caches])
            joined.count = torch.cat([cache.count for cache in caches])
        return joined
