"""Local and LSH attention (Kitaev et al. 2020, section 2), the two kinds of attention of the Reformer.

    local     a token sees its own chunk of the text and those before it, up to itself
    lsh       queries are keys as well; tokens that hash alike are sorted together, and chunks are cut of that order

As published, LSH attention is not causal: where the borders of chunks fall depends on the whole text. `strict` costs
the same and is causal: a token sees the last `before * chunk_len` tokens of its own bucket. What it sees is then the
same in any longer text, and a text can be read token by token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from txl_dist.models.layers.chunked_attention import SELF, Chunks, Layout, attend, wide
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, LaneDropout, Mask, Noise, mixed
from txl_dist.models.layers.hashing import (
    draw_rotations,
    hash_vectors,
    sort_as_published,
    sort_within_buckets,
    unsorted,
)
from txl_dist.models.layers.text_cache import TextCache


class View(NamedTuple):
    """What all layers share.

    Attributes:
        start: int64 [lanes, length], the first position that each position may see.
        rounds: of hashing.
        draw: which rotations evaluation draws.
    """

    start: Tensor
    rounds: int
    draw: int


class Arrangement(NamedTuple):
    """In which order a layer cuts its chunks, and how."""

    layout: Layout
    chunks: Chunks


class ChunkedAttention(nn.Module, ABC):
    """One attention sublayer: layer normalisation first, without residual connection, and without biases.

    Args:
        chunk_len: positions of a chunk.
        before: chunks before its own that a token may see.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        *,
        chunk_len: int,
        before: int,
        dropout: float,
        dropatt: float,
        eps: float,
    ):
        super().__init__()
        self.n_head = n_head
        self.d_head = d_head
        self.chunk_len = chunk_len
        self.before = before
        self.layer_norm = nn.LayerNorm(d_model, eps=eps)
        self.value = nn.Linear(d_model, n_head * d_head, bias=False)
        self.output = nn.Linear(n_head * d_head, d_model, bias=False)
        self.dropatt = LaneDropout(dropatt)
        self.dropout = Dropout(dropout, variational=False)

    def forward(
        self, stream: Tensor, view: View, noise: Noise | None = None, arrangement: Arrangement | None = None
    ) -> tuple[Tensor, Arrangement]:
        """Attend.

        Args:
            stream: [lanes, length, d_model], in float32 at least.
            arrangement: as the first computation has returned it, if this one repeats that.

        Returns:
            What is added to the other stream, [lanes, length, d_model]; and how chunks were cut.
        """
        query, key, value = self.project(stream)
        if arrangement is None:
            arrangement = self.arrange(query, view, noise)
        mask = self.dropatt.mask(noise)
        if mask is not None:
            heads = mixed(torch.arange(self.n_head, device=mask.seeds.device))
            mask = Mask(mask.p, (mask.seeds[:, None] ^ heads).flatten())
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        attended = attend(query, key, value, *arrangement, mask)
        return self.leave(attended.unflatten(0, (len(stream), self.n_head)), noise), arrangement

    def read(self, stream: Tensor, view: View, cache: TextCache) -> Tensor:
        """Attend to the text that a cache holds as well, and append this segment to it; arguments as in `forward`."""
        query, key, value = self.project(stream)
        if cache.is_empty:
            arrangement = self.arrange(query, view, None)
            cache.append(key, value)
            rows = [x.flatten(0, 1) for x in (query, key, value)]
            attended = attend(rows[0], rows[1], rows[2], *arrangement, None)
            self.remember(query, view, cache)
            return self.leave(attended.unflatten(0, (len(stream), self.n_head)))
        outputs = []
        for position in range(query.size(2)):
            token = slice(position, position + 1)
            cache.append(key[:, :, token], value[:, :, token])
            outputs.append(self.attend_last(query[:, :, token], view, cache))
        return self.leave(torch.cat(outputs, dim=2))

    def heads(self, x: Tensor) -> Tensor:
        """Split [lanes, length, n_head * d_head] into [lanes, n_head, length, d_head]."""
        heads: Tensor = x.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2).contiguous()
        return heads

    def leave(self, attended: Tensor, noise: Noise | None = None) -> Tensor:
        """Turn [lanes, n_head, length, d_head] into what is added to the stream."""
        output: Tensor = self.dropout(self.output(attended.transpose(1, 2).flatten(2)), noise)
        return output

    def chunks(self, length: int, rounds: int, sees_itself: bool, around: bool = False) -> Chunks:
        """Return how a text is cut; no window reaches around to chunks that it has already."""
        number = rounds * -(-length // self.chunk_len)
        before = self.before if around else min(self.before, number - 1)
        return Chunks(rounds, self.chunk_len, before, sees_itself, around)

    @abstractmethod
    def project(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, scaled keys, and values of a stream: [lanes, n_head, length, d_head]."""

    @abstractmethod
    def arrange(self, query: Tensor, view: View, noise: Noise | None) -> Arrangement:
        """Find out which chunks [lanes, n_head, length, d_head] are cut into."""

    @abstractmethod
    def remember(self, query: Tensor, view: View, cache: TextCache) -> None:
        """Note in a cache what finding keys for later queries needs, of a text [lanes, n_head, length, d_head]."""

    @abstractmethod
    def attend_last(self, query: Tensor, view: View, cache: TextCache) -> Tensor:
        """Attend from the last token of a cache, [lanes, n_head, 1, d_head]; note what later queries need of it."""

    @abstractmethod
    def products(self, lanes: int, length: int, rounds: int) -> list[Product]:
        """List the products of matrices when `lanes` read a segment."""

    def products_of(self, lanes: int, length: int, rounds: int, projections: int, visible: float) -> list[Product]:
        """List those that both kinds of attention have; `visible`: the fraction of a window's keys that are seen."""
        d_model, width = self.output.out_features, self.output.in_features
        number = rounds * -(-length // self.chunk_len)
        window = (min(self.before, number - 1) + 1) * self.chunk_len
        attention = Product(2 * lanes * width * number * self.chunk_len * window, visible=visible)
        scores = attention._replace(recomputed=1)
        return [Product(2 * lanes * length * d_model * width)] * (projections + 1) + [scores, attention]


class LocalAttention(ChunkedAttention):
    """Attention to the own chunk of the text and those before it; arguments are those of `ChunkedAttention`."""

    def __init__(self, d_model: int, n_head: int, d_head: int, **options: Any):
        super().__init__(d_model, n_head, d_head, **options)
        self.query = nn.Linear(d_model, n_head * d_head, bias=False)
        self.key = nn.Linear(d_model, n_head * d_head, bias=False)

    def project(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, scaled keys, and values of a stream."""
        normed = self.layer_norm(stream.to(self.value.weight.dtype))
        query, key, value = (self.heads(part(normed)) for part in (self.query, self.key, self.value))
        return query, key * self.d_head**-0.5, value

    def arrange(self, query: Tensor, view: View, noise: Noise | None) -> Arrangement:
        """Cut the text as it is."""
        chunks = self.chunks(query.size(2), 1, sees_itself=True)
        return Arrangement(unsorted(view.start, self.n_head, chunks), chunks)

    def remember(self, query: Tensor, view: View, cache: TextCache) -> None:
        """Note nothing: where keys are follows from the position."""

    def attend_last(self, query: Tensor, view: View, cache: TextCache) -> Tensor:
        """Attend from the last token of a cache."""
        position = cache.length - 1
        begin = (position // self.chunk_len - self.before) * self.chunk_len
        at = begin[:, None] + torch.arange((self.before + 1) * self.chunk_len, device=position.device)
        at = at.where(at <= position[:, None], -1)[:, None].expand(-1, self.n_head, -1)
        keys, values = cache.at(at)
        scores = (query @ keys.transpose(-1, -2)).to(wide(query.dtype))
        weights = scores.masked_fill_((at < 0)[:, :, None], -torch.inf).softmax(-1)
        attended: Tensor = weights.to(values.dtype) @ values
        return attended

    def products(self, lanes: int, length: int, rounds: int) -> list[Product]:
        """List the products of matrices when `lanes` read a segment."""
        seen = sum(position % self.chunk_len + 1 for position in range(length)) / length
        behind = sum(min(position // self.chunk_len, self.before) for position in range(length)) / length
        window = (min(self.before, -(-length // self.chunk_len) - 1) + 1) * self.chunk_len
        visible = (seen + behind * self.chunk_len) / window
        return self.products_of(lanes, length, 1, 3, visible)


class LSHAttention(ChunkedAttention):
    """Attention to what hashes alike; further arguments are those of `ChunkedAttention`.

    Args:
        n_buckets: even factors of the number of buckets.
        strict: see the module; else as published.
    """

    def __init__(
        self, d_model: int, n_head: int, d_head: int, n_buckets: Sequence[int], *, strict: bool, **options: Any
    ):
        super().__init__(d_model, n_head, d_head, **options)
        self.query_key = nn.Linear(d_model, n_head * d_head, bias=False)
        self.n_buckets = tuple(n_buckets)
        self.strict = strict
        self._rotations: tuple[tuple[int, int], Tensor] | None = None

    def project(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys, which are queries normalised to 1 / sqrt(d_head) a number, and values of a stream."""
        normed = self.layer_norm(stream.to(self.value.weight.dtype))
        query = self.heads(self.query_key(normed))
        mean_square = query.square().mean(-1, keepdim=True)
        return query, query * (mean_square + 1e-6).rsqrt() * self.d_head**-0.5, self.heads(self.value(normed))

    def arrange(self, query: Tensor, view: View, noise: Noise | None) -> Arrangement:
        """Hash, and sort."""
        length = query.size(2)
        if not self.strict and length <= self.chunk_len:  # published: then nothing is hashed
            chunks = Chunks(1, length, 0, sees_itself=False, around=False)
            return Arrangement(unsorted(view.start, self.n_head, chunks), chunks)
        buckets = self.hash(query, view, noise)
        if self.strict:
            chunks = self.chunks(length, view.rounds, sees_itself=False)
            return Arrangement(sort_within_buckets(buckets, view.start, self.n_buckets, chunks), chunks)
        chunks = self.chunks(length, view.rounds, sees_itself=False, around=True)
        return Arrangement(sort_as_published(buckets, view.start, self.n_buckets, chunks), chunks)

    def hash(self, query: Tensor, view: View, noise: Noise | None) -> Tensor:
        """Hash queries, by rotations of the step in training, and of `view.draw` in evaluation."""
        query = query.detach()
        return hash_vectors(query.to(wide(query.dtype)), self.rotations(view, noise), self.n_buckets)

    def rotations(self, view: View, noise: Noise | None) -> Tensor:
        """Draw the rotations of a step, the same for all lanes; those of evaluation are kept."""
        sizes = self.n_head, self.d_head, view.rounds, sum(self.n_buckets) // 2
        place = self.dropatt.place
        if self.training and noise is not None:
            rotations: Tensor = draw_rotations(mixed(place ^ noise.shared), *sizes)
            return rotations
        known = view.draw, view.rounds
        if self._rotations is None or self._rotations[0] != known:
            self._rotations = known, draw_rotations(mixed(place + view.draw), *sizes)
        return self._rotations[1]

    def remember(self, query: Tensor, view: View, cache: TextCache) -> None:
        """Note the last tokens of each bucket."""
        if self.strict:
            cache.fill_buckets(self.hash(query, view, None), self.n_buckets, self.before * self.chunk_len)

    def attend_last(self, query: Tensor, view: View, cache: TextCache) -> Tensor:
        """Attend from the last token of a cache to the last ones of its buckets; note it in them."""
        if not self.strict:
            return torch.cat([self.attend_anew(query[lane], view, cache, lane) for lane in range(len(query))])
        buckets = self.hash(query, view, None)[..., 0]
        at = cache.in_buckets(buckets).flatten(2)
        itself = (cache.length - 1)[:, None, None].expand(*at.shape[:2], 1)
        at = torch.cat([at, itself], dim=-1)
        keys, values = cache.at(at)
        scores = (query @ keys.transpose(-1, -2)).to(wide(query.dtype))
        scores.masked_fill_((at < 0)[:, :, None], -torch.inf)[..., -1] = SELF
        cache.add_to_buckets(buckets)
        attended: Tensor = scores.softmax(-1).to(values.dtype) @ values
        return attended

    def attend_anew(self, query: Tensor, view: View, cache: TextCache, lane: int) -> Tensor:
        """Cut the whole text of a lane into chunks anew, as published: a token more moves all borders."""
        length = int(cache.length[lane])
        key, value = cache.states[:, lane, :, :length]
        queries = torch.cat([key[:, :-1], query], dim=1)  # which hash as keys do: only their length differs
        start = view.start.new_zeros(1, length)
        arrangement = self.arrange(queries[None], view._replace(start=start), None)
        return attend(queries, key, value, *arrangement, None)[None, :, -1:]

    def products(self, lanes: int, length: int, rounds: int) -> list[Product]:
        """List the products of matrices when `lanes` read a segment; the visible fraction is that of even buckets."""
        if not self.strict and length <= self.chunk_len:
            width = self.output.in_features
            one = Product(2 * lanes * width * length * length, visible=(length + 1) / (2 * length))
            return [*self.products_of(lanes, length, 1, 2, 1.0)[:3], one._replace(recomputed=1), one]
        width = self.output.in_features
        directions = rounds * sum(self.n_buckets) // 2
        hashing = Product(2 * lanes * length * width * directions, gradients=0)
        buckets = torch.tensor(self.n_buckets).prod().item()
        window = (self.before + 1) * self.chunk_len
        seen = min(length / buckets / 2, self.before * self.chunk_len) + 1
        visible = min(1.0, seen / window) if self.strict else 0.5
        return [*self.products_of(lanes, length, rounds, 2, visible), hashing]
