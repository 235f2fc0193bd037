"""Attention with relative distances, fused: forward and backward keep no probabilities in memory.

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
from torch import Tensor
from torch.autograd.function import once_differentiable

from txl_dist.models.layers.dropout import Mask
from txl_dist.models.layers.flash_kernels import (
    WORD,
    dropout_kernel,
    forward_kernel,
    key_gradient_kernel,
    position_kernel,
    query_gradient_kernel,
)

# A program keeps BLOCK queries and takes BLOCK or STEP keys at a time, or the reverse. More run out of registers.
BLOCK = 64
STEP = 32


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
