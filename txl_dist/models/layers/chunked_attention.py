"""Attention within chunks: each query sees the keys of its own chunk and of those before it, wherever tokens stand.

    layout   which position stands where in the order in which chunks are cut (Kitaev et al. 2020, section 2)
    scores   of a chunk's queries with the keys of its window
    output   one softmax over all that a query meets, in all rounds: as often as it meets a key, the key counts

Positions are sorted anew in each round of hashing. A round is chunks in a row, the rounds stand one behind the other,
and the first window of all reaches around to the last chunk. Local attention is one round that is not sorted.

It is computed block by block, a few chunks of a few heads, and in backward so again: no more scores are in memory.
"""

from collections.abc import Iterator
from math import e, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txl_dist.models.layers.dropout import Mask, drop, mixed

CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 25  # scores that are computed at once, if a chunk has no more
HIDDEN = -1e9  # the score of a key that is not seen, or less
SELF = -1e5  # the score of a token with itself where it may see itself only if it sees nothing else
LOG2E = log2(e)  # scores are in bits within a block: powers of 2 are faster on a CPU


class Layout(NamedTuple):
    """Where positions stand in all rounds, and what each may see.

    Attributes:
        position: int [rows, rounds * round_len], the position that stands there. At the end of a round there may be
            padding, beyond the length of the text, whose numbers no position sees.
        lowest: int [rows, the same]; a query of number i sees the keys of its window of numbers lowest <= j <= i.
        number: int [rows, the same]; None: the places in the order, 0, 1, ...
    """

    position: Tensor
    lowest: Tensor
    number: Tensor | None = None


class Chunks(NamedTuple):
    """How an order is cut.

    Attributes:
        rounds: how often each position stands in it.
        chunk_len: positions of a chunk.
        before: chunks before its own that a query's window has.
        sees_itself: whether a token's own key is one like any other; else it counts only where there is no other.
        around: whether the first window's keys from behind the last chunk may be seen.
    """

    rounds: int
    chunk_len: int
    before: int
    sees_itself: bool
    around: bool

    @property
    def reach(self) -> int:
        """Return how many positions stand in a window before its chunk."""
        return self.before * self.chunk_len

    @property
    def window(self) -> int:
        """Return how many keys a window has."""
        return self.reach + self.chunk_len


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, chunks: Chunks, mask: Mask | None) -> Tensor:
    """Attend; gradients cannot be differentiated again.

    Args:
        query, key, value: [rows, length, d_head]; a row is a head of a lane. Keys are scaled.
        mask: of the dropout of probabilities; seeds: [rows].

    Returns:
        [rows, length, d_head].
    """
    output: Tensor = BlockedAttention.apply(query, key, value, layout, chunks, mask)  # type: ignore[no-untyped-call]
    return output


class BlockedAttention(torch.autograd.Function):
    """Attention to all windows of a query, and its gradients.

    Over all rounds it is one softmax, 2^(s_ij - z_i) with z_i the logarithm of the sum over the windows of all rounds.
    So backward needs z, in two parts, and the output, and computes scores again (Dao et al. 2022, algorithm 4).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, chunks: Chunks, mask: Mask | None
    ) -> Tensor:
        """Keep arguments, output, largest scores and the logarithms of the sums beside those."""
        output = torch.zeros_like(query)
        largest = query.new_full((*query.shape[:2], 1), -torch.inf, dtype=wide(query.dtype))
        log_sum = torch.zeros_like(largest)
        for rows, number in parts(query, layout, chunks):
            part = Round(layout, chunks, rows, number, query.size(1))
            sorted_query, keys, values = part.sorted(query) * LOG2E, part.windows(key), part.windows(value)
            round_output = torch.empty_like(sorted_query)
            round_largest = largest.new_empty(*sorted_query.shape[:2], 1)
            round_sum = torch.empty_like(round_largest)
            for block in part.blocks():
                scores = part.scores(block, sorted_query, keys)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp2_()
                total = weights.sum(-1, keepdim=True)
                round_largest[:, block.queries] = top.flatten(1, 2)
                round_sum[:, block.queries] = total.log2().flatten(1, 2)
                if mask is not None:
                    weights *= part.factors(block, weights, mask)
                product = weights.to(values.dtype) @ part.cut_windows(block, values)
                round_output[:, block.queries] = product.div_(total.to(product.dtype)).flatten(1, 2)
            of_round = (part.unsorted(x) for x in (round_output, round_largest, round_sum))
            merge((output[rows], largest[rows], log_sum[rows]), *of_round)
        ctx.save_for_backward(query, key, value, output, largest, log_sum, *(mask[1:] if mask else ()))
        ctx.layout = layout
        ctx.chunks = chunks
        ctx.p = mask.p if mask else None
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of query, key and value."""
        query, key, value, output, largest, log_sum, *seeds = ctx.saved_tensors
        layout: Layout = ctx.layout
        chunks: Chunks = ctx.chunks
        mask = Mask(ctx.p, *seeds) if seeds else None
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        delta = (d_output * output).sum(-1, keepdim=True, dtype=log_sum.dtype)
        for rows, round_number in parts(query, layout, chunks):
            part = Round(layout, chunks, rows, round_number, query.size(1))
            sorted_query, keys, values = part.sorted(query) * LOG2E, part.windows(key), part.windows(value)
            sorted_d_output = part.sorted(d_output)
            sorted_largest, sorted_sum, sorted_delta = (part.sorted(x) for x in (largest, log_sum, delta))
            sorted_d_query = torch.empty_like(sorted_query)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in part.blocks():
                weights = part.scores(block, sorted_query, keys)
                weights.sub_(part.cut(block, sorted_largest)).sub_(part.cut(block, sorted_sum)).exp2_()
                d_out = part.cut(block, sorted_d_output)
                d_weights = (d_out @ part.cut_windows(block, values).transpose(-1, -2)).to(weights.dtype)
                dropped = weights
                if mask is not None:
                    factors = part.factors(block, weights, mask)
                    d_weights *= factors
                    dropped = weights * factors
                part.add_to_windows(block, d_values, dropped.to(d_out.dtype).transpose(-1, -2) @ d_out)
                d_scores = d_weights.sub_(part.cut(block, sorted_delta)).mul_(weights)
                if not chunks.sees_itself:
                    part.fill_itself(block, d_scores, 0.0)
                d_scores = d_scores.to(keys.dtype)
                sorted_d_query[:, block.queries] = (d_scores @ part.cut_windows(block, keys)).flatten(1, 2)
                part.add_to_windows(block, d_keys, d_scores.transpose(-1, -2) @ part.cut(block, sorted_query))
            d_query[rows] += part.unsorted(sorted_d_query)
            part.add_windows(d_keys.div_(LOG2E), d_key[rows])
            part.add_windows(d_values, d_value[rows])
        return d_query, d_key, d_value, None, None, None


class Block(NamedTuple):
    """Some chunks of a round.

    Attributes:
        queries: their positions in the order of the round.
        keys: those of their windows, in the order that begins with the first window.
        first: the number of their first chunk within the round.
    """

    queries: slice
    keys: slice
    first: int


class Round:
    """One round of some rows: what stands in its order, and how it goes back to the order of the text.

    Args:
        rows: of the rows of `layout.position`.
        number: of the round.
        length: of the text.
    """

    def __init__(self, layout: Layout, chunks: Chunks, rows: slice, number: int, length: int):
        self.chunks = chunks
        self.rows = rows
        self.length = length
        self.round_len = layout.position.size(1) // chunks.rounds
        self.start = number * self.round_len
        own = slice(self.start, self.start + self.round_len)
        self.position = layout.position[rows, own]
        self.window_position = self._windows_of(layout.position[rows])
        self.lowest = layout.lowest[rows, own]
        self.number = self.window_number = None
        if layout.number is not None:
            self.number = layout.number[rows, own]
            self.window_number = self._windows_of(layout.number[rows])
        self.undo = inverse(self.position[:, :length])

    def _windows_of(self, x: Tensor) -> Tensor:
        """Return what stands in the order of all rounds from the first window of this round to its end."""
        begin = self.start - self.chunks.reach
        end = self.start + self.round_len
        if begin >= 0:
            return x[:, begin:end]
        return x[:, torch.arange(begin, end, device=x.device) % x.size(1)]

    def blocks(self) -> Iterator[Block]:
        """Yield blocks of a block's scores, or of one chunk."""
        chunk_len, reach = self.chunks.chunk_len, self.chunks.reach
        count = max(1, block_size(self.position.device) // (len(self.position) * chunk_len * self.chunks.window))
        for first in range(0, self.round_len // chunk_len, count):
            start = first * chunk_len
            end = min(start + count * chunk_len, self.round_len)
            yield Block(slice(start, end), slice(start, end + reach), first)

    def sorted(self, x: Tensor) -> Tensor:
        """Sort [all rows, length, width] of the text: [rows, round_len, width]."""
        return take(x[self.rows], self.position)

    def windows(self, x: Tensor) -> Tensor:
        """Sort [all rows, length, width] of the text, from the first window on: [rows, reach + round_len, width]."""
        return take(x[self.rows], self.window_position)

    def unsorted(self, x: Tensor) -> Tensor:
        """Return [rows, round_len, width] in the order of the text: [rows, length, width]."""
        return take(x, self.undo)

    def cut(self, block: Block, x: Tensor) -> Tensor:
        """Cut out a block's chunks: [rows, round_len, width] -> [rows, chunks, chunk_len, width]."""
        return cut(x[:, block.queries], self.chunks)

    def cut_windows(self, block: Block, x: Tensor) -> Tensor:
        """Cut out a block's windows: [rows, reach + round_len, width] -> [rows, chunks, window, width]."""
        return x[:, block.keys].unfold(1, self.chunks.window, self.chunks.chunk_len).transpose(-1, -2)

    def scores(self, block: Block, sorted_query: Tensor, keys: Tensor) -> Tensor:
        """Compute the scores of a block, [rows, chunks, chunk_len, window], in float32 at least; HIDDEN: not seen."""
        scores = self.cut(block, sorted_query) @ self.cut_windows(block, keys).transpose(-1, -2)
        scores = scores.to(wide(scores.dtype))
        lowest = self.cut(block, self.lowest[..., None])
        if self.number is not None and self.window_number is not None:
            number = self.cut_windows(block, self.window_number[..., None]).transpose(-1, -2)
            scores.masked_fill_((number > self.cut(block, self.number[..., None])) | (number < lowest), HIDDEN)
        else:  # ranks ahead are always the same; by arithmetic, which is faster than by comparisons
            places = torch.arange(block.queries.start, block.queries.stop, self.chunks.chunk_len, device=lowest.device)
            first = self.start - self.chunks.reach + places
            at = torch.arange(self.chunks.window, dtype=scores.dtype, device=scores.device)
            lowest_at = (lowest - first[:, None, None]).clamp_(min=0).to(scores.dtype)
            scores.add_((at - lowest_at).clamp_(max=0), alpha=-HIDDEN)
            scores.add_((at > at[self.chunks.reach :, None]).to(scores.dtype), alpha=HIDDEN)
        if not self.chunks.sees_itself:
            self.fill_itself(block, scores, SELF)
        return scores

    def fill_itself(self, block: Block, scores: Tensor, value: float) -> None:
        """Fill in a value where a query meets its own key."""
        if self.number is None or self.window_number is None:
            scores.diagonal(self.chunks.reach, -2, -1).fill_(value)
            return
        keys = self.cut_windows(block, self.window_number[..., None]).transpose(-1, -2)
        scores.masked_fill_(keys == self.cut(block, self.number[..., None]), value)

    def factors(self, block: Block, weights: Tensor, mask: Mask) -> Tensor:
        """Draw what the weights of a block are multiplied by."""
        first = self.start // self.chunks.chunk_len + block.first
        seeds = chunk_seeds(mask.seeds[self.rows], range(first, first + weights.size(1)))
        return drop(torch.ones_like(weights).flatten(0, 1), Mask(mask.p, seeds)).view_as(weights)

    def add_to_windows(self, block: Block, total: Tensor, windows: Tensor) -> None:
        """Add [rows, chunks, window, width] to [rows, reach + round_len, width]; windows overlap."""
        chunk_len = self.chunks.chunk_len
        for number in range(self.chunks.before + 1):
            shift = number * chunk_len
            start = block.queries.start + shift
            piece = windows[:, :, shift : shift + chunk_len].flatten(1, 2)
            total[:, start : start + piece.size(1)] += piece

    def add_windows(self, windows: Tensor, total: Tensor) -> None:
        """Add [rows, reach + round_len, width] to [rows, length, width] of the text."""
        reach = self.chunks.reach
        total += self.unsorted(windows[:, reach:])
        if self.chunks.around and reach:
            index = self.window_position[:, :reach].long().clamp(max=self.length - 1)  # the gradient of padding is 0
            total.scatter_add_(1, index[..., None].expand(-1, -1, total.size(-1)), windows[:, :reach])


def merge(total: tuple[Tensor, Tensor, Tensor], output: Tensor, largest: Tensor, log_sum: Tensor) -> None:
    """Merge a round into the softmax over the rounds before it, in place.

    Args:
        total, and the others: output [rows, length, width], largest score, and the logarithm to the base 2 of the sum
            beside that [rows, length, 1]. Their sum would lose what is behind the point where only SELF is seen.
    """
    all_output, all_largest, all_sum = total
    most = torch.maximum(all_largest, largest)
    before = all_sum + (all_largest - most)
    here = log_sum + (largest - most)
    merged = torch.logaddexp2(before, here)
    all_output *= (before - merged).exp2().to(output.dtype)
    all_output += output * (here - merged).exp2().to(output.dtype)
    all_largest.copy_(most)
    all_sum.copy_(merged)


def parts(query: Tensor, layout: Layout, chunks: Chunks) -> Iterator[tuple[slice, int]]:
    """Yield rows and rounds; of several rows together if they have no more scores than a block."""
    round_len = layout.position.size(1) // chunks.rounds
    count = max(1, block_size(query.device) // (round_len * chunks.window))
    for start in range(0, len(query), count):
        for number in range(chunks.rounds):
            yield slice(start, start + count), number


def chunk_seeds(seeds: Tensor, numbers: range) -> Tensor:
    """Return a seed for each chunk of each row: int64 [rows] -> [rows * chunks]."""
    chunk = mixed(torch.arange(numbers.start, numbers.stop, device=seeds.device))
    return mixed(seeds[:, None] ^ chunk).flatten()


def cut(x: Tensor, chunks: Chunks) -> Tensor:
    """Cut [rows, n, ...] into chunks: [rows, n / chunk_len, chunk_len, ...]."""
    pieces: Tensor = x.unflatten(1, (-1, chunks.chunk_len))
    return pieces


def take(x: Tensor, index: Tensor) -> Tensor:
    """Take positions of each row: [rows, length, width], int [rows, ...] -> [rows, ..., width]."""
    rows, length, width = x.shape
    first = torch.arange(rows, device=x.device).view(-1, *[1] * (index.dim() - 1)) * length
    flat = (index.clamp(max=length - 1) + first).flatten()  # padding is anything
    return x.reshape(-1, width).index_select(0, flat).view(*index.shape, width)


def inverse(index: Tensor) -> Tensor:
    """Return the inverse permutation of each row: int [rows, n] -> int64 [rows, n]."""
    count = torch.arange(index.size(1), device=index.device).expand(index.shape)
    return torch.empty_like(count.contiguous()).scatter_(1, index.long(), count)


def block_size(device: torch.device) -> int:
    """Return how many scores are computed at once: on a CPU those that fit into its cache."""
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
