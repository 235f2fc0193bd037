"""Attention with relative distances, fused: forward and backward keep no probabilities in memory (Triton kernels).

The score of query i for the key at distance d is (Dai et al. 2019, section 3.3, terms a to d)

    ((query_i + u) key + (query_i + v) r_d) * d_head ** -0.5   =   (content_i key + position_i r_d) * d_head ** -0.5.

Apart from the position term this is FlashAttention-2 (Dao 2023, section 3.1). Forward takes a block of queries past the
keys that they see and carries along the maximum and the sum of their softmax. Backward recomputes the probabilities
from the logarithm of that sum: one kernel takes a block of queries past the keys, another a block of keys past the
queries, so that each sums its gradients alone. Nothing is added atomically; every run gives the same bits. Only what
dropout drops is kept, a bit for a probability: drawing it anew would be a third of the work of each kernel.

The position term is a plain matrix product, position r^T, of the inputs' dtype (the unfused computation rounds alike).
A kernel of its own writes it by key, for forward and again for backward. The shift of the paper's appendix B is in its
addresses: each number is stored alone, but nothing waits for a store, and what is hidden is left out. The other kernels
then load whole rows of blocks, 16 bytes at a time and a step ahead. Backward writes the gradient of the scores by
distance, query i's for key j in column length - 1 - i + j; two matrix products turn it into the gradients of position
and r, summed over the lanes.

The kernels could compute the position term themselves, from blocks of r. But then every tile would have to be gathered
across its columns, through shared memory, in each of the kernels; registers are short as it is; and r's gradient, a sum
over all queries of all lanes, would still need the gradient of the scores by distance or a third pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from txl_dist.models.layers.dropout import Mask

LOG2_E = tl.constexpr(1.4426950408889634)  # Scores are in units of log 2: the hardware has exp2.
# A program keeps BLOCK queries and takes BLOCK or STEP keys at a time, or the reverse. More run out of registers.
BLOCK = 64
STEP = 32
WORD = tl.constexpr(32)  # keys whose dropout a number holds
SCAN = tl.constexpr(1024)  # queries whose lookback a block of keys loads at once: all, as a rule


@torch.compiler.disable  # its kernels are compiled already
def attend(
    content: Tensor,
    position: Tensor | None,
    past: Tensor | None,
    present: Tensor,
    r: Tensor | None,
    bias: Tensor | None,
    lookback: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """Compute softmax((content key + position r + bias) * d_head ** -0.5) value, r and bias by distance.

    Differentiable in all but `lookback`. Any strides, but the numbers of one head are contiguous. The arguments are of
    one dtype, float32, bfloat16 or float16, on one GPU. Its shared memory limits d_head, on an H100 to 128 in float32.

    Args:
        content: [lanes, length, n_head, d_head], the queries with u, not scaled.
        position: [lanes, length, n_head, d_head], the queries with v, not scaled; None: scores have no positions.
        past, present: [2 (keys, values), lanes, rows, n_head, d_head], of the first and the last of all keys, as they
            come from memory and segment; past may be None. Query i stands at key keys - length + i.
        r: [keys + 1, n_head, d_head], for distances keys - 1, ..., 0, -1; the last is not used.
        bias: [keys + 1, n_head], for the same distances; or None.
        lookback: int64 [lanes, length]: query i sees the keys at distance 0, 1, ..., lookback[lane, i].
        mask: drops attention probabilities.

    Returns:
        [lanes, length, n_head, d_head].
    """
    dropout, seeds = mask or (0.0, None)
    if past is not None and past.size(2) % BLOCK:  # a block of keys would be partly past, partly present
        present = torch.cat([past, present], dim=2)
        past = None
    attended: Tensor = Attend.apply(content, position, past, present, r, bias, lookback, dropout, seeds)
    return attended


class Attend(torch.autograd.Function):
    """The kernels as a differentiable function; arguments and result are those of `attend`."""

    @staticmethod
    def forward(ctx: Any, content, position, past, present, r, bias, lookback, dropout, seeds):
        """Compute the output, and keep the logarithm of the softmax's sum for backward."""
        lanes, length, n_head, _ = content.shape
        keys = present.size(2) + (0 if past is None else past.size(2))
        assert all(x.stride(-1) == 1 for x in (content, past, present) if x is not None)
        out = torch.empty_like(content, memory_format=torch.contiguous_format)
        log_sum = content.new_empty(lanes, n_head, length, dtype=torch.float32)
        lookback = lookback.contiguous()
        dropped = draw(seeds, lookback, keys, n_head, dropout)
        forward_kernel[triton.cdiv(length, BLOCK), n_head, lanes](
            *(with_strides(content), *keys_and_values(past, present), with_strides(out)),
            *(with_strides(scores_by_key(position, r, bias, lookback, keys)), lookback, log_sum),
            *(dropped, length, keys - length),
            **options(content, dropout, BLOCK_M=BLOCK, BLOCK_N=BLOCK),
        )
        ctx.save_for_backward(content, position, past, present, r, bias, lookback, out, log_sum, dropped)
        ctx.keys = keys
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        """Compute the gradients of content, position, past, present, r and bias."""
        content, position, past, present, r, bias, lookback, out, log_sum, dropped = ctx.saved_tensors
        lanes, length, n_head, _ = content.shape
        by_key = scores_by_key(position, r, bias, lookback, ctx.keys)
        d_by_distance = None if by_key is None else position.new_empty(n_head, lanes, length, ctx.keys)
        d_content = torch.empty_like(content, memory_format=torch.contiguous_format)
        # Keys and values side by side, where they come from one projection, so that its gradient is no copy.
        d_past = None if past is None else torch.empty_like(past)
        d_present = torch.empty_like(present)
        delta = torch.empty_like(log_sum)
        given = with_strides(content), *keys_and_values(past, present), with_strides(d_out.contiguous())
        statistics = with_strides(by_key), lookback, log_sum, delta
        numbers = dropped, length, ctx.keys - length
        # The queries first: their kernel computes the `delta` that the keys' kernel reads.
        query_gradient_kernel[triton.cdiv(length, BLOCK), n_head, lanes](
            *(*given, *statistics, *map(with_strides, (out, d_content, d_by_distance)), *numbers),
            **options(content, ctx.dropout, BLOCK_M=BLOCK, BLOCK_N=STEP),
        )
        step = STEP if content.size(-1) <= 64 else STEP // 2  # the gradients of long keys take registers
        key_gradient_kernel[triton.cdiv(ctx.keys, BLOCK), n_head, lanes](
            *(*given, *statistics, *keys_and_values(d_past, d_present), *numbers),
            **options(content, ctx.dropout, BLOCK_M=step, BLOCK_N=BLOCK),
        )
        d_position = d_r = d_bias = None
        if d_by_distance is not None:
            d_position = torch.empty_like(position, memory_format=torch.contiguous_format)
            d_by_distance = d_by_distance.flatten(1, 2)
            torch.bmm(d_by_distance, by_head(r[:-1]), out=by_head(d_position.flatten(0, 1)))
            d_r = torch.zeros_like(r)
            d_r[:-1] = by_head(d_by_distance.mT @ by_head(position.flatten(0, 1)))
            if bias is not None:
                d_bias = torch.zeros_like(bias)
                d_bias[:-1] = d_by_distance.sum(1).T
        return d_content, d_position, d_past, d_present, d_r, d_bias, None, None, None


def draw(seeds: Tensor | None, lookback: Tensor, keys: int, n_head: int, dropout: float) -> Tensor | None:
    """Draw which probabilities are dropped; None where none are.

    Returns:
        int32 [lanes, n_head, words, length]: the bits of a word are those of WORD neighbouring keys. Where no key is
        visible nothing is drawn. Words of neighbouring queries lie together, as they are read and written.
    """
    if seeds is None:
        return None
    lanes, length = lookback.shape
    words = triton.cdiv(keys, WORD.value)
    dropped = lookback.new_empty(lanes, n_head, words, length, dtype=torch.int32)
    dropout_kernel[triton.cdiv(length, BLOCK), n_head, lanes](
        *(dropped, seeds, lookback, length, keys - length), DROPOUT=dropout, BLOCK_M=BLOCK, num_warps=2
    )
    return dropped


def scores_by_key(
    position: Tensor | None, r: Tensor | None, bias: Tensor | None, lookback: Tensor, keys: int
) -> Tensor | None:
    """Compute (position r + bias) * d_head ** -0.5, in units of log 2; None where scores have no positions.

    Returns:
        [n_head, lanes, length, columns]: keys, and as many columns more as make up whole blocks. Where no key is
        visible nothing is written.
    """
    if position is None or r is None:
        return None
    lanes, length, n_head, _ = position.shape
    assert position.stride(-1) == r.stride(-1) == 1
    by_key = position.new_empty(n_head, lanes, length, triton.cdiv(keys, BLOCK) * BLOCK)
    position_kernel[triton.cdiv(length, BLOCK), n_head, lanes](
        *(with_strides(position), with_strides(r.expand(lanes, -1, -1, -1))),
        *(with_strides(bias), with_strides(by_key), lookback, length, keys - length),
        **options(position, BLOCK_M=BLOCK, BLOCK_N=STEP),
    )
    return by_key


def by_head(x: Tensor) -> Tensor:
    """Swap rows and heads: [rows, n_head, d_head] -> [n_head, rows, d_head], or back."""
    return x.transpose(0, 1)


def with_strides(x: Tensor | None) -> tuple[Tensor, tuple[int, ...]] | None:
    """Pair a tensor with its strides, as the kernels take it."""
    return None if x is None else (x, x.stride())


def keys_and_values(past: Tensor | None, present: Tensor) -> list[tuple[Any, Any, int]]:
    """Return keys, and values, as the kernels take them: past, present, and how many rows are past."""
    past_rows = 0 if past is None else past.size(2)
    pairs = zip(present if past is None else past, present, strict=True)
    return [(with_strides(before), with_strides(now), past_rows) for before, now in pairs]


def options(content: Tensor, dropout: float = 0.0, **blocks: int) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for."""
    d_head = content.size(-1)
    block_d = max(16, triton.next_power_of_2(d_head))
    single = content.dtype == torch.float32
    # A warp takes 16 rows of a product. Of 8 warps on BLOCK = 64 rows each second one would compute the same again; but
    # for float32 the registers of 4 are too few.
    return {
        "D_HEAD": d_head,
        "BLOCK_D": block_d,
        "DROPOUT": dropout,
        "PRECISION": "tf32x3" if single else None,
        "num_warps": 8 if single else 4,
        "num_stages": 1 if single else 2,
        **blocks,
    }


# Each program is for a block of queries or keys, a head and a lane: program_id 0, 1 and 2. The address of a block takes
# 64 bits, an offset within it 32. `disable_licm` keeps the tiles' addresses, one for every score, from being held in
# registers from step to step.


@triton.jit
def of_head(tensor):
    """Return the address of this head's and lane's first row in [lanes, rows, n_head, d_head], and the rows' stride."""
    pointer, strides = tensor
    return pointer + tl.program_id(2).to(tl.int64) * strides[0] + tl.program_id(1).to(tl.int64) * strides[2], strides[1]


@triton.jit
def keys_of_head(parts):
    """Return those of the first past row and of the first present row; and how many rows are past."""
    past, present, past_rows = parts
    return of_head(past), of_head(present), past_rows


@triton.jit
def block_of(rows, start, BLOCK: tl.constexpr):
    """Return the addresses of rows start, ..., start + BLOCK - 1, [BLOCK, 1]."""
    pointer, stride = rows
    return pointer + tl.cast(start, tl.int64) * stride + tl.arange(0, BLOCK)[:, None] * stride


@triton.jit
def block_of_keys(rows, start, BLOCK: tl.constexpr):
    """Return the addresses of keys or values start, ..., start + BLOCK - 1, [BLOCK, 1], all past or all present."""
    past, present, past_rows = rows
    is_past = start < past_rows
    pointer = tl.where(is_past, past[0], present[0])
    stride = tl.where(is_past, past[1], present[1])
    return block_of((pointer, stride), tl.where(is_past, start, start - past_rows), BLOCK)


@triton.jit
def load(block, start, count, BLOCK: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the D_HEAD numbers of rows start, ..., start + BLOCK - 1, of `count`; [BLOCK, BLOCK_D], zeros elsewhere."""
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = (tl.arange(0, BLOCK)[:, None] < count - start) & (d < D_HEAD)
    return tl.load(block + d, mask=exists, other=0.0)


@triton.jit
def store(block, x, start, count, BLOCK: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x, [BLOCK, BLOCK_D], as far as `load` would load it."""
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = (tl.arange(0, BLOCK)[:, None] < count - start) & (d < D_HEAD)
    tl.store(block + d, x, mask=exists)


@triton.jit
def statistic(tensor, rows, length):
    """Return the addresses of one number for each query of this head and lane, in [lanes, n_head, length]."""
    return tensor + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * length + rows


@triton.jit
def first_visible(lookback, rows, length, mem_len):
    """Return the first key that each query sees; for rows beyond the last query one beyond their own key."""
    lookback = tl.load(lookback + tl.program_id(2).to(tl.int64) * length + rows, mask=rows < length, other=-1)
    return tl.maximum(mem_len + rows - lookback, 0).to(tl.int32)


@triton.jit
def by_key_at(tensor, tile):
    """Return where [n_head, lanes, length, columns] has the numbers of a tile: a column is a key.

    A tile is (row, column, i, j, length, mem_len), the queries row + i and the keys column + j; i + j has its shape, a
    row for a query, or transposed for a key.
    """
    pointer, strides = tensor
    row, column, i, j, _, _ = tile
    start = tl.program_id(1).to(tl.int64) * strides[0] + tl.program_id(2).to(tl.int64) * strides[1]
    return pointer + start + tl.cast(row, tl.int64) * strides[2] + column + i * strides[2] + j


@triton.jit
def by_distance_at(tensor, tile):
    """Return where [n_head, lanes, length, keys] has them if a column is a distance: keys - 1, ..., 0."""
    row, _, i, _, length, _ = tile
    return by_key_at(tensor, tile) + (length - 1 - row) - i


@triton.jit
def is_visible(first, tile):
    """Return which keys of a tile its queries see, `first` and those behind it up to their own."""
    row, column, i, j, _, mem_len = tile
    return (first <= column + j) & (column + j <= mem_len + row + i)


@triton.jit
def in_row(tile):
    """Return which of a tile's keys, also of those before the first, stand at a distance of their query's row."""
    row, column, i, j, length, mem_len = tile
    return (row + i < length) & (row + i - length < column + j) & (column + j <= mem_len + row + i)


@triton.jit
def position_kernel(
    position, r, bias, by_key, lookback, length, mem_len,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute `by_key` of BLOCK_M queries."""
    keys = mem_len + length
    row = tl.program_id(0) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    first = first_visible(lookback, row + i, length, mem_len)
    query = load(block_of(of_head(position), row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
    r = of_head(r)
    lowest = first + (length - 1 - row) - i  # the rows of r for the keys that are visible: from here to the last
    begin = tl.min(lowest) // BLOCK_N * BLOCK_N
    for start in tl.range(begin, keys, BLOCK_N, disable_licm=True):
        block = load(block_of(r, start, BLOCK_N), start, keys, BLOCK_N, D_HEAD, BLOCK_D)
        scores = tl.dot(query, tl.trans(block), input_precision=PRECISION)
        if bias is not None:
            pointer, strides = bias
            added = tl.load(pointer + (start + n) * strides[0] + tl.program_id(1) * strides[1], mask=start + n < keys)
            scores += added[None, :]
        tile = row, start + row - length + 1, i[:, None], i[:, None] + n[None, :], length, mem_len
        visible = (lowest[:, None] <= start + n[None, :]) & (start + n[None, :] < keys)
        tl.store(by_key_at(by_key, tile), scores * (D_HEAD**-0.5 * LOG2_E), mask=visible)


@triton.jit
def scores_of(left, right, by_key, first, tile, D_HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """Compute a tile's scores in units of log 2, -inf where hidden.

    `left` are the queries or keys that the tile's rows stand for, `right` those of its columns.
    """
    row, _, i, _, length, _ = tile
    position = 0.0
    if by_key is not None:  # Whole blocks, whatever stands where keys are hidden; a mask would part their numbers.
        position = tl.load(by_key_at(by_key, tile), mask=row + i < length, other=0.0)
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (D_HEAD**-0.5 * LOG2_E) + position
    return tl.where(is_visible(first, tile), scores, float("-inf"))


@triton.jit
def word_of(dropped, column, rows, length, mem_len):
    """Return the addresses of the bits of keys column, ..., column + WORD - 1 for each query of this head and lane."""
    head_and_lane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return dropped + (head_and_lane * tl.cdiv(mem_len + length, WORD) + column // WORD) * length + rows


@triton.jit
def dropout_factor(dropped, tile, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the factors by which dropout multiplies a tile of BLOCK_N keys: 0 or 1 / (1 - DROPOUT)."""
    factor = 1.0
    if DROPOUT > 0:
        row, column, i, j, length, mem_len = tile
        bits = tl.zeros(i.shape, tl.int32)
        for start in tl.static_range(0, BLOCK_N, WORD):
            exists = (row + i < length) & (column + start < mem_len + length)
            word = tl.load(word_of(dropped, column + start, row + i, length, mem_len), mask=exists, other=0)
            bits = tl.where(j >= start, word, bits)
        factor = tl.where(bits >> (j % WORD) & 1 != 0, 0.0, 1 / (1 - DROPOUT))
    return factor


@triton.jit
def is_dropped(random, DROPOUT: tl.constexpr):
    """Return 1 for each random number of 32 bits that stands for a dropped probability, else 0."""
    return (tl.uint_to_uniform_float(random) < DROPOUT).to(tl.int32)


@triton.jit
def dropout_kernel(dropped, seeds, lookback, length, mem_len, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Draw what is dropped of BLOCK_M queries. Philox, seeded by the lane, makes the numbers of four keys at once."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    seed = tl.load(seeds + tl.program_id(2))
    begin = tl.min(first_visible(lookback, rows, length, mem_len)) // WORD * WORD
    end = mem_len + tl.minimum(row + BLOCK_M, length)
    for column in range(begin, end, WORD):
        bits = tl.zeros([BLOCK_M], tl.int32)
        for start in tl.static_range(0, WORD, 4):
            a, c, b, d = tl.philox(seed, (column + start) // 4, rows, tl.program_id(1), 0)
            two = is_dropped(a, DROPOUT) | is_dropped(b, DROPOUT) << 1
            four = two | is_dropped(c, DROPOUT) << 2 | is_dropped(d, DROPOUT) << 3
            bits |= four << start
        tl.store(word_of(dropped, column, rows, length, mem_len), bits, mask=rows < length)


@triton.jit
def forward_kernel(
    content, key, value, out, by_key, lookback, log_sum,
    dropped, length, mem_len,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `log_sum` of BLOCK_M queries."""
    keys = mem_len + length
    key = keys_of_head(key)
    value = keys_of_head(value)
    row = tl.program_id(0) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    first = first_visible(lookback, row + i, length, mem_len)
    query = load(block_of(of_head(content), row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
    maximum = tl.full([BLOCK_M], -1e30, tl.float32)  # Finite: a query may see no key of a tile that others see.
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.min(first) // BLOCK_N * BLOCK_N
    end = tl.minimum(mem_len + row + BLOCK_M, keys)
    for column in tl.range(begin, end, BLOCK_N, disable_licm=True):
        k = load(block_of_keys(key, column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
        v = load(block_of_keys(value, column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
        tile = row, column, i[:, None], j[None, :], length, mem_len
        scores = scores_of(query, k, by_key, first[:, None], tile, D_HEAD, PRECISION)
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - higher)
        probability = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(probability, 1)
        probability *= dropout_factor(dropped, tile, DROPOUT, BLOCK_N)
        attended = tl.dot(probability.to(v.dtype), v, attended * shrink[:, None], input_precision=PRECISION)
        maximum = higher
    store(block_of(of_head(out), row, BLOCK_M), attended / total[:, None], row, length, BLOCK_M, D_HEAD, BLOCK_D)
    tl.store(statistic(log_sum, row + i, length), maximum + tl.log2(total), mask=row + i < length)


@triton.jit
def gradient_of(
    left, right, d_left, d_right, by_key, first, log_sum, delta, factor, tile,
    D_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile's probabilities after dropout, and the gradient of its scores: 0 where they are hidden."""
    scores = scores_of(left, right, by_key, first, tile, D_HEAD, PRECISION)
    probability = tl.exp2(scores - log_sum)
    d_probability = tl.dot(d_left, tl.trans(d_right), input_precision=PRECISION) * factor
    return probability * factor, probability * (d_probability - delta) * D_HEAD**-0.5


@triton.jit
def query_gradient_kernel(
    content, key, value, d_out, by_key, lookback, log_sum, delta, out, d_content, d_by_distance,
    dropped, length, mem_len,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute `delta`, `d_content` and `d_by_distance` of BLOCK_M queries."""
    keys = mem_len + length
    key = keys_of_head(key)
    value = keys_of_head(value)
    row = tl.program_id(0) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    first = first_visible(lookback, row + i, length, mem_len)
    query = load(block_of(of_head(content), row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
    d_query_out = load(block_of(of_head(d_out), row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
    query_out = load(block_of(of_head(out), row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
    query_delta = tl.sum(query_out.to(tl.float32) * d_query_out.to(tl.float32), 1)
    tl.store(statistic(delta, row + i, length), query_delta, mask=row + i < length)
    query_log_sum = tl.load(statistic(log_sum, row + i, length), mask=row + i < length, other=0.0)
    d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.min(first) // BLOCK_N * BLOCK_N
    end = tl.minimum(mem_len + row + BLOCK_M, keys)
    for column in tl.range(begin, end, BLOCK_N, disable_licm=True):
        k = load(block_of_keys(key, column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
        v = load(block_of_keys(value, column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
        tile = row, column, i[:, None], j[None, :], length, mem_len
        factor = dropout_factor(dropped, tile, DROPOUT, BLOCK_N)
        _, d_scores = gradient_of(
            query, k, d_query_out, v, by_key, first[:, None], query_log_sum[:, None], query_delta[:, None],
            factor, tile, D_HEAD, PRECISION,
        )  # fmt: skip
        d_scores = d_scores.to(k.dtype)
        if d_by_distance is not None:
            tl.store(by_distance_at(d_by_distance, tile), d_scores, mask=in_row(tile))
        d_query = tl.dot(d_scores, k, d_query, input_precision=PRECISION)
    if d_by_distance is not None:  # Zeros for all greater distances: in the place of keys before those of the loop.
        for before in range(BLOCK_N, begin + length - row - 1 + BLOCK_N, BLOCK_N):
            tile = row, begin - before, i[:, None], j[None, :], length, mem_len
            zeros = tl.zeros([BLOCK_M, BLOCK_N], d_by_distance[0].dtype.element_ty)
            tl.store(by_distance_at(d_by_distance, tile), zeros, mask=in_row(tile))
    store(block_of(of_head(d_content), row, BLOCK_M), d_query, row, length, BLOCK_M, D_HEAD, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    content, key, value, d_out, by_key, lookback, log_sum, delta, d_key, d_value,
    dropped, length, mem_len,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute `d_key` and `d_value` of BLOCK_N keys."""
    keys = mem_len + length
    content = of_head(content)
    d_out = of_head(d_out)
    column = tl.program_id(0) * BLOCK_N
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    k = load(block_of_keys(keys_of_head(key), column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
    v = load(block_of_keys(keys_of_head(value), column, BLOCK_N), column, keys, BLOCK_N, D_HEAD, BLOCK_D)
    # From the first query at one of these keys or beyond to the last that looks back to them.
    begin = tl.maximum(column - mem_len, 0) // BLOCK_M * BLOCK_M
    end = begin
    for start in range(begin, length, SCAN):
        rows = start + tl.arange(0, SCAN)
        sees = (first_visible(lookback, rows, length, mem_len) < column + BLOCK_N) & (rows < length)
        end = tl.maximum(end, tl.max(tl.where(sees, rows + 1, 0)))
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for row in tl.range(begin, end, BLOCK_M, disable_licm=True):
        query = load(block_of(content, row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
        d_query_out = load(block_of(d_out, row, BLOCK_M), row, length, BLOCK_M, D_HEAD, BLOCK_D)
        first = first_visible(lookback, row + i, length, mem_len)
        query_log_sum = tl.load(statistic(log_sum, row + i, length), mask=row + i < length, other=0.0)
        query_delta = tl.load(statistic(delta, row + i, length), mask=row + i < length, other=0.0)
        tile = row, column, i[None, :], j[:, None], length, mem_len
        factor = dropout_factor(dropped, tile, DROPOUT, BLOCK_N)
        probability, d_scores = gradient_of(
            k, query, v, d_query_out, by_key, first[None, :], query_log_sum[None, :], query_delta[None, :],
            factor, tile, D_HEAD, PRECISION,
        )  # fmt: skip
        d_v = tl.dot(probability.to(v.dtype), d_query_out, d_v, input_precision=PRECISION)
        d_k = tl.dot(d_scores.to(k.dtype), query, d_k, input_precision=PRECISION)
    store(block_of_keys(keys_of_head(d_key), column, BLOCK_N), d_k, column, keys, BLOCK_N, D_HEAD, BLOCK_D)
    store(block_of_keys(keys_of_head(d_value), column, BLOCK_N), d_v, column, keys, BLOCK_N, D_HEAD, BLOCK_D)
