"""Log-probabilities, and the negative log-likelihood of targets, from logits.

Beside the products of a softmax it is the passes through its logits that take time, and the memory of each copy of
them. On a GPU two kernels therefore read logits of half precision as they are, compute in float32, and keep one number
per row: the logarithm of its sum. Backward writes the gradient over the logits, which nothing else needs any more. The
products stay those of torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_dist.models.layers.dropout import HAS_TRITON
from txl_dist.models.layers.transfer import to_device


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities along the last dimension, in float32 at least."""
    log_probs: Tensor = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_probs


def predict(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Compute what a head returns: the negative log-likelihood of targets, or all log-probabilities without them.

    Args:
        logits: [lanes, positions, size], for nothing but this.
        targets: int64 [lanes, positions], on any device; -100: not scored.
    """
    if targets is None:
        return log_softmax(logits)
    flat = to_device(targets, logits.device).flatten()
    return cross_entropy(logits.flatten(0, 1), flat).view_as(targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each target, in nats; gradients cannot be differentiated again.

    Args:
        logits: [n, size], for nothing but this: on a GPU backward overwrites them.
        targets: int64 [n], on the same device; -100: not scored, the result is 0. One that does not exist is an error,
            or on a GPU NaN.

    Returns:
        [n]; float32 (float64 for logits in float64).
    """
    if logits.device.type == "cpu" or logits.dtype == torch.float64 or not HAS_TRITON:
        return F.nll_loss(log_softmax(logits), targets, reduction="none")
    nll: Tensor = fused(logits.contiguous(), targets)[0]
    return nll


@torch.library.custom_op("txl_dist::cross_entropy", mutates_args=())
def fused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `cross_entropy` of [n, size], and the logarithm of each row's sum of exponentials: float32 [n]."""
    from txl_dist.models.layers import cross_entropy_kernel  # imports triton, which is not installed everywhere

    results: tuple[Tensor, Tensor] = cross_entropy_kernel.forward(logits, targets.contiguous())
    return results


@torch.library.custom_op("txl_dist::cross_entropy_gradient", mutates_args={"logits"})
def write_gradient(logits: Tensor, targets: Tensor, log_sum: Tensor, d_nll: Tensor) -> None:
    """Write the gradient of logits over them, from that of the negative log-likelihood."""
    from txl_dist.models.layers import cross_entropy_kernel

    cross_entropy_kernel.backward(logits, targets.contiguous(), log_sum, d_nll.contiguous())


@fused.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    return nll, torch.empty_like(nll)


@write_gradient.register_fake
def _(logits: Tensor, targets: Tensor, log_sum: Tensor, d_nll: Tensor) -> None:
    pass


def keep_logits(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradient is computed from, for backward."""
    _, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(*inputs, log_sum)


def gradient(ctx: Any, d_nll: Tensor, _: Tensor) -> tuple[Tensor, None]:
    """Return the logits, overwritten: torch then refuses a second backward, which would read them as logits."""
    logits, targets, log_sum = ctx.saved_tensors
    write_gradient(logits, targets, log_sum, d_nll)
    return logits, None


fused.register_autograd(gradient, setup_context=keep_logits)
