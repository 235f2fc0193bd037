"""What is asked of every architecture in conf/model/, dropout on; and that models which break it are found."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.batches import batch
from tests.other_package.other_models.recurrent import Recurrent
from txl_dist.config.schema import ClassificationConfig
from txl_dist.data.examples import ExampleSource
from txl_dist.data.format import Examples
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.models import registry
from txl_dist.models.base import Runtime
from txl_dist.models.layers.dropout import LaneDropout, Noise
from txl_dist.models.reformer import Reformer
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.objectives.classification import Classification

torch.set_num_threads(1)

TESTS = Path(__file__).parents[1]
CONFIGS = sorted([*TESTS.parent.glob("conf/model/*.yaml"), *TESTS.glob("other_package/*/conf/model/*.yaml")])
CONFIGS = [path for path in CONFIGS if path.stem != "init_from"]  # which is no architecture
SMALL = {"n_layer": 3, "d_model": 24, "n_head": 2, "d_head": 10, "d_inner": 50, "tgt_len": 5, "mem_len": 12}
LANES, VOCAB, LENGTH = 4, 40, 12
TOKENS = torch.randint(VOCAB, (LANES, LENGTH), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(VOCAB, (LANES, LENGTH), generator=torch.Generator().manual_seed(1))
LOOKBACK = torch.arange(LENGTH).expand(LANES, LENGTH)
ALL = slice(LANES)


def find(path):
    """The class of the architecture of a file in conf/model/."""
    return Recurrent if path.stem == "recurrent" else registry.find(OmegaConf.load(path).name)


# Other sizes of architectures that need them.
SIZES = {"reformer": {"axial_shape": [4, 4], "axial_widths": [8, 16], "n_buckets": 4, "n_hashes": 3, "ff_chunk_len": 3}}
SIZES["reformer"] |= {"lsh_chunk_len": 4, "local_chunk_len": 4, "mem_len": 0}
SIZES["gated_delta_net"] = {"d_value": 7, "mem_len": 0}


def make_config(path, **changes):
    """The config of a file in conf/model/, small, with every kind of dropout."""
    config_class = find(path).Config
    values = OmegaConf.to_container(OmegaConf.load(path))
    drops = {field.name: 0.3 for field in fields(config_class) if field.name.startswith(("dropout", "dropatt"))}
    small = {key: value for key, value in SMALL.items() if key in values}
    return config_class(**values | small | drops | SIZES.get(path.stem, {}) | changes)


def build(model_class, config, **runtime):
    """A model in float64 whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    model = model_class(config, VOCAB, Runtime(**runtime)).double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.3)
    return model


def read(model, lengths=(5, 4, 3), rows=ALL, noisy=True, memory=None, of_text=False):
    """Read lanes in segments, which may be pieces of one text; return the losses, and the memory at the end."""
    lanes = len(TOKENS[rows])
    memory = model.empty_memory(lanes) if memory is None else memory
    losses = []
    start = 0
    for step, length in enumerate(lengths):
        part = (rows, slice(start, start + length))
        noise = Noise.of_step(1, step, range(LANES)).of_rows(rows) if noisy else None
        position = {"position": LOOKBACK[part]} if of_text else {}
        nats, memory = model(batch(TOKENS[part], TARGETS[part], LOOKBACK[part]) | position, memory, noise)
        losses.append(nats)
        start += length
    return torch.cat(losses, dim=1), memory


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def ask_repetition(model_class, config):
    """A forward writes nothing: the same input gives the same bits, whatever was read in between."""
    model = build(model_class, config)
    first, memory = read(model)
    read(model, rows=slice(1, 3))
    again, same = read(model)
    torch.testing.assert_close((first, memory), (again, same), rtol=0, atol=0)
    assert not any(value.requires_grad for state in memory for value in state.values())


def ask_lanes(model_class, config):
    """A lane is the same whoever it is computed with: losses, states and dropout."""
    model = build(model_class, config)
    losses, memory = read(model)
    for rows in (slice(0, 1), slice(1, 4), torch.tensor([3, 1])):
        some_losses, some_memory = read(model, rows=rows)
        assert_near(some_losses, losses[rows])
        assert_near(some_memory, [{name: value[rows] for name, value in state.items()} for state in memory])


def ask_segments(model_class, config):
    """Segments with a memory of all before them, or a text read piece by piece, are one pass."""
    model = build(model_class, config).eval()
    expected, _ = read(model, [LENGTH], noisy=False)
    for lengths in ([5, 4, 3], [1] * LENGTH):
        if config.lookback:
            assert_near(read(model, lengths, noisy=False)[0], expected)
        context = model.empty_context(LANES)
        assert_near(read(model, lengths, noisy=False, memory=context, of_text=True)[0], expected)


def ask_caches(model_class, config):
    """Evaluation by caches gives the numbers of evaluation by memories."""
    model = build(model_class, config).eval()
    assert_near(read(model, noisy=False, memory=model.empty_cache(LANES))[0], read(model, noisy=False)[0])


def ask_activation_checkpointing(model_class, config):
    """Recomputed activations give the same gradients to the bit, those of reversed layers nearly so."""
    gradients = []
    for recompute in (False, True):
        model = build(model_class, config, activation_checkpointing=recompute)
        read(model)[0].sum().backward()
        # Reading from left to right may leave parameters out, such as those of marked segments.
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    tolerance = 1e-10 if issubclass(model_class, Reformer) else 0
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
    assert all(gradient.any() for gradient in gradients[0].values()) and len(gradients[0]) > config.n_layer


def ask_stages(model_class, config):
    """Cut anywhere, the stages together are the whole."""
    losses, memory = read(build(model_class, config), [LENGTH])
    noise = Noise.of_step(1, 0, range(LANES))
    for cut in range(config.n_layer + 1):
        stages = [build(model_class, config) for _ in range(2)]
        stages[0].keep_stage(range(cut), is_first=True, is_last=False)
        stages[1].keep_stage(range(cut, config.n_layer), is_first=False, is_last=True)
        batch = {"inputs": TOKENS, "lookback": LOOKBACK}
        carry = stages[0].embed(stages[0].inputs_of(batch), noise)
        carry, lower = stages[0].through_layers(carry, stages[0].empty_memory(LANES), noise)
        floats, *integers = carry
        assert floats.is_floating_point() and all(field.dtype == torch.int64 for field in integers)
        carry, upper = stages[1].through_layers(carry, stages[1].empty_memory(LANES), noise)
        assert_near(stages[1].predict(carry, TARGETS, noise), losses)
        assert_near([*lower, *upper], memory)


def ask_state_shapes(model_class, config):
    """States have the shapes that the model announces, before and after a segment."""
    model = build(model_class, config)
    announced = [{name: (LANES, *shape) for name, shape in shapes.items()} for shapes in model.state_shapes()]
    for memory in (model.empty_memory(LANES), read(model)[1]):
        assert [{name: tuple(value.shape) for name, value in state.items()} for state in memory] == announced
    assert len(announced) == config.n_layer


def ask_places(model_class, config):
    """Every dropout has a place of its own, so that no two drop alike."""
    modules = build(model_class, config).modules()
    places = [int(module.place) for module in modules if isinstance(module, LaneDropout)]
    assert len(set(places)) == len(places) and 0 not in places


def ask_cost(model_class, config):
    """The operations that the model counts are those that torch counts, in a forward and in a backward."""
    model = build(model_class, config)
    with FlopCounterMode(display=False) as counter:
        losses, _ = read(model, [config.tgt_len])
        forward = counter.get_total_flops()
        losses.mean().backward()
    products = [product for part in model.products(LANES, config.tgt_len) for product in part]
    assert forward == sum(model.flops(LANES, config.tgt_len)) == sum(product.forward for product in products)
    as_it_runs = sum(product.training + product.forward * product.recomputed for product in products)
    assert counter.get_total_flops() == as_it_runs


def build_task(model_class, config, **runtime):
    """A model with the head of a task of three classes, and the task."""
    examples = Examples(kind="labels", labels=["a", "b", "c"], pairs=False)
    task = Classification(ClassificationConfig("classification", None, 0.3), examples, BytesTokenizer())
    model = build(model_class, config, **runtime)
    model.replace_head(task.head(model).double())
    return model, task


def read_examples(model, task, length, noisy=True):
    """Read an example for each lane, all of one length, in segments of `length`; return what is said at their ends."""
    source = ExampleSource.of_texts([(tokens.numpy(), np.array([], np.int64)) for tokens in TOKENS % VOCAB])
    memory = model.empty_memory(LANES)
    for segment in task.one_pass(source, LANES, length, range(LANES)):
        fields = task.batch(segment)
        inputs = {"inputs": fields["inputs"] % VOCAB}  # the marks are none of this small vocabulary
        noise = Noise.of_step(1, segment.step, range(LANES)) if noisy else None
        result, memory = model(fields | inputs, memory, noise)
    return result


def ask_task(model_class, config):
    """With the head of a task padding has no effect, stages are the whole, and operations are as torch counts them."""
    length = LENGTH + 2  # with both marks
    model, task = build_task(model_class, config)
    with FlopCounterMode(display=False) as counter:
        whole = read_examples(model.train(), task, length)
    with model.reading_as(replace(config, tgt_len=length)):
        assert counter.get_total_flops() == sum(model.flops(LANES, task.num_targets(length)))
    for cut in range(config.n_layer + 1):
        stages = [build_task(model_class, config)[0] for _ in range(2)]
        stages[0].keep_stage(range(cut), is_first=True, is_last=False)
        stages[1].keep_stage(range(cut, config.n_layer), is_first=False, is_last=True)
        parts = Chain(*stages)
        assert_near(read_examples(parts, task, length), whole)
    if model_class is not Reformer:  # whose chunks begin with the segment, padding included
        model.eval()
        assert_near(
            read_examples(model, task, length + 3, noisy=False), read_examples(model, task, length, noisy=False)
        )


class Chain:
    """Two stages, called as a model is."""

    def __init__(self, first, last):
        self.stages = (first, last)

    def empty_memory(self, lanes):
        return [state for stage in self.stages for state in stage.empty_memory(lanes)]

    def __call__(self, fields, memory, noise):
        first, last = self.stages
        count = len(first.layers)
        carry, lower = first.through_layers(first.embed(first.inputs_of(fields), noise), memory[:count], noise)
        carry, upper = last.through_layers(carry, memory[count:], noise)
        return last.predict(carry, fields["targets"], noise), [*lower, *upper]


QUESTIONS = [
    ask_repetition,
    ask_lanes,
    ask_segments,
    ask_caches,
    ask_activation_checkpointing,
    ask_stages,
    ask_state_shapes,
    ask_places,
    ask_cost,
    ask_task,
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ask", QUESTIONS)
def test_every_architecture_keeps_the_contract(ask, path):
    ask(find(path), make_config(path))


@pytest.mark.parametrize("ask", QUESTIONS)
def test_a_hybrid_keeps_the_contract(ask):
    path = TESTS.parent / "conf/model/gated_delta_net.yaml"
    ask(find(path), make_config(path, layers=["delta", "attention"], mem_len=12))


@pytest.mark.parametrize("name", ["transformer_xl", "xlnet"])
def test_what_a_cache_keeps_of_the_distances_is_computed_once(name):
    path = TESTS.parent / f"conf/model/{name}.yaml"
    model = build(find(path), make_config(path)).eval()
    memory = model.empty_cache(LANES)
    flops = []
    for position in range(3):
        part = slice(None), slice(position, position + 1)
        with FlopCounterMode(display=False) as counter:
            _, memory = model(batch(TOKENS[part], None, LOOKBACK[part]), memory)
        flops.append(counter.get_total_flops())
    assert flops[0] > flops[1] == flops[2]


class StateOfAnotherLane(TransformerXL):
    """Writes each state under the lane after its own."""

    def through_layers(self, *args):
        carry, memory = super().through_layers(*args)
        return carry, [{name: value.roll(1, 0) for name, value in state.items()} for state in memory]


class HiddenState(TransformerXL):
    """Remembers something beside its memory."""

    past = 0.0

    def embed(self, *args):
        hidden, lookback = super().embed(*args)
        hidden = hidden + self.past
        self.past = 0.1 * float(hidden.detach().mean())
        return hidden, lookback


class CostOff(TransformerXL):
    """Forgets one product of the head."""

    def products(self, lanes, targets):
        *parts, _ = super().products(lanes, targets)
        return [*parts, []]


class DropoutByDraw(TransformerXL):
    """Drops what torch's generator says, which belongs to no lane."""

    def predict(self, carry, *args):
        hidden, lookback = carry
        return super().predict((F.dropout(hidden, 0.1, self.training), lookback), *args)


class DropoutByRow(TransformerXL):
    """Drops by the row within the micro-batch, as if it was the lane."""

    def embed(self, inputs, noise=None):
        by_row = noise and Noise.of_step(0, 0, range(len(inputs[0])))
        return super().embed(inputs, by_row)


class DropoutWithoutPlaces(TransformerXL):
    """Drops the same numbers in every layer."""

    def complete(self):
        self.initialise()


class CutOff(TransformerXL):
    """Forgets in a pipeline that its stages have other layers."""

    def keep_stage(self, layers, is_first, is_last):
        super().keep_stage(range(len(layers)), is_first, is_last)


class OtherStates(TransformerXL):
    """Remembers one token more than it announces."""

    def state_shapes(self):
        return [{"memory": (self.config.mem_len - 1, self.config.d_model)} for _ in self.layers]

    def empty_memory(self, lanes, device=None):
        with self.reading_as(replace(self.config, mem_len=self.config.mem_len + 1)):
            return super().empty_memory(lanes, device)


BROKEN = {
    StateOfAnotherLane: ask_lanes,
    HiddenState: ask_repetition,
    CostOff: ask_cost,
    DropoutByDraw: ask_repetition,
    DropoutByRow: ask_lanes,
    DropoutWithoutPlaces: ask_places,
    CutOff: ask_stages,
    OtherStates: ask_state_shapes,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_model_that_breaks_the_contract_is_found(broken):
    with pytest.raises(AssertionError):
        BROKEN[broken](broken, make_config(TESTS.parent / "conf/model/transformer_xl.yaml"))
