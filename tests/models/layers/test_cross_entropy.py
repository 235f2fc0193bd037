"""The kernels of the cross-entropy against the plain formula, under Triton's interpreter; and as compiled for sm_90."""

import re
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from math import inf, nan

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.layers.test_adaptive import CASES, build, hidden_and_all_tokens
from tests.models.layers.triton_process import compiling, interpreting, resources
from txl_dist.models.layers import adaptive, cross_entropy
from txl_dist.models.layers.adaptive import AdaptiveSoftmax, padding

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here"),
]


@pytest.fixture(scope="module")
def interpreted():
    with interpreting() as run:
        yield run


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_targets(rows: int, size: int) -> Tensor:
    """Some of them not scored."""
    targets = torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1::3] = -100
    return targets


def by_the_formula(logits: Tensor, targets: Tensor, d_nll: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().double().requires_grad_()
    nll = F.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(nll, leaf, d_nll.double())
    return nll.detach(), gradient


def by_kernels(logits: Tensor, targets: Tensor, d_nll: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    nll, _ = cross_entropy.fused(leaf * 1, targets)
    (gradient,) = torch.autograd.grad(nll, leaf, d_nll)
    return nll.detach(), gradient


def check_formula(dtype: torch.dtype, rows: int, size: int) -> None:
    logits, targets = (4 * random(rows, size)).to(dtype), random_targets(rows, size)
    d_nll = random(rows, seed=2).float() * 100
    nll, gradient = by_kernels(logits, targets, d_nll)
    expected, d_logits = by_the_formula(logits, targets, d_nll)
    assert nll.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), d_logits, rtol=4e-6 if dtype == torch.float32 else 1e-3, atol=1e-5)
    assert not nll[targets < 0].any() and not gradient[targets < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, size", [(0, 5), (1, 1), (7, 1), (1, 300), (4, 4096), (5, 4097), (6, 13_001)])
def test_losses_and_gradients_are_the_formulas(interpreted, dtype, rows, size):
    interpreted(check_formula, dtype, rows, size)


def check_not_scored() -> None:
    logits = random(3, 500).float()
    logits[1] = nan
    nll, gradient = by_kernels(logits, torch.full((3,), -100), torch.tensor([1.0, inf, nan]))
    assert not nll.any() and not gradient.any()


def test_what_is_not_scored_has_no_loss_and_no_gradient_whatever_stands_there(interpreted):
    interpreted(check_not_scored)


def check_numbers_that_are_not_finite() -> None:
    size = 9000
    logits = random(6, size).float()
    logits[0, 5000] = nan
    logits[1, 5000] = inf
    logits[2] = -inf
    logits[3] = nan
    logits[4, :8500] = -inf  # more than a block
    logits[5, 100:] = -inf
    targets = torch.tensor([7, 7, 7, 7, 8999, 8999])
    ones = torch.ones(6)
    nll, gradient = by_kernels(logits, targets, ones)
    expected, d_logits = by_the_formula(logits, targets, ones)
    assert expected[:4].isnan().all() and expected[5] == inf
    torch.testing.assert_close(nll.double(), expected, equal_nan=True)
    torch.testing.assert_close(gradient.double(), d_logits, equal_nan=True)


def test_numbers_that_are_not_finite_are_as_in_the_formula(interpreted):
    interpreted(check_numbers_that_are_not_finite)


def check_targets_that_do_not_exist() -> None:
    targets = torch.tensor([-1, 10, 2**40, 3])
    nll, gradient = by_kernels(random(4, 10).float(), targets, torch.ones(4))
    assert nll.isnan().tolist() == [True, True, True, False]
    assert gradient[:3].isnan().all() and gradient[3].isfinite().all()


def test_a_target_that_does_not_exist_gives_nan(interpreted):
    interpreted(check_targets_that_do_not_exist)


def check_memory() -> None:
    """The gradient stands where the logits stood, and no second one can be computed of them."""
    leaf = random(3, 5000).half().requires_grad_()
    logits = leaf * 1
    nll, _ = cross_entropy.fused(logits, random_targets(3, 5000))
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    nll.sum().backward(retain_graph=True)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.sum().backward()


def test_backward_overwrites_the_logits_once(interpreted):
    interpreted(check_memory)


def softmax_results(
    softmax: AdaptiveSoftmax, dtype: torch.dtype, hidden: Tensor, targets: Tensor, frozen: str = "none"
) -> dict[str, Tensor]:
    """The losses of an adaptive softmax, and the gradients of their weighted sum."""
    softmax = deepcopy(softmax).to(dtype)
    hidden = torch.stack([hidden, hidden], -1).to(dtype)[..., 0].requires_grad_()  # its numbers lie apart
    leaves = {"hidden": hidden, **dict(softmax.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(re.fullmatch(frozen, name) is None)
    nll = softmax(hidden, targets)
    (nll * random(*nll.shape, seed=3).to(nll.dtype)).sum().backward()
    return {"nll": nll.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}}


def check_softmax(case: str, dtype: torch.dtype) -> None:
    _, softmax = build(**CASES[case])
    hidden, targets = hidden_and_all_tokens()
    softmax.to(dtype).double()  # rounded, so that no error comes from that
    hidden = hidden.to(dtype).double()
    some = targets.clone()
    some[:, ::2] = -100
    of_first_cluster = targets % 10
    batches = {"all": targets, "some": some, "none": torch.full_like(targets, -100), "first": of_first_cluster}
    few = {"few rows": (hidden[:1, :5], targets[:1, :5]), "one row": (hidden[:1, :1], targets[:1, :1])}
    for name, (rows, tokens) in {**{name: (hidden, tokens) for name, tokens in batches.items()}, **few}.items():
        expected = softmax_results(softmax, torch.float64, rows, tokens)
        with on_a_gpu():
            got = softmax_results(softmax, dtype, rows, tokens)
        assert got.keys() == expected.keys()
        for leaf, x in got.items():
            assert x.shape == expected[leaf].shape and x.dtype == (torch.float32 if leaf == "nll" else dtype)
            error = (x - expected[leaf]).abs().max() / expected[leaf].abs().max().clamp(min=1)
            assert error < 40 * torch.finfo(dtype).eps, f"{leaf} of {name}: {error}"


@contextmanager
def on_a_gpu():
    """Compute cross-entropies by the kernels, of logits that are padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "cross_entropy", lambda logits, targets: cross_entropy.fused(logits, targets)[0])
        patch.setattr(adaptive, "padding", lambda size, _: padding(size, torch.device("cuda")))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_softmax_by_kernels(interpreted, case, dtype):
    interpreted(check_softmax, case, dtype)


def check_frozen() -> None:
    hidden, targets = hidden_and_all_tokens()
    _, softmax = build(**CASES["narrowing clusters"])
    with on_a_gpu():
        expected = softmax_results(softmax, torch.float32, hidden, targets)
        for frozen in "hidden", "bias", "table_.*", "hidden|projection_.*|cluster_.*", "(?!bias).*":
            got = softmax_results(softmax, torch.float32, hidden, targets, frozen)
            assert len(got) < len(expected)
            assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_frozen_parameters_change_no_other_gradient(interpreted):
    interpreted(check_frozen)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_probability(case, monkeypatch):
    _, softmax = build(**CASES[case])
    hidden, _ = hidden_and_all_tokens()
    expected = softmax(hidden, None)
    monkeypatch.setattr(adaptive, "padding", lambda size, _: padding(size, torch.device("cuda")))
    torch.testing.assert_close(softmax(hidden, None), expected, rtol=1e-12, atol=1e-12)


def test_rows_of_logits_are_aligned_on_a_gpu():
    gpu = torch.device("cuda")
    sizes = [20_003, 20_000, 20_008, 160_000, 67_735, 205, 1]
    assert [size + padding(size, gpu) for size in sizes] == [20_032, 20_000, 20_032, 160_000, 67_776, 256, 64]
    assert not any(padding(size, torch.device("cpu")) for size in sizes)


class LogitsInMemory(TorchDispatchMode):
    """Collects every tensor that is as large as the logits of so many rows and outputs, views aside."""

    def __init__(self, rows: int, outputs: int):
        super().__init__()
        self.numel = rows * outputs
        self.tensors: dict[int, Tensor] = {}  # by their memory, which is kept, so that none has another's

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() == self.numel:
                self.tensors[x.untyped_storage()._cdata] = x
        return result


def test_on_a_gpu_logits_are_in_memory_once_in_half_precision():
    """Forward and backward, counted on tensors without numbers."""
    _, softmax = build(**CASES["clusters"])
    softmax.to("meta", torch.bfloat16)
    hidden, targets = hidden_and_all_tokens()
    with LogitsInMemory(targets.numel(), 64) as logits:
        softmax(hidden.to("meta", torch.bfloat16).requires_grad_(), targets).mean().backward()
    assert [x.dtype for x in logits.tensors.values()] == [torch.bfloat16]
    assert softmax.bias.grad is not None


def compile_kernels(size: int, dtype: torch.dtype) -> None:
    from txl_dist.models.layers import cross_entropy_kernel

    logits, targets = torch.zeros(2, size, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    nll, log_sum = cross_entropy_kernel.forward(logits, targets)
    cross_entropy_kernel.backward(logits, targets, log_sum, nll)


def kinds_of_access() -> dict[str, set[str]]:
    """How the kernels compiled last read and write blocks of numbers."""
    from tests.models.layers.triton_process import KERNELS

    found = re.compile(r"\b(?:ld|st)\.global\.(v\d\.b\d+|b16)")
    return {name: set(found.findall(kernel.asm["ptx"])) for name, kernel in KERNELS.items()}


def test_what_the_kernels_take_of_an_h100(tmp_path):
    """No register is spilled, the warps fill the multiprocessor, and logits are read and written 16 bytes at a time."""
    with compiling() as run:
        for size in 20_032, 1, 205:
            taken = run(resources, str(tmp_path), compile_kernels, size, torch.bfloat16)
            assert list(taken) == ["forward_kernel", "backward_kernel"]
            assert all(kernel.spills == 0 for kernel in taken.values())
            if size == 20_032:
                assert all(kernel.programs == 8 for kernel in taken.values())
                # One number alone is the target's.
                assert run(kinds_of_access) == {"forward_kernel": {"v4.b32", "b16"}, "backward_kernel": {"v4.b32"}}
