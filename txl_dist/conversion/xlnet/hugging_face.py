"""Open XLNet folders as transformers' save_pretrained writes them, and as they are exported from here."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txl_dist.conversion import activations
from txl_dist.conversion.import_source import ImportSource
from txl_dist.conversion.tensor_files import is_same, read_folder
from txl_dist.conversion.xlnet import fine_tuned, vocabulary, weights
from txl_dist.conversion.xlnet.recipe import ALSO_ACCEPTED, OWN_KEYS, RECIPE
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown

# The values of keys that a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "d_model": 1024,
    "n_layer": 24,
    "n_head": 16,
    "d_inner": 4096,
    "ff_activation": "gelu",
    "attn_type": "bi",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "dropout": 0.1,
    "mem_len": 512,
    "reuse_len": None,
    "clamp_len": -1,
    "same_length": False,
}


def open_folder(path: Path, config: dict[str, Any]) -> ImportSource:
    """Open a folder of an XLNetLMHeadModel, an XLNetModel or a fine-tuned model, whose head is read apart.

    Raises:
        UserError: where its files cannot be read, or it is a model that ours cannot be.
    """
    config = DEFAULTS | config
    problems = unsupported(path / "config.json", config)
    if problems:
        raise ConfigError(problems)
    tensors, notes, head = model_tensors(path, read_folder(path, own_prefix="transformer."))
    spiece = path / vocabulary.FILE
    return ImportSource(
        title=", ".join(["Hugging Face's xlnet", *notes]),
        hyper_parameters=RECIPE | hyper_parameters(config),
        vocab_size=config["vocab_size"],
        weights=partial(weights.to_parameters, tensors, config["vocab_size"]),
        load_tokenizer=partial(load_tokenizer, path) if spiece.is_file() else None,
        also_accepted=ALSO_ACCEPTED,
        load_vocabulary=vocabulary.load,
        task=partial(fine_tuned.read_task, path / "config.json", config, head) if fine_tuned.has_head(head) else None,
    )


def unsupported(path: Path, config: dict[str, Any]) -> list[str]:
    """List what a config states of a model that ours cannot be."""
    problems = []
    if config["attn_type"] != "bi":
        problems.append(f"{path}: attn_type={shown(config['attn_type'])}: must be bi, as XLNet was published")
    if config["same_length"] is not False:
        problems.append(f"{path}: same_length={shown(config['same_length'])}: must be false")
    problems += activations.unknown_activation(path, config, "ff_activation")
    if config.get("tie_word_embeddings", True) is not True:
        problems.append(f"{path}: tie_word_embeddings=false: must be true; our softmax is tied to the embedding")
    return problems


def hyper_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config states, by our names; an exported one states what Hugging Face does not know, too."""
    values = {key: config[key] for key in ("n_layer", "d_model", "n_head", "d_inner", "layer_norm_eps", "dropout")}
    values["d_head"] = config.get("d_head") or config["d_model"] // config["n_head"]
    values["activation"] = activations.OURS[config["ff_activation"]]
    values["init_std"] = config["initializer_range"]
    values["clamp_len"] = max(config["clamp_len"], 0) or -1
    values["dropatt"] = config["dropout"]
    # Without a length (the released models' configs have none) all is remembered: here what the recipe remembers.
    values |= {key: config[key] for key in ("mem_len", "reuse_len") if config[key]}
    own = config.get("txl_dist", {})
    return values | {key: own[key] for key in OWN_KEYS if key in own}


def model_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], dict[str, Tensor]]:
    """Choose the tensors of the language model, and add what is not there.

    Returns:
        Them, what people should know of that, and all other tensors.

    Raises:
        UserError: where they are not those of XLNet, or the softmax is not tied to the embedding.
    """
    if not any(name.startswith("transformer.") for name in tensors):  # an XLNetModel
        tensors = {name if name.startswith("lm_loss.") else f"transformer.{name}": tensors[name] for name in tensors}
    table = tensors.get(weights.EMBEDDING)
    if table is None:
        raise UserError(f"from={path}: its tensors are not those of xlnet, but {shown(sorted(tensors))}")
    if not is_same(tensors.pop(weights.TIED, table), table):
        raise UserError(f"from={path}: {weights.TIED} differs from {weights.EMBEDDING}, to which our softmax is tied")
    kept = {name: value for name, value in tensors.items() if name.startswith("transformer.") or name == weights.BIAS}
    others = {name: value for name, value in tensors.items() if name not in kept}
    left_out = sorted({name.partition(".")[0] for name in others})
    notes = [f"without its {', '.join(left_out)[:200]}"] if left_out else []
    if weights.BIAS not in kept:
        kept[weights.BIAS] = torch.zeros(len(table))
        notes.append("without lm_loss: the softmax has biases of 0")
    return kept, notes, others


def load_tokenizer(path: Path) -> Tokenizer:
    """Load spiece.model; tokenizer_config.json, if there is one, says whether text is lower-cased.

    Raises:
        UserError: where they cannot be read.
    """
    config = path / "tokenizer_config.json"
    try:
        values = read_json(config) if config.is_file() else {}
        lower = values.get("do_lower_case", False)
    except (OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{config}: cannot be read ({describe(error)})") from error
    return vocabulary.load(path / vocabulary.FILE, lower)
