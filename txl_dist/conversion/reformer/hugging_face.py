"""Open Reformer folders as transformers' save_pretrained writes them, and as they are exported from here."""

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.config.types import INT32_MAX
from txl_dist.conversion import activations
from txl_dist.conversion.import_source import ImportSource
from txl_dist.conversion.reformer import vocabulary, weights
from txl_dist.conversion.reformer.keys import OWN, THEIRS
from txl_dist.conversion.tensor_files import is_same, read_folder
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import shown

# The values of keys that a config.json leaves out, or states as null. Without is_decoder it is one with an lm_head.
DEFAULTS: dict[str, Any] = {
    "attention_head_size": 64,
    "attn_layers": ["local", "lsh"] * 3,
    "axial_norm_std": 1.0,
    "axial_pos_embds": True,
    "axial_pos_shape": [64, 64],
    "axial_pos_embds_dim": [64, 192],
    "chunk_size_feed_forward": 0,
    "feed_forward_size": 512,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.05,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "is_decoder": True,
    "layer_norm_eps": 1e-12,
    "local_attention_probs_dropout_prob": 0.05,
    "local_attn_chunk_length": 64,
    "local_num_chunks_before": 1,
    "local_num_chunks_after": 0,
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_before": 1,
    "lsh_num_chunks_after": 0,
    "max_position_embeddings": 4096,
    "num_attention_heads": 12,
    "num_buckets": None,
    "num_hashes": 1,
    "vocab_size": 320,
}
MAX_AXES = 7  # a file's tensors have no more dimensions


def open_folder(path: Path, config: dict[str, Any]) -> ImportSource:
    """Open a folder of a ReformerModelWithLMHead.

    Raises:
        UserError: where its files cannot be read, or it is a model that ours cannot be.
    """
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    problems = list(unsupported(path / "config.json", config))
    if problems:
        raise ConfigError(problems)
    tensors = with_one_bias(path, read_folder(path, own_prefix="reformer."))
    notes = []
    if config["num_buckets"] is None:
        length = longest_text(config)
        config["num_buckets"] = choose_buckets(
            length, config["lsh_attn_chunk_length"], config["max_position_embeddings"]
        )
        if "lsh" in config["attn_layers"]:
            chosen = config["num_buckets"]
            notes.append(f"which states no num_buckets: {chosen}, as transformers chooses for {length:,} tokens")
    load_tokenizer = vocabulary.find(path)
    vocab_size = config["vocab_size"]
    rows = None
    if load_tokenizer is None and vocab_size == vocabulary.BYTES:
        load_tokenizer, rows = BytesTokenizer, vocabulary.ROWS
        notes.append(vocabulary.ROWS_NOTE)
    return ImportSource(
        title=", ".join(["Hugging Face's reformer", *notes]),
        hyper_parameters=hyper_parameters(config),
        vocab_size=vocab_size if rows is None else len(rows),
        weights=partial(weights.to_parameters, path / "config.json", tensors, vocab_size, rows),
        load_tokenizer=load_tokenizer,
        also_accepted=("lsh", "n_buckets"),
        load_vocabulary=vocabulary.load,
    )


def unsupported(path: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield what a config states of a model that ours cannot be."""
    architectures = config.get("architectures", [])
    if config["is_decoder"] is not True or "ReformerForMaskedLM" in architectures:
        yield f"{path}: is of a model that reads in both directions; must be a ReformerModelWithLMHead, is_decoder=true"
    for key in ("local_num_chunks_after", "lsh_num_chunks_after"):
        if config[key] != 0:
            yield f"{path}: {key}={shown(config[key])}: must be 0; a token cannot see those behind it"
    for key in ("max_position_embeddings", "lsh_attn_chunk_length"):
        if not is_size(config[key]):
            yield f"{path}: {key}={shown(config[key])}: must be a number above 0"
    axes = config["axial_pos_shape"]
    are_sizes = isinstance(axes, list) and 2 <= len(axes) <= MAX_AXES and all(map(is_size, axes))
    if config["axial_pos_embds"] and not are_sizes:
        yield f"{path}: axial_pos_shape={shown(axes)}: must be a list of 2 to {MAX_AXES} numbers above 0"
    yield from activations.unknown_activation(path, config, "hidden_act")


def is_size(value: Any) -> bool:
    """Return whether a value can be a size of a tensor."""
    return type(value) is int and 1 <= value <= INT32_MAX


def hyper_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config states, by our names; an exported one states what Hugging Face does not know, too."""
    values = {ours: config[theirs] for ours, theirs in THEIRS.items()}
    is_axial = config["axial_pos_embds"]
    values["axial_shape"] = config["axial_pos_shape"] if is_axial else [config["max_position_embeddings"]]
    values["axial_widths"] = config["axial_pos_embds_dim"] if is_axial else [config["hidden_size"]]
    values |= {"name": "reformer", "n_layer": len(config["attn_layers"]), "tgt_len": longest_text(config)}
    values |= {"lsh": "published", "activation": activations.OURS[config["hidden_act"]]}
    own = config.get("txl_dist", {})
    return values | {key: own[key] for key in OWN if key in own}


def longest_text(config: dict[str, Any]) -> int:
    """Return the number of tokens that a model of transformers may read; in training it reads as many."""
    length = config["max_position_embeddings"]
    return min(length, prod(config["axial_pos_shape"])) if config["axial_pos_embds"] else length


def choose_buckets(length: int, chunk_len: int, max_positions: int) -> int | list[int]:
    """Choose a number of buckets as transformers does by the first text that it hashes; many are two factors.

    Args:
        length: of that text.
    """
    power = max(1, (2 * (length // chunk_len)).bit_length() - 1)
    if 2**power <= 2 * max(int((max_positions // chunk_len) ** 0.5), chunk_len):
        return 2**power
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def with_one_bias(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the biases of the softmax once; a file may have them under one of two names, or both.

    Raises:
        UserError: where there is no softmax, or the two differ.
    """
    if not any(name.startswith("lm_head.") for name in tensors):
        raise UserError(
            f"from={path}: holds no softmax (lm_head.*), and a Reformer's is not its embedding; save a "
            f"ReformerModelWithLMHead; the tensors are {shown(sorted(tensors))}"
        )
    biases = tensors.pop(weights.BIAS_AGAIN, None)
    if biases is not None and not is_same(tensors.setdefault(weights.BIAS, biases), biases):
        raise UserError(f"from={path}: {weights.BIAS_AGAIN} differs from {weights.BIAS}, but the two are one tensor")
    return tensors
