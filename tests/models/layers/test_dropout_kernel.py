"""Dropout by a kernel, under Triton's interpreter; and its registers as compiled for sm_90."""

from importlib.util import find_spec

import pytest
import torch

from tests.models.layers.triton_process import compiling, interpreting, resources
from txl_dist.models.layers.dropout import Noise

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here"),
]

LANES = range(4)
SHAPES = [(4, 7, 300), (4, 1, 1), (4, 3, 50, 33), (4, 2048)]


def drop(x, lanes=LANES, p=0.3, variational=False, step=0, relu=False):
    from txl_dist.models.layers import dropout_kernel

    return dropout_kernel.drop(x, Noise.of_step(1, step, lanes).seeds, p, variational, relu)


def check_kernel() -> None:
    for shape in SHAPES:
        ones = torch.ones(shape)
        dropped = drop(ones)
        kept = dropped > 0
        assert torch.allclose(dropped[kept], torch.tensor(1 / 0.7))
        assert torch.equal(dropped, drop(ones)) and torch.equal(dropped[1:3], drop(ones[1:3], [1, 2]))
        x = torch.randn(shape, dtype=torch.bfloat16)
        torch.testing.assert_close(drop(x), torch.where(kept, x / 0.7, 0.0).bfloat16())
    assert abs(kept.double().mean() - 0.7) < 0.03
    assert not torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped, drop(ones, step=1))


def check_variational() -> None:
    for shape in SHAPES[:3]:
        dropped = drop(torch.ones(shape), variational=True)
        assert torch.equal(dropped, dropped[..., :1, :].expand(shape))
    assert not torch.equal(dropped[0, 0], dropped[0, 1])


def check_relu() -> None:
    from txl_dist.models.layers import dropout, dropout_kernel

    for shape in SHAPES:
        x = torch.randn(shape)
        dropped = drop(x, relu=True)
        assert torch.equal(dropped, drop(x).relu())
        gradient = torch.randn(shape)
        passed = dropout_kernel.pass_where_positive(gradient, dropped, 0.3)
        assert torch.equal(passed, torch.where(dropped > 0, drop(gradient), 0.0))
    seeds = Noise.of_step(1, 0, LANES).seeds
    x.requires_grad_()
    dropout.drop_relu_fused(x, seeds, 0.3, False).backward(gradient)
    assert torch.equal(x.grad, passed)
    assert drop(torch.full((4, 1, 1), torch.nan), p=0.0, relu=True).isnan().all()


@pytest.mark.parametrize("check", [check_kernel, check_variational, check_relu])
def test_the_kernel_drops_by_lane(check):
    with interpreting() as run:
        run(check)


def compile_kernels() -> None:
    from txl_dist.models.layers import dropout_kernel

    x = torch.ones(4, 128, 512, dtype=torch.bfloat16)
    drop(x, relu=True)
    dropout_kernel.pass_where_positive(x, x, 0.5)


def test_no_register_is_spilled_on_sm_90(tmp_path):
    with compiling() as run:
        taken = run(resources, str(tmp_path), compile_kernels)
    assert {name: kernel.spills for name, kernel in taken.items()} == {"drop_kernel": 0, "gradient_kernel": 0}
