"""The names of activations in Hugging Face's configs, and ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txl_dist.files.parsing import shown

OURS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
THEIRS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}


def unknown_activation(path: Path, config: dict[str, Any], key: str) -> Iterator[str]:
    """Yield what is wrong with the activation that a key of a config names."""
    if config[key] not in OURS:
        yield f"{path}: {key}={shown(config[key])}: must be one of {', '.join(OURS)}"
