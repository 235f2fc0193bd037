"""The Triton kernels of flash.py, whose first lines say what they compute.

Each program is for a block of queries or keys, a head and a lane: program_id 0, 1 and 2. The address of a block takes
64 bits, an offset within it 32. `disable_licm` keeps the tiles' addresses, one for every score, from being held in
registers from step to step.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # Scores are in units of log 2: the hardware has exp2.
WORD = tl.constexpr(32)  # keys whose dropout a number holds
SCAN = tl.constexpr(1024)  # queries whose lookback a block of keys loads at once: all, as a rule


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
