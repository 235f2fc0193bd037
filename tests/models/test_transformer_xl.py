"""Transformer-XL against Hugging Face's (transformers 4.36.2), and the laws of memory, lookback and window."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from tests.batches import batch
from txl_dist.conversion.transformer_xl.weights import from_hugging_face
from txl_dist.models.base import Runtime
from txl_dist.models.layers import dropout
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.layers.state import KVCache, concat_lanes
from txl_dist.models.transformer_xl import TransformerXL, TransformerXLConfig

torch.set_num_threads(1)

VOCAB, LANES = 50, 3
FAR = 10**6  # a lookback beyond any memory
NOISE = Noise.of_step(0, 0, range(LANES))
BASE = TransformerXLConfig(
    name="transformer_xl",
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=6,
    d_inner=20,
    attention="relative",
    max_distance=30,
    tgt_len=5,
    mem_len=7,
    clamp_len=-1,
    same_length=False,
    dropout=0.0,
    dropatt=0.0,
    div_val=1,
    cutoffs=[],
    tie_weights=True,
    tie_projections=True,
    pre_lnorm=False,
    init_std=0.02,
)


def build(
    config: TransformerXLConfig, dtype: torch.dtype = torch.float64, seed: int = 0, **runtime: bool
) -> TransformerXL:
    """A model whose weights are large enough for every one of them to matter."""
    torch.manual_seed(seed)
    model = TransformerXL(config, VOCAB, Runtime(**runtime)).to(dtype)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.4)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def from_start(length: int, lanes: int = LANES, start: int = 0) -> Tensor:
    """The lookback of a stream's positions start, start + 1, ..."""
    return torch.arange(start, start + length).expand(lanes, length)


def read(model: TransformerXL, stream: Tensor, lengths: list[int], memory=None, noise=None) -> Tensor:
    """The log-probabilities over a stream that is read from its start in segments."""
    memory, start, out = memory or model.empty_memory(len(stream)), 0, []
    for length in lengths:
        segment = stream[:, start : start + length]
        log_probs, memory = model(batch(segment, None, from_start(length, len(stream), start)), memory, noise)
        out.append(log_probs)
        start += length
    return torch.cat(out, dim=1)


# ------------------------------------------------------------------------------------------- the reference


def reference(config: TransformerXLConfig, dtype: torch.dtype) -> TransfoXLLMHeadModel:
    theirs = TransfoXLLMHeadModel(
        TransfoXLConfig(
            vocab_size=VOCAB,
            d_embed=config.d_model,
            tie_word_embeddings=config.tie_weights,
            tie_projs=[False] + [config.tie_projections] * len(config.cutoffs),
            **asdict(config),
        )
    ).to(dtype)
    frequency = 10000 ** (-torch.arange(0, config.d_model, 2, dtype=torch.float64) / config.d_model)
    theirs.transformer.pos_emb.inv_freq = frequency.to(dtype)  # theirs is rounded to float32 first
    return theirs


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    """Equal up to `tolerance`, relative to the largest number."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item() if ours.numel() else 0.0
    assert error <= tolerance, f"{name}: {error:.1e}"


CASES = {
    "full softmax": {},
    "full softmax, untied": {"tie_weights": False},
    "clusters": {"cutoffs": [10, 20, 35]},
    "clusters, untied": {"cutoffs": [10, 20], "tie_weights": False},
    "div_val 2": {"cutoffs": [10, 20], "div_val": 2},
    "div_val 2, untied": {"cutoffs": [10, 20], "div_val": 2, "tie_weights": False},
    "div_val 2, own projections": {"cutoffs": [10, 20], "div_val": 2, "tie_projections": False},
    "div_val 2, nothing tied": {"cutoffs": [10, 20], "div_val": 2, "tie_weights": False, "tie_projections": False},
    "div_val 4": {"cutoffs": [5, 30], "div_val": 4},
    "same_length": {"same_length": True},
    "same_length, short memory": {"same_length": True, "mem_len": 3},
    "clamp_len": {"clamp_len": 4},
    "pre_lnorm": {"pre_lnorm": True},
    "no memory": {"mem_len": 0},
    "short memory": {"mem_len": 2},
    "memory of one segment": {"mem_len": 5},
    "long memory": {"mem_len": 13},
    "dropout": {"dropout": 0.2, "dropatt": 0.4},
    "all at once": {
        "dropout": 0.3,
        "dropatt": 0.1,
        "cutoffs": [7, 30],
        "div_val": 2,
        "same_length": True,
        "clamp_len": 6,
        "pre_lnorm": True,
    },
}


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, dtype, tolerance, monkeypatch):
    """Losses, log-probabilities, memories over four segments (the last of another length), and all gradients."""
    config = replace(BASE, **CASES[case])
    theirs, model = reference(config, dtype), TransformerXL(config, VOCAB).to(dtype)
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.4)
    their_parameters = dict(theirs.named_parameters(remove_duplicate=False))
    model.load_state_dict(dict(from_hugging_face(lambda name: their_parameters[name].data, config)), strict=True)
    theirs.train()
    # A dropout that falls evenly on all shows that it stands at the same places, whatever the layout.
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, training=True, inplace=False: x * (1 - p))
    monkeypatch.setattr(dropout, "factors", lambda seeds, shape, p, dtype: torch.tensor(1 - p, dtype=dtype))
    if dtype == torch.float64:  # theirs takes scores through float32
        monkeypatch.setattr(Tensor, "float", Tensor.double)

    memory, their_memory, loss, their_loss = model.empty_memory(LANES), None, 0, 0
    for step, length in enumerate([5, 5, 5, 3]):
        inputs, targets = tokens(LANES, length, seed=step), tokens(LANES, length, seed=100 + step)
        targets[0, 1] = -100
        lookback = torch.full_like(inputs, FAR)  # they look at their first memory of zeros
        nll, new_memory = model(batch(inputs, targets, lookback), memory, NOISE)
        log_probs, same_memory = model(batch(inputs, None, lookback), memory, NOISE)

        output = theirs.transformer(inputs, mems=their_memory)
        hidden = output.last_hidden_state
        shifted = torch.cat([hidden, hidden[:, :1]], 1), torch.cat([targets[:, :1], targets], 1)  # they shift inside
        their_nll = theirs.crit(*shifted, keep_order=True).view(LANES, length)

        assert_near(nll, their_nll, tolerance, "nll")
        assert_near(log_probs, theirs.crit(hidden).view(LANES, length, VOCAB), tolerance, "log_probs")
        assert len(new_memory) == len(same_memory) == config.n_layer
        for ours, again, old in zip(new_memory, same_memory, output.mems or [], strict=config.mem_len > 0):
            assert_near(ours["memory"], old.transpose(0, 1), tolerance, "memory")
            assert torch.equal(ours["memory"], again["memory"]) and not ours["memory"].requires_grad
        memory, their_memory = new_memory, output.mems
        loss, their_loss = loss + nll.sum(), their_loss + their_nll.sum()

    loss.backward()
    their_loss.backward()
    gradients = dict(from_hugging_face(lambda name: their_parameters[name].grad, config))
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, gradients[name], tolerance, name)


# ---------------------------------------------------------------------------------- memory, lookback, window


@pytest.mark.parametrize("attention", ["relative", "shaw"])  # absolute positions are those in a segment
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1] * 12, [7, 2, 3]], ids=str)
def test_segment_by_segment_equals_one_long_pass(attention, n_layer, lengths):
    model = build(replace(BASE, attention=attention, max_distance=6, n_layer=n_layer, mem_len=12)).eval()
    stream = tokens(LANES, 12)
    torch.testing.assert_close(read(model, stream, lengths), read(model, stream, [12]), rtol=1e-12, atol=1e-12)


def test_segment_by_segment_within_a_window_equals_one_long_pass():
    """One layer needs no more than the memory of its inputs, be the window shorter than the stream."""
    model = build(replace(BASE, n_layer=1, mem_len=4, same_length=True)).eval()
    stream = tokens(LANES, 12)
    torch.testing.assert_close(read(model, stream, [5, 1, 6]), read(model, stream, [12]), rtol=1e-12, atol=1e-12)


def test_a_document_in_mid_segment_knows_nothing_of_the_one_before():
    model = build(BASE).eval()
    stream, memory = tokens(LANES, 9), model.empty_memory(LANES)
    lookback = torch.cat([from_start(4), from_start(5)], dim=1)
    first, memory = model(batch(stream[:, :6], None, lookback[:, :6]), memory)
    second, memory = model(batch(stream[:, 6:], None, lookback[:, 6:]), memory)
    apart = [read(model, stream[:, :4], [4]), read(model, stream[:, 4:], [2, 3])]
    torch.testing.assert_close(torch.cat([first, second], 1), torch.cat(apart, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_a_reset_lane_forgets_and_the_others_do_not(pre_lnorm):
    model = build(replace(BASE, pre_lnorm=pre_lnorm)).eval()
    memoryless = TransformerXL(replace(BASE, pre_lnorm=pre_lnorm, mem_len=0), VOCAB).double().eval()
    memoryless.load_state_dict(model.state_dict())
    stream = tokens(LANES, 10)
    _, memory = model(batch(stream[:, :5], None, from_start(5)), model.empty_memory(LANES))
    lookback = torch.cat([from_start(5, 1), from_start(5, LANES - 1, start=5)])  # lane 0 starts anew
    log_probs, _ = model(batch(stream[:, 5:], None, lookback), memory)
    fresh, none = memoryless(batch(stream[:, 5:], None, from_start(5)), memoryless.empty_memory(LANES))
    kept = read(model, stream, [5, 5])[:, 5:]
    torch.testing.assert_close(log_probs, torch.cat([fresh[:1], kept[1:]]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(fresh[1:], kept[1:], atol=1e-2)
    assert [state["memory"].shape for state in none] == [(LANES, 0, BASE.d_model)] * BASE.n_layer


def test_a_window_ends_where_it_ends():
    """With same_length a position sees mem_len tokens, itself included; without, the whole memory and itself."""
    for same_length, seen in (True, BASE.mem_len), (False, BASE.mem_len + 1):
        model = build(replace(BASE, n_layer=1, same_length=same_length)).eval()
        stream = tokens(1, 13).expand(13, 13).clone()
        stream[range(13), range(13)] += 1 - 2 * (stream[0] == VOCAB - 1).long()  # lane i differs at token i
        last = read(model, torch.cat([stream, tokens(1, 13)]), [12, 1])[:, -1]
        changed = [i for i in range(13) if not torch.allclose(last[i], last[-1], rtol=1e-12)]
        assert changed == list(range(13 - seen, 13))


def test_distances_beyond_clamp_len_look_alike():
    """The order of two neighbouring tokens matters below clamp_len, not beyond."""
    for clamp_len, alike in (-1, []), (3, [0, 1, 2, 3, 4]):
        model = build(replace(BASE, n_layer=1, clamp_len=clamp_len)).eval()
        swapped = torch.arange(9).expand(8, 9).clone()
        for i in range(8):
            swapped[i, [i, i + 1]] = torch.tensor([i + 1, i])  # lane i: tokens i and i + 1 exchanged
        last = read(model, torch.cat([swapped, torch.arange(9)[None]]), [5, 4])[:, -1]
        # Seen from position 8, tokens 0 to 5 are at distance 3 or more.
        assert [i for i in range(7) if torch.allclose(last[i], last[-1], rtol=1e-12)] == alike


@pytest.mark.parametrize("attention", ["absolute", "al_rfou"])
def test_absolute_positions_are_added_once_to_what_is_remembered(attention):
    """A layer's memory holds what came into it, to the bit, however often it has been attended to."""
    model = build(replace(BASE, attention=attention)).eval()
    stream, memory = tokens(LANES, 7), model.empty_memory(LANES)
    for step in range(7):
        _, memory = model(batch(stream[:, step : step + 1], None, from_start(1, start=step)), memory)
        assert torch.equal(memory[0]["memory"][:, -step - 1 :], model.embedding(stream[:, : step + 1]))
        if step == 0:
            first = [state["memory"][:, -1].clone() for state in memory]
        assert all(torch.equal(state["memory"][:, -step - 1], once) for state, once in zip(memory, first, strict=True))


@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize("attention", ["relative", "shaw", "absolute", "al_rfou"])
def test_cached_keys_and_values_change_no_number(attention, pre_lnorm):
    """Segments of several lengths, some into the same room, more in all than there is; and again with other weights."""
    config = replace(BASE, attention=attention, pre_lnorm=pre_lnorm, n_layer=3, mem_len=12)
    model, lengths = build(config).eval(), [5, 4, 1, 1, 1, 1, 1, 2, 5, 9]
    for seed in (0, 1):
        model.load_state_dict(build(config, seed=seed).state_dict())
        expected, cache = read(model, tokens(LANES, sum(lengths)), lengths), model.empty_cache(LANES)
        with_cache = read(model, tokens(LANES, sum(lengths)), lengths, cache)
        torch.testing.assert_close(with_cache, expected, rtol=1e-12, atol=1e-12)
        cached = [isinstance(state["memory"], KVCache) for state in cache]
        assert cached == {"absolute": [False, True, True], "al_rfou": [False] * 3}.get(attention, [True] * 3)


@pytest.mark.parametrize("case", ["full softmax", "clusters", "div_val 2"])
def test_neither_the_layout_nor_the_number_of_tokens_changes_a_number(case):
    """For fewer tokens than d_model the head's outputs are concatenated, else its tables."""
    model, stream = build(replace(BASE, **CASES[case])), tokens(LANES, 10)
    expected, tied = read(model, stream, [10]), len(list(model.parameters()))
    model.store_long_rows()
    for lane, log_probs in zip(stream, expected, strict=True):
        torch.testing.assert_close(read(model, lane[None], [10]), log_probs[None], rtol=1e-12, atol=1e-12)
    assert len(list(model.parameters())) == tied
    for weight in model.parameters():
        assert weight.size(weight.stride().index(1)) == max(weight.shape)


def test_lanes_that_were_read_alone_continue_together():
    for attention in ("relative", "absolute"):  # the latter's first layer has no cache
        model, stream = build(replace(BASE, attention=attention)).eval(), tokens(2, 12)
        parts, memories = [], []
        for lane in stream.split(1):
            memories.append(model.empty_cache(1))
            _, memories[-1] = model(batch(lane[:, :9], None, from_start(9, 1)), memories[-1])
            parts.append(read(model, lane, [9, 3])[:, 9:])
        together, _ = model(batch(stream[:, 9:], None, from_start(3, 2, 9)), concat_lanes(memories))
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- how it is built


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(share):
    config = replace(BASE, dropout=share, dropatt=share, cutoffs=[10, 20], div_val=2)
    results = []
    for activation_checkpointing in (False, True):
        model = build(config, torch.float32, activation_checkpointing=activation_checkpointing)
        memory, loss = model.empty_memory(LANES), 0
        for step in range(2):
            inputs, targets = tokens(LANES, 5, seed=step), tokens(LANES, 5, seed=7)
            nll, memory = model(batch(inputs, targets, from_start(5, start=5 * step)), memory, NOISE)
            loss = loss + nll.sum()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([nll, *(state["memory"] for state in memory), *gradients])
    assert all(map(torch.equal, *results))


def test_activation_checkpointing_keeps_less():
    kept = {}
    for activation_checkpointing in (False, True):
        model = build(BASE, activation_checkpointing=activation_checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(
                batch(tokens(LANES, 5), tokens(LANES, 5), from_start(5)),
                model.empty_memory(LANES),
            )
        kept[activation_checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 3


@pytest.mark.parametrize("case", ["full softmax", "clusters", "div_val 2", "div_val 2, nothing tied"])
def test_parameters_are_used_only_by_the_modules_that_own_them(case):
    """As under ZeRO-3: a parameter is there only within the forward of a module that holds it directly."""
    model = build(replace(BASE, **CASES[case])).eval()
    expected, _ = model(batch(tokens(LANES, 5), None, from_start(5)), model.empty_memory(LANES))
    gathered = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = gathered[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)

    memory = model.empty_memory(LANES)
    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        log_probs, _ = model(batch(tokens(LANES, 5), None, from_start(5)), memory)
        nll, _ = model(batch(tokens(LANES, 5), tokens(LANES, 5), from_start(5)), memory)
    assert torch.equal(log_probs, expected)
    torch.testing.assert_close(nll, -expected.gather(-1, tokens(LANES, 5)[..., None]).squeeze(-1))


@pytest.mark.parametrize("case", ["full softmax", "clusters", "div_val 2"])
def test_a_step_never_synchronises_with_a_gpu(case):
    """Tensors on "meta" have no numbers: reading one fails, be it to count how many tokens a cluster has."""
    drops = dict.fromkeys(["dropout", "dropatt", "dropout_words"], 0.1)
    model = build(replace(BASE, **CASES[case], **drops)).to("meta")
    inputs, targets, lookback = tokens(LANES, 5), tokens(LANES, 5, seed=2), from_start(5)
    noise = Noise.of_step(0, 0, range(LANES), torch.device("meta"))
    nll, _ = model(batch(inputs, targets, lookback), model.empty_memory(LANES), noise)
    nll.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()(batch(inputs, None, lookback), model.empty_cache(LANES))
    if case != "full softmax":
        with pytest.raises(NotImplementedError, match="nonzero"):
            model.train()(
                batch(inputs.to("meta"), targets.to("meta"), lookback),
                model.empty_memory(LANES),
                noise,
            )


def test_nothing_is_dropped_in_evaluation():
    model, with_dropout = build(BASE), build(replace(BASE, dropout=0.5, dropatt=0.5))
    stream = tokens(LANES, 10)
    expected = read(model.eval(), stream, [5, 5])
    assert not torch.allclose(read(with_dropout, stream, [5, 5], noise=NOISE), expected)
    assert torch.equal(read(with_dropout.eval(), stream, [5, 5]), expected)


def test_bfloat16_is_near_and_its_losses_are_float32():
    config = replace(BASE, cutoffs=[10, 20], div_val=2, mem_len=6)
    nll = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = TransformerXL(config, VOCAB)
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            nn.init.normal_(parameter, float("layer_norm.weight" in name), 0.1, generator=generator)
        model.to(dtype)
        memory = model.empty_memory(LANES)
        for step in range(2):
            nll[dtype], memory = model(
                batch(tokens(LANES, 5), tokens(LANES, 5), from_start(5, start=5 * step)),
                memory,
            )
        assert nll[dtype].dtype == torch.float32 and all(state["memory"].dtype == dtype for state in memory)
        nll[dtype].sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(nll[torch.bfloat16], nll[torch.float32], rtol=0.03, atol=0.03)


def test_initial_weights_are_the_authors():
    config = replace(BASE, d_model=256, d_inner=512, n_head=8, d_head=32, cutoffs=[10, 20], div_val=2, init_std=0.05)
    torch.manual_seed(0)
    model = TransformerXL(config, 400)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        mean, std = (1, 0.05) if "layer_norm" in name else (0, 0.01) if "projection" in name else (0, 0.05)
        near = 5 * std / parameter.numel() ** 0.5
        assert abs(parameter.mean().item() - mean) < near and abs(parameter.std().item() - std) < near, name


def test_parameter_count_is_the_published_one():
    """WikiText-103 base: 151.1M parameters (Dai et al. 2019, table 1), 41.1M of them outside the embedding."""
    config = replace(BASE, n_layer=16, d_model=410, n_head=10, d_head=41, d_inner=2100, cutoffs=[20000, 40000, 200000])
    with torch.device("meta"):
        model = TransformerXL(config, 267735)
    untied_uv = (config.n_layer - 1) * 2 * 410  # the authors share u and v among the layers
    total = sum(parameter.numel() for parameter in model.parameters()) - untied_uv
    assert total == 151_107_538
    assert round(sum(parameter.numel() for parameter in model.layers.parameters()) / 1e6, 1) == 41.1
