"""Gated DeltaNet against the rule written out token by token, against transformers 5, and against itself."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.batches import batch
from txl_dist.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from txl_dist.models.layers.gated_delta import CHUNK, GatedDelta, Tokens, gated_delta_rule, rule_products, unit

torch.set_num_threads(1)

CONF = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/model/gated_delta_net.yaml"))
SMALL = {"n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 6, "d_value": 5, "d_inner": 20, "dropout": 0.0}
LANES, HEADS, D_HEAD, D_VALUE, VOCAB = 2, 3, 8, 6, 30
LENGTHS = [1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 22]


def near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------- the rule


def draw_tokens(length, seed=0, decay=1.0):
    """Tokens whose decays are between exp(-decay) and 1, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(LANES, HEADS, *shape, generator=generator, dtype=torch.float64)

    query, key = normal(length, D_HEAD), unit(normal(length, D_HEAD))
    rates = torch.rand(2, LANES, HEADS, length, generator=generator, dtype=torch.float64)
    return Tokens(query, key, normal(length, D_VALUE), -decay * rates[0], rates[1]), normal(D_HEAD, D_VALUE)


def draw_lookback(length, seed=0):
    """A document begins at one token in ten, at others in each lane; the first token continues one in lane 0."""
    begins = torch.rand(LANES, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    begins[:, 0] = torch.tensor([False, True])
    return lookback_of(begins)


def lookback_of(begins, before=1000):
    """How many tokens there are before each in its document, where documents begin at some tokens."""
    lookback = torch.zeros(begins.shape, dtype=torch.int64)
    for lane, row in enumerate(begins):
        count = before
        for position, begins_here in enumerate(row):
            count = 0 if begins_here else count + 1
            lookback[lane, position] = count
    return lookback


def literally(tokens, state, lookback):
    """The formula, for each lane, head and token alone."""
    reads = torch.zeros_like(tokens.value)
    states = torch.zeros_like(state)
    for lane in range(LANES):
        for head in range(HEADS):
            s = state[lane, head]
            for t in range(lookback.size(1)):
                q, k, v, log_a, b = (x[lane, head, t] for x in tokens)
                if lookback[lane, t] == 0:
                    s = torch.zeros_like(s)
                identity = torch.eye(D_HEAD, dtype=s.dtype)
                s = log_a.exp() * (identity - b * torch.outer(k, k)) @ s + b * torch.outer(k, v)
                reads[lane, head, t] = q @ s
            states[lane, head] = s
    return reads, states


def by_token(tokens, state, lookback):
    """Each token as a segment of its own, as in generation."""
    reads = []
    for t in range(lookback.size(1)):
        at = slice(t, t + 1)
        read, state = gated_delta_rule(Tokens._make(x[:, :, at] for x in tokens), state, lookback[:, at])
        reads.append(read)
    return torch.cat(reads, dim=2), state


def results_of(rule, tokens, state, lookback):
    """Outputs, the state behind, and the gradients of all that is read, where the loss is the sum of all squares."""
    inputs = [x.clone().requires_grad_() for x in (*tokens, state)]
    read, final = rule(Tokens._make(inputs[:-1]), inputs[-1], lookback)
    loss = read.square().sum() + final.square().sum()
    return [read.detach(), final.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_and_single_tokens_are_the_formula(length):
    tokens, state = draw_tokens(length)
    lookback = draw_lookback(length)
    expected = results_of(literally, tokens, state, lookback)
    near(results_of(gated_delta_rule, tokens, state, lookback), expected)
    near(results_of(by_token, tokens, state, lookback), expected)


def test_nothing_before_a_document_has_an_effect():
    length = CHUNK + 30
    tokens, state = draw_tokens(length)
    begins = torch.zeros(LANES, length, dtype=torch.bool)
    begins[:, CHUNK + 10] = True
    before, after = slice(0, CHUNK + 10), slice(CHUNK + 10, None)
    read, final, *gradients, state_gradient = results_of(gated_delta_rule, tokens, state, lookback_of(begins))
    alone = Tokens._make(x[:, :, after] for x in tokens)
    alone_read, alone_final = gated_delta_rule(alone, torch.zeros_like(state), lookback_of(begins[:, after]))
    near([read[:, :, after], final], [alone_read, alone_final])
    # To the bit, whatever stands before; and from what is read there no gradient comes.
    others = Tokens._make(torch.cat([1e3 * x[:, :, before], x[:, :, after]], dim=2) for x in tokens)
    other_read, other_final = gated_delta_rule(others, 1e6 * state, lookback_of(begins))
    near([other_read[:, :, after], other_final], [read[:, :, after], final], tolerance=0)
    inputs = [x.clone().requires_grad_() for x in (*tokens, state)]
    read, final = gated_delta_rule(Tokens._make(inputs[:-1]), inputs[-1], lookback_of(begins))
    *gradients, of_state = torch.autograd.grad(read[:, :, after].sum() + final.sum(), inputs)
    assert not of_state.any()
    assert not any(gradient[:, :, before].any() for gradient in gradients)


@pytest.mark.parametrize("decay", [0.0, 1e4])
def test_extreme_decays_stay_finite(decay):
    """With no decay nothing is forgotten; with a decay of 1e-4000 all is, and no factor is 0 / 0."""
    tokens, state = draw_tokens(2 * CHUNK, decay=decay)
    lookback = draw_lookback(2 * CHUNK)
    results = results_of(gated_delta_rule, tokens, state, lookback)
    assert all(result.isfinite().all() for result in results)
    near(results, results_of(by_token, tokens, state, lookback))


def test_equal_keys_leave_the_last_value():
    """The rule overwrites what a key had: with b = 1 and no decay it returns the last value, 200 tokens on."""
    tokens, state = draw_tokens(200)
    key = tokens.key[:, :, :1].expand_as(tokens.key)
    tokens = tokens._replace(key=key, query=key, log_decay=torch.zeros_like(tokens.beta))
    tokens = tokens._replace(beta=torch.ones_like(tokens.beta))
    exact = tokens._replace(key=key / key.norm(dim=-1, keepdim=True), query=key)
    read, _ = gated_delta_rule(exact, state, torch.full((LANES, 200), 1000))
    near(read, exact.value, tolerance=1e-5)  # queries are shorter than 1 by `unit`


@pytest.mark.parametrize("length", LENGTHS)
def test_the_products_are_those_that_torch_counts(length):
    tokens, state = draw_tokens(length)
    lookback = draw_lookback(length)
    inputs = Tokens._make(x.requires_grad_() for x in tokens)
    with FlopCounterMode(display=False) as counter:
        read, _ = gated_delta_rule(inputs, state, lookback)
        forward = counter.get_total_flops()
        read.sum().backward()
    products = list(rule_products(LANES * HEADS, length, D_HEAD, D_VALUE))
    assert forward == sum(product.forward for product in products)
    assert counter.get_total_flops() == sum(p.training + p.forward * p.recomputed for p in products)


# ------------------------------------------------------------------------------------------------ against transformers


def draw_sublayer(d_conv=4):
    torch.manual_seed(0)
    sublayer = GatedDelta(16, HEADS, D_HEAD, D_VALUE, d_conv, dropout=0.0, eps=1e-6).double()
    for parameter in sublayer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return sublayer


def in_their_names(sublayer, of=lambda parameter: parameter.detach()):
    """What `of` returns of each parameter, by transformers' names and in its order: all projections, head by head."""
    *qkv, gate = (of(net.weight) for net in (sublayer.qkv_net, sublayer.gate_net))
    query_key_value = [x.unflatten(0, (HEADS, -1)) for x in qkv[0].split(sublayer.widths)]
    by_head = torch.cat([*query_key_value, gate.unflatten(0, (HEADS, -1))], dim=1)
    rates = of(sublayer.rate_net.weight).unflatten(0, (2, HEADS))
    return {
        "in_proj_qkvz.weight": by_head.flatten(0, 1),
        "in_proj_ba.weight": rates.transpose(0, 1).flatten(0, 1),
        "conv1d.weight": of(sublayer.convolution.weight)[:, None],
        "A_log": of(sublayer.A_log),
        "dt_bias": of(sublayer.dt_bias),
        "norm.weight": of(sublayer.head_norm.weight),
        "out_proj.weight": of(sublayer.o_net.weight),
    }


def draw_segments():
    """A segment of more than a chunk, and what follows it: some tokens, then single ones."""
    hidden = torch.randn(LANES, CHUNK + 15, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return hidden.split([CHUNK + 7, 6, 1, 1], dim=1)


@pytest.fixture(scope="module")
def theirs(transformers5, tmp_path_factory):
    """What transformers 5 computes of the same."""
    folder = tmp_path_factory.mktemp("qwen3_next")
    tokens, state = draw_tokens(2 * CHUNK + 22)
    names = {"query": "query", "key": "key", "value": "value", "log_decay": "g", "beta": "beta"}
    first, *second = draw_segments()
    sizes = {"hidden_size": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": D_HEAD}
    sizes |= {"linear_value_head_dim": D_VALUE, "linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS}
    asked = {
        "tokens": {names[name]: value for name, value in tokens._asdict().items()},
        "state": state,
        "layer": {"sizes": sizes, "weights": in_their_names(draw_sublayer()), "first": first, "second": second},
    }
    torch.save(asked, folder / "asked.pt")
    script = Path(__file__).with_name("qwen3_next.py")
    command = [sys.executable, str(script), str(folder / "asked.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=os.environ | transformers5, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("way", ["chunks", "tokens"])
def test_the_rule_is_that_of_transformers(theirs, way):
    tokens, state = draw_tokens(2 * CHUNK + 22)
    lookback = torch.full((LANES, 2 * CHUNK + 22), 1000)

    def scaled(tokens, state, lookback):
        return gated_delta_rule(tokens._replace(query=tokens.query * D_HEAD**-0.5), state, lookback)

    near(results_of(scaled, tokens, state, lookback), theirs[way])


def test_the_sublayer_is_that_of_transformers(theirs):
    """Values and states of segment after segment, and the gradients of all weights."""
    sublayer = draw_sublayer()
    sublayer.norm = torch.nn.Identity()  # theirs stands in the layer around it
    first, *second = draw_segments()
    state = {name: torch.zeros(LANES, *shape, dtype=torch.float64) for name, shape in sublayer.state_shapes().items()}
    position = torch.arange(CHUNK + 15).expand(LANES, -1)
    for number, segment in enumerate((first, *second)):
        hidden, state = sublayer(segment, state, position[:, : segment.size(1)])
        position = position[:, segment.size(1) :]
        result = hidden - segment  # without the residual connection
        near(result, theirs["layer"]["outputs"][number])
        their_memory, their_inputs = theirs["layer"]["states"][number]
        near(state["memory"], their_memory)
        near(state["conv"], their_inputs[..., -3:].mT)
        if number == 0:
            result.square().sum().backward(retain_graph=True)
            near(in_their_names(sublayer, lambda parameter: parameter.grad), theirs["layer"]["gradients"])


# ----------------------------------------------------------------------------------------------------------- the model


def make_config(**changes):
    return GatedDeltaNetConfig(**CONF | SMALL | changes)


def build(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = GatedDeltaNet(config, VOCAB).to(dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    return model


def draw_words(length, seed=0):
    return torch.randint(VOCAB, (LANES, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hybrid", [{}, {"layers": ["delta", "attention"], "mem_len": 8}], ids=["delta", "hybrid"])
def test_a_document_in_mid_segment_is_read_as_if_alone(hybrid):
    """With what was read before it, in whatever segments: the same losses, states and gradients as without."""
    model = build(make_config(**hybrid))
    text = draw_words(90)
    begins = torch.zeros(LANES, 90, dtype=torch.bool)
    begins[0, 75] = begins[1, 71] = True
    lookback = lookback_of(begins, before=-1)
    memory = model.empty_memory(LANES)
    losses = []
    for part in (slice(0, 70), slice(70, 90)):
        nats, memory = model(batch(text[:, part], text[:, part], lookback[:, part]), memory)
        losses.append(nats)
    nats = torch.cat(losses, dim=1)
    for lane, start in enumerate((75, 71)):
        rows, after = slice(lane, lane + 1), slice(start, None)
        document = batch(text[rows, after], text[rows, after], lookback[rows, after])
        alone, states = model(document, model.empty_memory(1))
        near(nats[rows, after], alone)
        parameters = list(model.parameters())
        within = torch.autograd.grad(nats[rows, after].sum(), parameters, retain_graph=True)
        near(within, torch.autograd.grad(alone.sum(), parameters))
        for of_lanes, state in zip(memory, states, strict=True):
            if "conv" in state:  # attention remembers the document before, and does not look at it
                near({name: value[rows] for name, value in of_lanes.items()}, state)


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_segments_shorter_than_the_convolution_are_one_pass(d_conv):
    model = build(make_config(d_conv=d_conv))
    text = draw_words(9)
    lookback = torch.arange(9).expand(LANES, 9)
    expected, _ = model(batch(text, text, lookback), model.empty_memory(LANES))
    memory = model.empty_memory(LANES)
    losses = []
    for part in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 9)):
        nats, memory = model(batch(text[:, part], text[:, part], lookback[:, part]), memory)
        losses.append(nats)
    near(torch.cat(losses, dim=1), expected)


def test_in_half_precision_evaluation_keeps_float32():
    """A state rounded to bfloat16 after each of 300 tokens would be off by more."""
    model = build(make_config(), torch.bfloat16).eval()
    text = draw_words(300)
    lookback = torch.arange(300).expand(LANES, 300)
    finals = {}
    for name, memory in {"cache": model.empty_cache(LANES), "memory": model.empty_memory(LANES)}.items():
        with torch.no_grad():
            _, whole = model(batch(text, None, lookback), memory)
            for t in range(300):
                at = slice(t, t + 1)
                _, memory = model(batch(text[:, at], None, lookback[:, at]), memory)
        assert all(state["memory"].dtype == (torch.float32 if name == "cache" else torch.bfloat16) for state in memory)
        finals[name] = (memory[0]["memory"].float() - whole[0]["memory"].float()).norm() / whole[0]["memory"].norm()
    assert finals["cache"] < finals["memory"] / 4


def test_weights_begin_as_the_authors_draw_them():
    torch.manual_seed(0)
    delta = GatedDeltaNet(make_config(n_head=20_000, d_head=1, d_value=1), VOCAB).layers[0].delta
    step, rate = F.softplus(delta.dt_bias), delta.A_log.exp()
    assert 0.001 <= step.min() < 0.00101 and 0.0999 < step.max() <= 0.1001
    assert 0.009 < step.log().mean().exp() < 0.011  # log-uniform
    assert 0.01 <= rate.min() < 0.02 and 15.9 < rate.max() <= 16 and 7.9 < rate.mean() < 8.1
    assert (delta.norm.weight == 1).all() and (delta.head_norm.weight == 1).all()


def test_weights_are_tied_where_the_config_says_so():
    tied, apart = (GatedDeltaNet(make_config(tie_weights=tie), VOCAB) for tie in (True, False))
    assert tied.tied_parameters() == [tied.embedding.weight] and apart.tied_parameters() == []


def test_the_cost_is_that_of_all_chunks():
    config = make_config(tgt_len=CHUNK + 9)
    model = build(config)
    text = draw_words(config.tgt_len)
    fields = batch(text, text, torch.arange(config.tgt_len).expand(text.shape))
    with FlopCounterMode(display=False) as counter:
        model(fields, model.empty_memory(LANES))
    assert counter.get_total_flops() == sum(model.flops(LANES, config.tgt_len))
    shorter = replace(config, tgt_len=CHUNK)
    with model.reading_as(shorter):
        assert sum(model.flops(LANES, CHUNK)) < counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------- the hybrid


def test_a_hybrid_has_the_states_of_both_kinds():
    model = GatedDeltaNet(make_config(n_layer=5, layers=["delta", "delta", "attention"], mem_len=7), VOCAB)
    delta = {"memory": (2, 6, 5), "conv": (3, 2 * (6 + 6 + 5))}
    assert model.state_shapes() == [delta, delta, {"memory": (7, 16)}, delta, delta]
    assert model.config.lookback == 7 and make_config().lookback == 1
    assert model.config.without_memory() is None


def test_only_a_model_that_attends_has_a_backend_of_attention():
    device = torch.device("cpu")
    hybrid, plain = (GatedDeltaNet(make_config(layers=layers), VOCAB) for layers in (["delta", "attention"], None))
    assert hybrid.describe_runtime(device, torch.float32) == "attention by reference, "
    assert "sdpa" in hybrid.config.attention_backends
    assert plain.describe_runtime(device, torch.float32) == "" and plain.config.attention_backends == ()


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"layers": ["delta", "delta", "attention"]}, "model.layers: names 3 layers of model.n_layer=2"),
        ({"mem_len": 4}, "model.mem_len=4: is the memory of attention, and no layer attends"),
        ({"mem_len": 4, "layers": ["delta"]}, "model.layers=[delta,attention]"),
        ({"clamp_len": 0}, "model.clamp_len=0"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, key):
    assert [key in problem for problem in make_config(**changes).problems()] == [True]
    assert not list(make_config().problems())
