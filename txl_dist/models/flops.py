"""Floating-point operations: counted, not measured, so that every rank finds the same number.

A product of matrices [a, b] x [b, c] counts 2abc (a multiplication and an addition each); what is done element by
element counts nothing. In backward each factor that needs a gradient costs as much again: two as a rule, one where the
other factor depends on no parameter (the memory, the encoding of distances).
"""

from math import log
from typing import NamedTuple

from txl_dist.config.schema import ModelConfig


class Product(NamedTuple):
    """A product of matrices, as it runs.

    Attributes:
        forward: its operations in a forward.
        gradients: how many of its two factors need a gradient.
        visible: in attention the share of the keys, on average, that a query may see.
    """

    forward: float
    gradients: int = 2
    visible: float = 1.0

    @property
    def trained(self) -> float:
        """Its operations in a forward and a backward."""
        return self.forward * (1 + self.gradients)


def flops(config: ModelConfig, vocab_size: int, lanes: int) -> list[float]:
    """Of a forward's embedding, of each layer and of the softmax, as they run when `lanes` lanes read one segment."""
    return [sum(product.forward for product in part) for part in parts(config, vocab_size, lanes)]


def training_flops(config: ModelConfig, vocab_size: int, lanes: int) -> float:
    """Model FLOPs (Chowdhery et al. 2022, appendix B) of a training step: forward and backward of one segment.

    What the model asks for, whatever the hardware does and however the `lanes` are split. So nothing that is computed
    again counts, r is projected once, and of attention only the keys count that a query may see once the memory is
    full. (Chowdhery et al. count future keys, too, and find more.)
    """
    return sum(product.trained * product.visible for part in parts(config, vocab_size, lanes) for product in part)


def parts(config: ModelConfig, vocab_size: int, lanes: int) -> list[list[Product]]:
    """The products of the embedding, of each layer and of the softmax."""
    starts, ends = [0, *config.cutoffs], [*config.cutoffs, vocab_size]
    tokens = lanes * config.tgt_len
    members = [tokens * zipf_share(start, end, vocab_size) for start, end in zip(starts, ends, strict=True)]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return [
        embedding_products(config, members),
        *[layer_products(config, lanes)] * config.n_layer,
        softmax_products(config, sizes, [tokens, *members[1:]]),
    ]


def zipf_share(start: int, end: int, vocab_size: int) -> float:
    """The share of a text's tokens that are among the words of ranks start to end, where rank r occurs 1/r as often."""
    return log((end + 1) / (start + 1)) / log(vocab_size + 1)


def layer_products(config: ModelConfig, lanes: int) -> list[Product]:
    length, mem_len, d_model = config.tgt_len, config.mem_len, config.d_model
    width, keys = config.n_head * config.d_head, config.mem_len + config.tgt_len
    project, attend = 2 * d_model * width, 2 * width * lanes * length
    seen = mem_len if config.same_length else mem_len + (length + 1) / 2  # keys a query, on average
    # The memory itself has no gradient; what is learned stands between it and its keys and values in these two.
    learned = config.pre_lnorm or config.attention == "al_rfou"
    products = [
        *[Product(project * lanes * length)] * 4,  # q, k, v, output
        *[Product(project * lanes * mem_len, gradients=2 if learned else 1)] * 2,  # k and v of the memory
        *[Product(attend * keys, visible=seen / keys)] * 2,  # content, values
        *[Product(2 * lanes * length * d_model * config.d_inner)] * 2,  # feed-forward
    ]
    if config.attention in ("relative", "shaw"):
        products.append(Product(attend * (keys + 1), visible=seen / (keys + 1)))  # position
    if config.attention == "relative":
        products.append(Product(project * (keys + 1), gradients=1))  # r
    return products


def embedding_products(config: ModelConfig, members: list[float]) -> list[Product]:
    """members: how many of the tokens are in each cluster. A table is looked up, for nothing; a projection costs."""
    if config.div_val == 1:
        return []
    return [Product(2 * count * config.d_model * width(config, i)) for i, count in enumerate(members)]


def softmax_products(config: ModelConfig, sizes: list[int], scored: list[float]) -> list[Product]:
    """sizes: tokens in the vocabulary's clusters. scored: for how many positions each cluster's distribution is needed;
    the first one's, with one entry for each other cluster, for all."""
    products = []
    for i, (size, count) in enumerate(zip(sizes, scored, strict=True)):
        outputs = size + len(config.cutoffs) if i == 0 else size
        products.append(Product(2 * count * width(config, i) * outputs))
        if config.div_val > 1:
            products.append(Product(2 * count * config.d_model * width(config, i)))
    return products


def width(config: ModelConfig, cluster: int) -> int:
    """Of a cluster's embedding."""
    return config.d_model // config.div_val**cluster
