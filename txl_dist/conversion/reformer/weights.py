"""Convert tensors of Hugging Face's Reformer: its names and shapes, and ours.

Every tensor is the same but for the positions, which have an axis of size 1 for each other axis there. One table of
positions has another name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from txl_dist.conversion.tensor_files import check_shapes, check_size
from txl_dist.errors import ConfigError
from txl_dist.models.config import ModelConfig
from txl_dist.models.reformer import ReformerConfig
from txl_dist.models.shapes import parameter_shapes

POSITIONS = "reformer.embeddings.position_embeddings."
BIAS = "lm_head.decoder.bias"
BIAS_AGAIN = "lm_head.bias"  # another name of the same tensor

# (pattern, replacement), applied in order to one of our names, give Hugging Face's.
NAMES = [
    (r"^embedding\.table$", "reformer.embeddings.word_embeddings.weight"),
    (r"^embedding\.positions\.", f"{POSITIONS}weights."),
    (r"^layer(s\.\d+|_norm)\.", r"reformer.encoder.layer\1."),
    (r"\.attention\.(query|key|query_key|value)\.", r".attention.self_attention.\1."),
    (r"\.attention\.output\.", ".attention.output.dense."),
    (r"\.feed_forward\.inner\.", ".feed_forward.dense.dense."),
    (r"\.feed_forward\.outer\.", ".feed_forward.output.dense."),
    (r"^head\.", "lm_head.decoder."),
]

OF_VOCABULARY = ("embedding.table", "head.weight", "head.bias")  # have a row for each token

# Buffers that older versions of transformers saved as well.
NO_WEIGHTS = re.compile(r".*\.self_attention\.(self_)?mask_value_float(16|32)")


def to_parameters(
    path: Path, tensors: Mapping[str, Tensor], vocab_size: int, rows: Sequence[int] | None, config: ModelConfig
) -> dict[str, Tensor]:
    """Convert tensors with Hugging Face's names into our parameters, in float32.

    Args:
        path: of its config, for messages.
        vocab_size: the tokens that its tables have.
        rows: those of them that are our tokens, in our order; None: all as they are.

    Raises:
        ConfigError: for every tensor that is missing, has another shape, or is not part of this config's model.
    """
    assert isinstance(config, ReformerConfig)
    parameters = parameter_shapes(config, vocab_size, at_most=len(tensors))
    check_size(tensors, parameters)
    expected = {}
    for name, shape in parameters.items():
        expected[their_name(name, config)] = their_shape(name, shape, config)
    check_positions(path, tensors, expected, config)
    check_shapes(tensors, expected, NO_WEIGHTS)
    converted = {}
    for name, shape in parameters.items():
        value = tensors[their_name(name, config)].to(torch.float32, copy=True).reshape(shape)
        converted[name] = value[rows] if rows is not None and name in OF_VOCABULARY else value
    return converted


def to_hugging_face(parameters: Mapping[str, Tensor], config: ReformerConfig) -> dict[str, Tensor]:
    """Convert our parameters into Hugging Face's tensors, the inverse of `to_parameters`."""
    tensors = {}
    for name, value in parameters.items():
        tensors[their_name(name, config)] = value.reshape(their_shape(name, tuple(value.shape), config))
    tensors[BIAS_AGAIN] = tensors.pop(BIAS)  # the name that all versions read without a warning
    return tensors


def their_name(name: str, config: ReformerConfig) -> str:
    """Return Hugging Face's name of one of our parameters."""
    if name.startswith("embedding.positions.") and len(config.axial_shape) == 1:
        return f"{POSITIONS}embedding.weight"
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def their_shape(name: str, shape: tuple[int, ...], config: ReformerConfig) -> tuple[int, ...]:
    """Return the shape that one of our parameters has at Hugging Face: a position's has all axes."""
    if not name.startswith("embedding.positions."):
        return shape
    size, width = shape
    axis = int(name.rpartition(".")[2])
    return (*(size if other == axis else 1 for other in range(len(config.axial_shape))), width)


def check_positions(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], config: ReformerConfig
) -> None:
    """Compare the tensors' positions with those that the config asks for.

    Raises:
        ConfigError: where they differ, with the keys that say so.
    """
    asked = {name: shape for name, shape in expected.items() if name.startswith(POSITIONS)}
    given = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith(POSITIONS)}
    if not given or given == asked:
        return  # where there are none, they are missing as other tensors may be
    if len(config.axial_shape) == 1:
        keys = f"axial_pos_embds=false, max_position_embeddings={config.max_len}"
    else:
        keys = f"axial_pos_shape={config.axial_shape}, axial_pos_embds_dim={config.axial_widths}"
    raise ConfigError(
        [f"{path}: {keys}: asks for positions {listed(asked)}, but its tensors are {listed(given)}; correct the keys"]
    )


def listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Write down names and shapes of positions."""
    return ", ".join(f"{name.removeprefix(POSITIONS)} {list(shape)}" for name, shape in shapes.items())[:400]
