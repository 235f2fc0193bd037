"""Counted operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from txl_dist.models.flops import embedding_flops, flops, layer_flops, softmax_flops, zipf_share
from txl_dist.models.transformer_xl import TransformerXL

LANES, VOCAB = 3, 200
ADAPTIVE = {"cutoffs": [50, 120], "div_val": 2}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("mem_len", [0, 11])
@pytest.mark.parametrize("attention", ["relative", "shaw", "absolute", "al_rfou"])
def test_a_layer(make_config, attention, mem_len):
    config = make_config(attention=attention, mem_len=mem_len)
    model = TransformerXL(config, VOCAB)
    hidden = torch.zeros(LANES, config.tgt_len, config.d_model)
    encoding, visible = model.surroundings(hidden, torch.zeros(LANES, config.tgt_len, dtype=torch.int64))
    memory = torch.zeros(LANES, mem_len, config.d_model)
    assert counted(lambda: model.layers[0](hidden, memory, encoding, visible)) == layer_flops(config, LANES)


def test_embedding_and_softmax_with_known_members(make_config):
    config = make_config(**ADAPTIVE)
    model = TransformerXL(config, VOCAB)
    tokens = torch.tensor([[0] * 4 + [60] * 2 + [150]] * LANES)
    members, sizes = [4 * LANES, 2 * LANES, LANES], [50, 70, 80]
    hidden = torch.zeros(LANES, 7, 24)
    assert counted(lambda: model.embedding(tokens)) == embedding_flops(config, members)
    assert counted(lambda: model.softmax(hidden, tokens)) == softmax_flops(config, sizes, [7 * LANES, *members[1:]])


def test_a_whole_model_with_one_softmax(make_config):
    config = make_config()
    model = TransformerXL(config, VOCAB)
    tokens = torch.zeros(LANES, 7, dtype=torch.int64)
    whole = counted(lambda: model(tokens, tokens, tokens, model.empty_memory(LANES)))
    assert whole == sum(flops(config, VOCAB, LANES)) and len(flops(config, VOCAB, LANES)) == config.n_layer + 2


def test_zipf_shares_add_up():
    borders = [0, 20_000, 40_000, 200_000, 267_735]
    shares = [zipf_share(start, end, 267_735) for start, end in zip(borders, borders[1:], strict=False)]
    assert sum(shares) == pytest.approx(1) and shares[0] > 0.75 > 0.1 > shares[-1]
