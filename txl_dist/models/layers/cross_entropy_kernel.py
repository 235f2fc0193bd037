"""Cross-entropy by two Triton kernels: forward reads each logit once; backward once more, to write its gradient there.

Both compute in float32, whatever the dtype of the logits. The sum of a row is taken block by block, beside the maximum
so far (Milakov & Gimelshein 2018, section 3). Nothing is added atomically; every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row at a time: two loads of 16 bytes for each thread, of half precision.
BLOCK = 4096
NUM_WARPS = 8

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NOT_SCORED = tl.constexpr(-100)


def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood of int64 [n] and the logarithm of each row's sum of exponentials.

    Args:
        logits: [n, size], contiguous.

    Returns:
        Both float32 [n]; NaN for a target that does not exist.
    """
    rows, size = logits.shape
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    log_sum = torch.empty_like(nll)
    forward_kernel[(rows,)](logits, targets, nll, log_sum, size, BLOCK, num_warps=NUM_WARPS)
    return nll, log_sum


def backward(logits: Tensor, targets: Tensor, log_sum: Tensor, d_nll: Tensor) -> None:
    """Overwrite logits by (softmax - one-hot) d_nll, by 0 in rows that are not scored."""
    rows, size = logits.shape
    grid = rows, triton.cdiv(size, BLOCK)
    backward_kernel[grid](logits, targets, log_sum, d_nll, size, BLOCK, num_warps=NUM_WARPS)


@triton.jit
def forward_kernel(logits, targets, nll, log_sum, size, BLOCK: tl.constexpr):
    """Compute both results of a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * size
    maximum = LOWEST  # Finite, so that a block of -inf adds nothing.
    total = 0.0
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        scores = tl.load(logits + column, mask=column < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(scores, 0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(scores - higher), 0)
        maximum = higher
    exists = (target >= 0) & (target < size)
    score = tl.load(logits + target, mask=exists, other=0.0).to(tl.float32)
    log_total = tl.where(exists, tl.log(total), float("nan"))
    tl.store(nll + row, tl.where(target == NOT_SCORED, 0.0, maximum - score + log_total))
    tl.store(log_sum + row, maximum + log_total)


@triton.jit
def backward_kernel(logits, targets, log_sum, d_nll, size, BLOCK: tl.constexpr):
    """Overwrite BLOCK logits of a row by their gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * size + column
    target = tl.load(targets + row)
    scores = tl.load(logits, mask=column < size).to(tl.float32)
    probability = tl.exp(scores - tl.load(log_sum + row))
    gradient = (probability - (column == target).to(tl.float32)) * tl.load(d_nll + row)
    gradient = tl.where(target == NOT_SCORED, 0.0, gradient)
    tl.store(logits, gradient.to(logits.dtype.element_ty), mask=column < size)
