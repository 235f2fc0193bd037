"""Open a Transformer-XL checkpoint: find its tensors, their names, its hyper-parameters and its vocabulary."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txl_dist.conversion import vocabularies
from txl_dist.conversion.exported_folder import load_tokenizer
from txl_dist.conversion.import_source import ImportSource
from txl_dist.conversion.pickles import Inert
from txl_dist.conversion.tensor_files import plain_names, read_folder
from txl_dist.conversion.transformer_xl import weights
from txl_dist.conversion.transformer_xl.weights import Naming
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import shown
from txl_dist.models.transformer_xl import TransformerXLConfig


def source(
    title: str,
    tensors: dict[str, Tensor],
    naming: Naming | None,
    hyper_parameters: dict[str, Any],
    vocab_size: int,
    load_tokenizer: Callable[[], Tokenizer] | None,
) -> ImportSource:
    """Describe a checkpoint whose tensors have been read.

    Args:
        naming: how it names its tensors; None: as our parameters.
    """
    return ImportSource(
        title=title,
        hyper_parameters=hyper_parameters | {"name": "transformer_xl"},
        vocab_size=vocab_size,
        weights=partial(weights.to_parameters, tensors, naming, vocab_size),
        load_tokenizer=load_tokenizer,
        also_accepted=("cutoffs", "pre_lnorm"),
    )


# ------------------------------------------------------------------------------------------------- Hugging Face


def open_exported(path: Path, config: dict[str, Any]) -> ImportSource:
    """Open a folder that was exported from here."""
    hyper_parameters = {field.name: config[field.name] for field in fields(TransformerXLConfig) if field.name in config}
    return source(
        title="a folder of txl_dist",
        tensors=read_folder(path, own_prefix="transformer."),
        naming=None,
        hyper_parameters=hyper_parameters,
        vocab_size=config["vocab_size"],
        load_tokenizer=partial(load_tokenizer, path),
    )


def open_hugging_face(path: Path, config: dict[str, Any]) -> ImportSource:
    """Open a transfo-xl folder of a TransfoXLLMHeadModel or a TransfoXLModel, as save_pretrained writes it."""
    config = HUGGING_FACE_DEFAULTS | config
    tensors = read_folder(path, own_prefix="transformer.")
    title = "Hugging Face's transfo-xl"
    if not any(name.startswith(("transformer.", "crit.")) for name in tensors):  # a TransfoXLModel
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
    if not any(name.startswith("crit.") for name in tensors):
        add_softmax(tensors, path, config)
        title = f"{title}, without a softmax: it takes the embedding's table, its biases are 0"
    naming = weights.HUGGING_FACE_SHARED if "transformer.r_w_bias" in tensors else weights.HUGGING_FACE
    projections = config.get("tie_projs") or [False] + [config["proj_share_all_but_first"]] * len(config["cutoffs"])
    problems = unsupported(path / "config.json", config)
    tables_tied = config["tie_word_embeddings"]
    problems += weights.add_tied(tensors, naming, tables_tied, projections, num_clusters(config, tensors))
    if problems:
        raise ConfigError(problems)
    # Where a folder does not state the length of segments: the one that the paper's large model is evaluated with.
    tgt_len = config.get("tgt_len", 128)
    words = next((path / name for name in vocabularies.FILES if (path / name).is_file()), None)
    return source(
        title=title,
        tensors=tensors,
        naming=naming,
        hyper_parameters=common(config) | {"tgt_len": tgt_len} | weights.find_ties(tensors, naming),
        vocab_size=config["vocab_size"],
        load_tokenizer=partial(vocabularies.load, words) if words else None,
    )


def add_softmax(tensors: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Add the softmax that the config of a TransfoXLModel, which has none, ties to the embedding.

    Raises:
        UserError: where the softmax would have weights of its own.
    """
    table = tensors.get("transformer.word_emb.emb_layers.0.weight")
    if table is None:
        raise UserError(f"from={path}: its tensors are not those of transfo-xl, but {shown(sorted(tensors))}")
    if config["cutoffs"] or not config["tie_word_embeddings"]:
        why = "has clusters with weights of their own" if config["cutoffs"] else "is not tied to the embedding"
        raise UserError(f"from={path}: holds no softmax (crit.*), and it {why}; save a TransfoXLLMHeadModel")
    tensors["crit.out_layers.0.bias"] = torch.zeros(len(table))


# The values of keys that a config.json may leave out.
HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 267735,
    "cutoffs": [20000, 40000, 200000],
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "div_val": 4,
    "pre_lnorm": False,
    "n_layer": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "proj_share_all_but_first": True,
    "attn_type": 0,
    "dropout": 0.1,
    "dropatt": 0.0,
    "init_std": 0.02,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


# --------------------------------------------------------------------------------------- the authors and NVIDIA


def open_authors(path: Path, tensors: dict[str, Tensor], module: Inert | None) -> ImportSource:
    """Open a file of kimiyoung/transformer-xl: the pickled module, or its state dict, which states no lengths."""
    hyper_parameters = from_shapes(path, tensors)
    if module is not None:
        attributes = vars(module)
        hyper_parameters |= {key: attributes[key] for key in ("tgt_len", "mem_len", "same_length")}
        hyper_parameters |= {"clamp_len": clamp_len(attributes)} | of_first_layer(attributes)
        embedding = vars(attributes["_modules"]["word_emb"])
        hyper_parameters["cutoffs"] = embedding["cutoffs"][:-1]  # theirs end with the vocabulary's size
        if problems := unsupported(path, attributes):
            raise ConfigError(problems)
    corpus = path.with_name("cache.pt")
    return source(
        title="the authors' Transformer-XL",
        tensors=tensors,
        naming=weights.AUTHORS,
        hyper_parameters=hyper_parameters | weights.find_ties(tensors, weights.AUTHORS),
        vocab_size=sum(len(table) for table in embedding_tables(tensors)),
        load_tokenizer=partial(vocabularies.load, corpus) if corpus.is_file() else None,
    )


def embedding_tables(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the embedding's tables in the order of their clusters."""
    tables = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"word_emb\.emb_layers\.(\d+)\.weight", name):
            tables[int(match[1])] = value
    return [tables[i] for i in sorted(tables)]


def from_shapes(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Derive hyper-parameters from the shapes of the authors' tensors; take what they do not show as 0 or the default.

    Raises:
        UserError: where a tensor is missing, or the embedding is narrower than the model.
    """
    needed = ["r_w_bias", "layers.0.dec_attn.qkv_net.weight", "layers.0.pos_ff.CoreNet.0.weight"]
    tables = embedding_tables(tensors)
    problems = [f"{name}: is missing in {path}" for name in needed if name not in tensors]
    if problems or not tables:
        raise ConfigError(problems or [f"word_emb.emb_layers.0.weight: is missing in {path}"])
    n_head, d_head = tensors["r_w_bias"].shape[-2:]
    d_inner, d_model = tensors["layers.0.pos_ff.CoreNet.0.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    values: dict[str, Any] = {"n_layer": max(layers) + 1, "d_model": d_model, "n_head": n_head, "d_head": d_head}
    values |= {"d_inner": d_inner, "dropout": 0.0, "dropatt": 0.0, "init_std": 0.02, "div_val": 1}
    d_embed = tables[0].size(1)
    if d_embed != d_model:
        raise UserError(f"{path}: embeds in {d_embed} dimensions a model of {d_model}; {EMBEDDED}")
    if len(tables) > 1:
        values["div_val"] = d_embed // tables[1].size(1)
        values["cutoffs"] = torch.tensor([len(table) for table in tables[:-1]]).cumsum(0).tolist()
    elif "crit.cluster_weight" not in tensors:
        values["cutoffs"] = []
    return values


def of_first_layer(attributes: dict[str, Any]) -> dict[str, Any]:
    """Read from the authors' module its dropouts, and where the layer normalisation stands."""
    layer = vars(attributes["_modules"]["layers"])["_modules"]["0"]
    attention = vars(vars(layer)["_modules"]["dec_attn"])
    values: dict[str, Any] = {"pre_lnorm": bool(attention.get("pre_lnorm"))}
    dropouts = {"dropout": attributes["_modules"].get("drop"), "dropatt": attention["_modules"].get("dropatt")}
    for key, dropout in dropouts.items():
        if dropout is not None:
            values[key] = vars(dropout)["p"]
    return values


def open_nvidia(path: Path, content: Mapping[str, Any]) -> ImportSource:
    """Open a checkpoint of DeepLearningExamples: a dict with model_state, model_config and vocab."""
    config = dict(content["model_config"])
    tensors = plain_names(content["model_state"])
    needed = ["n_token", "n_layer", "d_model", "n_head", "d_head", "d_inner", "cutoffs", "div_val", "tie_weight"]
    needed += ["tie_projs", "pre_lnorm", "tgt_len", "mem_len", "same_length", "clamp_len"]
    problems = [f"{path}: its model_config has no {key}" for key in needed if key not in config]
    if problems := problems or unsupported(path, config):
        raise ConfigError(problems)
    naming = weights.NVIDIA
    clusters = num_clusters(config, tensors)
    if problems := weights.add_tied(tensors, naming, config["tie_weight"], config["tie_projs"], clusters):
        raise ConfigError(problems)
    hyper_parameters = common({"dropout": 0.0, "dropatt": 0.0, "init_std": 0.02} | config)
    hyper_parameters |= {"tgt_len": config["tgt_len"]} | weights.find_ties(tensors, naming)
    if hyper_parameters["same_length"]:
        hyper_parameters["mem_len"] += 1  # there a token sees mem_len others and itself; here mem_len with itself
    return source(
        title="NVIDIA's Transformer-XL",
        tensors=tensors,
        naming=naming,
        hyper_parameters=hyper_parameters,
        vocab_size=config["n_token"],
        load_tokenizer=partial(vocabularies.from_pickle, content["vocab"], path) if "vocab" in content else None,
    )


# ------------------------------------------------------------------------------------------------ common to all

COMMON = ["n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "clamp_len", "same_length", "dropout"]
COMMON += ["dropatt", "div_val", "cutoffs", "pre_lnorm", "init_std"]
EMBEDDED = "ours embeds in d_model dimensions, or by clusters with div_val > 1"


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters that have the same names everywhere."""
    return {key: config[key] for key in COMMON} | {"clamp_len": clamp_len(config)}


def clamp_len(config: Mapping[str, Any]) -> int:
    """Return clamp_len as we write it: -1 where distances are not clamped, which elsewhere 0 means, too."""
    return max(config["clamp_len"], 0) or -1


def num_clusters(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return how many clusters have a table of their own.

    Raises:
        ValueError: where they are more than there are tensors.
    """
    count = 1 + len(config["cutoffs"]) if config["div_val"] > 1 else 1
    if count > len(tensors):
        raise ValueError(f"its config has {count:,} clusters, but there are only {len(tensors)} tensors")
    return count


def unsupported(path: Path, config: Mapping[str, Any]) -> list[str]:
    """List what a config states of a model that ours cannot be."""
    problems = []
    if config.get("attn_type", 0) != 0:
        problems.append(
            f"{path}: attn_type={shown(config['attn_type'])}: must be 0, Transformer-XL's relative attention"
        )
    d_embed = config.get("d_embed")
    if d_embed is not None and d_embed != config["d_model"]:
        problems.append(
            f"{path}: d_embed={shown(d_embed)}, d_model={shown(config['d_model'])}: must be equal; {EMBEDDED}"
        )
    if abs(config.get("layer_norm_epsilon", 1e-5) - 1e-5) > 1e-12:
        problems.append(f"{path}: layer_norm_epsilon={shown(config['layer_norm_epsilon'])}: must be 1e-05")
    return problems
