"""Dropout and its kinds: they drop what they should, where they should, and keep the mean."""

import pytest
import torch

from txl_dist.models.layers.dropout import Dropout
from txl_dist.models.transformer_xl import TransformerXL

VOCAB = 40


def test_variational_dropout_drops_the_same_at_all_positions():
    torch.manual_seed(0)
    ones = torch.ones(3, 7, 50)
    dropped = Dropout(0.4, True)(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])  # each lane has its own
    assert abs(torch.stack([Dropout(0.4, True)(ones) for _ in range(200)]).mean().item() - 1) < 0.03
    assert torch.equal(Dropout(0.4, True).eval()(ones), ones)
    single = Dropout(0.4, False)(ones)
    assert not torch.equal(single, single[:, :1].expand_as(single))


def test_a_dropped_word_is_dropped_wherever_it_stands(make_config):
    torch.manual_seed(0)
    model = TransformerXL(make_config(dropout_words=0.5), VOCAB)
    tokens = torch.arange(VOCAB).repeat(1, 2)
    embedded = model.embedding(tokens)[0]
    gone = embedded.abs().sum(-1) == 0
    assert torch.equal(embedded[:VOCAB], embedded[VOCAB:]) and 8 < gone[:VOCAB].sum() < 32
    kept = model.eval().embedding(tokens)[0]
    torch.testing.assert_close(embedded[~gone], 2 * kept[~gone])


def probabilities(model):
    """The probability of each dropout of a model, by the module's name."""
    return {name: module.p for name, module in model.named_modules() if isinstance(module, Dropout)}


def test_each_kind_has_its_module(make_config):
    kinds = {"dropout": 0.1, "dropout_input": 0.2, "dropout_ff": 0.3, "dropout_output": 0.4}
    model = TransformerXL(make_config(n_layer=1, **kinds), VOCAB)
    assert probabilities(model) == {
        "dropout": 0.1,
        "input_dropout": 0.2,
        "output_dropout": 0.4,
        "layers.0.attention.dropout": 0.1,
        "layers.0.feed_forward.inner_dropout": 0.3,
        "layers.0.feed_forward.dropout": 0.1,
    }
    assert set(probabilities(TransformerXL(make_config(dropout=0.25), VOCAB)).values()) == {0.25}


def test_a_kind_that_drops_everything_shows_where_it_is_applied(make_config):
    """With all inputs dropped no token matters; with all outputs dropped no hidden state does."""
    tokens, lookback = torch.arange(7)[None], torch.arange(7)[None]
    for kind in ("dropout_input", "dropout_output"):
        torch.manual_seed(0)
        model = TransformerXL(make_config(**{kind: 0.999999}), VOCAB)
        one, _ = model(tokens, None, lookback, model.empty_memory(1))
        two, _ = model(tokens + 9, None, lookback, model.empty_memory(1))
        evaluated, _ = model.eval()(tokens, None, lookback, model.empty_memory(1))
        assert torch.equal(one, two) and not torch.equal(evaluated, one)


def test_the_feed_forward_drops_its_inner_numbers(make_config):
    """With (almost) all of the inner numbers dropped, what the sublayer adds is the outer bias alone."""
    torch.manual_seed(0)
    feed_forward = TransformerXL(make_config(dropout_ff=0.999999, pre_lnorm=True), VOCAB).layers[0].feed_forward
    hidden = torch.randn(3, 7, 24)
    torch.testing.assert_close(feed_forward(hidden), hidden + feed_forward.outer.bias)
    assert not torch.allclose(feed_forward.eval()(hidden), hidden + feed_forward.outer.bias)
