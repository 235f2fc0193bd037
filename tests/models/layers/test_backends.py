"""The backends of attention agree with the formula, and each of its arguments counts."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from txl_dist.models.layers.backends import AttentionWindow, RelativePositions, attend, default_backend
from txl_dist.models.layers.dropout import Mask

LANES, N_HEAD, D_HEAD = 3, 2, 5
SHAPES = [(7, 0), (7, 3), (3, 9), (1, 6), (1, 0), (8, 8)]


def lookbacks(length: int) -> Tensor:
    """Three lanes: everything, nothing but itself, and a document that begins in mid-segment."""
    return torch.stack([torch.full((length,), 10**6), torch.zeros(length).long(), (torch.arange(length) + 2) % 4])


def arguments(length: int, mem_len: int, kind: str) -> list[Tensor]:
    """content, key, value, position, r, bias as far as the kind has them, in float64."""
    keys = mem_len + length
    shapes = [(LANES, length), (LANES, keys), (LANES, keys)]
    shapes += [(LANES, length), (keys + 1,)] if kind != "content" else []
    torch.manual_seed(length + 10 * mem_len)
    values = [torch.randn(*shape, N_HEAD, D_HEAD, dtype=torch.float64) for shape in shapes]
    values += [torch.randn(keys + 1, N_HEAD, dtype=torch.float64)] if kind == "bias" else []
    return [value.requires_grad_() for value in values]


def by_backend(backend: str, lookback: Tensor, content: Tensor, key: Tensor, value: Tensor, *terms: Tensor) -> Tensor:
    relative = RelativePositions(terms[0], terms[1], terms[2] if terms[2:] else None) if terms else None
    window = AttentionWindow(lookback, key.size(1) - content.size(1), content.dtype)
    memory = key.size(1) // 2  # may also be cut elsewhere
    past, present = (torch.stack([key[:, rows], value[:, rows]]) for rows in (slice(memory), slice(memory, None)))
    return attend(backend, content, past, present, relative, window, None)


def by_the_formula(lookback: Tensor, content: Tensor, key: Tensor, value: Tensor, *terms: Tensor) -> Tensor:
    """One lane, head, query and key after the other."""
    out, mem_len, keys = torch.zeros_like(content), key.size(1) - content.size(1), key.size(1)
    for lane, i, head in torch.cartesian_prod(*map(torch.arange, content.shape[:3])).tolist():
        scores, seen = [], []
        for j in range(max(0, mem_len + i - int(lookback[lane, i])), mem_len + i + 1):
            score, distance = content[lane, i, head] @ key[lane, j, head], mem_len + i - j
            if terms:
                score = score + terms[0][lane, i, head] @ terms[1][keys - 1 - distance, head]
            if terms[2:]:
                score = score + terms[2][keys - 1 - distance, head]
            scores.append(score / D_HEAD**0.5)
            seen.append(value[lane, j, head])
        out[lane, i, head] = torch.stack(scores).softmax(0) @ torch.stack(seen)
    return out


@pytest.mark.parametrize("kind", ["content", "position", "bias"])
@pytest.mark.parametrize("length, mem_len", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_backend_is_the_formula(backend, length, mem_len, kind):
    """The result, and the gradients of all arguments, of one loss."""
    given, lookback = arguments(length, mem_len, kind), lookbacks(length)
    expected = by_the_formula(lookback, *given)
    computed = by_backend(backend, lookback, *given)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad(result, given, upstream) for result in (computed, expected))
    for gradient, right in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_drops_probabilities_and_keeps_their_mean(backend):
    torch.manual_seed(0)
    content, key, value = (torch.randn(1, 50, 1, 4) for _ in range(3))
    value = torch.ones_like(value)  # the result is then what is left of the probabilities' sum
    mask = Mask(0.5, torch.tensor([3]))
    key_value = torch.stack([key, value])
    left = attend(backend, content, None, key_value, None, AttentionWindow(torch.full((1, 50), 99), 0), mask)
    assert left.std() > 0.1 and abs(left.mean() - 1) < 4 * left.std() / left[..., 0].numel() ** 0.5


def test_the_default_backend_depends_on_device_dtype_and_dropout():
    assert default_backend(torch.device("cpu"), torch.bfloat16) == "reference"
    assert default_backend(torch.device("cuda"), torch.float32) == "sdpa"
    assert default_backend(torch.device("cuda"), torch.float32, dropout=0.1) == "reference"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == ("triton" if find_spec("triton") else "sdpa")
