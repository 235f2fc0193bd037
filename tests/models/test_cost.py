"""Counted operations against torch's own counter, in a forward and in a real backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.batches import batch
from txl_dist.models.base import Runtime
from txl_dist.models.layers.backends import AttentionWindow
from txl_dist.models.layers.cost import zipf_share
from txl_dist.models.shapes import Uninitialised
from txl_dist.models.transformer_xl import TransformerXL

LANES, VOCAB = 3, 200
ADAPTIVE = {"cutoffs": [50, 120], "div_val": 2}
VARIANTS = ["relative", "shaw", "absolute", "al_rfou"]


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def forward(products):
    return sum(product.forward for product in products)


def training(products):
    return sum(product.training for product in products)


def training_step(model):
    """A forward and a backward of a model with one softmax, which reads a full memory."""
    tokens = torch.zeros(LANES, model.config.tgt_len, dtype=torch.int64)
    lookback = torch.full_like(tokens, 1000)
    return lambda: model(batch(tokens, tokens, lookback), model.empty_memory(LANES))[0].mean().backward()


@pytest.mark.parametrize("mem_len", [0, 11])
@pytest.mark.parametrize("attention", VARIANTS)
def test_a_layer(make_config, attention, mem_len):
    config = make_config(attention=attention, mem_len=mem_len)
    model = TransformerXL(config, VOCAB)
    lookback = torch.zeros(LANES, config.tgt_len, dtype=torch.int64)
    carry = torch.zeros(LANES, config.tgt_len, config.d_model), lookback
    state = model.empty_memory(LANES)[0]
    products = model.layers[0].products(LANES, config)
    assert counted(lambda: model.layers[0](carry, state, model.shared(carry))) == forward(products)


def test_embedding_and_softmax_with_known_clusters(make_config):
    config = make_config(**ADAPTIVE)
    model = TransformerXL(config, VOCAB)
    tokens = torch.tensor([[0] * 4 + [60] * 2 + [150]] * LANES)
    in_cluster = [4 * LANES, 2 * LANES, LANES]
    hidden = torch.zeros(LANES, 7, 24, requires_grad=True)
    embedding = model.embedding.products(in_cluster)
    softmax = model.softmax.products([7 * LANES, *in_cluster[1:]])
    assert counted(lambda: model.embedding(tokens)) == forward(embedding)
    assert counted(lambda: model.softmax(hidden, tokens)) == forward(softmax)
    assert counted(lambda: model.embedding(tokens).sum().backward()) == training(embedding)
    assert counted(lambda: model.softmax(hidden, tokens).sum().backward()) == training(softmax)


def test_a_whole_model_with_one_softmax(make_config):
    config = make_config()
    model = TransformerXL(config, VOCAB)
    tokens = torch.zeros(LANES, 7, dtype=torch.int64)
    by_part = model.flops(LANES, config.tgt_len)
    assert counted(lambda: model(batch(tokens, tokens, tokens), model.empty_memory(LANES))) == sum(by_part)
    assert len(by_part) == config.n_layer + 2


@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize("mem_len, same_length", [(0, False), (3, False), (3, True), (11, False), (11, True)])
@pytest.mark.parametrize("attention", VARIANTS)
def test_a_training_step(make_config, attention, mem_len, same_length, pre_lnorm):
    """Every operation that runs is counted; the model needs only those of pairs that the mask leaves visible."""
    config = make_config(attention=attention, mem_len=mem_len, same_length=same_length, pre_lnorm=pre_lnorm)
    model = TransformerXL(config, VOCAB)
    products = sum(model.products(LANES, config.tgt_len), [])
    with FlopCounterMode(display=False) as counter:
        training_step(model)()
    runs = counter.get_total_flops()
    assert runs == training(products)

    of_scores = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    lookback = torch.full((LANES, config.tgt_len), mem_len - 1 if same_length else 1000)
    pairs = int(AttentionWindow(lookback, mem_len).visible.sum())
    for_each_pair = 3 if attention in ("relative", "shaw") else 2  # content, values, position
    seen = 3 * for_each_pair * 2 * config.n_head * config.d_head * pairs * config.n_layer  # backward is twice a forward
    assert model.training_flops(LANES, config.tgt_len) == pytest.approx(runs - of_scores + seen, rel=1e-12)


def test_recomputation_is_not_counted_as_the_models(make_config):
    config = make_config()
    model = TransformerXL(config, VOCAB, Runtime(activation_checkpointing=True))
    tokens = torch.zeros(LANES, config.tgt_len, dtype=torch.int64)
    runs = counted(lambda: model(batch(tokens, tokens, tokens), model.empty_memory(LANES))[0].mean().backward())
    products = sum(model.products(LANES, config.tgt_len), [])
    assert runs > training(products) > model.training_flops(LANES, config.tgt_len)


def test_lanes_cost_alike_but_share_r(make_config):
    config = make_config()
    model = TransformerXL(config, VOCAB)
    one, two, three = (model.training_flops(lanes, config.tgt_len) for lanes in (1, 2, 3))
    assert three - two == two - one
    r = 2 * (2 * config.d_model * 20 * (11 + 7 + 1)) * config.n_layer  # a forward and one gradient
    assert 2 * one - two == r


@pytest.mark.parametrize(
    "sizes, vocab_size, lanes, projections, attention, head",
    [
        # wt103_large and enwik8_large; GFLOP per token, counted by hand: products of each token with weights of the
        # layers (those of the memory's keys and values twice, the others three times), attention, and the softmax, of
        # clusters the first. The rest (r, the rare clusters) is less than a hundredth.
        (
            {"n_layer": 18, "d_model": 1024, "n_head": 16, "d_head": 64, "d_inner": 4096, "tgt_len": 384}
            | {"mem_len": 384, "div_val": 4, "cutoffs": [20_000, 40_000, 200_000]},
            267_735,
            128,
            18 * (3 * (2 * 4 * 1024**2 + 4 * 1024 * 4096) + 2 * 4 * 1024**2) / 1e9,
            18 * 3 * 3 * 2 * 1024 * (384 + 385 / 2) / 1e9,
            3 * 2 * 1024 * (20_003 + 1024) / 1e9,
        ),
        (
            {"n_layer": 24, "d_model": 1024, "n_head": 8, "d_head": 128, "d_inner": 3072, "tgt_len": 768}
            | {"mem_len": 768},
            257,
            64,
            24 * (3 * (2 * 4 * 1024**2 + 4 * 1024 * 3072) + 2 * 4 * 1024**2) / 1e9,
            24 * 3 * 3 * 2 * 1024 * (768 + 769 / 2) / 1e9,
            3 * 2 * 1024 * 257 / 1e9,
        ),
    ],
)
def test_the_papers_large_models(make_config, sizes, vocab_size, lanes, projections, attention, head):
    config = make_config(**sizes)
    with torch.device("meta"), Uninitialised():
        model = TransformerXL(config, vocab_size)
    a_token = model.training_flops(lanes, config.tgt_len) / (lanes * config.tgt_len) / 1e9
    assert a_token == pytest.approx(projections + attention + head, rel=1e-2)


def test_zipf_shares_add_up():
    borders = [0, 20_000, 40_000, 200_000, 267_735]
    shares = [zipf_share(start, end, 267_735) for start, end in zip(borders, borders[1:], strict=False)]
    assert sum(shares) == pytest.approx(1) and shares[0] > 0.75 > 0.1 > shares[-1]
