"""Relative attention against the formula of Dai et al. 2019, section 3.3, term by term; skew and visibility by hand."""

import math

import pytest
import torch
from torch import Tensor

from txl_dist.models.attention import relative_attention, sinusoids, skew, visibility

torch.set_num_threads(1)


def by_the_formula(query, key, value, r, u, v, visible) -> Tensor:
    """A loop over queries and keys; r here as in the library: row -2 is distance 0, row -3 distance 1, ..."""
    n_head, lanes, length, d_head = query.shape
    keys = key.size(2)
    out = torch.zeros(n_head, lanes, length, d_head, dtype=query.dtype)
    for head in range(n_head):
        for lane in range(lanes):
            for i in range(length):
                scores = {}
                for j in range(keys):
                    if visible[lane, i, j]:
                        distance = keys - length + i - j
                        q, k, r_ij = query[head, lane, i], key[head, lane, j], r[head, -2 - distance]
                        a, b, c, d = q @ k, q @ r_ij, u[head] @ k, v[head] @ r_ij
                        scores[j] = math.exp((a + b + c + d) / math.sqrt(d_head))
                out[head, lane, i] = sum(score * value[head, lane, j] for j, score in scores.items()) / sum(
                    scores.values()
                )
    return out


def arguments(length: int, mem_len: int, requires_grad: bool = False) -> list[Tensor]:
    n_head, lanes, d_head, keys = 2, 3, 4, mem_len + length
    generator = torch.Generator().manual_seed(length + mem_len)
    shapes = [(n_head, lanes, length, d_head), *[(n_head, lanes, keys, d_head)] * 2, (n_head, keys + 1, d_head)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=requires_grad)
        for shape in [*shapes, (n_head, d_head), (n_head, d_head)]
    ]


def reaches(length: int) -> Tensor:
    """Three lanes: everything, nothing but itself, and a document that begins in mid-segment."""
    return torch.stack(
        [torch.full((length,), 10**6), torch.zeros(length).long(), (torch.arange(length) + 2) % max(length - 1, 1)]
    )


@pytest.mark.parametrize("length, mem_len", [(4, 0), (4, 3), (4, 4), (3, 7), (1, 5), (1, 0)])
def test_attention_is_the_papers_formula(length, mem_len):
    args, visible = arguments(length, mem_len), visibility(reaches(length), mem_len)
    expected = by_the_formula(*args, visible)
    torch.testing.assert_close(relative_attention(*args, visible), expected, rtol=1e-13, atol=1e-13)


def test_attention_has_the_gradients_of_its_values():
    visible = visibility(reaches(3), 2)
    assert torch.autograd.gradcheck(lambda *args: relative_attention(*args, visible), arguments(3, 2, True))


def test_dropatt_drops_probabilities_and_keeps_their_mean():
    args, visible = arguments(4, 3), visibility(reaches(4), 3)
    torch.manual_seed(0)
    dropped = torch.stack([relative_attention(*args, visible, dropatt=0.5) for _ in range(1000)])
    error = (dropped.mean(0) - relative_attention(*args, visible)).abs() / dropped.std(0)
    assert error.max() < 5 / 1000**0.5


def test_skew_by_hand():
    """Two queries, three keys; columns are distances 2, 1, 0, -1. Query 0 has distance 0 to key 1, query 1 to key 2."""
    by_distance = torch.tensor([[12, 11, 10, 19], [22, 21, 20, 29]])
    assert skew(by_distance).tolist() == [[11, 10, 19], [22, 21, 20]]
    assert skew(torch.tensor([[12, 11, 10, 19]])).tolist() == [[12, 11, 10]]
    assert skew(by_distance).data_ptr() == by_distance[0, 1].data_ptr()  # a view


def test_skew_puts_every_distance_at_its_key():
    for length, keys in (5, 5), (5, 12), (1, 4), (1, 1):
        columns = torch.arange(keys - 1, -2, -1).expand(2, 3, length, keys + 1).contiguous()
        distance = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
        past = distance >= 0
        assert torch.equal(skew(columns)[..., past], distance[past].expand(2, 3, -1))


def test_visibility_by_hand():
    def seen(reach, mem_len, window=None):
        return ["".join(".x"[key] for key in row) for row in visibility(torch.tensor([reach]), mem_len, window)[0]]

    assert seen([0, 1, 2], 2) == ["..x..", "..xx.", "..xxx"]  # the memory is empty
    assert seen([1, 2, 3], 2) == [".xx..", ".xxx.", ".xxxx"]  # it is half full
    assert seen([9, 9, 9], 2) == ["xxx..", "xxxx.", "xxxxx"]  # full
    assert seen([9, 0, 1], 2) == ["xxx..", "...x.", "...xx"]  # a document begins at the second position
    assert seen([9, 9, 9], 2, window=2) == [".xx..", "..xx.", "...xx"]
    assert seen([9, 0, 1], 2, window=2) == [".xx..", "...x.", "...xx"]
    assert seen([9], 0) == ["x"]


def test_visibility_is_each_lanes_own():
    reach = torch.tensor([[0, 1], [5, 5]])
    both = visibility(reach, 1)
    assert both.dtype == torch.bool and both.shape == (2, 2, 3)
    assert torch.equal(both, torch.cat([visibility(reach[:1], 1), visibility(reach[1:], 1)]))


def test_sinusoids_by_hand():
    """d_model 4: frequencies 1 and 1/100; sines, then cosines; distances 2, 1, 0 and the row of the future."""
    encoding = sinusoids(3, 4, -1, like=torch.zeros(0, dtype=torch.float64))
    for row, distance in enumerate([2, 1, 0]):
        expected = [math.sin(distance), math.sin(distance / 100), math.cos(distance), math.cos(distance / 100)]
        assert encoding[row].tolist() == pytest.approx(expected, abs=1e-15)
    assert encoding.shape == (4, 4)


def test_sinusoids_are_clamped_and_take_their_dtype():
    encoding = sinusoids(6, 4, 3, like=torch.zeros(0, dtype=torch.bfloat16))
    free = sinusoids(6, 4, -1, like=torch.zeros(0, dtype=torch.bfloat16))
    assert encoding.dtype == torch.bfloat16
    assert torch.equal(encoding[:3], free[2].expand(3, 4)) and torch.equal(encoding[2:], free[2:])
    assert not torch.equal(free[0], free[1])
