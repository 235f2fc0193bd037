"""Recognise a third-party checkpoint: which architecture it is of, and in which format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txl_dist.conversion import pickles
from txl_dist.conversion.import_source import ImportSource
from txl_dist.conversion.pickles import Inert
from txl_dist.conversion.reformer import hugging_face as reformer
from txl_dist.conversion.tensor_files import plain_names, read_file, unwrap
from txl_dist.conversion.transformer_xl import sources as transformer_xl
from txl_dist.conversion.xlnet import authors, tensor_bundle
from txl_dist.conversion.xlnet import hugging_face as xlnet
from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown


def is_importable(path: Path) -> bool:
    """Return whether something that could be a third-party checkpoint lies at a path; run directories do not."""
    return path.is_file() or (path / "config.json").is_file() or tensor_bundle.find(path) is not None


def open_import_source(path: Path) -> ImportSource:
    """Open a folder or file and find out what it is.

    Raises:
        UserError: where it is of no known kind, cannot be read, or is a model that ours cannot be.
    """
    try:
        source = recognise(path)
        if type(source.vocab_size) is not int or not 1 <= source.vocab_size < 1 << 32:
            raise ValueError(f"its vocabulary cannot have {shown(source.vocab_size)} tokens")
        return source
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"from={path}: is damaged, or not a complete checkpoint ({describe(error)})") from error


def recognise(path: Path) -> ImportSource:
    """Do the work of `open_import_source`, but let parsers' errors pass."""
    bundle = tensor_bundle.find(path)
    if path.is_dir() and (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if bundle is None or "model_type" in config:  # the authors' training writes a config.json, too
            return open_folder(path, config)
    if bundle is not None:
        return authors.open_checkpoint(bundle)
    if path.is_dir():
        raise UserError(
            f"from={path}: is a folder without config.json; give a Hugging Face folder, a .pt file, or a TensorFlow "
            "checkpoint of XLNet with its xlnet_config.json"
        )
    content = unwrap(read_file(path))
    if isinstance(content, Inert):
        return transformer_xl.open_authors(path, pickles.state_dict(content), content)
    if isinstance(content, Mapping) and {"model_state", "model_config"} <= content.keys():
        return transformer_xl.open_nvidia(path, content)
    tensors = plain_names(content)
    if "r_w_bias" in tensors:
        return transformer_xl.open_authors(path, tensors, None)
    if any(part in name for name in tensors for part in (".dec_attn.", ".rel_attn.", ".self_attention.")):
        raise UserError(
            f"from={path}: holds the weights of a Hugging Face folder; give the folder with its config.json"
        )
    raise UserError(
        f"from={path}: is not a checkpoint of a known kind; give a Hugging Face folder, the authors' model.pt or a "
        "state dict of it, NVIDIA's dict with model_state and model_config, or XLNet's TensorFlow checkpoint"
    )


def open_folder(path: Path, config: dict[str, Any]) -> ImportSource:
    """Open a folder that was exported from here, or one that save_pretrained has written, by its config.json.

    Raises:
        UserError: where it is of an architecture that cannot be imported.
    """
    kind = config["model_type"]
    if kind == "txl_dist":
        return transformer_xl.open_exported(path, config)
    if kind == "transfo-xl":
        return transformer_xl.open_hugging_face(path, config)
    if kind == "xlnet":
        return xlnet.open_folder(path, config)
    if kind == "reformer":
        return reformer.open_folder(path, config)
    raise UserError(
        f"{path / 'config.json'}: model_type={kind!s:.80}: must be transfo-xl, xlnet, reformer, or a folder exported "
        "from here"
    )
