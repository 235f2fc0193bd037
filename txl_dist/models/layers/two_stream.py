"""Two-stream self-attention (Yang et al. 2019, section 2.3 and appendix A.2): content, and queries that do not see it.

    q, k, v = x W_q, [memory ; h] W_k, [memory ; h] W_v;  r = R W_r           x = [h ; g]
    score(i, j) = ((q_i + u) k_j + (q_i + v) r_(i - j) + (q_i + s) segment[same or other]) / sqrt(d_head)

The content stream h holds every position, itself included. The query stream g holds only the positions that are to be
predicted, and does not see what stands there. Which keys a row sees follows from one integer per position, its *rank*:
content sees keys of the same rank or a lower one, a query those of a lower one; memory has the lowest. Of a permuted
segment the part that becomes memory sees nothing behind it, whatever its ranks: else memory would tell what is
predicted when that is read again.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.models.layers.attention import remember, sinusoids
from txl_dist.models.layers.attention_weights import AttentionWeights, ObservableAttention
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, LaneDropout, Mask, Noise, drop, hash64
from txl_dist.models.layers.state import KVCache, StateValue

BLOCK = 256  # rows of the content stream that attend together
SEGMENTS = 4  # ids that a segment can have: A (and memory), B, and two for the marks behind them


@lru_cache(maxsize=4)  # all segments of a run ask for the same one or two
def encode_both_ways(
    keys: int, length: int, clamp_len: int, d_model: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Encode the distances keys, ..., 1, 0, -1, ..., 1 - length as sinusoids R: [keys + length, d_model]."""
    distance = torch.arange(keys, -length, -1, device=device)
    if clamp_len > 0:
        distance = distance.clamp(-clamp_len, clamp_len)
    return sinusoids(distance, d_model).to(dtype)


class Block(NamedTuple):
    """Rows of a segment, from `start` to before `end`, that see the first `keys` keys at most.

    Attributes:
        key: by which it has dropout masks of its own.
    """

    start: int
    end: int
    keys: int
    key: int


def blocks_of(length: int, reuse_len: int | None, mem_len: int) -> list[Block]:
    """Cut a segment in blocks of neighbouring rows, each with the keys that any of them may see.

    Args:
        reuse_len: of a permuted segment, the part that sees nothing behind it; None: it is read from left to right.
    """
    borders = range(BLOCK, length, BLOCK) if reuse_len is None else range(reuse_len, length, length)
    blocks = []
    for start, end in pairwise([0, *borders, length]):
        parts = range(start, end, BLOCK)
        blocks += [Block(part, min(part + BLOCK, end), mem_len + end, hash64(f"block {part}")) for part in parts]
    return blocks


class View(NamedTuple):
    """What the rows of both streams see, for a segment after a memory; the same in all layers.

    Attributes:
        length: positions of the segment, the rows of the content stream.
        remembered: how many of them, from the first on, become memory.
        encoding: [keys + length, d_model] of `encode_both_ways`.
        direction: [lanes, 1, 1, 1], 1 or -1: the factor of all distances; None: 1 for all lanes.
        blocks: of the content stream.
        content, queries: what is added to scores, [lanes, length, keys] and [lanes, queries, keys]: 0 where a row sees
            a key, else a number so low that it gets no probability. Finite: so no row is NaN.
        columns: int64 [lanes, queries, keys], which distance of the encoding each query has to a key; None where query
            i stands at position i + 1, and sees what content i sees.
        seeing: [lanes, 1, queries, 1], 0 for a query that sees no key at all, else 1; None where each sees one.
        segment_of_row, segment_of_key: one-hot [lanes, length + queries, SEGMENTS] and [lanes, keys, SEGMENTS]; None
            where all are the same.
    """

    length: int
    remembered: int
    encoding: Tensor
    direction: Tensor | None
    blocks: list[Block]
    content: Tensor
    queries: Tensor
    columns: Tensor | None
    seeing: Tensor | None
    segment_of_row: Tensor | None
    segment_of_key: Tensor | None


class Keys(NamedTuple):
    """What all rows attend to: [lanes x n_head, keys, d_head (+ SEGMENTS, of the key)] and r by distance."""

    key: Tensor
    value: Tensor
    relative: Tensor


class Rows(NamedTuple):
    """Queries [lanes x n_head, rows, d_head], those for content with SEGMENTS numbers more."""

    content: Tensor
    position: Tensor

    def split(self, sizes: list[int]) -> "list[Rows]":
        """Cut the rows in parts of these sizes."""
        parts = zip(self.content.split(sizes, 1), self.position.split(sizes, 1), strict=True)
        return [Rows(*part) for part in parts]


def skew_both_ways(by_distance: Tensor, keys: int) -> Tensor:
    """Turn scores by distance into scores by key, without a copy, where each row stands one position further.

    Args:
        by_distance: [..., rows, columns], contiguous in these two, columns >= keys + rows - 1. The first row wants its
            key 0 in column rows - 1, each following row one column further left.
        keys: how many there are.

    Returns:
        A view [..., rows, keys].
    """
    *batch, rows, columns = by_distance.shape
    if rows == 1:
        return by_distance[..., :keys]
    shifted = by_distance.flatten(-2).narrow(-1, rows - 1, rows * (columns - 1))
    return shifted.view(*batch, rows, columns - 1)[..., :keys]


class TwoStreamAttention(ObservableAttention):
    """The attention sublayer of both streams: projections, attention, residual connection and layer normalisation.

    The state of a lane is the sublayer's own last mem_len content inputs, oldest first; in evaluation a `KVCache`.

    Args:
        is_last: whether it is that of the last layer, whose content nobody reads where there are queries: then only
            those are computed.
    """

    def __init__(
        self, d_model: int, n_head: int, d_head: int, *, dropout: float, dropatt: float, eps: float, is_last: bool
    ):
        super().__init__()
        self.n_head = n_head
        self.d_head = d_head
        self.is_last = is_last
        width = n_head * d_head
        self.q_net = nn.Linear(d_model, width, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * width, bias=False)
        self.r_net = nn.Linear(d_model, width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.u = nn.Parameter(torch.empty(n_head, d_head))
        self.v = nn.Parameter(torch.empty(n_head, d_head))
        self.s = nn.Parameter(torch.empty(n_head, d_head))
        self.segment = nn.Parameter(torch.empty(2, n_head, d_head))
        self.layer_norm = nn.LayerNorm(d_model, eps=eps)
        self.content_dropatt = LaneDropout(dropatt)
        self.query_dropatt = LaneDropout(dropatt)
        self.dropout = Dropout(dropout, variational=False)

    def forward(
        self, streams: Tensor, memory: StateValue, view: View, noise: Noise | None = None
    ) -> tuple[Tensor, StateValue]:
        """Attend from both streams to the memory and to the content.

        Args:
            streams: [lanes, length + queries, d_model], content first.
            memory: [lanes, mem_len, d_model], or a KVCache.

        Returns:
            [lanes, length + queries, d_model], of the last layer [lanes, queries, d_model] if there are queries; and
            the memory for the next segment, detached.
        """
        content = streams[:, : view.length]
        keys, new_memory = self.keys_of(content, memory, view)
        has_queries = streams.size(1) > view.length
        queries_only = self.is_last and has_queries
        attending = streams[:, view.length :] if queries_only else streams
        block_sizes = [block.end - block.start for block in view.blocks]
        content_sizes = [] if queries_only else block_sizes
        query_sizes = block_sizes if view.columns is None else [attending.size(1) - sum(content_sizes)] * has_queries
        rows = self.rows_of(attending, view).split(content_sizes + query_sizes)
        content_rows = rows[: len(content_sizes)]
        query_rows = rows[len(content_sizes) :]
        content_mask = self.content_dropatt.mask(noise)
        query_mask = self.query_dropatt.mask(noise)
        attended = self.attend_by_blocks(content_rows, keys, view, view.content, content_mask, ahead=0)
        shown: list[Tensor] | None = None if self.observer is None else []
        if view.columns is None:
            attended += self.attend_by_blocks(query_rows, keys, view, view.queries, query_mask, ahead=1, shown=shown)
        elif has_queries:
            attended.append(self.attend_anywhere(query_rows[0], keys, view, query_mask, shown))
        if self.observer is not None:
            assert shown is not None
            self.observer(self.query_weights(shown, keys, view, memory))
        together = torch.cat(attended, dim=2).transpose(1, 2).flatten(-2)
        return self.layer_norm(attending + self.dropout(self.o_net(together), noise)), new_memory

    def keys_of(self, content: Tensor, memory: StateValue, view: View) -> tuple[Keys, StateValue]:
        """Return what is attended to, and the new memory."""
        segment = self.heads(self.kv_net(content))
        if isinstance(memory, KVCache):
            key, value = memory.append(*segment.chunk(2, dim=-2))
            memory.forget(view.length - view.remembered)
            sine_and_cosine = memory.memoise(self.project_distances, view.encoding)
            new_memory: StateValue = memory
        else:
            assert isinstance(memory, Tensor)
            # The memory apart from the segment, so that no gradient is computed for it.
            both = torch.cat([self.heads(self.kv_net(memory)), segment], dim=1)
            key, value = both.chunk(2, dim=-2)
            sine_and_cosine = self.project_distances(view.encoding)
            new_memory = remember(memory, content[:, : view.remembered])
        key = key.transpose(1, 2)
        if view.segment_of_key is not None:
            marks = view.segment_of_key[:, None].expand(-1, self.n_head, -1, -1)
            key = torch.cat([key, marks.to(key.dtype)], dim=-1)
        assert sine_and_cosine is not None
        sine, cosine = sine_and_cosine
        assert cosine is not None
        # A lane that reads backward has all distances negated: sines change their sign, cosines do not.
        relative = cosine + sine if view.direction is None else cosine + view.direction * sine
        relative = relative.expand(len(content), -1, -1, -1)
        return Keys(key.flatten(0, 1), value.transpose(1, 2).flatten(0, 1), relative.flatten(0, 1)), new_memory

    def project_distances(self, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_r R of the sines and of the cosines apart, [1, n_head, keys + length, d_head] each."""
        half = encoding.size(1) // 2
        weights = self.r_net.weight
        sine = F.linear(encoding[:, :half], weights[:, :half])
        cosine = F.linear(encoding[:, half:], weights[:, half:])
        return self.heads(sine).transpose(0, 1)[None], self.heads(cosine).transpose(0, 1)[None]

    def rows_of(self, attending: Tensor, view: View) -> Rows:
        """Return the queries of both streams, or of the query stream alone."""
        scale = self.d_head**-0.5
        query = self.heads(self.q_net(attending)) * scale
        content = query + self.u * scale
        position = query + self.v * scale
        if view.segment_of_row is not None:
            # By how much a key of the same segment scores more than one of another: softmax knows no more of it.
            more = ((query + self.s * scale) * (self.segment[0] - self.segment[1])).sum(-1, keepdim=True)
            own = view.segment_of_row[:, -attending.size(1) :, None].to(query.dtype)
            content = torch.cat([content, more * own], dim=-1)
        return Rows(content.transpose(1, 2).flatten(0, 1), position.transpose(1, 2).flatten(0, 1))

    def attend_by_blocks(
        self,
        rows: list[Rows],
        keys: Keys,
        view: View,
        added: Tensor,
        mask: Mask | None,
        ahead: int,
        shown: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Attend from neighbouring positions, block by block: [lanes, n_head, rows, d_head] of each.

        A block needs the distances between its rows and their keys only: fewer, and a part of them fits in the cache.

        Args:
            rows: those of each block; none at all where only queries are computed.
            ahead: by how much the rows stand further than the content of the same number.
            shown: to which the weights of each block are appended.
        """
        attended = []
        for part, (start, end, count, block_key) in zip(rows, view.blocks, strict=False):
            first = view.length - end + 1 - ahead  # the distance from the last row to the first key
            distances = keys.relative[:, first : first + count + end - start - 1]
            scores = skew_both_ways(part.position @ distances.transpose(1, 2), count)
            block_mask = mask and mask._replace(seeds=mask.seeds ^ block_key)
            # A slice of everything would cost a copy in backward.
            seen = keys if count == keys.key.size(1) else Keys(keys.key[:, :count], keys.value[:, :count], distances)
            attended.append(attend(part.content, seen, scores, added[:, start:end, :count], block_mask, shown))
        return attended

    def attend_anywhere(
        self, rows: Rows, keys: Keys, view: View, mask: Mask | None, shown: list[Tensor] | None
    ) -> Tensor:
        """Attend from queries at positions of their own: [lanes, n_head, queries, d_head]."""
        assert view.columns is not None and view.seeing is not None
        by_distance = rows.position @ keys.relative.transpose(1, 2)
        columns = view.columns[:, None].expand(-1, self.n_head, -1, -1).flatten(0, 1)
        attended = attend(rows.content, keys, by_distance.gather(2, columns), view.queries, mask, shown)
        return attended * view.seeing

    def query_weights(self, by_block: list[Tensor], keys: Keys, view: View, memory: StateValue) -> AttentionWeights:
        """Return where queries look, from the weights of each of their blocks, [lanes, n_head, rows, keys or fewer]."""
        count = keys.key.size(1)
        weights = torch.cat([F.pad(block, (0, count - block.size(3))) for block in by_block], dim=2)
        if view.columns is None:
            position = torch.arange(1, view.length + 1, device=weights.device)
            key = torch.arange(view.length - count, view.length, device=weights.device)
            distance = (position[:, None] - key)[None]
        else:
            assert view.seeing is not None
            weights = weights * view.seeing
            distance = count - view.columns
        states = memory if isinstance(memory, Tensor) else None
        return AttentionWeights(weights, distance, count - view.length, states)

    def heads(self, x: Tensor) -> Tensor:
        """Split [..., n * d_head] into heads, [..., n, d_head]; n is n_head, or twice that: keys, then values."""
        split: Tensor = x.unflatten(-1, (-1, self.d_head))
        return split

    def products(
        self, lanes: int, length: int, queries: int, mem_len: int, reuse_len: int | None, seen: tuple[float, float]
    ) -> list[Product]:
        """List the products of matrices when `lanes` read a segment after a full memory.

        Args:
            reuse_len: as for `blocks_of`; the keys of a permuted segment are marked.
            seen: how many keys a row of the content and a query see, on average.
        """
        d_model = self.q_net.in_features
        width = self.n_head * self.d_head
        keys = mem_len + length
        project = 2 * d_model * width * lanes
        pair = 2 * width * lanes
        marked_pair = pair if reuse_len is None else pair + 2 * self.n_head * SEGMENTS * lanes
        queries_only = self.is_last and queries > 0
        rows = queries if queries_only else length + queries
        content = [(end - start, count) for start, end, count, _ in blocks_of(length, reuse_len, mem_len)]
        attending = [] if queries_only else [(number, count, count + number - 1, seen[0]) for number, count in content]
        if reuse_len is None:
            attending += [(number, count, count + number - 1, seen[1]) for number, count in content]
        elif queries:
            attending.append((queries, keys, keys + length, seen[1]))
        products = [
            *[Product(project * rows)] * 2,  # q, output
            *[Product(project * length)] * 2,  # k, v
            *[Product(project * mem_len, gradients=1)] * 2,
            Product(2 * d_model * width * (keys + length), gradients=1),  # r, which all lanes share
        ]
        for number, count, columns, share in attending:
            products.append(Product(marked_pair * number * count, visible=min(share / count, 1.0)))  # content
            products.append(Product(pair * number * columns, visible=min(share / columns, 1.0)))  # position
            products.append(Product(pair * number * count, visible=min(share / count, 1.0)))  # values
        return products

    def empty_cache(self, lanes: int, mem_len: int, device: torch.device) -> KVCache:
        """Return an empty key/value cache on a device."""
        return KVCache(self.kv_net.weight.new_zeros(2, self.n_head, lanes, mem_len, self.d_head, device=device))


def attend(
    content: Tensor,
    keys: Keys,
    position_scores: Tensor,
    added: Tensor,
    mask: Mask | None,
    shown: list[Tensor] | None = None,
) -> Tensor:
    """Compute softmax(content key^T + position_scores + added) value: [lanes, n_head, rows, d_head].

    Args:
        added: [lanes, rows, keys], for all heads.
        shown: to which the softmax is appended, [lanes, n_head, rows, keys].
    """
    lanes = len(added)
    scores = torch.baddbmm(position_scores, content, keys.key.transpose(1, 2))
    # Added, and not recorded: see backends.attention_weights.
    by_lane = scores.view(lanes, -1, *added.shape[1:])
    by_lane.detach().add_(added[:, None])
    probabilities = by_lane.softmax(dim=-1)
    if shown is not None:
        shown.append(probabilities)
    if mask is not None:
        probabilities = drop(probabilities, mask)
    return (probabilities.flatten(0, 1) @ keys.value).view(lanes, -1, added.size(1), keys.value.size(2))
