"""The architectures that model.name can name."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from txl_dist.config.schema import ModelConfig
from txl_dist.errors import ConfigError
from txl_dist.files.parsing import describe
from txl_dist.models.base import DEFAULT_RUNTIME, LanguageModel, Runtime
from txl_dist.models.transformer_xl import TransformerXL

MODELS: dict[str, type[LanguageModel]] = {"transformer_xl": TransformerXL}


def build(config: ModelConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME) -> LanguageModel:
    """Build a model on the CPU, with weights drawn from torch's generator."""
    return MODELS[config.name](config, vocab_size, runtime)


class Uninitialised(TorchFunctionMode):
    """Skip all initialisation: on the meta device the first random number costs a second of imports."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def parameter_shapes(config: ModelConfig, vocab_size: int, at_most: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's parameters, without allocating memory for them.

    Raises:
        ConfigError: where a model of this config would have more than `at_most` parameter tensors, or one larger
            than a tensor can be.
    """
    clusters = len(config.cutoffs) if config.div_val > 1 else 0
    if config.n_layer + clusters > at_most:
        sizes = f"model.n_layer={config.n_layer} and {clusters} model.cutoffs"
        raise ConfigError([f"{sizes}: there are only {at_most} tensors for them"])
    try:
        with torch.device("meta"), Uninitialised():
            model = build(config, vocab_size)
    except (RuntimeError, TypeError) as error:
        raise ConfigError([f"model: no tensor can have the sizes of this config ({describe(error)})"]) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
