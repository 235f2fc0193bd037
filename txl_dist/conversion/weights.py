"""How Transformer-XL's tensors are named and shaped elsewhere, and what they are here.

Three houses know the model: the authors (kimiyoung/transformer-xl), NVIDIA (DeepLearningExamples) and Hugging Face
(transformers up to 4.36). Their tensors differ in names and, for the authors and NVIDIA, in two other things:

- u and v (r_w_bias, r_r_bias) are one pair for all layers; here, as by default at Hugging Face, each layer has its own.
- The softmax' head knows its clusters from the end: cluster i is row -i of cluster_weight and cluster_bias.

Hugging Face's names are the common ones; a `Spelling` tells how a file's names come from them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from txl_dist.config.schema import ModelConfig
from txl_dist.errors import ConfigError
from txl_dist.files.parsing import shown
from txl_dist.models.transformer_xl import parameter_shapes

LAYER = {
    "attention.r_net.weight": "dec_attn.r_net.weight",
    "attention.o_net.weight": "dec_attn.o_net.weight",
    "attention.u": "dec_attn.r_w_bias",
    "attention.v": "dec_attn.r_r_bias",
    "attention.layer_norm.weight": "dec_attn.layer_norm.weight",
    "attention.layer_norm.bias": "dec_attn.layer_norm.bias",
    "feed_forward.inner.weight": "pos_ff.CoreNet.0.weight",
    "feed_forward.inner.bias": "pos_ff.CoreNet.0.bias",
    "feed_forward.outer.weight": "pos_ff.CoreNet.3.weight",
    "feed_forward.outer.bias": "pos_ff.CoreNet.3.bias",
    "feed_forward.layer_norm.weight": "pos_ff.layer_norm.weight",
    "feed_forward.layer_norm.bias": "pos_ff.layer_norm.bias",
}


def translate(theirs: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and values, tied ones under both names, from a look-up by Hugging Face's names."""
    for l in range(config.n_layer):
        q, k, v = theirs(f"transformer.layers.{l}.dec_attn.qkv_net.weight").chunk(3)
        yield f"layers.{l}.attention.q_net.weight", q
        yield f"layers.{l}.attention.kv_net.weight", torch.cat([k, v])
        for mine, their in LAYER.items():
            yield f"layers.{l}.{mine}", theirs(f"transformer.layers.{l}.{their}")
    parts = range(1 + len(config.cutoffs) if config.div_val > 1 else 1)
    for i in parts:
        yield f"embedding.table_{i}", theirs(f"transformer.word_emb.emb_layers.{i}.weight")
        yield f"softmax.table_{i}", theirs(f"crit.out_layers.{i}.weight")
        if config.div_val > 1:
            yield f"embedding.projection_{i}", theirs(f"transformer.word_emb.emb_projs.{i}")
            yield f"softmax.projection_{i}", theirs(f"crit.out_projs.{i}")
    yield "softmax.bias", torch.cat([theirs(f"crit.out_layers.{i}.bias") for i in parts])
    if config.cutoffs:
        yield "softmax.cluster_weight", theirs("crit.cluster_weight")
        yield "softmax.cluster_bias", theirs("crit.cluster_bias")


def shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Of Hugging Face's tensors."""
    width, d_model, d_inner = config.n_head * config.d_head, config.d_model, config.d_inner
    layer = {
        "dec_attn.qkv_net.weight": (3 * width, d_model),
        "dec_attn.r_net.weight": (width, d_model),
        "dec_attn.o_net.weight": (d_model, width),
        "dec_attn.r_w_bias": (config.n_head, config.d_head),
        "dec_attn.r_r_bias": (config.n_head, config.d_head),
        "pos_ff.CoreNet.0.weight": (d_inner, d_model),
        "pos_ff.CoreNet.0.bias": (d_inner,),
        "pos_ff.CoreNet.3.weight": (d_model, d_inner),
        "pos_ff.CoreNet.3.bias": (d_model,),
        **{f"{part}.layer_norm.{kind}": (d_model,) for part in ("dec_attn", "pos_ff") for kind in ("weight", "bias")},
    }
    found: dict[str, tuple[int, ...]] = {
        f"transformer.layers.{l}.{name}": shape for l in range(config.n_layer) for name, shape in layer.items()
    }
    ends = [*config.cutoffs, vocab_size] if config.div_val > 1 else [vocab_size]
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        size, narrow = end - start, d_model // config.div_val**i
        found[f"transformer.word_emb.emb_layers.{i}.weight"] = size, narrow
        found[f"crit.out_layers.{i}.weight"] = size, narrow
        found[f"crit.out_layers.{i}.bias"] = (size,)
        if config.div_val > 1:
            found[f"transformer.word_emb.emb_projs.{i}"] = d_model, narrow
            found[f"crit.out_projs.{i}"] = d_model, narrow
    if config.cutoffs:
        found["crit.cluster_weight"] = len(config.cutoffs), d_model
        found["crit.cluster_bias"] = (len(config.cutoffs),)
    return found


# ---------------------------------------------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Spelling:
    """rules: (pattern, replacement), applied in order to one of Hugging Face's names, give the file's name.
    from_the_end: whether the head counts its clusters so."""

    rules: tuple[tuple[str, str], ...]
    from_the_end: bool

    def __call__(self, name: str) -> str:
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


SHARED_BIASES = (r"layers\.\d+\.dec_attn\.(r_[wr]_bias)", r"\1")
HUGGING_FACE = Spelling((), from_the_end=False)
HUGGING_FACE_SHARED = Spelling((SHARED_BIASES,), from_the_end=False)  # untie_r=False
AUTHORS = Spelling((SHARED_BIASES, (r"^transformer\.", "")), from_the_end=True)
NVIDIA = Spelling(
    (
        *AUTHORS.rules,
        (r"out_layers\.(\d+)\.bias", r"out_layers_biases.\1"),
        (r"out_layers\.(\d+)\.weight", r"out_layers_weights.\1"),
    ),
    from_the_end=True,
)

# What a file may hold besides: no weights, or other names of the same tensors.
NO_WEIGHTS = re.compile(r"(.*\.)?inv_freq|crit\.shared_out_projs\.\d+|transformer\.layers\.\d+\.dec_attn\.r_[wr]_bias")

TIES = {
    "tie_weights": ("out_layers.{}.weight", "emb_layers.{}.weight"),
    "tie_projections": ("out_projs.{}", "emb_projs.{}"),
}


def tie(
    tensors: dict[str, Tensor], spelling: Spelling, tables: bool, projections: list[bool], clusters: int
) -> list[str]:
    """Give the softmax what a file leaves out, for its config ties it; tell what is tied by the config but differs.

    Args:
        tables: whether all tables are tied. projections: of each cluster, whether its projection is.
        clusters: how many clusters have a table of their own; 1: one table for all, and no projection.
    """
    problems = []
    tied = [("tie_weights", i) for i in range(clusters) if tables]
    tied += [("tie_projections", i) for i in range(clusters) if clusters > 1 and projections[i]]
    for kind, i in tied:
        mine, theirs = pair(spelling, kind, i)
        if theirs in tensors and not same(tensors.setdefault(mine, tensors[theirs]), tensors[theirs]):
            problems.append(f"{mine}: differs from {theirs}, but the config ties it to that")
    return problems


def ties(tensors: Mapping[str, Tensor], spelling: Spelling) -> dict[str, bool]:
    """Whether the softmax' tables, and its projections but the first, are the embedding's."""
    found = {}
    for kind, first in (("tie_weights", 0), ("tie_projections", 1)):
        pairs = [pair(spelling, kind, i) for i in range(first, len(tensors))]
        both = [(tensors[mine], tensors[theirs]) for mine, theirs in pairs if mine in tensors and theirs in tensors]
        found[kind] = bool(both) and all(same(*each) for each in both)
    return found


def pair(spelling: Spelling, kind: str, cluster: int) -> tuple[str, str]:
    mine, theirs = TIES[kind]
    return spelling(f"crit.{mine.format(cluster)}"), spelling(f"transformer.word_emb.{theirs.format(cluster)}")


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def ours(
    tensors: Mapping[str, Tensor], spelling: Spelling | None, config: ModelConfig, vocab_size: int
) -> dict[str, Tensor]:
    """A file's tensors by the names of our parameters, in float32. Without a spelling they bear those already.

    Raises:
        ConfigError: with every tensor that is missing, misshapen or too much for this config.
    """
    parameters = parameter_shapes(config, vocab_size, at_most=len(tensors))
    check_size(tensors, parameters)
    if spelling is None:
        check_shapes(tensors, parameters)
        return {name: tensors[name].to(torch.float32, copy=True) for name in parameters}
    check_shapes(tensors, {spelling(name): shape for name, shape in shapes(config, vocab_size).items()})

    def theirs(name: str) -> Tensor:
        value = tensors[spelling(name)].to(torch.float32, copy=True)  # each layer its own u and v
        return value.flip(0) if spelling.from_the_end and "cluster_" in name else value

    return {name: value for name, value in translate(theirs, config) if name in parameters}


def check_size(tensors: Mapping[str, Tensor], parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model far larger than its file: tensors of a pickle may be views of the same few numbers."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors.values()}
    held = sum(storage.nbytes() for storage in storages.values())
    asked = sum(map(prod, parameters.values()))
    # A parameter is a byte at least: float16 as float32 is twice the bytes, a table that is tied there twice that.
    if asked > max(held, 4096):
        raise ConfigError([f"the model of the config has {asked:,} parameters, but all tensors only {held:,} bytes"])


def check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those that are wanted; of many that are wrong in one way the first is named."""
    given = {name: value for name, value in tensors.items() if name in wanted or not NO_WEIGHTS.fullmatch(name)}
    if not wanted.keys() & given.keys():
        raise ConfigError([f"none of the tensors is known: they are {shown(list(given))}, not {shown(list(wanted))}"])
    both = [(name, list(given[name].shape), list(shape)) for name, shape in wanted.items() if name in given]
    problems = [
        [f"{name}: is missing; its shape would be {list(wanted[name])}" for name in wanted if name not in given],
        [f"{name}: has the shape {has}, but the config asks for {asked}" for name, has, asked in both if has != asked],
        [
            f"{name}: is of {given[name].dtype}, not of floats"
            for name, *_ in both
            if not given[name].is_floating_point()
        ],
        [
            f"{name}: has no place in the model of the config; its shape is {list(value.shape)}"
            for name, value in given.items()
            if name not in wanted
        ],
    ]
    told = [line for kind in problems for line in (kind if len(kind) <= 3 else [f"{kind[0]} ({len(kind) - 1} more)"])]
    if told:
        raise ConfigError(told)
