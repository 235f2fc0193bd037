"""Losses of single tokens, each in a context of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.batches import batch
from txl_dist.evaluation.likelihood import losses_in_context
from txl_dist.models.transformer_xl import TransformerXL

EOS, VOCAB = 0, 30


@pytest.fixture(scope="module")
def stream():
    return np.random.default_rng(0).integers(1, VOCAB, 40)


def build(make_config, **options):
    torch.manual_seed(0)
    return TransformerXL(make_config(**options), VOCAB).double().eval()


def by_hand(model, stream, position, context, start=0, starts=()):
    """Compute one loss by one forward over its context; before the first token of a document stands <eos>."""
    with_eos = [EOS, *stream]
    for begin in starts:
        with_eos[begin] = EOS
    begin = max(start, position - context + 1)
    inputs = torch.tensor([with_eos[begin : position + 1]])
    memory = [{"memory": torch.zeros(1, 0, model.config.d_model, dtype=torch.float64)} for _ in model.layers]
    config = model.config
    model.config = replace(config, mem_len=0)
    with torch.no_grad():
        log_probs, _ = model(batch(inputs, None, torch.arange(inputs.size(1))[None]), memory)
    model.config = config
    return -log_probs[0, -1, stream[position]].item()


@pytest.mark.parametrize("attention, mem_len", [("relative", 0), ("relative", 25), ("shaw", 25), ("absolute", 0)])
@pytest.mark.parametrize("context", [1, 5, 7, 20])
def test_a_token_sees_its_context_and_no_more(make_config, stream, attention, mem_len, context):
    model = build(make_config, attention=attention, mem_len=mem_len)
    positions = np.array([0, 1, 4, 19, 20, 39])
    losses = losses_in_context(model, stream, positions, context, EOS)
    expected = [by_hand(model, stream, position, context) for position in positions]
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reset, begins", [("document", [0, 10, 10, 13, 13]), ("never", [0] * 5)])
def test_a_context_ends_with_its_document_where_memory_does(make_config, stream, reset, begins):
    starts, model = np.array([0, 10, 13, 40]), build(make_config)
    positions = [9, 10, 12, 13, 30]
    losses = losses_in_context(model, stream, np.array(positions), 6, EOS, starts, reset)
    pairs = zip(positions, begins, strict=True)
    expected = [by_hand(model, stream, position, 6, begin, [0, 10, 13]) for position, begin in pairs]
    assert losses == pytest.approx(expected, rel=1e-12)
