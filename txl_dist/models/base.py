"""What engine, evaluation and generation know of a model, whatever its architecture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from txl_dist.models.config import ModelConfig
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.layers.state import LayerState, StateT


@dataclass(frozen=True)
class Runtime:
    """How a model computes: another choice at every start changes its numbers by rounding alone.

    Attributes:
        attention: a key of layers.backends.BACKENDS, or auto: the fastest for device and precision.
        activation_checkpointing: in training keep no activations within the layers; recompute them in backward.
        compile: torch.compile the layers.
    """

    attention: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False


DEFAULT_RUNTIME = Runtime()


class LanguageModel(nn.Module, ABC):
    """A model of the next token: an embedding, layers that carry a state from segment to segment, and a head.

    Memory is an argument and a result: a forward in training writes nothing, and may be repeated without harm.

    Attributes:
        Config: the architecture's section of the config.
        config: the hyper-parameters; its lengths may be others from one segment to the next.
        vocab_size: of the distribution that it predicts.
        layers: those that are here; a pipeline stage has some of them.
    """

    Config: type[ModelConfig]
    layers: nn.ModuleList

    def __init__(self, config: ModelConfig, vocab_size: int, runtime: Runtime):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.runtime = runtime

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None,
        lookback: Tensor,
        memory: Sequence[StateT],
        noise: Noise | None = None,
    ) -> tuple[Tensor, list[StateT]]:
        """Read a segment of any length. Its integers may be on the CPU: then nothing synchronises with the GPU.

        Args:
            inputs: int64 [lanes, length].
            targets: int64 [lanes, length], the token to be predicted at each position; -100: not scored.
                None: return the whole distribution.
            lookback: int64 [lanes, length], how many tokens back each position may look: the number of tokens before it
                in its document, or in its stream since the last reset. What the memory holds beyond has no effect.
            memory: the state of each layer, as the segment before has returned it; at first `empty_memory`. In
                evaluation `empty_cache`.
            noise: the randomness of the lanes at this step; needed for dropout, in training only.

        Returns:
            The negative log-likelihood of each target [lanes, length], 0 where not scored, or the log-probabilities
            [lanes, length, vocab_size]; in nats, float32. And the memory for the next segment, detached.
        """
        hidden, new_memory = self.through_layers(self.embed(inputs, noise), lookback, memory, noise)
        return self.predict(hidden, targets, noise), new_memory

    @contextmanager
    def reading_as(self, config: ModelConfig) -> Iterator[None]:
        """Read with the values of another config where those may differ (`ModelConfig.read_otherwise`), for a while."""
        trained = self.config
        self.config = config
        try:
            yield
        finally:
            self.config = trained

    # The three parts of `forward`, for a pipeline whose stages hold some of the layers each.

    @abstractmethod
    def embed(self, inputs: Tensor, noise: Noise | None = None) -> Tensor:
        """Embed tokens: int64 [lanes, length] -> [lanes, length, d_model]."""

    @abstractmethod
    def through_layers(
        self, hidden: Tensor, lookback: Tensor, memory: Sequence[StateT], noise: Noise | None = None
    ) -> tuple[Tensor, list[StateT]]:
        """Run all layers that are here: [lanes, length, d_model] -> [lanes, length, d_model], and the new memory."""

    @abstractmethod
    def predict(self, hidden: Tensor, targets: Tensor | None, noise: Noise | None = None) -> Tensor:
        """Turn hidden states [lanes, length, d_model] into the first result of `forward`."""

    @abstractmethod
    def products(self, lanes: int) -> list[list[Product]]:
        """List the products of the embedding, of each layer and of the head, when `lanes` read one segment."""

    def flops(self, lanes: int) -> list[float]:
        """Count a forward of the embedding, of each layer and of the head, when `lanes` read one segment."""
        return [sum(product.forward for product in part) for part in self.products(lanes)]

    def training_flops(self, lanes: int) -> float:
        """Count the model FLOPs (Chowdhery et al. 2022, appendix B) of a training step: one segment of all `lanes`.

        They are what the model asks for, whatever the hardware does and however the lanes are split. So recomputation
        does not count, what lanes share is computed once, and in attention only the keys count that a query may see
        once the memory is full. (Chowdhery et al. count future keys, too, and find more.)
        """
        products = [product for part in self.products(lanes) for product in part]
        return sum(product.training * product.visible for product in products)

    @abstractmethod
    def keep_stage(self, layers: range, is_first: bool, is_last: bool) -> None:
        """Leave out what other stages of a pipeline compute; the first has the embedding, the last the head."""

    @abstractmethod
    def tied_parameters(self) -> list[nn.Parameter]:
        """Return the head's parameters that are the embedding's as well."""

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Return the shape of what a layer remembers of one lane."""

    def empty_memory(self, lanes: int) -> list[Tensor]:
        """Return each layer's memory before the first token, [lanes, *state_shape]: zeros, which nothing attends to."""
        like = next(self.parameters())
        return [like.new_zeros(lanes, *self.state_shape) for _ in self.layers]

    @abstractmethod
    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[LayerState]:
        """Return each layer's memory for evaluation, as fast as it can be had, before the first token.

        As long as it is in use weights must not change, and no segment may be read twice.

        Args:
            device: where the model computes, if that is not where its weights are.
        """

    def describe_runtime(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return what people should know of how the model computes on a device, with a comma behind it; or nothing."""
        return ""

    def store_long_rows(self) -> None:
        """Store every matrix with its longer side contiguous; values and shapes stay.

        On a CPU products with one token, which generation consists of, are then up to twice as fast.
        """
        for parameter in self.parameters():
            if parameter.dim() == 2 and parameter.size(0) > parameter.size(1):
                parameter.data = parameter.data.T.contiguous().T
