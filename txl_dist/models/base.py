"""What engine, evaluation and generation know of a model, whatever its architecture: it is a chain.

    carry = embed(inputs of a batch)                    the embedding
    carry, state = layer(carry, state, shared)          each layer, with what it remembers of every lane
    nats = predict(carry, targets)                      the head: predict_tokens, or a task's (models/heads.py)

A pipeline cuts it between two layers, and the carry crosses. A state never does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from txl_dist.models.config import ModelConfig
from txl_dist.models.heads import TaskHead
from txl_dist.models.layers.attention_weights import AttentionWeights, ObservableAttention
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Noise, assign_places
from txl_dist.models.layers.state import State

Batch = Mapping[str, Tensor]  # by name, int64 [lanes, ...]; at least inputs and lookback
Carry = tuple[Tensor, ...]  # [lanes, positions, ...] each: one of floats, then others of int64
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Runtime:
    """How a model computes: another choice at every start changes its numbers by rounding alone.

    Attributes:
        attention: a key of layers.backends.BACKENDS, or auto: the fastest for device and precision.
        activation_checkpointing: in training keep no activations within the layers; recompute them in backward.
        compile: torch.compile the layers.
        tbptt: how many segments a forward in training reads, one after the other: gradients flow through the states
            between them.
    """

    attention: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    tbptt: int = 1


DEFAULT_RUNTIME = Runtime()
TASK_HEAD = "task_head"  # the name of the module, in place of that of `token_head`
INIT_STD = 0.02  # of the heads of models that have no init_std
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by precision


class LanguageModel(nn.Module, ABC):
    """A model of tokens: an embedding, layers that carry a state from segment to segment, and a head.

    A constructor builds the modules and ends with `complete`. A layer is called as
    `layer(carry, state, shared, noise) -> (carry, state)`. Its state is an argument and a result: a forward in training
    writes nothing, and may be repeated without harm. The new state keeps its graph where gradients are to flow from
    segment to segment (`Runtime.tbptt`); at the end of a forward it is detached.

    Attributes:
        Config: the architecture's section of the config.
        inputs: the fields of a batch that `embed` takes.
        first_only, last_only: the names of the modules that only the first or the last stage of a pipeline needs.
        token_head: of these the module that predicts tokens.
        task_head: what predicts something else in its place; None: tokens are predicted.
        config: the hyper-parameters; those of `ModelConfig.read_otherwise` may be others from one segment to the next.
        vocab_size: of the distribution that it predicts.
        layers: those that are here; a pipeline stage has some of them.
        activation_observer: called with the number of each layer that is here, and the floats of the carry behind it,
            once for each forward. Layers may be compiled or recomputed: it stands outside of them.
    """

    Config: type[ModelConfig]
    inputs: tuple[str, ...] = ("inputs", "lookback")
    first_only: tuple[str, ...] = ("embedding",)
    last_only: tuple[str, ...] = ("softmax",)
    token_head: str = "softmax"
    task_head: TaskHead | None
    layers: nn.ModuleList
    activation_observer: Callable[[int, Tensor], None] | None = None

    def __init__(self, config: ModelConfig, vocab_size: int, runtime: Runtime):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.runtime = runtime
        self.task_head = None

    def complete(self) -> None:
        """Identify the dropouts, draw all weights, and compile the layers if the runtime says so."""
        assign_places(self)
        self.initialise()
        if self.runtime.compile:
            for layer in self.layers:
                layer.compile()

    @abstractmethod
    def initialise(self) -> None:
        """Draw all weights from torch's generator."""

    # ------------------------------------------------------------------------------------------------- the chain

    def forward(self, batch: Batch, memory: list[State], noise: Noise | None = None) -> tuple[Tensor, list[State]]:
        """Read a segment of any length. Its integers may be on the CPU: then nothing synchronises with the GPU.

        Args:
            batch: int64, on any device, what an objective makes of a segment:
                inputs [lanes, length];
                lookback [lanes, length], how many tokens back each position may look: the number of tokens before it in
                its document, or in its stream since the last reset. What the memory holds beyond has no effect;
                targets [lanes, targets], what is to be predicted; -100: not scored. Without them the whole distribution
                is returned.
            memory: the state of each layer, as the segment before has returned it; at first `empty_memory`. In
                evaluation `empty_cache`.
            noise: the randomness of the lanes at this step; needed for dropout, in training only.

        Returns:
            The negative log-likelihood of each target [lanes, targets], 0 where not scored, or the log-probabilities
            [lanes, length, vocab_size]; in nats, float32. And the memory for the next segment, detached.
        """
        if self.training and self.runtime.tbptt > 1:
            result, memory = self.through_segments(batch, memory, noise)
        else:
            result, memory = self.read_segment(batch, memory, noise)
        return result, [detached(state) for state in memory]

    def read_segment(self, batch: Batch, memory: list[State], noise: Noise | None) -> tuple[Tensor, list[State]]:
        """Do what `forward` does for a single segment; the new memory keeps its graph."""
        carry = self.embed(self.inputs_of(batch), noise)
        carry, new_memory = self.through_layers(carry, memory, noise)
        return self.predict(carry, batch.get("targets"), noise), new_memory

    def through_segments(self, batch: Batch, memory: list[State], noise: Noise | None) -> tuple[Tensor, list[State]]:
        """Do what `forward` does for `runtime.tbptt` segments of one length, one after the other.

        With activation checkpointing each keeps its states alone, so that their number costs no activations.
        """
        length = batch["inputs"].size(1) // self.runtime.tbptt
        results = []
        for number in range(self.runtime.tbptt):
            part = slice(number * length, (number + 1) * length)
            segment = {name: field[:, part] for name, field in batch.items()}
            arguments = (segment, memory, noise and noise.of_part(number))
            if self.runtime.activation_checkpointing:
                result, memory = checkpoint(self.read_segment, *arguments, use_reentrant=False)
            else:
                result, memory = self.read_segment(*arguments)
            results.append(result)
        return torch.cat(results, dim=1), memory

    def inputs_of(self, batch: Batch) -> Carry:
        """Return the fields of a batch that `embed` takes."""
        return tuple(batch[name] for name in self.inputs)

    @abstractmethod
    def embed(self, inputs: Carry, noise: Noise | None = None) -> Carry:
        """Turn the fields `inputs` of a batch into the carry of the first layer."""

    def shared(self, carry: Carry, noise: Noise | None = None) -> Any:
        """Compute once what all layers share, such as encodings of positions."""
        return None

    def through_layers(
        self, carry: Carry, memory: list[State], noise: Noise | None = None
    ) -> tuple[Carry, list[State]]:
        """Run all layers that are here; return the carry behind them, and the new memory."""
        shared = self.shared(carry, noise)
        new_memory = []
        for number, (layer, state) in enumerate(zip(self.layers, memory, strict=True)):
            carry, new_state = self.run_layer(layer, carry, state, shared, noise)
            if self.activation_observer:
                self.activation_observer(number, carry[0].detach())
            new_memory.append(new_state)
        return carry, new_memory

    def run_layer(
        self, layer: nn.Module, carry: Carry, state: State, shared: Any, noise: Noise | None
    ) -> tuple[Carry, State]:
        """Run one layer, in training without keeping its activations if `runtime.activation_checkpointing` is set."""
        result: tuple[Carry, State]
        # Of several segments each is recomputed as a whole.
        if self.runtime.activation_checkpointing and self.training and self.runtime.tbptt == 1:
            # Of all that is random only the dropout of torch's own attention draws from torch's generators.
            draws_from_torch = self.runtime.attention == "sdpa"
            arguments = (layer, carry, state, shared, noise)
            result = checkpoint(*arguments, use_reentrant=False, preserve_rng_state=draws_from_torch)
        else:
            result = layer(carry, state, shared, noise)
        return result

    def predict(self, carry: Carry, targets: Tensor | None, noise: Noise | None = None) -> Tensor:
        """Turn the carry behind the last layer into the first result of `forward`.

        That of a task are the losses [lanes, 1], in evaluation followed by what is predicted, [lanes, 1 + width].
        """
        hidden = self.output(carry, noise)
        if self.task_head is None:
            return self.predict_tokens(hidden, targets)
        assert targets is not None, "the head of a task is asked by its targets"
        losses: Tensor = self.task_head(hidden, targets, noise)
        return losses if self.training else torch.cat([losses, self.task_head.outputs(hidden, targets)], dim=1)

    @abstractmethod
    def output(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Return the hidden states that a head reads, [lanes, positions, output_width], after their dropout.

        The positions are those of the batch, or of its queries where it has some.
        """

    @property
    @abstractmethod
    def output_width(self) -> int:
        """Return how many numbers `output` has at a position."""

    @abstractmethod
    def predict_tokens(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Turn what `output` returns into the first result of `forward`."""

    @contextmanager
    def reading_as(self, config: ModelConfig) -> Iterator[None]:
        """Read with the values of another config where those may differ (`ModelConfig.read_otherwise`), for a while."""
        trained = self.config
        self.config = config
        try:
            yield
        finally:
            self.config = trained

    @contextmanager
    def observed(self, observer: Callable[[int, AttentionWeights], None]) -> Iterator[None]:
        """Show where attention goes, for a while: the observer is called with the number of each layer that is here.

        Layers without attention show nothing.
        """
        sublayers: list[ObservableAttention] = []
        for number, layer in enumerate(self.layers):
            for module in layer.modules():
                if isinstance(module, ObservableAttention):
                    module.observer = partial(observer, number)
                    sublayers.append(module)
        try:
            yield
        finally:
            for sublayer in sublayers:
                del sublayer.observer  # not set to None: a compiled layer would be compiled anew for an attribute more

    # -------------------------------------------------------------------------------------------------- the states

    @abstractmethod
    def state_shapes(self) -> list[Shapes]:
        """Return for each layer that is here the shapes of what it remembers of one lane, by name."""

    def empty_memory(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return each layer's state before the first token: zeros [lanes, *shape], which have no effect.

        Args:
            device: where the model computes, if that is not where its weights are.
        """
        weight = next(self.parameters())
        memory: list[State] = []
        for shapes in self.state_shapes():
            memory.append({name: weight.new_zeros(lanes, *shape, device=device) for name, shape in shapes.items()})
        return memory

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return each layer's state for evaluation, as fast as it can be had, before the first token.

        As long as it is in use weights must not change, and no segment may be read twice. Arguments are those of
        `empty_memory`, which is the default.
        """
        return self.empty_memory(lanes, device)

    def empty_context(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return each layer's state for a text that is read piece by piece, before its first token.

        A model that otherwise reads each segment alone remembers here the text so far; of others it is `empty_cache`.
        """
        return self.empty_cache(lanes, device)

    # ------------------------------------------------------------------------------------ tasks, pipelines and cost

    def keep_stage(self, layers: range, is_first: bool, is_last: bool) -> None:
        """Leave out what other stages of a pipeline compute; the first has the embedding, the last the head."""
        self.layers = self.layers[layers.start : layers.stop]
        removed = [*(() if is_first else self.first_only), *(() if is_last else self.last_only)]
        for name in removed:
            delattr(self, name)

    def tied_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the last stage alone that are the first one's as well, in a fixed order."""
        first = {parameter for name in self.first_only for parameter in getattr(self, name).parameters()}
        last = [parameter for name in self.last_only for parameter in getattr(self, name).parameters()]
        return [parameter for parameter in last if parameter in first]

    def replace_head(self, head: TaskHead) -> None:
        """Have the head of a task in place of the one that predicts tokens; before a pipeline cuts the model."""
        delattr(self, self.token_head)
        self.last_only = (*(name for name in self.last_only if name != self.token_head), TASK_HEAD)
        self.task_head = head
        head.initialise(getattr(self.config, "init_std", INIT_STD))
        assign_places(self)

    def products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding, of each layer and of the head, when `lanes` read one segment.

        Args:
            targets: how many positions of each lane are predicted; 0 for a task, of which a segment has one target.
        """
        if self.task_head is None:
            head = self.head_products(lanes, targets)
        else:
            head = self.task_head.products(lanes, self.config.tgt_len)
        return [*self.body_products(lanes, targets), head]

    @abstractmethod
    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding and of each layer; arguments are those of `products`."""

    @abstractmethod
    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the products of the head that predicts tokens; arguments are those of `products`."""

    def flops(self, lanes: int, targets: int) -> list[float]:
        """Count a forward of the embedding, of each layer and of the head; arguments are those of `products`."""
        return [sum(product.forward for product in part) for part in self.products(lanes, targets)]

    def training_flops(self, lanes: int, targets: int) -> float:
        """Count the model FLOPs (Chowdhery et al. 2022, appendix B) of a training step: one segment of all `lanes`.

        They are what the model asks for, whatever the hardware does and however the lanes are split. So recomputation
        does not count, what lanes share is computed once, and in attention only the keys count that a query may see
        once the memory is full. (Chowdhery et al. count future keys, too, and find more.)
        """
        products = [product for part in self.products(lanes, targets) for product in part]
        return sum(product.training * product.visible for product in products)

    # ------------------------------------------------------------------------------------------------- the runtime

    def describe_runtime(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return what people should know of how the model computes on a device, with a comma behind it; or nothing."""
        return f"{self.config.note}, " if self.config.note else ""

    def store_long_rows(self) -> None:
        """Store every matrix with its longer side contiguous; values and shapes stay.

        On a CPU products with one token, which generation consists of, are then up to twice as fast.
        """
        for parameter in self.parameters():
            if parameter.dim() == 2 and parameter.size(0) > parameter.size(1):
                parameter.data = parameter.data.T.contiguous().T


def detached(state: State) -> State:
    """Return a state without its graph; a cache has none."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}


HeadBuilder = Callable[[LanguageModel], TaskHead]  # builds the head of a task for a model
