"""The shapes of a model's parameters, known before any memory is taken for them."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from txl_dist.errors import ConfigError
from txl_dist.files.parsing import describe
from txl_dist.models import registry
from txl_dist.models.base import HeadBuilder
from txl_dist.models.config import ModelConfig


class Uninitialised(TorchFunctionMode):
    """Skip all initialisation: on the meta device the first random number costs a second of imports."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def parameter_shapes(
    config: ModelConfig, vocab_size: int, at_most: int, head: HeadBuilder | None = None
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's parameters, without allocating memory for them.

    Args:
        head: as of `registry.build`.

    Raises:
        ConfigError: where a model of this config would have more than `at_most` parameter tensors, or one larger
            than a tensor can be.
    """
    if config.fewest_tensors > at_most:
        tensors = f"such a model has {config.fewest_tensors} tensors or more, but there are only {at_most}"
        raise ConfigError([f"model.n_layer={config.n_layer}: {tensors}"])
    try:
        with torch.device("meta"), Uninitialised():
            model = registry.build(config, vocab_size, head=head)
    except (RuntimeError, TypeError) as error:
        raise ConfigError([f"model: no tensor can have the sizes of this config ({describe(error)})"]) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
