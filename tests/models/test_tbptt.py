"""Truncated backpropagation through time: gradients flow through the states between the segments of a step."""

import pytest
import torch

from tests.batches import batch
from tests.other_package.other_models.recurrent import Recurrent, RecurrentConfig
from txl_dist.models.base import Runtime
from txl_dist.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.transformer_xl import TransformerXL

LANES, LENGTH, PARTS, VOCAB = 3, 4, 3, 30
SHAPE = (LANES, LENGTH * PARTS)
TOKENS, TARGETS = (torch.randint(VOCAB, SHAPE, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
LOOKBACK = torch.arange(LENGTH * PARTS).expand(SHAPE)


def build(kind, config, **runtime):
    """A model in float64 whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    model = kind(config, VOCAB, Runtime(**runtime)).double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.3)
    return model


def recurrent(dropout=0.0, **runtime):
    config = RecurrentConfig(name="recurrent", n_layer=2, d_model=8, tgt_len=LENGTH, dropout=dropout)
    return build(Recurrent, config, **runtime)


def gated_delta_net(dropout=0.0, **runtime):
    sizes = {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_value": 4, "d_conv": 3, "d_inner": 12}
    rest = {"tgt_len": LENGTH, "dropout": dropout, "tie_weights": True, "init_std": 0.02, "norm_eps": 1e-6}
    return build(GatedDeltaNet, GatedDeltaNetConfig(name="gated_delta_net", **sizes, **rest), **runtime)


every_recurrence = pytest.mark.parametrize("recurrence", [recurrent, gated_delta_net])


def read(model, begin=0, end=LENGTH * PARTS, memory=None, noise=None):
    part = (slice(None), slice(begin, end))
    memory = model.empty_memory(LANES) if memory is None else memory
    return model(batch(TOKENS[part], TARGETS[part], LOOKBACK[part]), memory, noise)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_recurrence
def test_segments_from_an_empty_state_are_one_long_segment(recurrence):
    """Losses, gradients and states."""
    several, one = recurrence(tbptt=PARTS), recurrence()
    results = [read(model) for model in (several, one)]
    for losses, _ in results:
        losses.mean().backward()
    assert_near(results[0], results[1])
    assert_near(gradients(several), gradients(one))


def test_without_it_gradients_end_at_a_segment():
    several, one = recurrent(tbptt=PARTS), recurrent()
    read(several)[0].mean().backward()
    memory = None
    losses = []
    for start in range(0, LENGTH * PARTS, LENGTH):
        nats, memory = read(one, start, start + LENGTH, memory)
        losses.append(nats)
    losses = torch.cat(losses, dim=1)
    losses.mean().backward()
    assert_near(losses, read(several)[0])
    gate = "layers.0.gate.weight"
    assert not torch.allclose(gradients(several)[gate], gradients(one)[gate], rtol=1e-3)


def test_a_memory_that_is_detached_by_definition_stays_so(make_config):
    """Transformer-XL: three segments of a step are three segments whose gradients are added up."""
    config = make_config(tgt_len=LENGTH, mem_len=6)
    several, one = build(TransformerXL, config, tbptt=PARTS), build(TransformerXL, config)
    read(several)[0].sum().backward()
    memory = None
    for start in range(0, LENGTH * PARTS, LENGTH):
        nats, memory = read(one, start, start + LENGTH, memory)
        nats.sum().backward()
    assert_near(gradients(several), gradients(one))


@every_recurrence
def test_recomputed_segments_have_the_same_gradients(recurrence):
    """Dropout included, which is another one in each segment."""
    noise = Noise.of_step(1, 0, range(LANES))
    found = []
    for recompute in (False, True):
        model = recurrence(0.3, tbptt=PARTS, activation_checkpointing=recompute)
        read(model, noise=noise)[0].mean().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_recomputation_keeps_the_states_between_segments_alone():
    """So that memory of activations does not grow with their number but by those."""
    kept = {}
    for parts in (1, PARTS):
        model = recurrent(tbptt=PARTS, activation_checkpointing=True) if parts > 1 else recurrent()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            read(model, 0, LENGTH * parts)
        kept[parts] = sum(sizes)
    assert kept[PARTS] < 0.5 * kept[1]


@every_recurrence
def test_a_state_that_is_returned_has_no_graph(recurrence):
    for model in (recurrence(tbptt=PARTS), recurrence()):
        _, memory = read(model)
        assert not any(value.requires_grad for state in memory for value in state.values())


def test_evaluation_reads_as_it_always_does():
    model = recurrent(tbptt=PARTS).eval()
    losses, _ = read(model, 0, 5)
    assert_near(losses, read(recurrent().eval(), 0, 5)[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (["engine.pipeline_stages=2"], "engine.pipeline_stages=2: a pipeline has the segments of a lane in flight"),
        (["train.loss=second_half"], "train.loss=second_half: train.tbptt=2 scores all positions"),
        (["objective=classification"], "train.tbptt=2: is for objective=causal_lm"),
    ],
)
def test_what_does_not_go_with_it_is_named(run, small, tmp_path, options, message):
    given = [*small, "train.tbptt=2", *options, f"run.dir={tmp_path / 'run'}"]
    assert message in run("txl_dist.train", *given, expect=2).stderr


def test_another_number_of_segments_is_other_lanes(run, small, tmp_path):
    """A run that was started without it has one."""
    given = [*small, f"run.dir={tmp_path / 'run'}"]
    run("txl_dist.train", *given, "train.stop_at=10")
    refused = run("txl_dist.train", *given, "train.tbptt=2", expect=2).stderr
    assert "train.tbptt=2: the run in" in refused and "was started with 1, and its memory belongs" in refused
    run("txl_dist.train", *given, "train.tbptt=2", "run.on_lane_change=reset_memory")
