"""Run a micro-batch without numbers, and record what each part of a model keeps in memory and moves through it.

Tensors have shapes and no values: those of a GPU are on the meta device, those of a CPU are torch's fake ones, which
take the ways of a real CPU. Triton's kernels are not launched. What is recorded is what the model's own code does, so
an architecture needs nothing for it. Layers that repeat are run until their neighbours have been the same before.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from txl_dist.models import registry
from txl_dist.models.base import Batch, LanguageModel, Runtime
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers.dropout import HAS_TRITON, Noise
from txl_dist.objectives.base import Objective

META = torch.device("meta")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PartTrace:
    """What one part of a model (embedding, layer or head) does with one micro-batch; all in bytes.

    Attributes:
        parameters: the numbers of its parameters, by name; not bytes.
        carry: what it hands to the next part: its floats, and its integers.
        state: the memory of its lanes, once.
        state_held: of the new memory what is held anyway, because an activation is the same tensor.
        held: what it keeps in memory from its forward to its backward.
        forward_peak, backward_peak: the most that it has in memory in either, beyond what other parts hold and without
            the gradients of parameters.
        pending: gradients of parameters that it shares with a part before it, and that wait for those of that part.
        forward_moved, backward_moved: read and written by all operators but products of matrices.
        operators: how many are launched in both; not bytes. Those that return a view do not count.
    """

    parameters: dict[str, int]
    carry: tuple[int, int]
    state: int
    state_held: int
    held: int
    forward_peak: int
    backward_peak: int
    pending: int
    forward_moved: int
    backward_moved: int
    operators: int


class Recorder(TorchDispatchMode):
    """Record when storages on a device come and go, and how many bytes operators move, while it is entered.

    Attributes:
        phase: what is running now; changes of memory and bytes moved are recorded under it.
        changes: (phase, storage, bytes), less than 0 where it is freed.
        moved: bytes by phase.
        operators: how many have computed something, by phase.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.phase = 0
        self.changes: list[tuple[int, int, int]] = []
        self.moved: Counter[int] = Counter()
        self.operators: Counter[int] = Counter()
        self.known: dict[int, int] = {}  # number of each storage that is there

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._here([args, kwargs])
        for tensor in read:
            self._ignore(tensor)
        results = operator(*args, **(kwargs or {}))
        written = self._here(results)
        before = len(self.changes)
        for tensor in written:
            self._add(tensor)
        is_new = len(self.changes) > before
        if is_new or operator._schema.is_mutable:
            self.operators[self.phase] += 1
            if operator.overloadpacket not in flop_registry:
                self.moved[self.phase] += sum(map(num_bytes, [*read, *(written if is_new else [])]))
        return results

    def _here(self, values: Any) -> list[Tensor]:
        return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.device == self.device]

    def _ignore(self, tensor: Tensor) -> None:
        """Do not record a storage that was there before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = -1
            weakref.finalize(storage, self.known.pop, storage._cdata, None)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known and storage.nbytes():
            number = self.known[key] = len(self.changes)
            self.changes.append((self.phase, number, storage.nbytes()))
            weakref.finalize(storage, self._remove, key, number, storage.nbytes())

    def _remove(self, key: int, number: int, size: int) -> None:
        self.known.pop(key, None)
        self.changes.append((self.phase, number, -size))

    def number(self, tensor: Tensor) -> int:
        """Return under which number the storage of a tensor is recorded."""
        return self.known.get(tensor.untyped_storage()._cdata, -1)

    def levels(self, left_out: set[int]) -> dict[int, tuple[int, int, int]]:
        """Return for each phase how many bytes were there at its beginning, at most, and at its end."""
        levels: dict[int, tuple[int, int, int]] = {}
        counted = [(phase, size) for phase, number, size in self.changes if number not in left_out]
        before = 0
        for (phase, _), level in zip(counted, accumulate(size for _, size in counted), strict=True):
            start, most, _ = levels.get(phase, (before, before, before))
            levels[phase] = (start, max(most, level), level)
            before = level
        return levels


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor has in memory; what is expanded is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(sizes).numel() * tensor.element_size()


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Let Triton's kernels be called without effect: their arguments have no values."""
    if not HAS_TRITON:
        yield
        return
    from triton.runtime import JITFunction

    launch = JITFunction.run
    JITFunction.run = lambda *_, **__: None
    try:
        yield
    finally:
        JITFunction.run = launch


def build_model(
    config: ModelConfig, vocab_size: int, runtime: Runtime, dtype: torch.dtype, on_gpu: bool
) -> LanguageModel:
    """Build a model without values."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META if on_gpu else FakeTensorMode(allow_non_fake_inputs=True):
            return registry.build(config, vocab_size, runtime)
    finally:
        torch.set_default_dtype(usual)


def chain(model: LanguageModel) -> list[int]:
    """Return for each layer the number of the first one that is like it, and so is the one before it."""
    kinds = [repr(layer) + str([parameter.shape for parameter in layer.parameters()]) for layer in model.layers]
    neighbours = list(zip(["embedding", *kinds], kinds, strict=False))
    return [neighbours.index(pair) for pair in neighbours]


class Pass(NamedTuple):
    """What a forward and a backward have left to know of the parts that were run; in bytes.

    Attributes:
        carries: floats and integers behind embedding and layers.
        states, held_states: of each part; see PartTrace.
        gradients: the recorded storages that are parameters' gradients in the end.
    """

    carries: list[tuple[int, int]]
    states: list[int]
    held_states: list[int]
    gradients: set[int]


def trace(model: LanguageModel, objective: Objective, batch: Batch, on_gpu: bool) -> list[PartTrace]:
    """Return what embedding, layers and head do with a micro-batch.

    Args:
        model: of `build_model`.
        batch: of real numbers, on the CPU.
    """
    like = chain(model)
    layers = max(like) + 1  # of which so many are run
    recorder = Recorder(META if on_gpu else CPU)
    with no_launches():
        done = run(model, layers, objective, batch, recorder)
    levels = recorder.levels(done.gradients)
    parameters = part_parameters(model)

    def part_trace(part: int) -> PartTrace:
        start, most, end = levels[part]
        waiting, most_back, left = levels[backward(part)]
        return PartTrace(
            parameters=parameters[part],
            carry=done.carries[part],
            state=done.states[part],
            state_held=done.held_states[part],
            held=end - start,
            forward_peak=most - start,
            backward_peak=most_back - start - (waiting - end),
            pending=left - start - (waiting - end),
            forward_moved=recorder.moved[part],
            backward_moved=recorder.moved[backward(part)],
            operators=recorder.operators[part] + recorder.operators[backward(part)],
        )

    embedding, *layers_run, head = map(part_trace, range(layers + 2))
    of_layers = [replace(layers_run[first], parameters=parameters[part]) for part, first in enumerate(like, 1)]
    return [embedding, *of_layers, replace(head, parameters=parameters[-1])]


def backward(part: int) -> int:
    """Return the phase of a part's backward; that of its forward is its number."""
    return -1 - part


def run(model: LanguageModel, layers: int, objective: Objective, batch: Batch, recorder: Recorder) -> Pass:
    """Run embedding, the first `layers` and head forward and backward, and record it by phase."""
    memory = model.empty_memory(len(batch["inputs"]))
    seeds = next(model.parameters()).new_empty(len(batch["inputs"]) + 1, dtype=torch.int64)
    noise = Noise(*seeds.split([len(seeds) - 1, 1]))
    model.shared(model.embed(model.inputs_of(batch), noise), noise)  # what is computed once for all steps is there
    carries = []
    new_states: list[dict[int, int]] = [{}]  # of each part, by the number of the storage
    with recorder:
        carry = model.embed(model.inputs_of(batch), noise)
        shared = model.shared(carry, noise)
        for number, layer in enumerate(model.layers[:layers]):
            carries.append(carry)
            recorder.phase = number + 1
            carry, state = model.run_layer(layer, carry, memory[number], shared, noise)
            new_states.append({recorder.number(tensor): num_bytes(tensor) for tensor in tree_leaves(state)})
            del state
        carries.append(carry)
        del carry, shared
        recorder.phase = layers + 1
        loss, _ = objective.loss(model.predict(carries[-1], batch["targets"], noise), 1.0)
        sizes = [(num_bytes(hidden), sum(map(num_bytes, others))) for hidden, *others in carries]
        for part, (hidden, *_) in enumerate(carries):
            hidden.register_hook(lambda _, part=part: setattr(recorder, "phase", backward(part)))
        carries.clear()
        del hidden
        held = set(recorder.known.values())
        recorder.phase = backward(layers + 1)
        loss.backward()
    gradients = {recorder.number(parameter.grad) for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad()
    states = [sum(map(num_bytes, tree_leaves(state))) for state in memory[:layers]]
    held_states = [sum(size for number, size in of_part.items() if number in held) for of_part in new_states]
    return Pass([*sizes, (0, 0)], [0, *states, 0], [*held_states, 0], gradients)


def part_parameters(model: LanguageModel) -> list[dict[str, int]]:
    """Return the parameters of embedding, layers and head, by name; those of several parts stand in each."""
    own: list[dict[str, int]] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_layers = [layer.parameters() for layer in model.layers]
    first = [parameter for name in model.first_only for parameter in getattr(model, name).parameters()]
    last = [parameter for name in model.last_only for parameter in getattr(model, name).parameters()]
    for parameters in (first, *of_layers, last):
        own.append({names[parameter]: parameter.numel() for parameter in parameters})
    return own
