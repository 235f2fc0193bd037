"""What a checkpoint of another house is: its tensors, their spelling, and what it tells of its config and its words."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from txl_dist.config.schema import ModelConfig
from txl_dist.conversion import pickles, vocabularies, weights
from txl_dist.conversion.pickles import Inert
from txl_dist.conversion.weights import Spelling
from txl_dist.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown


@dataclass(frozen=True)
class Source:
    """A checkpoint of another house, or a folder that was exported from here.

    title: what it is, for people. spelling: None where the tensors bear our names.
    told: hyper-parameters by our names, as far as the source tells them. vocab_size: as it tells, or as its tables are.
    tokenizer: reads what lies in or beside the source, and raises a UserError where it cannot; None: there is nothing.
    """

    title: str
    tensors: dict[str, Tensor]
    spelling: Spelling | None
    told: dict[str, Any]
    vocab_size: int
    tokenizer: Callable[[], Tokenizer] | None


def open_source(path: Path) -> Source:
    """Find out what a folder or file holds.

    Raises:
        UserError: where it is nothing known, cannot be read, or is a model that ours cannot be.
    """
    try:
        source = recognised(path)
        if type(source.vocab_size) is not int or not 1 <= source.vocab_size < 1 << 32:
            raise ValueError(f"a vocabulary of {shown(source.vocab_size)} tokens")
        return source
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"from={path}: is damaged, or no whole checkpoint ({describe(error)})") from error


def recognised(path: Path) -> Source:
    if path.is_dir() and (path / "config.json").is_file():
        return folder(path)
    if path.is_dir():
        raise UserError(f"from={path}: is a folder without config.json; give a Hugging Face folder, or a .pt file")
    found = unwrapped(read_file(path))
    if isinstance(found, Inert):
        return authors(path, pickles.state_dict(found), found)
    if isinstance(found, Mapping) and {"model_state", "model_config"} <= found.keys():
        return nvidia(path, found)
    tensors = plain_names(found)
    if "r_w_bias" in tensors:
        return authors(path, tensors, None)
    if any(".dec_attn." in name for name in tensors):
        raise UserError(
            f"from={path}: holds the weights of a Hugging Face folder; give the folder with its config.json"
        )
    raise UserError(
        f"from={path}: is no checkpoint that is known here: a Hugging Face folder; the authors' model.pt or a state "
        "dict of it; NVIDIA's, a dict with model_state and model_config"
    )


# What a training script wraps a state dict or a module in, and what modules that wrap others put into their names.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "_orig_mod")
WRAPPING = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FIRST = ("word_emb.emb_layers.0.weight", "embedding.table_0")


def read_file(path: Path) -> Any:
    """The content of a file of tensors."""
    if path.suffix != ".safetensors":
        return pickles.read(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: cannot be read ({describe(error)})") from error


def unwrapped(found: Any) -> Any:
    """The model's dict, or the module, within what a training script has put around it."""
    for _ in range(10):
        inside = vars(found).get("_modules") if isinstance(found, Inert) else found
        if not isinstance(inside, Mapping) or (isinstance(found, Inert) and len(inside) != 1):
            break
        wrapped = [inside[key] for key in WRAPPERS if isinstance(inside.get(key), Mapping | Inert)]
        if not wrapped:
            break
        found = wrapped[0]
    return found


def plain_names(found: Any, own: str = "") -> dict[str, Tensor]:
    """The tensors of a state dict, by their names without what stands before all of them.

    Args:
        own: what stands before the embedding's name where nothing is wrapped.
    """
    items = found.items() if isinstance(found, Mapping) else ()
    tensors = {
        WRAPPING.sub("", name): value for name, value in items if isinstance(value, Tensor) and isinstance(name, str)
    }
    prefix = next((name.removesuffix(end) for name in tensors for end in FIRST if name.endswith(end)), "")
    prefix = prefix.removesuffix(own)
    if all(name.startswith(prefix) for name in tensors if re.search(r"(^|\.)(dec_attn|crit)\.", name)):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


# ------------------------------------------------------------------------------------------------- Hugging Face


def folder(path: Path) -> Source:
    """One that was exported from here, or a transfo-xl folder as save_pretrained writes it."""
    config = read_json(path / "config.json")
    kind = config["model_type"]
    if kind == "txl_dist":
        told = {field.name: config[field.name] for field in fields(ModelConfig) if field.name in config}
        told["name"] = "transformer_xl"
        tokenizer = partial(exported_tokenizer, path)
        return Source("a folder of txl_dist", read_folder(path), None, told, config["vocab_size"], tokenizer)
    if kind != "transfo-xl":
        raise UserError(
            f"{path / 'config.json'}: model_type={kind!s:.80}: must be transfo-xl, or a folder exported from here"
        )
    return hugging_face(path, HUGGING_FACE_DEFAULTS | config)


def hugging_face(path: Path, config: dict[str, Any]) -> Source:
    tensors = read_folder(path)
    title = "Hugging Face's transfo-xl"
    if not any(name.startswith(("transformer.", "crit.")) for name in tensors):  # a TransfoXLModel
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
    if not any(name.startswith("crit.") for name in tensors):
        add_softmax(tensors, path, config)
        title = f"{title}, without a softmax: it takes the embedding's table, its biases are 0"
    spelling = weights.HUGGING_FACE_SHARED if "transformer.r_w_bias" in tensors else weights.HUGGING_FACE
    projections = config.get("tie_projs") or [False] + [config["proj_share_all_but_first"]] * len(config["cutoffs"])
    problems = unsupported(path / "config.json", config)
    problems += weights.tie(tensors, spelling, config["tie_word_embeddings"], projections, clusters(config, tensors))
    if problems:
        raise ConfigError(problems)
    words = next((path / name for name in vocabularies.FILES if (path / name).is_file()), None)
    # A folder need not tell the length of segments: then the one that the paper's large model is evaluated with.
    told = common(config) | {"tgt_len": config.get("tgt_len", 128)} | weights.ties(tensors, spelling)
    tokenizer = partial(vocabularies.read, words) if words else None
    return Source(title, tensors, spelling, told, config["vocab_size"], tokenizer)


def add_softmax(tensors: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Give a TransfoXLModel, which has no softmax, the one that its config ties to the embedding."""
    table = tensors.get("transformer.word_emb.emb_layers.0.weight")
    if table is None:
        raise UserError(f"from={path}: has none of the names of transfo-xl, but {shown(sorted(tensors))}")
    if config["cutoffs"] or not config["tie_word_embeddings"]:
        why = "has clusters with weights of their own" if config["cutoffs"] else "is not tied to the embedding"
        raise UserError(f"from={path}: holds no softmax (crit.*), and it {why}; save a TransfoXLLMHeadModel")
    tensors["crit.out_layers.0.bias"] = torch.zeros(len(table))


# What a config.json may leave out.
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


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, in one file or in the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return plain_names(unwrapped(read_file(path)), own="transformer.")
        if index.is_file():
            return plain_names(read_parts(index), own="transformer.")
    raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of their parts")


def read_parts(index: Path) -> dict[str, Tensor]:
    names = sorted(set(read_json(index)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = index.parent / name
        if not re.fullmatch(r"\w[\w.-]*", name) or not path.is_file():
            raise UserError(f"{index}: names the part {name!s:.200}, which is not in the folder")
        tensors |= unwrapped(read_file(path))
    return tensors


def exported_tokenizer(folder: Path) -> Tokenizer:
    try:
        kind = read_json(folder / "tokenizer_config.json")["tokenizer_class"]
    except (OSError, *PARSE_ERRORS) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: names no tokenizer ({describe(error)})") from error
    if kind == "WordTokenizer":
        return WordTokenizer.open(folder / "vocab.txt")
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer.open(folder / "sentencepiece.model")
    return BytesTokenizer()


# --------------------------------------------------------------------------------------- the authors and NVIDIA


def authors(path: Path, tensors: dict[str, Tensor], module: Inert | None) -> Source:
    """kimiyoung/transformer-xl: the pickled module, or its state dict, which tells no lengths."""
    told = sizes(path, tensors)
    if module is not None:
        facts = vars(module)
        told |= {key: facts[key] for key in ("tgt_len", "mem_len", "same_length")}
        told |= {"clamp_len": max(facts["clamp_len"], 0) or -1} | of_first_layer(facts)
        embedding = vars(facts["_modules"]["word_emb"])
        told["cutoffs"] = embedding["cutoffs"][:-1]  # theirs end with the vocabulary's size
        if problems := unsupported(path, facts):
            raise ConfigError(problems)
    told |= weights.ties(tensors, weights.AUTHORS)
    beside = path.with_name("cache.pt")
    tokenizer = partial(vocabularies.read, beside) if beside.is_file() else None
    vocab_size = sum(len(table) for table in tables(tensors))
    return Source("the authors' Transformer-XL", tensors, weights.AUTHORS, told, vocab_size, tokenizer)


def tables(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The embedding's tables in order."""
    found = {int(match[1]): value for name, value in tensors.items() if (match := TABLE.fullmatch(name))}
    return [found[i] for i in sorted(found)]


TABLE = re.compile(r"word_emb\.emb_layers\.(\d+)\.weight")


def sizes(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the authors' tensors tell of the config."""
    needed = ["r_w_bias", "layers.0.dec_attn.qkv_net.weight", "layers.0.pos_ff.CoreNet.0.weight"]
    found = tables(tensors)
    problems = [f"{name}: is missing in {path}" for name in needed if name not in tensors]
    if problems or not found:
        raise ConfigError(problems or [f"word_emb.emb_layers.0.weight: is missing in {path}"])
    n_head, d_head = tensors["r_w_bias"].shape[-2:]
    d_inner, d_model = tensors["layers.0.pos_ff.CoreNet.0.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    told: dict[str, Any] = {"n_layer": max(layers) + 1, "d_model": d_model, "n_head": n_head, "d_head": d_head}
    told |= {"d_inner": d_inner, "dropout": 0.0, "dropatt": 0.0, "init_std": 0.02, "div_val": 1}
    if found[0].size(1) != d_model:
        raise UserError(f"{path}: embeds in {found[0].size(1)} dimensions a model of {d_model}; {EMBEDDED}")
    if len(found) > 1:
        told["div_val"] = found[0].size(1) // found[1].size(1)
        told["cutoffs"] = torch.tensor([len(table) for table in found[:-1]]).cumsum(0).tolist()
    elif "crit.cluster_weight" not in tensors:
        told["cutoffs"] = []
    return told


def of_first_layer(facts: dict[str, Any]) -> dict[str, Any]:
    """What the authors' modules tell: dropouts, and where the layer normalisation stands."""
    layer = vars(facts["_modules"]["layers"])["_modules"]["0"]
    attention = vars(vars(layer)["_modules"]["dec_attn"])
    rates = {"dropout": facts["_modules"].get("drop"), "dropatt": attention["_modules"].get("dropatt")}
    told = {key: vars(each)["p"] for key, each in rates.items() if each is not None}
    return told | {"pre_lnorm": bool(attention.get("pre_lnorm"))}


def nvidia(path: Path, found: Mapping[str, Any]) -> Source:
    """DeepLearningExamples: a dict with model_state, model_config and vocab."""
    config, spelling = dict(found["model_config"]), weights.NVIDIA
    tensors = plain_names(found["model_state"])
    needed = ["n_token", "n_layer", "d_model", "n_head", "d_head", "d_inner", "cutoffs", "div_val", "tie_weight"]
    needed += ["tie_projs", "pre_lnorm", "tgt_len", "mem_len", "same_length", "clamp_len"]
    problems = [f"{path}: its model_config tells no {key}" for key in needed if key not in config]
    if problems := problems or unsupported(path, config):
        raise ConfigError(problems)
    problems = weights.tie(tensors, spelling, config["tie_weight"], config["tie_projs"], clusters(config, tensors))
    if problems:
        raise ConfigError(problems)
    told = common({"dropout": 0.0, "dropatt": 0.0, "init_std": 0.02} | config) | weights.ties(tensors, spelling)
    told["tgt_len"] = config["tgt_len"]
    if told["same_length"]:
        told["mem_len"] += 1  # there a token sees mem_len others and itself; here mem_len with itself
    tokenizer = partial(vocabularies.of_pickled, found["vocab"], path) if "vocab" in found else None
    return Source("NVIDIA's Transformer-XL", tensors, spelling, told, config["n_token"], tokenizer)


# ------------------------------------------------------------------------------------------------- what all have

COMMON = ["n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "clamp_len", "same_length", "dropout"]
COMMON += ["dropatt", "div_val", "cutoffs", "pre_lnorm", "init_std"]
EMBEDDED = "ours embeds in d_model dimensions, or by clusters with div_val > 1"


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that have the same names everywhere."""
    told = {key: config[key] for key in COMMON}
    return told | {"clamp_len": max(told["clamp_len"], 0) or -1}


def clusters(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """How many have a table of their own."""
    count = 1 + len(config["cutoffs"]) if config["div_val"] > 1 else 1
    if count > len(tensors):
        raise ValueError(f"{count:,} clusters, but only {len(tensors)} tensors")
    return count


def unsupported(path: Path, config: Mapping[str, Any]) -> list[str]:
    """What a config says of a model that ours cannot be."""
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
