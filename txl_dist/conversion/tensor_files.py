"""Read the tensors of third-party files by name, and compare them with those that a model has."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from txl_dist.conversion import pickles
from txl_dist.conversion.pickles import Inert
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown

# Keys under which training scripts keep a state dict or a module, and what modules that wrap others add to names.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "_orig_mod")
WRAPPING = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
EMBEDDING_NAMES = (
    "word_emb.emb_layers.0.weight",
    "embedding.table_0",
    "word_embedding.weight",
    "embeddings.word_embeddings.weight",
)
# Names that have the prefix which the embedding's name has.
PREFIXED = re.compile(r"(^|\.)(dec_attn|crit|rel_attn|reformer|lm_head)\.")


def read_file(path: Path) -> Any:
    """Read a file of tensors, of safetensors or torch.save."""
    if path.suffix != ".safetensors":
        return pickles.load(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: cannot be read as a safetensors file ({describe(error)})") from error


def unwrap(content: Any) -> Any:
    """Return the model's dict, or its module, from within what a training script has put around it."""
    for _ in range(10):
        inside = vars(content).get("_modules") if isinstance(content, Inert) else content
        if not isinstance(inside, Mapping) or (isinstance(content, Inert) and len(inside) != 1):
            break
        wrapped = [inside[key] for key in WRAPPERS if isinstance(inside.get(key), Mapping | Inert)]
        if not wrapped:
            break
        content = wrapped[0]
    return content


def plain_names(state: Any, own_prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state dict by their names, without a prefix that all of them have.

    Args:
        own_prefix: what stands before the embedding's name where nothing wraps the model; it stays.
    """
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {
        WRAPPING.sub("", name): value for name, value in items if isinstance(value, Tensor) and isinstance(name, str)
    }
    prefix = prefix_of_embedding(tensors).removesuffix(own_prefix)
    if all(name.startswith(prefix) for name in tensors if PREFIXED.search(name)):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def prefix_of_embedding(tensors: Mapping[str, Tensor]) -> str:
    """Return what stands before the name of the embedding's table; nothing where there is none."""
    for name in tensors:
        for end in EMBEDDING_NAMES:
            if name.endswith(end):
                return name.removesuffix(end)
    return ""


def read_folder(folder: Path, own_prefix: str) -> dict[str, Tensor]:
    """Read the tensors of a folder, from one file or from the parts that an index names.

    Args:
        own_prefix: as in `plain_names`.

    Raises:
        UserError: where there is neither.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = folder / name
        index = folder / f"{name}.index.json"
        if path.is_file():
            return plain_names(unwrap(read_file(path)), own_prefix)
        if index.is_file():
            return plain_names(read_parts(index), own_prefix)
    raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of their parts")


def read_parts(index: Path) -> dict[str, Tensor]:
    """Read the tensors of all parts that an index names.

    Raises:
        UserError: where one of them is not in the folder.
    """
    names = sorted(set(read_json(index)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = index.parent / name
        if not re.fullmatch(r"\w[\w.-]*", name) or not path.is_file():
            raise UserError(f"{index}: names the part {name!s:.200}, which is not in the folder")
        tensors |= unwrap(read_file(path))
    return tensors


def check_size(tensors: Mapping[str, Tensor], parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model far larger than its file: tensors of a pickle may be views of the same few numbers.

    Raises:
        ConfigError: where the model has more parameters than its tensors bytes.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    num_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    num_parameters = sum(map(prod, parameters.values()))
    # A parameter has at least one byte: two in float16, which serve two of ours where only the file ties them.
    if num_parameters > max(num_bytes, 4096):
        raise ConfigError(
            [f"the model of the config has {num_parameters:,} parameters, but all tensors only {num_bytes:,} bytes"]
        )


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], ignored: re.Pattern[str]
) -> None:
    """Compare a file's tensors with those that the config asks for.

    Args:
        ignored: matches the names of tensors that a file may hold besides.

    Raises:
        ConfigError: where they differ; of many that differ in one way it names the first.
    """
    weights = {name: value for name, value in tensors.items() if name in expected or not ignored.fullmatch(name)}
    known = [name for name in expected if name in weights]
    if not known:
        raise ConfigError(
            [f"none of the tensors is known: they are {shown(list(weights))}, not {shown(list(expected))}"]
        )
    missing = []
    for name, shape in expected.items():
        if name not in weights:
            missing.append(f"{name}: is missing; its shape would be {list(shape)}")
    other_shape = []
    for name in known:
        if tuple(weights[name].shape) != expected[name]:
            shapes = f"has the shape {list(weights[name].shape)}, but the config asks for {list(expected[name])}"
            other_shape.append(f"{name}: {shapes}")
    other_dtype = []
    for name in known:
        if not weights[name].is_floating_point():
            other_dtype.append(f"{name}: is of {weights[name].dtype}, not of floats")
    unknown = []
    for name, value in weights.items():
        if name not in expected:
            unknown.append(f"{name}: is not part of the model of the config; its shape is {list(value.shape)}")
    problems = []
    for lines in (missing, other_shape, other_dtype, unknown):
        problems += lines if len(lines) <= 3 else [f"{lines[0]} ({len(lines) - 1} more)"]
    if problems:
        raise ConfigError(problems)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and the same numbers."""
    return one.shape == other.shape and torch.equal(one, other)
