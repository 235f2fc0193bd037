"""XLNet against Hugging Face's (transformers 4.36.2), and the laws of its two streams."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import XLNetConfig as TheirConfig
from transformers import XLNetLMHeadModel
from transformers.models.xlnet.modeling_xlnet import XLNetModel

from tests.batches import batch
from txl_dist.evaluation.both_sides import log_probs_from_both_sides
from txl_dist.models.base import Runtime
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.registry import build as build_model
from txl_dist.models.shapes import parameter_shapes
from txl_dist.models.xlnet import XLNetConfig

torch.set_num_threads(1)

LANES, VOCAB, LENGTH, REUSE, MEM_LEN, TARGETS = 4, 60, 16, 8, 12, 5
BASE = XLNetConfig(
    name="xlnet",
    n_layer=3,
    d_model=32,
    n_head=4,
    d_head=8,
    d_inner=48,
    tgt_len=LENGTH,
    mem_len=MEM_LEN,
    reuse_len=REUSE,
    clamp_len=-1,
    activation="gelu_tanh",
    dropout=0.0,
    dropatt=0.0,
    init_std=0.3,
    layer_norm_eps=1e-12,
)
DIRECTION = torch.tensor([[1], [1], [-1], [-1]])  # theirs has the forward lanes first
NAMES = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}


def build(config=BASE, dtype=torch.float64, seed=0, **runtime):
    """A model whose weights are large enough for every one of them to matter."""
    torch.manual_seed(seed)
    model = build_model(config, VOCAB, Runtime(**runtime)).to(dtype)
    for name, parameter in model.named_parameters():
        if "bias" in name or "layer_norm" in name:
            torch.nn.init.normal_(parameter, float("norm.weight" in name), 0.3)
    return model


def their_parameters(model):
    """Our parameters, or their gradients, by transformers' names and in its shapes."""
    config = model.config
    heads = (config.n_head, config.d_head)

    def theirs(of):
        named = {"transformer.mask_emb": of(model.embedding.mask).view(1, 1, -1)}
        named["transformer.word_embedding.weight"] = of(model.embedding.table)
        named["lm_loss.bias"] = of(model.head.bias)
        for number, layer in enumerate(model.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            where = f"transformer.layer.{number}"
            key, value = of(attention.kv_net.weight).chunk(2)
            projections = {"q": of(attention.q_net.weight), "k": key, "v": value, "r": of(attention.r_net.weight)}
            for name, weight in projections.items():
                named[f"{where}.rel_attn.{name}"] = weight.T.reshape(-1, *heads)
            named[f"{where}.rel_attn.o"] = of(attention.o_net.weight).reshape(-1, *heads)
            for name, ours in {"r_w": "u", "r_r": "v", "r_s": "s"}.items():
                named[f"{where}.rel_attn.{name}_bias"] = of(getattr(attention, ours))
            named[f"{where}.rel_attn.seg_embed"] = of(attention.segment)
            named[f"{where}.rel_attn.layer_norm.weight"] = of(attention.layer_norm.weight)
            named[f"{where}.rel_attn.layer_norm.bias"] = of(attention.layer_norm.bias)
            parts = {"layer_1": feed_forward.inner, "layer_2": feed_forward.outer}
            for name, part in {**parts, "layer_norm": feed_forward.layer_norm}.items():
                named[f"{where}.ff.{name}.weight"] = of(part.weight)
                named[f"{where}.ff.{name}.bias"] = of(part.bias)
        return named

    return theirs


def reference(model, dtype, monkeypatch):
    """Theirs with our weights, in training mode. Its table of positions is always float32: patched for float64."""
    config = model.config
    theirs = XLNetLMHeadModel(
        TheirConfig(
            vocab_size=VOCAB,
            d_model=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            d_inner=config.d_inner,
            ff_activation=NAMES[config.activation],
            dropout=0.0,
            mem_len=config.mem_len,
            reuse_len=config.reuse_len,
            bi_data=True,
            use_mems_train=True,
            clamp_len=config.clamp_len,
            layer_norm_eps=config.layer_norm_eps,
        )
    ).to(dtype)

    def positions(self, qlen, klen, bsz=None, **device):
        inverse = 1 / 10000 ** (torch.arange(0, self.d_model, 2.0, dtype=dtype) / self.d_model)
        forward = torch.arange(klen, -qlen, -1.0, dtype=dtype)
        both = [forward, -forward]
        if self.clamp_len > 0:
            both = [side.clamp(-self.clamp_len, self.clamp_len) for side in both]
        return torch.cat([self.positional_embedding(side, inverse, bsz // 2) for side in both], 1)

    monkeypatch.setattr(XLNetModel, "relative_positional_encoding", positions)
    weights = their_parameters(model)(lambda parameter: parameter.detach())
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_loss.weight"] and not unexpected
    theirs.tie_weights()
    return theirs


def permuted(seed, lanes=LANES, direction=DIRECTION, targets=TARGETS):
    """A batch as the authors make it: halves apart, some positions of each predicted in a random order."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.zeros(lanes, LENGTH, dtype=torch.int64)
    positions = torch.zeros(lanes, targets, dtype=torch.int64)
    for lane in range(lanes):
        places = []
        for start, stop, base, count in (
            (0, REUSE, 0, targets // 2),
            (REUSE, LENGTH, REUSE + 1, targets - targets // 2),
        ):
            rank[lane, start:stop] = base
            chosen = start + torch.randperm(stop - start, generator=generator)[:count]
            rank[lane, chosen] = base + 1 + torch.arange(count)
            places += chosen.tolist()
        positions[lane] = torch.tensor(sorted(places))
    inputs = torch.randint(9, VOCAB, (lanes, LENGTH), generator=generator)
    segment = torch.tensor([0] * 10 + [1] * 5 + [2]).expand(lanes, LENGTH)
    return {
        "inputs": inputs,
        "rank": rank,
        "lookback": torch.full((lanes, LENGTH), 10**6),
        "segment": segment,
        "direction": direction[:lanes],
        "positions": positions,
        "targets": inputs.gather(1, positions),
    }


def their_masks(ours):
    """perm_mask (1: hidden) and target_mapping; theirs frees the diagonal for the content itself."""
    rank, positions = ours["rank"], ours["positions"]
    is_target = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, positions, True)
    visible = rank[:, None, :] < torch.where(is_target, rank, rank + 1)[:, :, None]
    return (~visible).double(), F.one_hot(positions, LENGTH).double()


def assert_near(ours, theirs, tolerance, name):
    assert ours.shape == theirs.shape, name
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert error <= tolerance, (name, float(error))


CASES = {
    "as it is": {},
    "clamp_len": {"clamp_len": 6},
    "erf": {"activation": "gelu_erf"},
    "short memory": {"mem_len": 5},
    "memory longer than what is reused": {"mem_len": 20},
    "reuse all": {"reuse_len": LENGTH},
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, dtype, tolerance, monkeypatch):
    """Logits, loss, all gradients and memories over four chained segments, both directions; a target is not scored."""
    config = replace(BASE, **CASES[case])
    model = build(config, dtype)
    theirs = reference(model, dtype, monkeypatch)
    memory, mems = model.empty_memory(LANES), None
    for step in range(4):
        ours = permuted(step)
        # Their first memory is none, ours is empty: nothing of it is seen.
        read = torch.arange(LENGTH) + min(step * config.reuse_len, config.mem_len)
        ours["lookback"] = read.expand(LANES, LENGTH) if step * config.reuse_len < config.mem_len else ours["lookback"]
        ours["targets"][1, 2] = -100
        perm_mask, target_mapping = their_masks(ours)
        output = theirs(
            ours["inputs"],
            token_type_ids=ours["segment"],
            perm_mask=perm_mask.to(dtype),
            target_mapping=target_mapping.to(dtype),
            mems=mems,
            labels=ours["targets"],
            use_mems=True,
        )
        mems = output.mems
        nats, new_memory = model(ours, memory)
        log_probs, same_memory = model({name: field for name, field in ours.items() if name != "targets"}, memory)
        memory = new_memory
        assert_near(log_probs, output.logits.log_softmax(-1), tolerance, "log_probs")
        loss = nats.sum() / (ours["targets"] >= 0).sum()
        assert_near(loss, output.loss, tolerance, "loss")
        for old, new, same in zip(mems, memory, same_memory, strict=True):
            held = old.transpose(0, 1)
            assert_near(new["memory"][:, -held.size(1) :], held, tolerance, "memory")
            assert torch.equal(new["memory"], same["memory"]) and not new["memory"].requires_grad
        model.zero_grad()
        theirs.zero_grad()
        loss.backward()
        output.loss.backward()
        gradients = their_parameters(model)(lambda parameter: parameter.grad)
        for name, parameter in theirs.named_parameters():
            assert_near(gradients[name], parameter.grad, tolerance, name)


# --------------------------------------------------------------------------------------------- laws of two streams


def read(model, *batches, rows=slice(None), noisy=False):
    """Read batches one after the other; return the log-probabilities of each, and the memory at the end."""
    lanes = len(batches[0]["inputs"][rows])
    memory, outputs = model.empty_memory(lanes), []
    for step, one in enumerate(batches):
        noise = Noise.of_step(1, step, range(LANES)).of_rows(rows) if noisy else None
        fields = {name: field[rows] for name, field in one.items() if name != "targets"}
        log_probs, memory = model(fields, memory, noise)
        outputs.append(log_probs)
    return outputs, memory


def with_token(one, lane, place, token):
    """The same batch with another token in one place."""
    inputs = one["inputs"].clone()
    inputs[lane, place] = token
    return one | {"inputs": inputs}


@pytest.mark.parametrize("lane", [0, 3])
def test_no_query_sees_a_token_whose_rank_is_not_lower(lane):
    model = build()
    one = permuted(1)
    (before,), _ = read(model, one)
    for place in range(LENGTH):
        (after,), _ = read(model, with_token(one, lane, place, 3))
        moved = (after - before).abs().amax(dim=2) > 0
        may_see = one["rank"][lane, one["positions"][lane]] > one["rank"][lane, place]
        assert torch.equal(moved[lane], may_see) and not moved[torch.arange(LANES) != lane].any()


@pytest.mark.parametrize("lane", [0, 3])
def test_what_is_not_reused_is_not_remembered(lane):
    """The second half of a segment is read again at the next step: its memory must not tell what is predicted then."""
    model = build()
    batches = [permuted(step) for step in range(3)]
    outputs, memory = read(model, *batches)
    for place in range(REUSE, LENGTH):
        changed, same_memory = read(model, with_token(batches[0], lane, place, 3), *batches[1:])
        assert all(map(torch.equal, changed[1:], outputs[1:]))
        assert all(torch.equal(new["memory"], old["memory"]) for new, old in zip(same_memory, memory, strict=True))
    for place in range(REUSE):
        changed, _ = read(model, with_token(batches[0], lane, place, 3), *batches[1:])
        assert all((new - old)[lane].abs().amax() > 0 for new, old in zip(changed[1:], outputs[1:], strict=True))


def test_a_query_that_sees_nothing_looks_at_nothing():
    """Where everything is predicted and nothing remembered the first one has no context: it is no average of it."""
    model = build()
    one = permuted(1)
    one["rank"] = torch.arange(LENGTH).expand(LANES, LENGTH)
    one["positions"] = torch.arange(TARGETS).expand(LANES, TARGETS)
    (before,), _ = read(model, one)
    assert before.isfinite().all()
    for place in range(LENGTH):
        (after,), _ = read(model, with_token(one, 1, place, 3))
        assert torch.equal(after[:, 0], before[:, 0])


def test_a_lane_that_reads_backward_mirrors_one_that_reads_forward():
    model = build(replace(BASE, reuse_len=LENGTH))  # else the first half would not see the second
    one = permuted(2)
    is_target = torch.zeros_like(one["rank"]).scatter_(1, one["positions"], 1)
    nothing_before = torch.arange(LENGTH).expand(LANES, LENGTH)
    forward = one | {"rank": is_target, "lookback": nothing_before, "direction": torch.ones_like(DIRECTION)}
    mirrored = {name: forward[name].flip(1) for name in ("inputs", "rank", "segment")}
    mirrored |= {"lookback": nothing_before, "direction": -forward["direction"]}
    mirrored["positions"] = LENGTH - 1 - one["positions"]
    (there,), _ = read(model, forward)
    (back,), _ = read(model, mirrored)
    torch.testing.assert_close(back, there, rtol=1e-10, atol=1e-10)
    (wrong,), _ = read(model, mirrored | {"direction": forward["direction"]})
    assert not torch.allclose(wrong, there, atol=1e-3)


def test_lanes_of_both_directions_may_stand_in_any_rows():
    """With dropout, and over several segments."""
    model = build(replace(BASE, dropout=0.2, dropatt=0.2))
    batches = [permuted(step) for step in range(3)]
    outputs, memory = read(model, *batches, noisy=True)
    for rows in (torch.tensor([2, 0]), torch.tensor([3]), torch.tensor([1, 3, 2])):
        some, some_memory = read(model, *batches, rows=rows, noisy=True)
        torch.testing.assert_close(some, [output[rows] for output in outputs], rtol=1e-10, atol=1e-10)
        expected = [{"memory": state["memory"][rows]} for state in memory]
        torch.testing.assert_close(some_memory, expected, rtol=1e-10, atol=1e-10)


def test_lookback_hides_memory():
    """What lies further back has no effect, of a permuted segment and of one that is read from left to right."""
    model = build()
    one = permuted(3)
    for lookback in (0, 3):
        near = one | {"lookback": (lookback + torch.arange(LENGTH)).expand(LANES, LENGTH)}
        causal = batch(near["inputs"], None, near["lookback"])
        for fields in (near, causal):
            outputs = []
            for beyond in (0.0, 7.0):
                memory = [{"memory": torch.ones(LANES, MEM_LEN, BASE.d_model).double()} for _ in model.layers]
                for state in memory:
                    state["memory"][:, : MEM_LEN - lookback] += beyond
                outputs.append(model({k: v for k, v in fields.items() if k != "targets"}, memory)[0])
            assert torch.equal(*outputs)


def test_caches_hold_what_is_reused():
    """A permuted segment leaves the same memory in a cache of keys and values."""
    model = build().eval()
    batches = [permuted(step, direction=torch.ones(LANES, 1, dtype=torch.int64)) for step in range(3)]
    outputs, _ = read(model, *batches)
    cache = model.empty_cache(LANES)
    for one, expected in zip(batches, outputs, strict=True):
        log_probs, cache = model({name: field for name, field in one.items() if name != "targets"}, cache)
        torch.testing.assert_close(log_probs, expected, rtol=1e-10, atol=1e-10)


def test_every_parameter_is_trained():
    model = build()
    nats, _ = model(permuted(0), model.empty_memory(LANES))
    nats.sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_activation_checkpointing_changes_no_bit():
    gradients = []
    for recompute in (False, True):
        model = build(replace(BASE, dropout=0.2, dropatt=0.2), activation_checkpointing=recompute)
        noise = Noise.of_step(1, 0, range(LANES))
        model(permuted(0), model.empty_memory(LANES), noise)[0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_stages_are_the_whole():
    config = replace(BASE, dropout=0.2, dropatt=0.2)
    one, noise = permuted(0), Noise.of_step(1, 0, range(LANES))
    whole = build(config)
    expected, memory = whole(one, whole.empty_memory(LANES), noise)
    for cut in range(config.n_layer + 1):
        first, last = build(config), build(config)
        first.keep_stage(range(cut), is_first=True, is_last=False)
        last.keep_stage(range(cut, config.n_layer), is_first=False, is_last=True)
        carry, lower = first.through_layers(first.embed(first.inputs_of(one), noise), first.empty_memory(LANES), noise)
        carry, upper = last.through_layers(carry, last.empty_memory(LANES), noise)
        torch.testing.assert_close(last.predict(carry, one["targets"], noise), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close([*lower, *upper], memory, rtol=1e-10, atol=1e-10)


def test_the_cost_is_what_torch_counts():
    model = build()
    with FlopCounterMode(display=False) as counter:
        nats, _ = model(permuted(0), model.empty_memory(LANES))
        forward = counter.get_total_flops()
        nats.mean().backward()
    products = sum(model.products(LANES, TARGETS), [])
    assert forward == sum(model.flops(LANES, TARGETS)) == sum(product.forward for product in products)
    assert counter.get_total_flops() == sum(product.training for product in products)
    assert all(0 < product.visible <= 1 for product in products)


@pytest.mark.parametrize("sizes, parameters", [((12, 768, 12, 3072), 116_718_336), ((24, 1024, 16, 4096), 360_268_800)])
def test_it_has_the_published_number_of_parameters(sizes, parameters):
    n_layer, d_model, n_head, d_inner = sizes
    config = replace(BASE, n_layer=n_layer, d_model=d_model, n_head=n_head, d_head=64, d_inner=d_inner)
    shapes = parameter_shapes(config, 32000, 10_000)
    without_head = sum(prod(shape) for name, shape in shapes.items() if name != "head.bias")
    assert without_head == parameters


def test_a_token_is_scored_from_both_sides():
    """Alone in its row, each sees all of its segment but itself, and what is remembered; longer texts in segments."""
    model = build(replace(BASE, tgt_len=10, reuse_len=5)).eval()
    tokens = torch.randint(9, VOCAB, (17,), generator=torch.Generator().manual_seed(1))
    scores = log_probs_from_both_sides(model, tokens)
    assert len(scores) == 16
    for changed in (0, 4, 8, 9, 16):  # the segments are 0 to 8 and 9 to 16
        other = tokens.clone()
        other[changed] = 3
        moved = [new != old for new, old in zip(log_probs_from_both_sides(model, other), scores, strict=True)]
        in_segment = [(place < 9) == (changed < 9) for place in range(1, 17)]
        remembered = [place >= 9 > changed for place in range(1, 17)]
        assert moved == [near or far for near, far in zip(in_segment, remembered, strict=True)], changed
    model = build(replace(BASE, reuse_len=LENGTH)).eval()
    one = {
        "inputs": tokens[None, :LENGTH],
        "rank": torch.zeros(1, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([7]), 1),
    }
    one |= {"lookback": torch.arange(LENGTH)[None], "segment": torch.zeros(1, LENGTH, dtype=torch.int64)}
    one |= {"direction": torch.tensor([[1]]), "positions": torch.tensor([[7]])}
    expected = model(one, model.empty_memory(1))[0][0, 0, tokens[7]]
    assert log_probs_from_both_sides(model, tokens[:LENGTH])[6] == pytest.approx(expected.item(), rel=1e-12)
