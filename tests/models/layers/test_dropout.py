"""Dropout: it drops what it should, where it should, and keeps the mean; and its masks belong to lanes."""

import pytest
import torch

from tests.batches import batch
from txl_dist.models.layers.dropout import Dropout, LaneDropout, Noise, WordDropout, assign_places, factors, mixed
from txl_dist.models.transformer_xl import TransformerXL

torch.set_num_threads(1)

VOCAB = 40
NOISE = Noise.of_step(1, 0, range(3))
ONES = torch.ones(3, 7, 50)
KINDS = ["dropout", "dropatt", "dropout_words", "dropout_input", "dropout_ff", "dropout_output"]


def test_numbers_are_dropped_or_scaled_and_keep_their_mean():
    dropped = Dropout(0.4, False)(torch.ones(4, 500, 100), Noise.of_step(1, 0, range(4)))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    kept = (dropped > 0).double()
    assert abs(kept.mean() - 0.6) < 0.005  # ten times the deviation of 200,000
    for dim, size in enumerate(kept.shape):  # neighbours in lanes, positions and width are independent
        both = kept.narrow(dim, 0, size - 1) * kept.narrow(dim, 1, size - 1)
        assert abs(both.mean() - 0.36) < 0.005


def test_the_gradient_is_dropped_alike():
    x = torch.ones(3, 7, 50, requires_grad=True)
    dropped = Dropout(0.4, False)(x, NOISE)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_variational_dropout_drops_the_same_at_all_positions():
    dropped = Dropout(0.4, True)(ONES, NOISE)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])  # each lane has its own
    single = Dropout(0.4, False)(ONES, NOISE)
    assert not torch.equal(single, single[:, :1].expand_as(single))


def test_nothing_is_dropped_in_evaluation_and_nothing_without_noise_in_training():
    dropout = Dropout(0.4, False)
    with pytest.raises(AssertionError, match="noise"):
        dropout(ONES, None)
    assert dropout.eval()(ONES, None) is ONES and Dropout(0.0, False)(ONES, None) is ONES


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_any_share_can_be_dropped(share):
    dropped = factors(NOISE.seeds, [1001], share, torch.float32)
    assert abs((dropped == 0).float().mean() - share) < 0.1


@pytest.mark.parametrize("variational", [False, True])
def test_a_mask_depends_on_lane_step_seed_and_place_alone(variational):
    def masks(lanes, step=0, seed=1, place=5):
        dropout = Dropout(0.5, variational)
        dropout.place.fill_(place)
        return list(dropout(torch.ones(len(lanes), 7, 50), Noise.of_step(seed, step, lanes)))

    zero, one, two = masks([0, 1, 2])
    for same in (masks([2, 0])[0], masks([7, 2])[1], masks([2])[0]):
        assert torch.equal(same, two)
    others = [zero, one, masks([2], step=1)[0], masks([2], seed=2)[0], masks([2], place=6)[0]]
    assert not [other for other in others if torch.equal(other, two)]
    rows = Noise.of_step(1, 0, range(9)).of_rows(torch.tensor([4, 2]))
    assert torch.equal(rows.seeds, Noise.of_step(1, 0, [4, 2]).seeds)


def test_what_all_lanes_share_is_dropped_alike():
    shared = [Noise.of_step(1, 0, lanes).of_all_lanes() for lanes in ([0, 1], [7])]
    one, two = (Dropout(0.5, False)(torch.ones(1, 7, 50), noise) for noise in shared)
    assert torch.equal(one, two) and not torch.equal(one, Dropout(0.5, False)(torch.ones(1, 7, 50), NOISE.of_rows([0])))


def test_a_dropped_word_is_dropped_wherever_it_stands():
    tokens = torch.arange(VOCAB).repeat(3, 2)
    dropout = WordDropout(0.5)
    dropped = dropout(torch.ones(3, 2 * VOCAB, 8), tokens, NOISE)[..., 0]
    assert torch.equal(dropped[:, :VOCAB], dropped[:, VOCAB:])
    assert dropped.unique().tolist() == [0.0, 2.0] and 30 < (dropped[:, :VOCAB] == 0).sum() < 90
    assert not torch.equal(dropped[0], dropped[1])
    one = dropout(torch.ones(1, 5, 8), tokens[1:2, 3:8], NOISE.of_rows(slice(1, 2)))[0, :, 0]
    assert torch.equal(one, dropped[1, 3:8])
    kept = WordDropout(0.1)(torch.ones(1, 10**5, 1), torch.arange(10**5)[None], NOISE.of_rows(slice(1))) > 0
    assert abs(kept.double().mean() - 0.9) < 0.01


def test_hashes_spread():
    """Each bit of a hash is set for half of the numbers, and changes with every bit of them for half of those."""
    numbers = torch.arange(-2000, 2000)
    bits = torch.arange(64)
    for hashes in (mixed(numbers), *(mixed(numbers) ^ mixed(numbers ^ (1 << bit)) for bit in range(63))):
        share = (hashes[:, None] >> bits & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 0.06
    assert len(mixed(numbers).unique()) == 4000


def test_each_kind_has_its_module_and_each_module_a_place_of_its_own(make_config):
    kinds = dict(zip(KINDS, (0.1, 0.15, 0.2, 0.25, 0.3, 0.35), strict=True))
    model = TransformerXL(make_config(n_layer=1, **kinds), VOCAB)
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, LaneDropout)}
    assert {name: module.p for name, module in dropouts.items()} == {
        "dropout": 0.1,
        "embedding.word_dropout": 0.2,
        "input_dropout": 0.25,
        "output_dropout": 0.35,
        "layers.0.attention.dropatt": 0.15,
        "layers.0.attention.dropout": 0.1,
        "layers.0.feed_forward.inner_dropout": 0.3,
        "layers.0.feed_forward.dropout": 0.1,
    }
    assert len({int(module.place) for module in dropouts.values()}) == len(dropouts)
    assert not [name for name in model.state_dict() if "place" in name]
    default = TransformerXL(make_config(dropout=0.25), VOCAB).modules()
    assert {module.p for module in default if isinstance(module, Dropout)} == {0.25}


@pytest.mark.parametrize("variational", [False, True])
def test_a_lane_is_dropped_alike_in_every_micro_batch(make_config, variational):
    """Outputs and memories of two segments, of all kinds of dropout together."""
    model = TransformerXL(make_config(variational=variational, **dict.fromkeys(KINDS, 0.3)), VOCAB).double()
    tokens = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
    lookback = torch.arange(7).expand(4, 7)

    def read(rows):
        memory = model.empty_memory(len(rows))
        for step in range(2):
            noise = Noise.of_step(3, step, range(4)).of_rows(torch.tensor(rows))
            log_probs, memory = model(batch(tokens[rows], None, lookback[rows] + 7 * step), memory, noise)
        states = [state["memory"] for state in memory]
        return torch.stack([values.flatten(1).sum(1) for values in [log_probs, *states]], 1)

    together = read([0, 1, 2, 3])
    apart = torch.cat([read([0]), read([1, 2]), read([3])])
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(
        read([1]), model.eval()(batch(tokens[[1]], None, lookback[[1]]), model.empty_memory(1))[0].sum()
    )


def test_places_are_those_of_the_whole_model(make_config):
    model = TransformerXL(make_config(dropout=0.1), VOCAB)
    places = [int(layer.attention.dropout.place) for layer in model.layers]
    model.layers = model.layers[1:]  # as a pipeline does
    assert [int(layer.attention.dropout.place) for layer in model.layers] == places[1:]
    assign_places(model)
    assert int(model.layers[0].attention.dropout.place) == places[0]


def test_a_kind_that_drops_everything_shows_where_it_is_applied(make_config):
    """With all inputs dropped no token matters; with all outputs dropped no hidden state does."""
    tokens, lookback = torch.arange(7)[None], torch.arange(7)[None]
    noise = NOISE.of_rows(slice(1))
    for kind in ("dropout_input", "dropout_output"):
        torch.manual_seed(0)
        model = TransformerXL(make_config(**{kind: 0.999999}), VOCAB)
        one, _ = model(batch(tokens, None, lookback), model.empty_memory(1), noise)
        two, _ = model(batch(tokens + 9, None, lookback), model.empty_memory(1), noise)
        evaluated, _ = model.eval()(batch(tokens, None, lookback), model.empty_memory(1))
        assert torch.equal(one, two) and not torch.equal(evaluated, one)


def test_the_feed_forward_drops_its_inner_numbers(make_config):
    """With (almost) all of the inner numbers dropped, what the sublayer adds is the outer bias alone."""
    torch.manual_seed(0)
    feed_forward = TransformerXL(make_config(dropout_ff=0.999999, pre_lnorm=True), VOCAB).layers[0].feed_forward
    hidden = torch.randn(3, 7, 24)
    torch.testing.assert_close(feed_forward(hidden, NOISE), hidden + feed_forward.outer.bias)
    assert not torch.allclose(feed_forward.eval()(hidden, None), hidden + feed_forward.outer.bias)
