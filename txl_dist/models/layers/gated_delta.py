"""The gated delta rule (Yang, Kautz, Hatamizadeh 2024): a memory of constant size that decays and corrects itself.

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T            S [d_head, d_value] per head   (equation 10)
    o_t = S_t^T q_t

The decay a_t is from 0 to 1, and so is b_t, the share by which what the memory returns for the key k_t is corrected
towards the value v_t. One token is read as it is written above. More are read chunk by chunk (section 3.3): within a
chunk the corrections d_t, of which S_t is the decayed sum of k_t d_t^T, solve a triangular system, and only the state
between two chunks is ever computed. Where `lookback` is 0 a document begins: of S and the convolution's inputs nothing
is left there.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.state import State

CHUNK = 64  # tokens: a longer chunk costs more products within it, a shorter one more products with the state


class Tokens(NamedTuple):
    """What a segment writes into the memory and reads out of it.

    Attributes:
        query, key: [lanes, n_head, length, d_head]; keys of length 1.
        value: [lanes, n_head, length, d_value].
        log_decay: [lanes, n_head, length], log a, 0 or less.
        beta: [lanes, n_head, length], b.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor


def gated_delta_rule(tokens: Tokens, state: Tensor, lookback: Tensor) -> tuple[Tensor, Tensor]:
    """Read a segment of any length.

    Args:
        state: [lanes, n_head, d_head, d_value], S before the first token.
        lookback: int64 [lanes, length], 0 where a document begins.

    Returns:
        o [lanes, n_head, length, d_value], and S after the last token.
    """
    if lookback.size(1) == 1:
        return read_token(tokens, state, lookback)
    parts = []
    for start, end in pairwise(chunk_bounds(lookback.size(1))):
        chunk = Tokens._make(x[:, :, start:end] for x in tokens)
        part, state = read_chunk(chunk, state, lookback[:, start:end])
        parts.append(part)
    return torch.cat(parts, dim=2), state


def chunk_bounds(length: int) -> list[int]:
    """Return where chunks begin, and the end of the last one."""
    return [*range(0, length, CHUNK), length]


def read_token(tokens: Tokens, state: Tensor, lookback: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `gated_delta_rule` of a single token, as it is written."""
    query, key, value, log_decay, beta = tokens
    state = state * remaining(log_decay, lookback[:, None] == 0)[..., None]
    error = value - key @ state
    state = state + key.mT * (beta[..., None] * error)
    return query @ state, state


def read_chunk(tokens: Tokens, state: Tensor, lookback: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `gated_delta_rule` of one chunk.

    Nothing is divided by a decay: every factor is what remains of something at a later token, and at most 1.
    """
    query, key, value, log_decay, beta = tokens
    size = lookback.size(1)
    is_later = torch.ones(size, size, dtype=torch.bool, device=lookback.device).triu(1)
    document = (lookback == 0).cumsum(1)[:, None]  # the state is of number 0
    is_hidden = (document[..., :, None] != document[..., None, :]) | is_later
    # Each sum begins where it is to begin: as a difference of two sums it would have the rounding of all before.
    from_token = log_decay[..., None].expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    of_token = remaining(from_token, is_hidden)  # [..., at each token, of each token]
    of_state = remaining(log_decay.cumsum(-1), document != 0)[..., None]  # [..., at each token, 1]
    corrected = beta[..., None] * key
    system = (corrected @ key.mT) * of_token
    right_side = torch.cat([beta[..., None] * value, corrected * of_state], dim=-1)
    solution = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    constant, by_state = solution.split([value.size(-1), key.size(-1)], dim=-1)
    correction = constant - by_state @ state
    read = (query * of_state) @ state + ((query @ key.mT) * of_token) @ correction
    written = (key * of_token[..., -1, :, None]).mT @ correction
    return read, state * of_state[..., -1:, :] + written


def remaining(log_decay: Tensor, is_gone: Tensor) -> Tensor:
    """Return the decay, 0 where all is gone: there the gradient is 0 as well."""
    return log_decay.masked_fill(is_gone, -torch.inf).exp()


def rule_products(rows: int, length: int, d_head: int, d_value: int) -> Iterator[Product]:
    """List the products of `gated_delta_rule`, for so many lanes and heads together, after a state without gradient."""
    with_state = 2 * rows * d_head * d_value
    if length == 1:
        yield from [Product(with_state)] * 2  # what the key finds, and the query; the outer product is element-wise
        return
    for start, end in pairwise(chunk_bounds(length)):
        size = end - start
        pairs = 2 * rows * size * size
        visible = (size + 1) / (2 * size)
        # A triangular system is no product, but its gradient by the matrix is one: as large as those of keys with keys
        # and of weights with corrections, which are therefore counted once more.
        yield Product(pairs * d_head, visible=visible, recomputed=1)
        yield Product(pairs * d_value, visible=visible, recomputed=1)
        yield Product(pairs * d_head, visible=visible)  # queries with keys
        yield from [Product(with_state * size, gradients=2 if start else 1)] * 2  # read by keys, and by queries
        yield Product(with_state * size, gradients=0 if end == length else 2)  # written; after the last it is detached


class ShortConvolution(nn.Module):
    """A causal convolution of each channel alone, then SiLU.

    Args:
        d_conv: tokens that it sees, the present one included; the last weight is the present one's.
    """

    def __init__(self, channels: int, d_conv: int):
        super().__init__()
        self.d_conv = d_conv
        self.weight = nn.Parameter(torch.empty(channels, d_conv))

    def forward(self, inputs: Tensor, past: Tensor, lookback: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve a segment, and return the last inputs for the next one.

        Args:
            inputs: [lanes, length, channels].
            past: [lanes, d_conv - 1, channels], the inputs before.
            lookback: int64 [lanes, length]; inputs further back count as 0.

        Returns:
            [lanes, length, channels], and [lanes, d_conv - 1, channels].
        """
        length = inputs.size(1)
        all_inputs = torch.cat([past, inputs], dim=1)
        mixed = all_inputs[:, self.d_conv - 1 :] * self.weight[:, -1]
        for back in range(1, self.d_conv):
            start = self.d_conv - 1 - back
            before = all_inputs[:, start : start + length] * self.weight[:, -1 - back]
            # The products are hidden, not the inputs: so backward needs no copy of these for each weight.
            mixed = mixed + before.masked_fill(lookback[..., None] < back, 0.0)
        return F.silu(mixed), all_inputs[:, length:]


class GatedDelta(nn.Module):
    """The sublayer: normalisation first, projections, short convolution, gated delta rule, output gate, and residual.

    Its computation is that of Qwen3NextGatedDeltaNet in transformers 5, and of flash-linear-attention's GatedDeltaNet
    with as many heads of values as of keys.

    Args:
        d_head, d_value: the width of queries and keys, and of values, of each head.
        d_conv: see `ShortConvolution`.
        eps: of both normalisations.

    Attributes:
        A_log, dt_bias: log a_t = -exp(A_log) softplus(x + dt_bias), as in Mamba2 (Dao & Gu 2024).
    """

    def __init__(
        self, d_model: int, n_head: int, d_head: int, d_value: int, d_conv: int, *, dropout: float, eps: float
    ):
        super().__init__()
        self.n_head = n_head
        self.d_head = d_head
        self.d_value = d_value
        self.widths = [n_head * d_head, n_head * d_head, n_head * d_value]
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.qkv_net = nn.Linear(d_model, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(sum(self.widths), d_conv)
        self.rate_net = nn.Linear(d_model, 2 * n_head, bias=False)  # of b, then of a
        self.A_log = nn.Parameter(torch.empty(n_head))
        self.dt_bias = nn.Parameter(torch.empty(n_head))
        self.gate_net = nn.Linear(d_model, n_head * d_value, bias=False)
        self.head_norm = nn.RMSNorm(d_value, eps=eps)
        self.o_net = nn.Linear(n_head * d_value, d_model, bias=False)
        self.dropout = Dropout(dropout, variational=False)

    def forward(
        self, hidden: Tensor, state: State, lookback: Tensor, noise: Noise | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Read a segment, [lanes, length, d_model] -> [lanes, length, d_model], after a state of `state_shapes`."""
        memory, past = state["memory"], state["conv"]
        assert isinstance(memory, Tensor) and isinstance(past, Tensor)
        normed = self.norm(hidden)
        mixed, past = self.convolution(self.qkv_net(normed), past, lookback)
        # The state is a sum over all the text: half precision is not enough.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        query, key, value = (self.heads(x).to(dtype) for x in mixed.split(self.widths, dim=-1))
        log_decay, beta = self.rates(self.rate_net(normed).to(dtype))
        tokens = Tokens(unit(query) * self.d_head**-0.5, unit(key), value, log_decay, beta)
        read, new_memory = gated_delta_rule(tokens, memory.to(dtype), lookback)
        normed_read = self.head_norm(read.transpose(1, 2).to(hidden.dtype)).flatten(-2)
        gated = normed_read * F.silu(self.gate_net(normed))
        hidden = hidden + self.dropout(self.o_net(gated), noise)
        return hidden, {"memory": new_memory.to(memory.dtype), "conv": past}

    def heads(self, x: Tensor) -> Tensor:
        """Split [lanes, length, n_head * d] into heads, [lanes, n_head, length, d]."""
        split: Tensor = x.unflatten(-1, (self.n_head, -1))
        return split.transpose(1, 2)

    def rates(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Turn [lanes, length, 2 * n_head] into log a and b, [lanes, n_head, length] each."""
        b, a = projected.transpose(1, 2).chunk(2, dim=1)
        step = F.softplus(a + self.dt_bias.to(a.dtype)[:, None])
        return -self.A_log.to(a.dtype).exp()[:, None] * step, b.sigmoid()

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of S, and of the convolution's last inputs."""
        past = (self.convolution.d_conv - 1, sum(self.widths))
        return {"memory": (self.n_head, self.d_head, self.d_value), "conv": past}

    def empty_cache(self, lanes: int, device: torch.device) -> State:
        """Return the state for evaluation before the first token, S in float32 at least.

        Where each token is a segment of its own, half precision would lose what one adds to the sum of all before it.
        """
        weight = self.o_net.weight
        shapes = self.state_shapes()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(lanes, *shapes["memory"], dtype=dtype, device=device)
        return {"memory": memory, "conv": weight.new_zeros(lanes, *shapes["conv"], device=device)}

    def products(self, lanes: int, length: int) -> list[Product]:
        """List the products of matrices when `lanes` read a segment."""
        nets = (self.qkv_net, self.rate_net, self.gate_net, self.o_net)
        projections = [Product(2 * lanes * length * net.in_features * net.out_features) for net in nets]
        return [*projections, *rule_products(lanes * self.n_head, length, self.d_head, self.d_value)]


def unit(x: Tensor) -> Tensor:
    """Scale vectors [..., width] to length 1; a smaller one than 1e-3 stays smaller, and 0 stays 0."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
