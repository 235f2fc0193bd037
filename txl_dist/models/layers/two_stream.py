"""Two-stream self-attention (Yang et al. 2019, section 2.3 and appendix A.2): content, and queries that do not see it.

    q, k, v = x W_q, [memory ; h] W_k, [memory ; h] W_v;  r = R W_r           x = [h ; g]
    score(i, j) = ((q_i + u) k_j + (q_i + v) r_(i - j) + (q_i + s) segment[same or other]) / sqrt(d_head)

The content stream h holds every position, itself included. The query stream g holds only the positions that are to be
predicted, and does not see what stands there. Which keys a row sees is told by one integer per position, its *rank*:
content sees keys of the same rank or a lower one, a query those of a lower one; memory has the lowest.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.models.layers.attention import remember, sinusoids
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, LaneDropout, Mask, Noise, drop
from txl_dist.models.layers.state import KVCache, StateValue

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


class View(NamedTuple):
    """What the rows of both streams see, for a segment after a memory; the same in all layers.

    Attributes:
        length: positions of the segment, the rows of the content stream.
        remembered: how many of them, from the first on, become memory.
        encoding: [keys + length, d_model] of `encode_both_ways`.
        direction: [lanes, 1, 1, 1], 1 or -1: the factor of all distances; None: 1 for all lanes.
        content, query: bool [lanes, length, keys] and [lanes, queries, keys], whether a row sees a key.
        columns: int64 [lanes, queries, keys], which distance of the encoding each query has to a key; None where query
            i stands at position i + 1.
        segment_of_row, segment_of_key: one-hot [lanes, length + queries, SEGMENTS] and [lanes, keys, SEGMENTS]; None
            where all are the same.
    """

    length: int
    remembered: int
    encoding: Tensor
    direction: Tensor | None
    content: Tensor
    query: Tensor
    columns: Tensor | None
    segment_of_row: Tensor | None
    segment_of_key: Tensor | None


class Rows(NamedTuple):
    """The rows of one stream: their queries for content and for position, and what they see.

    Attributes:
        content: [lanes, n_head, rows, d_head (+ SEGMENTS)].
        position: [lanes, n_head, rows, d_head].
        visible: bool [lanes, rows, keys].
    """

    content: Tensor
    position: Tensor
    visible: Tensor


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


class TwoStreamAttention(nn.Module):
    """The attention sublayer of both streams: projections, attention, residual connection and layer normalisation.

    The state of a lane is the sublayer's own last mem_len content inputs, oldest first; in evaluation a `KVCache`.

    Args:
        is_last: whether it is that of the last layer, whose content nobody reads: only queries are computed.
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
            [lanes, length + queries, d_model], of the last layer [lanes, queries, d_model]; and the memory for the next
            segment, detached.
        """
        content = streams[:, : view.length]
        key, value, relative, new_memory = self.keys_and_values(content, memory, view)
        attending = streams[:, view.length :] if self.is_last else streams
        rows = self.split_rows(attending, view)
        masks = [self.content_dropatt.mask(noise), self.query_dropatt.mask(noise)]
        attended = [
            attend(stream, key, value, self.position_scores(stream.position, relative, view, is_query), mask)
            for stream, mask, is_query in zip(rows, masks[-len(rows) :], (False, True)[-len(rows) :], strict=True)
        ]
        together = torch.cat(attended, dim=2).transpose(1, 2).flatten(-2)
        return self.layer_norm(attending + self.dropout(self.o_net(together), noise)), new_memory

    def keys_and_values(
        self, content: Tensor, memory: StateValue, view: View
    ) -> tuple[Tensor, Tensor, Tensor, StateValue]:
        """Return keys and values [lanes, n_head, keys, d_head], r of `relative`, and the new memory."""
        segment = self.heads(self.kv_net(content))
        if isinstance(memory, KVCache):
            key, value = memory.append(*segment.chunk(2, dim=-2))
            memory.forget(view.length - view.remembered)
            sine_and_cosine = memory.memoise(self.project_distances, view.encoding)
            new_memory: StateValue = memory
        else:
            # The memory apart from the segment, so that no gradient is computed for it.
            both = torch.cat([self.heads(self.kv_net(memory)), segment], dim=1)
            key, value = both.chunk(2, dim=-2)
            sine_and_cosine = self.project_distances(view.encoding)
            new_memory = remember(memory, content[:, : view.remembered])
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if view.segment_of_key is not None:
            marks = view.segment_of_key[:, None].expand(-1, self.n_head, -1, -1)
            key = torch.cat([key, marks.to(key.dtype)], dim=-1)
        assert sine_and_cosine is not None
        sine, cosine = sine_and_cosine
        assert cosine is not None
        # A lane that reads backward has all distances negated: sines change their sign, cosines do not.
        relative = cosine + sine if view.direction is None else cosine + view.direction * sine
        return key, value, relative, new_memory

    def project_distances(self, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_r R of the sines and of the cosines apart, [1, n_head, keys + length, d_head] each."""
        half = encoding.size(1) // 2
        weights = self.r_net.weight
        sine = F.linear(encoding[:, :half], weights[:, :half])
        cosine = F.linear(encoding[:, half:], weights[:, half:])
        return self.heads(sine).transpose(0, 1)[None], self.heads(cosine).transpose(0, 1)[None]

    def split_rows(self, attending: Tensor, view: View) -> list[Rows]:
        """Return the rows of content and queries apart, or of queries alone."""
        query = self.heads(self.q_net(attending)) * self.d_head**-0.5
        scale = self.d_head**-0.5
        content = query + self.u * scale
        position = (query + self.v * scale).transpose(1, 2)
        if view.segment_of_row is not None:
            # By how much a key of the same segment scores more than one of another: softmax knows no more of it.
            more = ((query + self.s * scale) * (self.segment[0] - self.segment[1])).sum(-1, keepdim=True)
            own = view.segment_of_row[:, -attending.size(1) :, None].to(query.dtype)
            content = torch.cat([content, more * own], dim=-1)
        content = content.transpose(1, 2)
        if self.is_last:
            return [Rows(content, position, view.query)]
        sizes = [view.length, attending.size(1) - view.length]
        streams = zip(content.split(sizes, 2), position.split(sizes, 2), (view.content, view.query), strict=True)
        return [Rows(*stream) for stream in streams]

    def position_scores(self, position: Tensor, relative: Tensor, view: View, is_query: bool) -> Tensor:
        """Compute (q + v) r for every row and key: [lanes, n_head, rows, keys]."""
        keys = view.content.size(2)
        if not is_query:  # row i stands at position i: the first distance is for a position beyond the segment
            return skew_both_ways(position @ relative[:, :, 1:].transpose(2, 3), keys)
        by_distance = position @ relative.transpose(2, 3)
        if view.columns is None:
            return skew_both_ways(by_distance, keys)
        return by_distance.gather(3, view.columns[:, None].expand(-1, self.n_head, -1, -1))

    def heads(self, x: Tensor) -> Tensor:
        """Split [..., n * d_head] into heads, [..., n, d_head]; n is n_head, or twice that: keys, then values."""
        split: Tensor = x.unflatten(-1, (-1, self.d_head))
        return split

    def products(
        self, lanes: int, length: int, queries: int, mem_len: int, has_segments: bool, seen: tuple[float, float]
    ) -> list[Product]:
        """List the products of matrices when `lanes` read a segment after a full memory.

        Args:
            has_segments: whether rows and keys are marked with the segment that they are of.
            seen: how many keys a row of the content and a query see, on average.
        """
        d_model = self.q_net.in_features
        width = self.n_head * self.d_head
        keys = mem_len + length
        project = 2 * d_model * width * lanes
        pair = 2 * width * lanes
        marked_pair = pair + 2 * self.n_head * SEGMENTS * lanes * has_segments
        content = 0 if self.is_last else length
        rows = content + queries
        products = [
            *[Product(project * rows)] * 2,  # q, output
            *[Product(project * length)] * 2,  # k, v
            *[Product(project * mem_len, gradients=1)] * 2,
            Product(2 * d_model * width * (keys + length), gradients=1),  # r, which all lanes share
        ]
        for number, columns, share in ((content, keys + length - 1, seen[0]), (queries, keys + length, seen[1])):
            products.append(Product(marked_pair * number * keys, visible=share / keys))  # content
            products.append(Product(pair * number * columns, visible=share / columns))  # position
            products.append(Product(pair * number * keys, visible=share / keys))  # values
        return products

    def empty_cache(self, lanes: int, mem_len: int, device: torch.device) -> KVCache:
        """Return an empty key/value cache on a device."""
        return KVCache(self.kv_net.weight.new_zeros(2, self.n_head, lanes, mem_len, self.d_head, device=device))


def attend(rows: Rows, key: Tensor, value: Tensor, position_scores: Tensor, mask: Mask | None) -> Tensor:
    """Compute softmax(scores) value: [lanes, n_head, rows, d_head].

    A row that sees no key at all gets zeros, not an average of what it must not see.
    """
    lanes, n_head = key.shape[:2]
    scores = torch.baddbmm(
        position_scores.flatten(0, 1), rows.content.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    ).view(lanes, n_head, -1, key.size(2))
    # Finite, so that no row is NaN; half of the least, so that a sum with a score is finite, too.
    hidden = torch.finfo(scores.dtype).min / 2
    scores.add_(torch.zeros_like(rows.visible, dtype=scores.dtype).masked_fill_(~rows.visible, hidden)[:, None])
    probabilities = scores.softmax(dim=-1)
    if mask is not None:
        probabilities = drop(probabilities, mask)
    attended = (probabilities.flatten(0, 1) @ value.flatten(0, 1)).view(lanes, n_head, -1, value.size(3))
    return attended * rows.visible.any(dim=2)[:, None, :, None]
