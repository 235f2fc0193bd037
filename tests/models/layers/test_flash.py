"""The fused kernels against the plain formula, under Triton's interpreter; their registers as compiled for sm_90."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tests.models.layers.triton_process import compiling, interpreting, resources

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here"),
]

NAMES = "content", "position", "key", "value", "r", "bias"


@pytest.fixture(scope="module")
def interpreted():
    with interpreting() as run:
        run(torch.use_deterministic_algorithms, True)  # fills with NaN whatever memory is not yet written
        yield run


@pytest.fixture(scope="module")
def compiled():
    with compiling() as run:
        yield run


def attend(arguments: dict, lookback: Tensor, dropout: float = 0.0, step: int = 0, lanes=(0, 1, 2, 3)) -> Tensor:
    from txl_dist.models.layers import flash
    from txl_dist.models.layers.dropout import Mask, Noise

    mask = Mask(dropout, Noise.of_step(0, step, lanes).seeds) if dropout else None
    content, position, key, value, r, bias = (arguments.get(name) for name in NAMES)
    key_value = torch.stack([key, value], dim=2).movedim(2, 0)  # as of one projection
    past, present = key_value.split([key.size(1) - content.size(1), content.size(1)], dim=2)
    return flash.attend(content, position, past, present, r, bias, lookback, mask)


def by_the_formula(arguments: dict, lookback: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Scores by explicit distance; `factor`, [lanes, n_head, length, keys], is dropout's."""
    content, position, key, value, r, bias = (arguments.get(name) for name in NAMES)
    length, keys = content.size(1), key.size(1)
    distance = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    column = keys - 1 - distance.clamp(min=-1)
    scores = torch.einsum("bihd,bjhd->bhij", content, key)
    if position is not None:
        scores = scores + torch.einsum("bihd,ijhd->bhij", position, r[column])
    if bias is not None:
        scores = scores + bias[column].permute(2, 0, 1)
    visible = (distance >= 0) & (distance <= lookback[:, None, :, None])
    probability = (scores * content.size(-1) ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probability * factor, value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(length, mem_len, n_head, d_head, lanes=4, without=()) -> dict:
    """Arguments in float64."""
    keys = mem_len + length
    shapes = {"content": (lanes, length), "position": (lanes, length), "key": (lanes, keys), "value": (lanes, keys)}
    shapes |= {"r": (keys + 1,), "bias": (keys + 1,)}
    return {
        name: random(*shape, n_head, *[d_head] * (name != "bias"), seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
        if name not in without
    }


def lookbacks(length: int, mem_len: int) -> Tensor:
    """Four lanes: everything, only itself, documents that begin in mid-segment, a window as of same_length."""
    i = torch.arange(length)
    document = torch.where(i < length // 3, mem_len + i, (i - length // 3) % max(1, length // 2))
    return torch.stack([torch.full((length,), 10**12), torch.zeros_like(i), document, torch.full((length,), 9)])


def results(attention, arguments: dict, weight: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of sum(output * weight)."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    out = attention(leaves)
    gradients = torch.autograd.grad((out * weight).sum(), [*leaves.values()])
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_single(arguments: dict) -> dict:
    return {name: x.float() for name, x in arguments.items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        error = (x - expected[name]).abs().max()
        assert error < 1e-5, f"{name}: {error}"


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in got.items())


def check_formula(shape, without) -> None:
    length, mem_len, n_head, d_head = shape
    arguments, lookback = build(*shape, without=without), lookbacks(length, mem_len)
    weight = random(4, length, n_head, d_head, seed=9)
    expected = results(lambda leaves: by_the_formula(leaves, lookback), arguments, weight)
    assert_close(results(lambda x: attend(x, lookback), in_single(arguments), weight.float()), expected)


@pytest.mark.parametrize(
    "length, mem_len, n_head, d_head",
    [
        (64, 64, 1, 64),  # whole blocks
        (70, 33, 2, 8),  # mem_len < length, none a multiple of the block
        (20, 128, 2, 38),  # mem_len > length
        (130, 0, 1, 16),  # no memory
        (1, 40, 3, 41),  # one token at a time
        (1, 0, 1, 16),
    ],
)
def test_output_and_gradients_are_the_formulas(interpreted, length, mem_len, n_head, d_head):
    interpreted(check_formula, (length, mem_len, n_head, d_head), ["bias"])


@pytest.mark.parametrize("without", [[], ["position", "r", "bias"]], ids=["with bias", "without position"])
def test_variants_of_the_score(interpreted, without):
    interpreted(check_formula, (39, 70, 2, 16), without)


def check_several_scans(shape) -> None:
    from txl_dist.models.layers import flash_kernels

    scan = flash_kernels.SCAN
    flash_kernels.SCAN = 16
    try:
        check_formula(shape, ["bias"])
    finally:
        flash_kernels.SCAN = scan


def test_keys_find_their_last_query_in_several_scans(interpreted):
    interpreted(check_several_scans, (70, 33, 1, 8))


def check_strides() -> None:
    """Queries and their gradient by head, keys and values time-major in one projection, the rest with gaps."""
    length, mem_len, n_head, d_head = shape = 37, 30, 2, 16
    arguments, lookback = in_single(build(*shape)), lookbacks(length, mem_len)
    expected = results(lambda x: attend(x, lookback), arguments, torch.ones(1))

    def apart(leaves):
        projections = torch.cat([leaves["key"].flatten(2), leaves["value"].flatten(2)], -1).transpose(0, 1).contiguous()
        key, value = (x.unflatten(-1, (n_head, -1)) for x in projections.transpose(0, 1).chunk(2, -1))
        wide = {name: torch.cat([x, x + 1], -1)[..., : x.size(-1)] for name, x in leaves.items()}
        content = leaves["content"].transpose(1, 2).contiguous().transpose(1, 2)
        views = {**wide, "content": content, "key": key, "value": value}
        assert not any(view.is_contiguous() for view in views.values())
        return attend(views, lookback.T.contiguous().T)

    assert_close(results(apart, arguments, torch.ones(1)), expected)
    weight = random(4, n_head, length, d_head, seed=9).float().transpose(1, 2)
    expected = results(lambda x: attend(x, lookback), arguments, weight.contiguous())
    assert_close(results(apart, arguments, weight), expected)


def test_strided_views_are_read_as_they_are(interpreted):
    interpreted(check_strides)


def check_hidden() -> None:
    length, mem_len, split = 40, 50, 22
    arguments, weight = in_single(build(length, mem_len, 2, 16)), torch.ones(1)
    near = torch.arange(length).expand(4, -1) % 7
    expected = results(lambda x: attend(x, near), arguments, weight)
    changed = {name: x.clone() for name, x in arguments.items()}
    for name in "r", "bias":
        changed[name][: mem_len + length - 7] += 100  # distances beyond 6
        changed[name][-1] += 100  # the future
    assert_equal(results(lambda x: attend(x, near), changed, weight), expected)

    far = torch.full((4, length), 1000)
    expected = results(lambda x: attend(x, far), arguments, weight)
    changed = {name: x.clone() for name, x in arguments.items()}
    for name in "key", "value":
        changed[name][:, mem_len + split :] += 100
    got = results(lambda x: attend(x, far), changed, weight)
    for name in "out", "content", "position":
        assert torch.equal(got[name][:, :split], expected[name][:, :split])
    assert not torch.equal(got["out"][:, split], expected["out"][:, split])


def test_keys_that_no_query_sees_change_nothing(interpreted):
    interpreted(check_hidden)


def check_repetition() -> None:
    length, mem_len = 70, 64
    arguments, lookback = in_single(build(length, mem_len, 1, 16)), lookbacks(length, mem_len)

    def run():
        return results(lambda x: attend(x, lookback, 0.2), arguments, random(4, length, 1, 16).float())

    assert_equal(run(), run())


def test_the_same_bits_twice(interpreted):
    interpreted(check_repetition)


def check_dropout() -> None:
    """With one-hot values the output is the probabilities, in which the dropped ones can be seen."""
    share, length, mem_len, n_head = 0.3, 100, 28, 2
    d_head = keys = mem_len + length
    arguments, lookback = build(length, mem_len, n_head, d_head), lookbacks(length, mem_len)
    arguments["value"] = torch.eye(keys, dtype=torch.float64)[None, :, None].expand(4, -1, n_head, -1)
    single = {name: x.contiguous() for name, x in in_single(arguments).items()}
    weight = random(4, length, n_head, d_head, seed=9)

    undropped = attend(single, lookback)
    got = results(lambda x: attend(x, lookback, share), single, weight.float())
    other = attend(single, lookback, share, step=1)

    seen = undropped > 1e-12
    factor = torch.where(seen, got["out"] / undropped.clamp(min=1e-12), 0.0)
    kept = factor > 0.5
    assert torch.allclose(factor[kept], torch.tensor(1 / (1 - share))) and not factor[~kept].any()
    assert abs(kept[seen].double().mean() - (1 - share)) < 0.01  # of more than 20,000
    assert not torch.equal(other > 0, got["out"] > 0)
    some = {name: x if name in ("r", "bias") else x[1:3] for name, x in single.items()}
    of_some = attend(some, lookback[1:3], share, lanes=(1, 2))
    assert torch.equal(of_some, got["out"][1:3])  # whoever computes the lanes
    # Lanes, queries, heads and keys drop independently.
    full = kept[:, :30, :, :mem_len][[0, 2]].double()  # of two lanes, in which these queries see all of the memory
    for dim, size in enumerate(full.shape):
        both = full.narrow(dim, 0, size - 1) * full.narrow(dim, 1, size - 1)
        assert abs(both.mean() - (1 - share) ** 2) < 0.05

    by_head = factor.permute(0, 2, 1, 3).double()
    assert_close(got, results(lambda leaves: by_the_formula(leaves, lookback, by_head), arguments, weight))


def test_dropout_and_its_gradients(interpreted):
    interpreted(check_dropout)


def draw_words() -> list[str]:
    from txl_dist.models.layers import flash

    words = flash.draw(torch.tensor([5, -6]), torch.full((2, 3), 99), keys=40, n_head=2, dropout=0.3)
    return [f"{word % 2**32:08x}" for word in words[0, 1, 0].tolist()]


def test_masks_are_those_of_earlier_versions(interpreted):
    """So a run that is continued is the run that it was."""
    assert interpreted(draw_words)[1:] == ["28410b02", "22080000"]


def compile_kernels(d_head: int, dropout: float) -> None:
    length, mem_len = 96, 128 if d_head != 41 else 150  # the latter in no whole blocks: joined with the segment
    arguments = {name: x.bfloat16() for name, x in build(length, mem_len, 2, d_head, without=["bias"]).items()}
    results(lambda x: attend(x, lookbacks(length, mem_len), dropout), arguments, torch.ones(1))


@pytest.mark.parametrize("d_head", [32, 41, 64, 128])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_the_kernels_take_of_an_h100(compiled, d_head, dropout, tmp_path):
    """No register is spilled, two programs fit on a multiprocessor, and no row of a tile is computed twice.

    Rows of 41 numbers begin anywhere, and are loaded number by number; all else many at a time.
    """
    taken = compiled(resources, str(tmp_path), compile_kernels, d_head, dropout)
    drawing = ["dropout_kernel"] if dropout else []
    attending = ["position_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
    assert list(taken) == drawing + attending
    for name, kernel in taken.items():
        assert kernel.spills == 0, name
        assert kernel.programs >= 2, name
        assert kernel.rows <= 64, name
        assert not kernel.narrow or d_head == 41, name
