"""Open the authors' TensorFlow checkpoints (zihangdai/xlnet): xlnet_config.json beside a tensor bundle."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txl_dist.conversion.import_source import ImportSource
from txl_dist.conversion.xlnet import vocabulary, weights
from txl_dist.conversion.xlnet.recipe import ALSO_ACCEPTED, RECIPE
from txl_dist.conversion.xlnet.tensor_bundle import INDEX, TensorBundle
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import read_json, shown

CONFIGS = ("xlnet_config.json", "config.json")

# (pattern, replacement): their names as Hugging Face's. A kernel of the attention has the same shape there ...
NAMES = [
    (r"model/transformer/word_embedding/lookup_table", weights.EMBEDDING),
    (r"model/transformer/mask_emb/mask_emb", weights.MASK),
    (r"model/lm_loss/bias", weights.BIAS),
    (r"model/transformer/layer_(\d+)/rel_attn/([qkvro])/kernel", r"transformer.layer.\1.rel_attn.\2"),
    (r"model/transformer/layer_(\d+)/(rel_attn|ff)/LayerNorm/gamma", r"transformer.layer.\1.\2.layer_norm.weight"),
    (r"model/transformer/layer_(\d+)/(rel_attn|ff)/LayerNorm/beta", r"transformer.layer.\1.\2.layer_norm.bias"),
    (r"model/transformer/layer_(\d+)/ff/layer_([12])/bias", r"transformer.layer.\1.ff.layer_\2.bias"),
]
# ... one of the feed-forward is transposed ...
KERNEL = (r"model/transformer/layer_(\d+)/ff/layer_([12])/kernel", r"transformer.layer.\1.ff.layer_\2.weight")
# ... and these are stacked over the layers; but one pair of the biases may be all layers'.
STACKED = re.compile(r"model/transformer/(r_w_bias|r_r_bias|r_s_bias|seg_embed)")

TRAINING = re.compile(r".*/(Adam(_\d+)?|adam_[mv]|LAMB.*|lamb_[mv])|(.*/)?(global_step|beta[12]_power)(/.*)?")
ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu"}


def open_checkpoint(prefix: Path) -> ImportSource:
    """Open a checkpoint of a pretrained or fine-tuned model; what belongs to a task alone is left out.

    Args:
        prefix: of the tensor bundle.

    Raises:
        UserError: where a file is missing or damaged, or the model is one that ours cannot be.
    """
    config = read_config(prefix)
    bundle = TensorBundle(prefix)
    names = [name for name in bundle.entries if not TRAINING.fullmatch(name)]
    known = [name for name in names if hugging_face_name(name) is not None or STACKED.fullmatch(name)]
    others = [name for name in names if name not in known]
    refuse_other_models(prefix, known, others)
    notes = [f"without its {', '.join(others)[:200]}"] if others else []
    tensors, copies = unstacked(bundle.read(known))
    notes += [*copies, *complete(tensors)]
    spiece = prefix.with_name(vocabulary.FILE)
    return ImportSource(
        title=", ".join(["the authors' XLNet", *notes]),
        hyper_parameters=RECIPE | hyper_parameters(config),
        vocab_size=config["n_token"],
        weights=partial(weights.to_parameters, tensors, config["n_token"]),
        load_tokenizer=partial(vocabulary.load, spiece) if spiece.is_file() else None,
        also_accepted=ALSO_ACCEPTED,
        load_vocabulary=vocabulary.load,
    )


def read_config(prefix: Path) -> dict[str, Any]:
    """Read xlnet_config.json beside a bundle, or the config.json that the authors' training writes.

    Raises:
        UserError: where there is neither, or it does not state what is needed.
    """
    path = next((prefix.with_name(name) for name in CONFIGS if prefix.with_name(name).is_file()), None)
    if path is None:
        raise UserError(f"{prefix.with_name(CONFIGS[0])}: is missing; a TensorFlow checkpoint needs it beside {prefix}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a config, but {shown(config)}")
    needed = ["n_layer", "d_model", "n_head", "d_head", "d_inner", "n_token", "ff_activation"]
    problems = [f"{path}: has no {key}" for key in needed if key not in config]
    if not problems and config["ff_activation"] not in ACTIVATIONS:
        activations = " or ".join(ACTIVATIONS)
        problems.append(f"{path}: ff_activation={shown(config['ff_activation'])}: must be {activations}")
    if problems:
        raise ConfigError(problems)
    return config


def hyper_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the config states, by our names; the authors' GELU is the approximation by tanh."""
    stated = {key: config[key] for key in ("n_layer", "d_model", "n_head", "d_head", "d_inner")}
    return stated | {"activation": ACTIVATIONS[config["ff_activation"]]}


def hugging_face_name(name: str) -> str | None:
    """Return Hugging Face's name of a tensor that is not stacked; None where it has none."""
    for pattern, replacement in [*NAMES, KERNEL]:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def refuse_other_models(prefix: Path, known: list[str], others: list[str]) -> None:
    """Refuse what is not XLNet, or not one that ours can be.

    Raises:
        UserError: with the first tensor that shows it.
    """
    path = f"{prefix}{INDEX}"
    if not known:
        raise UserError(f"{path}: none of its tensors is one of XLNet's: they are {shown(others)}")
    for name in others:
        if name == "model/lm_loss/weight":
            raise UserError(f"{path}: holds {name}: its softmax is not tied to the embedding, but ours is")
        if name.startswith("model/transformer/"):
            raise UserError(f"{path}: holds {name}, which is no part of XLNet as it was published")


def unstacked(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors Hugging Face's names and shapes; return them, and what people should know of that."""
    result = {}
    notes: list[str] = []
    for name, value in tensors.items():
        their_name = hugging_face_name(name)
        if their_name is not None:
            result[their_name] = value.T if re.fullmatch(KERNEL[0], name) and value.dim() == 2 else value
    layers = {int(match[1]) for name in result if (match := re.match(r"transformer\.layer\.(\d+)\.", name))}
    for name, value in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            continue
        is_shared = value.dim() == 2
        if is_shared and not notes:
            notes.append("each layer with a copy of the biases that all layers share")
        parts = {layer: value for layer in layers} if is_shared else dict(enumerate(value))
        for layer, part in parts.items():
            result[f"transformer.layer.{layer}.rel_attn.{match[1]}"] = part
    return result, notes


def complete(tensors: dict[str, Tensor]) -> list[str]:
    """Add, as zeros, what checkpoints of fine-tuned models lack; return what people should know of that."""
    notes = []
    if weights.BIAS not in tensors:
        tensors[weights.BIAS] = zeros_like_table(tensors, 0)
        notes.append("without lm_loss: the softmax has biases of 0")
    if weights.MASK not in tensors:
        tensors[weights.MASK] = zeros_like_table(tensors, 1).view(1, 1, -1)
        notes.append("without mask_emb: it is 0")
    return notes


def zeros_like_table(tensors: dict[str, Tensor], dim: int) -> Tensor:
    """Return as many zeros as the embedding's table has rows (dim 0) or columns."""
    table = tensors.get(weights.EMBEDDING)
    return torch.zeros(0 if table is None or table.dim() != 2 else table.size(dim))
