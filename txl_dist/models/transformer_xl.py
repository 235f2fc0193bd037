"""Transformer-XL (Dai et al. 2019, section 3): attention over the segment and a memory of the segments before it.

    h~ = [SG(memory) ; h]                                  (section 3.2)
    q, k, v = h W_q, h~ W_k, h~ W_v;  r = R W_r            (section 3.3)
    h <- LayerNorm(h + attention(q, k, v, r, u, v))
    h <- LayerNorm(h + feed-forward(h))

What a layer remembers of a lane are its own last mem_len *inputs*, oldest first. Memory is an argument and a result: a
forward in training writes nothing, and may be run again (activation checkpointing, pipelines) without harm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from txl_dist.config.schema import ModelConfig
from txl_dist.errors import ConfigError
from txl_dist.files.parsing import describe
from txl_dist.models.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, send
from txl_dist.models.layers.attention import Attention, attention_of_layer, encode_distances
from txl_dist.models.layers.backends import AttentionWindow
from txl_dist.models.layers.dropout import Dropout
from txl_dist.models.memory import Remembered, States


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer, with residual connection and layer normalisation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model)
        inner = config.dropout if config.dropout_ff is None else config.dropout_ff
        self.inner_dropout = Dropout(inner, config.variational)
        self.dropout = Dropout(config.dropout, config.variational)
        self.pre_lnorm = config.pre_lnorm

    def forward(self, hidden: Tensor) -> Tensor:
        """[lanes, length, d_model] -> the same."""
        inner = self.inner(self.layer_norm(hidden) if self.pre_lnorm else hidden).relu_()
        hidden = hidden + self.dropout(self.outer(self.inner_dropout(inner)))
        return hidden if self.pre_lnorm else self.layer_norm(hidden)


class Layer(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.attention = attention_of_layer(config, number)
        self.feed_forward = FeedForward(config)

    def forward(
        self, hidden: Tensor, memory: States, encoding: Tensor, window: AttentionWindow
    ) -> tuple[Tensor, States]:
        """Arguments and results are those of Attention."""
        hidden, remembered = self.attention(hidden, memory, encoding, window)
        return self.feed_forward(hidden), remembered


class Uninitialised(TorchFunctionMode):
    """Initialise nothing: on the meta device the first random number costs a second of imports."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def parameter_shapes(config: ModelConfig, vocab_size: int, at_most: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters. Nothing is allocated for them.

    Raises:
        ConfigError: where a model of this config would have more than `at_most` parameter tensors.
    """
    clusters = len(config.cutoffs) if config.div_val > 1 else 0
    if config.n_layer + clusters > at_most:
        raise ConfigError(
            [f"model.n_layer={config.n_layer} and {clusters} model.cutoffs: there are only {at_most} tensors for them"]
        )
    try:
        with torch.device("meta"), Uninitialised():
            model = TransformerXL(config, vocab_size)
    except (RuntimeError, TypeError) as error:
        raise ConfigError([f"model: no tensor has the sizes of this config ({describe(error)})"]) from error
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


class TransformerXL(nn.Module):
    """The language model: token by token, the distribution of the next one.

    Attributes:
        activation_checkpointing: in training keep no activations within the layers, and compute them again in backward.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = AdaptiveEmbedding(config, vocab_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layer))
        self.softmax = AdaptiveSoftmax(config, vocab_size, self.embedding)
        kinds = config.dropout, config.dropout_input, config.dropout_output
        self.dropout, self.input_dropout, self.output_dropout = (
            Dropout(config.dropout if p is None else p, config.variational) for p in kinds
        )
        self.initialise()

    def initialise(self) -> None:
        """Draw all weights as the authors' code does."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.normal_(parameter, 1.0, self.config.init_std)
            elif "projection" in name:
                nn.init.normal_(parameter, 0.0, 0.01)
            else:
                nn.init.normal_(parameter, 0.0, self.config.init_std)

    def forward(
        self, inputs: Tensor, targets: Tensor | None, lookback: Tensor, memory: Sequence[Remembered]
    ) -> tuple[Tensor, list[Remembered]]:
        """Read a segment of any length. Its integers may be on the CPU: a GPU is then not waited for.

        Args:
            inputs: int64 [lanes, length].
            targets: int64 [lanes, length], the token to be predicted at each position; -100: not scored.
                None: the whole distribution is wanted.
            reach: int64 [lanes, length], how many tokens back each position may look: the number of tokens before it
                in its document, or in its stream since the last reset. What the memory holds beyond has no effect.
            memory: [lanes, mem_len, d_model] a layer, what the segment before left; at first `empty_memory`. In
                evaluation `empty_cache`.

        Returns:
            The negative log-likelihood of each target [lanes, length], 0 where not scored, or the log-probabilities
            [lanes, length, vocab_size]; in nats, float32. And the memory for the next segment, detached.
        """
        hidden, new_memory = self.through_layers(self.embed(inputs), lookback, memory)
        return self.predict(hidden, targets), new_memory

    # The three parts of `forward`, for a pipeline whose stages hold some of the layers each.

    def embed(self, inputs: Tensor) -> Tensor:
        """int64 [lanes, length] -> [lanes, length, d_model]."""
        return self.input_dropout(self.embedding(inputs))

    def through_layers(
        self, hidden: Tensor, lookback: Tensor, memory: Sequence[Remembered]
    ) -> tuple[Tensor, list[Remembered]]:
        """[lanes, length, d_model] -> the same, and the new memory; all layers that are here."""
        encoding, window = self.positions_and_window(hidden, lookback)
        new_memory = []
        for layer, past in zip(self.layers, memory, strict=True):
            hidden, remembered = self.run(layer, hidden, past, encoding, window)
            new_memory.append(remembered)
        return hidden, new_memory

    def predict(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """[lanes, length, d_model] -> the first result of `forward`."""
        return self.softmax(self.output_dropout(hidden), targets)

    def positions_and_window(self, hidden: Tensor, lookback: Tensor) -> tuple[Tensor, AttentionWindow]:
        """What all layers share: the encoding of distances, and which keys each query sees."""
        config, lookback = self.config, send(lookback, hidden.device)
        keys = config.mem_len + lookback.size(1)
        encoding = encode_distances(config, keys, like=hidden)
        if encoding.is_floating_point():
            encoding = self.dropout(encoding)
        if config.same_length:  # mem_len keys at most, itself included
            lookback = lookback.clamp(max=config.mem_len - 1)
        return encoding, AttentionWindow(lookback, config.mem_len, hidden.dtype)

    def run(self, layer: nn.Module, *args: States | AttentionWindow) -> tuple[Tensor, Any]:
        if self.activation_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def empty_memory(self, lanes: int) -> list[Tensor]:
        """The memory before the first token."""
        return [attention.empty_memory(lanes, self.config.mem_len) for attention in self.attentions()]

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[States]:
        """The same for evaluation: keys and values, where that can be, which are made once and give the same numbers.

        As long as it is in use weights must not change, and no segment is read twice.

        Args:
            device: where it is computed, if that is not where the weights are.
        """
        device = device or next(self.parameters()).device
        return [attention.empty_cache(lanes, self.config.mem_len, device) for attention in self.attentions()]

    def store_long_rows(self) -> None:
        """Lay out every matrix with its longer side in one piece; values and shapes stay.

        On a CPU products with one token, which generation consists of, are then up to twice as fast.
        """
        for parameter in self.parameters():
            if parameter.dim() == 2 and parameter.size(0) > parameter.size(1):
                parameter.data = parameter.data.T.contiguous().T

    def attentions(self) -> list[Attention]:
        """Those of the layers that are here."""
        return [module for module in self.layers.modules() if isinstance(module, Attention)]
