"""Attention in its variants against their papers' formulas, key by key; skew, visibility and encodings by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from txl_dist.models.layers.attention import clip_distances, encode_distances, remember, sinusoids
from txl_dist.models.layers.backends import AttentionWindow, skew
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.transformer_xl import build_attention

torch.set_num_threads(1)

LANES = 3
VARIANTS = {
    "relative": {},
    "shaw": {"attention": "shaw", "max_distance": 30},
    "shaw, clipped": {"attention": "shaw", "max_distance": 3},
    "absolute": {"attention": "absolute"},
    "al_rfou": {"attention": "al_rfou", "max_distance": 30},
    "al_rfou, clipped": {"attention": "al_rfou", "max_distance": 3},
}
VARIANTS |= {f"{name}, clamp_len": options | {"clamp_len": 4} for name, options in VARIANTS.items()}
VARIANTS |= {"pre_lnorm": {"pre_lnorm": True}, "absolute, pre_lnorm": {"attention": "absolute", "pre_lnorm": True}}


def build(config, layer=0):
    """An attention sublayer in float64 whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    attention = build_attention(config, layer).double()
    for name, parameter in attention.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.3)
    return attention


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode(config, keys, like):
    """The encoding of distances that the model gives to its layers."""
    if config.attention in ("shaw", "al_rfou"):
        return clip_distances(keys, config.clamp_len, config.max_distance, like.device)
    return encode_distances(keys, config.clamp_len, config.d_model, like.dtype, like.device)


def run(attention, config, hidden, memory, lookback, noise=None):
    """The sublayer as the model calls it."""
    mem_len = memory.size(1)
    encoding = encode(config, mem_len + hidden.size(1), hidden)
    return attention(hidden, memory, encoding, AttentionWindow(lookback, mem_len, hidden.dtype), noise)[0]


def by_the_formula(attention, config, hidden, memory, lookback, layer=0) -> Tensor:
    """Loops over lanes, heads, queries and keys, from the papers; a position counts from the memory's first one."""
    weights, mem_len = dict(attention.named_parameters()), memory.size(1)
    past_and_present = torch.cat([memory, hidden], 1)
    keys = past_and_present.size(1)

    def clamped(distance):
        return min(distance, config.clamp_len) if config.clamp_len > 0 else distance

    def sinusoid(distance):
        angle = [distance / 10000 ** (i / config.d_model) for i in range(0, config.d_model, 2)]
        return torch.tensor([*map(math.sin, angle), *map(math.cos, angle)], dtype=torch.float64)

    def row(distance):
        return min(clamped(distance), config.max_distance)

    def head(x, h):
        return x[h * config.d_head : (h + 1) * config.d_head]

    def normalised(x):
        return nn.functional.layer_norm(x, x.shape, weights["layer_norm.weight"], weights["layer_norm.bias"])

    if config.attention == "absolute" and layer == 0:
        added = torch.stack([sinusoid(clamped(keys - 1 - position)) for position in range(keys)])
        past_and_present = past_and_present + added
    if config.attention == "al_rfou":
        past_and_present = past_and_present + torch.stack([weights["position"][row(keys - 1 - p)] for p in range(keys)])

    out = torch.zeros_like(hidden)
    for lane in range(len(hidden)):
        states = past_and_present[lane]
        seen = torch.stack([normalised(state) for state in states]) if config.pre_lnorm else states
        k, v = (seen @ weights["kv_net.weight"].T).chunk(2, dim=-1)
        for i in range(hidden.size(1)):
            attended, q = [], weights["q_net.weight"] @ seen[mem_len + i]
            for h in range(config.n_head):
                scores = {}
                for j in range(mem_len + i + 1):
                    distance = mem_len + i - j
                    if distance > lookback[lane, i]:
                        continue
                    score = head(q, h) @ head(k[j], h)
                    if config.attention == "relative":
                        r = head(weights["r_net.weight"] @ sinusoid(clamped(distance)), h)
                        score = score + head(q, h) @ r + weights["u"][h] @ head(k[j], h) + weights["v"][h] @ r
                    if config.attention == "shaw":
                        a, b = weights["a"][h, row(distance)], weights["b"][h, row(distance)]
                        score = score + head(q, h) @ a + weights["u"][h] @ head(k[j], h) + b
                    scores[j] = torch.exp(score / math.sqrt(config.d_head))
                total = sum(scores.values())
                attended.append(sum(score / total * head(v[j], h) for j, score in scores.items()))
            out[lane, i] = states[mem_len + i] + weights["o_net.weight"] @ torch.cat(attended)
            if not config.pre_lnorm:
                out[lane, i] = normalised(out[lane, i])
    return out


def lookbacks(length: int) -> Tensor:
    """Three lanes: everything, nothing but itself, and a document that begins in mid-segment."""
    return torch.stack(
        [torch.full((length,), 10**6), torch.zeros(length).long(), (torch.arange(length) + 2) % max(length - 1, 1)]
    )


@pytest.mark.parametrize("length, mem_len", [(4, 0), (4, 3), (3, 7), (1, 5), (1, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_papers_formula(make_config, variant, length, mem_len):
    config = make_config(d_model=8, d_head=3, **VARIANTS[variant])
    for layer in (0, 1):
        attention = build(config, layer)
        given = states(LANES, length, 8), states(LANES, mem_len, 8, seed=1), lookbacks(length)
        expected = by_the_formula(attention, config, *given, layer)
        torch.testing.assert_close(run(attention, config, *given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["relative", "shaw", "absolute", "al_rfou"])
def test_attention_has_the_gradients_of_its_values(make_config, variant):
    config = make_config(d_model=4, d_head=2, **VARIANTS[variant])
    attention = build(config)
    parameters = dict(attention.named_parameters())

    def function(hidden, *values):
        encoding = encode(config, 5, hidden)
        arguments = hidden, states(LANES, 2, 4, seed=1), encoding, AttentionWindow(lookbacks(3), 2, hidden.dtype)
        return torch.func.functional_call(attention, dict(zip(parameters, values, strict=True)), arguments)[0]

    values = [value.detach().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(function, (states(LANES, 3, 4).requires_grad_(), *values))


@pytest.mark.parametrize("variant", ["relative", "shaw", "absolute", "al_rfou"])
def test_a_memory_row_is_seen_by_those_that_look_back_to_it(make_config, variant):
    """A changed row of the memory changes the queries whose lookback includes it, and no other."""
    config = make_config(**VARIANTS[variant])
    attention, hidden, memory = build(config), states(1, 4, 24), states(1, 5, 24, seed=1)
    lookback = torch.tensor([[2, 3, 9, 1]])
    changed = memory.clone()
    changed[0, 3] += 1  # at distance 2 of the first query, 3 of the second, 4 of the third
    before = run(attention, config, hidden, memory, lookback)
    after = run(attention, config, hidden, changed, lookback)
    assert [i for i in range(4) if not torch.equal(before[0, i], after[0, i])] == [0, 1, 2]


def test_dropatt_drops_probabilities_and_keeps_their_mean(make_config):
    """Without the residual connection's normalisation what is attended to is linear in the probabilities."""
    config = make_config(dropatt=0.5, pre_lnorm=True)
    attention, given = build(config), (states(1, 4, 24), states(1, 3, 24, seed=1), torch.full((1, 4), 9))
    steps = [Noise.of_step(0, step, [0]) for step in range(1000)]
    dropped = torch.stack([run(attention, config, *given, noise) for noise in steps])
    error = (dropped.mean(0) - run(attention.eval(), config, *given)).abs() / dropped.std(0)
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


def test_window_by_hand():
    def seen(lookback, mem_len):
        window = AttentionWindow(torch.tensor([lookback]), mem_len)
        return ["".join(".x"[key] for key in row) for row in window.visible[0]]

    assert seen([0, 1, 2], 2) == ["..x..", "..xx.", "..xxx"]  # the memory is empty
    assert seen([1, 2, 3], 2) == [".xx..", ".xxx.", ".xxxx"]  # it is half full
    assert seen([9, 9, 9], 2) == ["xxx..", "xxxx.", "xxxxx"]  # full
    assert seen([9, 0, 1], 2) == ["xxx..", "...x.", "...xx"]  # a document begins at the second position
    assert seen([1, 1, 1], 2) == [".xx..", "..xx.", "...xx"]  # a window
    assert seen([9], 0) == ["x"]


def test_each_lane_has_its_own_window():
    lookback = torch.tensor([[0, 1], [5, 5]])
    both = AttentionWindow(lookback, 1).visible
    assert both.dtype == torch.bool and both.shape == (2, 2, 3)
    alone = [AttentionWindow(lane[None], 1).visible for lane in lookback]
    assert torch.equal(both, torch.cat(alone))
    assert torch.equal(AttentionWindow(lookback, 1).mask == 0, both)
    assert AttentionWindow(lookback, 1, torch.bfloat16).mask.dtype == torch.bfloat16


def test_sinusoids_by_hand():
    """d_model 4: frequencies 1 and 1/100; sines, then cosines."""
    encoding = sinusoids(torch.tensor([2, 1, 0]), 4)
    for row, distance in enumerate([2, 1, 0]):
        expected = [math.sin(distance), math.sin(distance / 100), math.cos(distance), math.cos(distance / 100)]
        assert encoding[row].tolist() == pytest.approx(expected, abs=1e-15)


def test_distances_are_clamped_and_take_their_dtype():
    cpu = torch.device("cpu")
    encoding, free = (encode_distances(6, clamp_len, 24, torch.bfloat16, cpu) for clamp_len in (3, -1))
    assert encoding.dtype == torch.bfloat16 and encoding.shape == (7, 24)
    assert torch.equal(encoding[:3], free[2].expand(3, 24)) and torch.equal(encoding[2:], free[2:])
    assert not torch.equal(free[0], free[1])


def test_learned_distances_are_rows_of_their_table():
    """Farther ones share the last row; the column of the future has any."""
    rows = [clip_distances(6, -1, max_distance, torch.device("cpu"))[:-1].tolist() for max_distance in (9, 3)]
    assert rows == [[5, 4, 3, 2, 1, 0], [3, 3, 3, 2, 1, 0]]


@pytest.mark.parametrize("length, mem_len", [(4, 4), (4, 3), (4, 0), (3, 7)])
def test_the_last_positions_are_remembered_without_a_copy_where_the_segment_has_them(length, mem_len):
    memory, hidden = states(2, mem_len, 5), states(2, length, 5, seed=1).requires_grad_()
    remembered = remember(memory, hidden)
    assert torch.equal(remembered, torch.cat([memory, hidden], dim=1)[:, length:]) and not remembered.requires_grad
    storages = [x.untyped_storage().data_ptr() for x in (remembered, hidden)]
    assert (storages[0] == storages[1]) == (mem_len <= length)
