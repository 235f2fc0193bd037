"""What is shown of a text: losses with and without memory, and attention by the formula, across segments."""

import base64
from itertools import accumulate

import numpy as np
import pytest
import torch

from tests.batches import batch
from tests.other_package.other_models.recurrent import Recurrent, RecurrentConfig
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.evaluation import attention
from txl_dist.evaluation.attention import MAX_KEYS, SHARE_KEPT, observe_text
from txl_dist.evaluation.scoring import Scorer
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.models.xlnet import XLNet, XLNetConfig

torch.set_num_threads(1)

EOS = BytesTokenizer.eos
VOCAB = BytesTokenizer.vocab_size
TEXT = b"the and of the abcd, and of the hgfe: a text of some segments"  # nine of 7 tokens, the last one shorter
TOKENS = list(TEXT)

XLNET = XLNetConfig(
    **{"name": "xlnet", "n_layer": 2, "d_model": 24, "n_head": 2, "d_head": 10, "d_inner": 50},
    **{"tgt_len": 7, "mem_len": 11, "reuse_len": 3, "clamp_len": -1, "activation": "relu"},
    **{"dropout": 0.0, "dropatt": 0.0, "init_std": 0.3, "layer_norm_eps": 1e-12},
)


@pytest.fixture(params=["transformer_xl", "xlnet"])
def model(request, make_config):
    """A model with weights so large that its heads differ, in float64."""
    torch.manual_seed(1)
    built = (
        TransformerXL(make_config(init_std=0.3), VOCAB) if request.param == "transformer_xl" else XLNet(XLNET, VOCAB)
    )
    return built.double().eval()


def inputs_of_layers(model):
    """Read the text in segments; return what enters each layer, [text, d_model]: keys' states, and queries'."""
    seen = [[] for _ in model.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0][0][0]))
        for layer, found in zip(model.layers, seen, strict=True)
    ]
    Scorer(model, BytesTokenizer()).read(TEXT[:-1])  # <eos>, and each token but the last one
    for hook in hooks:
        hook.remove()
    if isinstance(model, TransformerXL):
        return [(torch.cat(found), torch.cat(found)) for found in seen]
    halves = [[streams.chunk(2) for streams in found] for found in seen]
    return [tuple(torch.cat(half) for half in zip(*found, strict=True)) for found in halves]


def written_out(model, number, row, states, queries):
    """The softmax of one row of one layer, key by key (Dai et al. 2019, section 3.3): for each head, key -> weight."""
    config = model.config
    layer = model.layers[number].attention
    start = row // config.tgt_len * config.tgt_len
    ahead = 0 if isinstance(model, TransformerXL) else 1  # XLNet's query stands where the predicted token does
    weights = []
    for head in range(config.n_head):
        rows = slice(head * config.d_head, (head + 1) * config.d_head)
        query = layer.q_net.weight[rows] @ queries[row]
        scores = {}
        for key in range(max(0, start - config.mem_len), row + 1):
            distance = row + ahead - key
            angles = [distance / 10000 ** (i / config.d_model) for i in range(0, config.d_model, 2)]
            encoding = torch.tensor([*np.sin(angles), *np.cos(angles)])
            content = layer.kv_net.weight[rows] @ states[key]
            position = layer.r_net.weight[rows] @ encoding
            score = (query + layer.u[head]) @ content + (query + layer.v[head]) @ position
            scores[key] = np.exp(score.item() / config.d_head**0.5)
        weights.append({key: score / sum(scores.values()) for key, score in scores.items()})
    return weights


@torch.no_grad()
def test_weights_are_those_of_the_formula_written_out(model):
    """Of every row, head and layer, with the memory across the border of segments; where keys stand is told rightly."""
    shown = observe_text(model, EOS, TOKENS).attention
    config = model.config
    assert shown.layers == [(0, 2), (1, 2)] and len(shown.reach) == len(TOKENS)
    from_memory = 0
    for number, (states, queries) in enumerate(inputs_of_layers(model)):
        for row in range(len(TOKENS)):
            start = row // config.tgt_len * config.tgt_len
            oldest = max(0, start - config.mem_len)
            assert shown.reach[row] == row + 1 - oldest
            for head, expected in enumerate(written_out(model, number, row, states, queries), number * config.n_head):
                kept = shown.weight[row, head] > 0
                weights = shown.weight[row, head][kept].tolist()
                keys = [row + 1 - distance for distance in shown.distance[row, head][kept].tolist()]
                assert weights == pytest.approx([expected[key] for key in keys], rel=1e-4)
                largest = sorted(expected.values(), reverse=True)
                needed = 1 + sum(total < SHARE_KEPT for total in accumulate(largest[:-1]))
                assert weights == pytest.approx(largest[:needed], rel=1e-4) and len(keys) == len(set(keys))
                memory = sum(weight for key, weight in expected.items() if key < start)
                assert shown.memory[row, head].item() == pytest.approx(memory, rel=1e-4, abs=1e-9)
                from_memory += sum(key < start for key in keys)
    assert from_memory > 100


@torch.no_grad()
def test_losses_are_those_of_the_scorer_and_of_the_model_without_memory(model):
    observed = observe_text(model, EOS, TOKENS)
    scores, _ = Scorer(model, BytesTokenizer()).read(TEXT)
    assert observed.log_probs.tolist() == pytest.approx([score.log_prob for score in scores], rel=1e-5)
    without = type(model)(model.config.without_memory(), VOCAB).double().eval()
    without.load_state_dict(model.state_dict())
    scores, _ = Scorer(without, BytesTokenizer()).read(TEXT)
    assert observed.alone.tolist() == pytest.approx([score.log_prob for score in scores], rel=1e-5)
    length = model.config.tgt_len
    torch.testing.assert_close(observed.alone[:length], observed.log_probs[:length])
    assert (observed.alone - observed.log_probs)[length:].abs().min() > 0


def test_looking_changes_nothing_and_ends(model):
    before, _ = Scorer(model, BytesTokenizer()).read(TEXT)
    observe_text(model, EOS, TOKENS)
    after, _ = Scorer(model, BytesTokenizer()).read(TEXT)
    assert before == after
    assert all(layer.attention.observer is None for layer in model.layers)


@pytest.mark.parametrize("length", [1, 7, 8, 14])
def test_a_text_may_end_with_a_segment_or_within_one(model, length):
    observed = observe_text(model, EOS, TOKENS[:length])
    longer = observe_text(model, EOS, TOKENS)
    for name in ("log_probs", "alone"):
        torch.testing.assert_close(getattr(observed, name), getattr(longer, name)[:length])
    torch.testing.assert_close(observed.attention.memory, longer.attention.memory[:length])


def decoded(stored, name, dtype):
    return np.frombuffer(base64.b64decode(stored[name]), dtype)


def test_a_page_holds_the_weights_in_per_mille(model):
    shown = observe_text(model, EOS, TOKENS).attention
    stored = shown.to_json()
    count = decoded(stored, "count", "u1")
    ends = count.cumsum()
    distance = decoded(stored, "distance", "<u2")
    weight = decoded(stored, "weight", "<u2")
    assert len(count) == len(TOKENS) * 4 and len(distance) == len(weight) == ends[-1]
    for row in range(len(TOKENS)):
        for head in range(4):
            number = row * 4 + head
            part = slice(ends[number] - count[number], ends[number])
            expected = (shown.weight[row, head] * 1000).round().int()
            assert weight[part].tolist() == expected[expected > 0].tolist()
            assert distance[part].tolist() == shown.distance[row, head][expected > 0].tolist()
    assert decoded(stored, "memory", "<u2").tolist() == (shown.memory * 1000).round().int().flatten().tolist()
    assert SHARE_KEPT <= stored["kept"] <= 1


def test_a_large_model_keeps_fewer_keys_of_each_head(model, monkeypatch):
    shown = observe_text(model, EOS, TOKENS).attention
    assert decoded(shown.to_json(), "count", "u1").max() > 3
    monkeypatch.setattr(attention, "PAGE_KEYS", 3 * len(TOKENS) * 4 + 1)
    stored = shown.to_json()
    assert decoded(stored, "count", "u1").max() == 3 and stored["kept"] < SHARE_KEPT
    monkeypatch.setattr(attention, "PAGE_KEYS", 1)
    assert decoded(shown.to_json(), "count", "u1").max() == 1


def test_a_long_memory_shows_its_largest_keys_only(make_config):
    """With weights that are almost equal, all of them would be needed."""
    torch.manual_seed(1)
    model = TransformerXL(make_config(mem_len=60, tgt_len=20), VOCAB).eval()
    shown = observe_text(model, EOS, TOKENS).attention
    assert (shown.weight[-1] > 0).sum(-1).tolist() == [MAX_KEYS] * 4
    assert shown.reach[-1] == 61  # 60 of them remembered
    assert shown.memory[-1].tolist() == pytest.approx([60 / 61] * 4, abs=0.01)


def test_the_reach_is_that_of_same_length(make_config):
    torch.manual_seed(1)
    model = TransformerXL(make_config(same_length=True), VOCAB).eval()
    assert observe_text(model, EOS, TOKENS).attention.reach.tolist() == [min(k + 1, 11) for k in range(len(TOKENS))]


def test_a_model_without_attention_has_losses():
    torch.manual_seed(1)
    config = RecurrentConfig(name="recurrent", n_layer=2, tgt_len=7, d_model=16, dropout=0.0)
    model = Recurrent(config, VOCAB).eval()
    observed = observe_text(model, EOS, TOKENS)
    assert observed.attention is None
    scores, _ = Scorer(model, BytesTokenizer()).read(TEXT)
    assert observed.log_probs.tolist() == pytest.approx([score.log_prob for score in scores], rel=1e-5)
    segment = torch.tensor([TOKENS[6:13]])
    with torch.no_grad():
        log_probs, _ = model(batch(segment, None, torch.arange(7)[None]), model.empty_memory(1))
    expected = [log_probs[0, i, token].item() for i, token in enumerate(TOKENS[7:14])]
    assert observed.alone[7:14].tolist() == pytest.approx(expected, rel=1e-5)
    assert (observed.alone - observed.log_probs)[7:].abs().min() > 0
