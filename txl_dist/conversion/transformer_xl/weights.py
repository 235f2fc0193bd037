"""Convert tensors of third-party Transformer-XL checkpoints: their names and shapes, and ours.

Three code bases have the model: the authors' (kimiyoung/transformer-xl), NVIDIA's (DeepLearningExamples) and Hugging
Face's (transformers up to 4.36). Their tensors differ in names and, for the authors and NVIDIA, in two other things:

- u and v (r_w_bias, r_r_bias) are one pair for all layers; here, as by default at Hugging Face, each layer has its own.
- The softmax's head counts its clusters from the end: cluster i is row -i of cluster_weight and cluster_bias.

Hugging Face's names are the common ones; a `Naming` derives a file's names from them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from txl_dist.conversion.tensor_files import check_shapes, check_size, is_same
from txl_dist.models.config import ModelConfig
from txl_dist.models.shapes import parameter_shapes
from txl_dist.models.transformer_xl import TransformerXLConfig

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


def from_hugging_face(theirs: Callable[[str], Tensor], config: TransformerXLConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and values, tied ones under both names.

    Args:
        theirs: look-up of a tensor by Hugging Face's name.
    """
    for l in range(config.n_layer):
        q, k, v = theirs(f"transformer.layers.{l}.dec_attn.qkv_net.weight").chunk(3)
        yield f"layers.{l}.attention.q_net.weight", q
        yield f"layers.{l}.attention.kv_net.weight", torch.cat([k, v])
        for our_name, their_name in LAYER.items():
            yield f"layers.{l}.{our_name}", theirs(f"transformer.layers.{l}.{their_name}")
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


def hugging_face_shapes(config: TransformerXLConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of Hugging Face's tensors, tied ones under both names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for l in range(config.n_layer):
        for name, shape in layer_shapes(config).items():
            shapes[f"transformer.layers.{l}.{name}"] = shape
    ends = [*config.cutoffs, vocab_size] if config.div_val > 1 else [vocab_size]
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        size = end - start
        width = config.d_model // config.div_val**i
        shapes[f"transformer.word_emb.emb_layers.{i}.weight"] = (size, width)
        shapes[f"crit.out_layers.{i}.weight"] = (size, width)
        shapes[f"crit.out_layers.{i}.bias"] = (size,)
        if config.div_val > 1:
            shapes[f"transformer.word_emb.emb_projs.{i}"] = (config.d_model, width)
            shapes[f"crit.out_projs.{i}"] = (config.d_model, width)
    if config.cutoffs:
        shapes["crit.cluster_weight"] = (len(config.cutoffs), config.d_model)
        shapes["crit.cluster_bias"] = (len(config.cutoffs),)
    return shapes


def layer_shapes(config: TransformerXLConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in one of Hugging Face's layers."""
    d_model = config.d_model
    d_inner = config.d_inner
    width = config.n_head * config.d_head
    return {
        "dec_attn.qkv_net.weight": (3 * width, d_model),
        "dec_attn.r_net.weight": (width, d_model),
        "dec_attn.o_net.weight": (d_model, width),
        "dec_attn.r_w_bias": (config.n_head, config.d_head),
        "dec_attn.r_r_bias": (config.n_head, config.d_head),
        "pos_ff.CoreNet.0.weight": (d_inner, d_model),
        "pos_ff.CoreNet.0.bias": (d_inner,),
        "pos_ff.CoreNet.3.weight": (d_model, d_inner),
        "pos_ff.CoreNet.3.bias": (d_model,),
        "dec_attn.layer_norm.weight": (d_model,),
        "dec_attn.layer_norm.bias": (d_model,),
        "pos_ff.layer_norm.weight": (d_model,),
        "pos_ff.layer_norm.bias": (d_model,),
    }


# -------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Naming:
    """How a file names its tensors.

    Attributes:
        rules: (pattern, replacement), applied in order to one of Hugging Face's names, give the file's name.
        clusters_reversed: whether the softmax's head counts its clusters from the end.
    """

    rules: tuple[tuple[str, str], ...]
    clusters_reversed: bool

    def __call__(self, name: str) -> str:
        """Turn Hugging Face's name into the file's."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


SHARED_BIASES = (r"layers\.\d+\.dec_attn\.(r_[wr]_bias)", r"\1")
HUGGING_FACE = Naming((), clusters_reversed=False)
HUGGING_FACE_SHARED = Naming((SHARED_BIASES,), clusters_reversed=False)  # untie_r=False
AUTHORS = Naming((SHARED_BIASES, (r"^transformer\.", "")), clusters_reversed=True)
NVIDIA = Naming(
    (
        *AUTHORS.rules,
        (r"out_layers\.(\d+)\.bias", r"out_layers_biases.\1"),
        (r"out_layers\.(\d+)\.weight", r"out_layers_weights.\1"),
    ),
    clusters_reversed=True,
)

# Tensors that a file may hold besides: buffers, and other names of the same weights.
NO_WEIGHTS = re.compile(r"(.*\.)?inv_freq|crit\.shared_out_projs\.\d+|transformer\.layers\.\d+\.dec_attn\.r_[wr]_bias")

TIES = {
    "tie_weights": ("out_layers.{}.weight", "emb_layers.{}.weight"),
    "tie_projections": ("out_projs.{}", "emb_projs.{}"),
}


def add_tied(
    tensors: dict[str, Tensor], naming: Naming, tables: bool, projections: list[bool], clusters: int
) -> list[str]:
    """Add the softmax's tensors that a file leaves out because its config ties them to the embedding's.

    Args:
        tables: whether all tables are tied.
        projections: for each cluster, whether its projection is tied.
        clusters: how many clusters have a table of their own; 1: one table for all, and no projection.

    Returns:
        Problems: tensors that the config ties, but that differ.
    """
    problems = []
    tied = [("tie_weights", i) for i in range(clusters) if tables]
    tied += [("tie_projections", i) for i in range(clusters) if clusters > 1 and projections[i]]
    for kind, i in tied:
        softmax, embedding = tied_names(naming, kind, i)
        if embedding not in tensors:
            continue
        if not is_same(tensors.setdefault(softmax, tensors[embedding]), tensors[embedding]):
            problems.append(f"{softmax}: differs from {embedding}, but the config ties the two")
    return problems


def find_ties(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, bool]:
    """Find out whether the softmax's tables, and its projections but the first, are the embedding's.

    Returns:
        tie_weights and tie_projections of our config.
    """
    ties = {}
    for kind, first in (("tie_weights", 0), ("tie_projections", 1)):
        same = []
        for i in range(first, len(tensors)):
            softmax, embedding = tied_names(naming, kind, i)
            if softmax in tensors and embedding in tensors:
                same.append(is_same(tensors[softmax], tensors[embedding]))
        ties[kind] = bool(same) and all(same)
    return ties


def tied_names(naming: Naming, kind: str, cluster: int) -> tuple[str, str]:
    """Return the names of a cluster's tensor in the softmax and in the embedding."""
    softmax, embedding = TIES[kind]
    return naming(f"crit.{softmax.format(cluster)}"), naming(f"transformer.word_emb.{embedding.format(cluster)}")


# ------------------------------------------------------------------------------------------------------ weights


def to_parameters(
    tensors: Mapping[str, Tensor], naming: Naming | None, vocab_size: int, config: ModelConfig
) -> dict[str, Tensor]:
    """Convert a file's tensors into our parameters, in float32.

    Args:
        naming: how the file names them; None: as our parameters.

    Raises:
        ConfigError: for every tensor that is missing, has another shape, or is not part of this config's model.
    """
    assert isinstance(config, TransformerXLConfig)
    parameters = parameter_shapes(config, vocab_size, at_most=len(tensors))
    check_size(tensors, parameters)
    if naming is None:
        check_shapes(tensors, parameters, NO_WEIGHTS)
        return {name: tensors[name].to(torch.float32, copy=True) for name in parameters}
    expected = {naming(name): shape for name, shape in hugging_face_shapes(config, vocab_size).items()}
    check_shapes(tensors, expected, NO_WEIGHTS)

    def theirs(name: str) -> Tensor:
        value = tensors[naming(name)].to(torch.float32, copy=True)  # a copy: each layer has its own u and v
        return value.flip(0) if naming.clusters_reversed and "cluster_" in name else value

    return {name: value for name, value in from_hugging_face(theirs, config) if name in parameters}
