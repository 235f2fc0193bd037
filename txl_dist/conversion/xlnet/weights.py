"""Convert tensors of XLNet checkpoints: Hugging Face's names and shapes, and ours.

Hugging Face keeps the projections of the attention as [d_model, n_head, d_head], transposed to what a linear layer has,
but for the output's. The authors' TensorFlow names become Hugging Face's first (authors.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from txl_dist.conversion.tensor_files import check_shapes, check_size
from txl_dist.models.base import TASK_HEAD
from txl_dist.models.config import ModelConfig
from txl_dist.models.shapes import parameter_shapes
from txl_dist.models.xlnet import XLNetConfig

EMBEDDING = "transformer.word_embedding.weight"
MASK = "transformer.mask_emb"
BIAS = "lm_loss.bias"
TIED = "lm_loss.weight"  # is the embedding's table

# Names within a layer whose values are the same here and there.
LAYER = {
    "attention.u": "rel_attn.r_w_bias",
    "attention.v": "rel_attn.r_r_bias",
    "attention.s": "rel_attn.r_s_bias",
    "attention.segment": "rel_attn.seg_embed",
    "attention.layer_norm.weight": "rel_attn.layer_norm.weight",
    "attention.layer_norm.bias": "rel_attn.layer_norm.bias",
    "feed_forward.inner.weight": "ff.layer_1.weight",
    "feed_forward.inner.bias": "ff.layer_1.bias",
    "feed_forward.outer.weight": "ff.layer_2.weight",
    "feed_forward.outer.bias": "ff.layer_2.bias",
    "feed_forward.layer_norm.weight": "ff.layer_norm.weight",
    "feed_forward.layer_norm.bias": "ff.layer_norm.bias",
}

# The heads for fine-tuning, by Hugging Face's class: the names of their modules here and there.
HEADS = {
    "XLNetForSequenceClassification": {"summary": "sequence_summary.summary", "out": "logits_proj"},
    "XLNetForQuestionAnsweringSimple": {"out": "qa_outputs"},
    "XLNetForQuestionAnswering": {
        "start": "start_logits.dense",
        "end.dense_0": "end_logits.dense_0",
        "end.layer_norm": "end_logits.LayerNorm",
        "end.dense_1": "end_logits.dense_1",
        "answer.dense_0": "answer_class.dense_0",
        "answer.dense_1": "answer_class.dense_1",
    },
}

NOTHING = re.compile(r"(?!)")


def to_parameters(tensors: Mapping[str, Tensor], vocab_size: int, config: ModelConfig) -> dict[str, Tensor]:
    """Convert tensors with Hugging Face's names into our parameters, in float32.

    Raises:
        ConfigError: for every tensor that is missing, has another shape, or is not part of this config's model.
    """
    assert isinstance(config, XLNetConfig)
    parameters = parameter_shapes(config, vocab_size, at_most=len(tensors))
    check_size(tensors, parameters)
    check_shapes(tensors, hugging_face_shapes(config, vocab_size), NOTHING)

    def theirs(name: str) -> Tensor:
        return tensors[name].to(torch.float32, copy=True)  # a copy: layers may share biases

    return dict(from_hugging_face(theirs, config.n_layer))


def from_hugging_face(theirs: Callable[[str], Tensor], n_layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and values.

    Args:
        theirs: look-up of a tensor by Hugging Face's name.
    """
    yield "embedding.table", theirs(EMBEDDING)
    yield "embedding.mask", theirs(MASK).flatten()
    for l in range(n_layer):
        layer = f"transformer.layer.{l}"
        q, k, v, r = (theirs(f"{layer}.rel_attn.{name}").flatten(1).T.contiguous() for name in "qkvr")
        yield f"layers.{l}.attention.q_net.weight", q
        yield f"layers.{l}.attention.kv_net.weight", torch.cat([k, v])
        yield f"layers.{l}.attention.r_net.weight", r
        yield f"layers.{l}.attention.o_net.weight", theirs(f"{layer}.rel_attn.o").flatten(1)
        for our_name, their_name in LAYER.items():
            yield f"layers.{l}.{our_name}", theirs(f"{layer}.{their_name}")
    yield "head.bias", theirs(BIAS)


def to_hugging_face(parameters: Mapping[str, Tensor], config: XLNetConfig) -> dict[str, Tensor]:
    """Convert our parameters into Hugging Face's tensors, the inverse of `from_hugging_face`; but those of a task."""
    heads = (config.d_model, config.n_head, config.d_head)
    tensors = {EMBEDDING: parameters["embedding.table"], MASK: parameters["embedding.mask"].view(1, 1, -1)}
    if "head.bias" in parameters:
        tensors[BIAS] = parameters["head.bias"]
    for l in range(config.n_layer):
        layer = f"transformer.layer.{l}"
        ours = {name: parameters[f"layers.{l}.attention.{name}_net.weight"] for name in ("q", "kv", "r", "o")}
        k, v = ours["kv"].chunk(2)
        for name, value in {"q": ours["q"], "k": k, "v": v, "r": ours["r"]}.items():
            tensors[f"{layer}.rel_attn.{name}"] = value.T.reshape(heads)
        tensors[f"{layer}.rel_attn.o"] = ours["o"].reshape(heads)
        for our_name, their_name in LAYER.items():
            tensors[f"{layer}.{their_name}"] = parameters[f"layers.{l}.{our_name}"]
    return tensors


def task_head_name(kind: str, name: str) -> str:
    """Return Hugging Face's name of a parameter of a head for fine-tuning.

    Args:
        kind: a key of HEADS.
        name: within our head, such as `end.dense_0.weight`.
    """
    module, _, parameter = name.rpartition(".")
    return f"{HEADS[kind][module]}.{parameter}"


def task_head_names(kind: str, parameters: Iterable[str]) -> dict[str, str]:
    """Return Hugging Face's names of those of our parameters that are of a head for fine-tuning, by our names."""
    prefix = f"{TASK_HEAD}."
    ours = [name for name in parameters if name.startswith(prefix)]
    return {name: task_head_name(kind, name.removeprefix(prefix)) for name in ours}


def hugging_face_shapes(config: XLNetConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of Hugging Face's tensors, without the one that is tied."""
    shapes = {EMBEDDING: (vocab_size, config.d_model), MASK: (1, 1, config.d_model), BIAS: (vocab_size,)}
    for l in range(config.n_layer):
        for name, shape in layer_shapes(config).items():
            shapes[f"transformer.layer.{l}.{name}"] = shape
    return shapes


def layer_shapes(config: XLNetConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in one of Hugging Face's layers."""
    d_model = config.d_model
    heads = (config.n_head, config.d_head)
    shapes: dict[str, tuple[int, ...]] = {f"rel_attn.{name}": (d_model, *heads) for name in "qkvor"}
    shapes |= {f"rel_attn.r_{name}_bias": heads for name in "wrs"}
    shapes["rel_attn.seg_embed"] = (2, *heads)
    shapes |= {"ff.layer_1.weight": (config.d_inner, d_model), "ff.layer_1.bias": (config.d_inner,)}
    shapes |= {"ff.layer_2.weight": (d_model, config.d_inner), "ff.layer_2.bias": (d_model,)}
    for sublayer in ("rel_attn", "ff"):
        shapes |= {f"{sublayer}.layer_norm.{name}": (d_model,) for name in ("weight", "bias")}
    return shapes
