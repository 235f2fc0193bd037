"""Floating-point operations of Transformer-XL: counted, not measured, so that every rank finds the same number.

A product of matrices [a, b] x [b, c] counts 2abc (a multiplication and an addition each); element-wise operations count
nothing. In backward each factor that needs a gradient costs as much again: two as a rule, one where the other factor
depends on no parameter (the memory, the encoding of distances).
"""

from math import log
from typing import NamedTuple

from txl_dist.config.schema import ModelConfig


class Product(NamedTuple):
    """A product of matrices, as it runs.

    Attributes:
        forward: its operations in a forward.
        gradients: how many of its two factors need a gradient.
        visible: in attention the fraction of the keys, on average, that a query may see.
    """

    forward: float
    gradients: int = 2
    visible: float = 1.0

    @property
    def training(self) -> float:
        """Return its operations in a forward and a backward."""
        return self.forward * (1 + self.gradients)


def flops(config: ModelConfig, vocab_size: int, lanes: int) -> list[float]:
    """Count a forward of the embedding, of each layer and of the softmax, as they run when `lanes` read one segment."""
    return [sum(product.forward for product in part) for part in products_by_part(config, vocab_size, lanes)]


def training_flops(config: ModelConfig, vocab_size: int, lanes: int) -> float:
    """Count the model FLOPs (Chowdhery et al. 2022, appendix B) of a training step: one segment, forward and backward.

    They are what the model asks for, whatever the hardware does and however the `lanes` are split. So recomputation
    does not count, r is projected once, and in attention only the keys count that a query may see once the memory is
    full. (Chowdhery et al. count future keys, too, and find more.)
    """
    products = [product for part in products_by_part(config, vocab_size, lanes) for product in part]
    return sum(product.training * product.visible for product in products)


def products_by_part(config: ModelConfig, vocab_size: int, lanes: int) -> list[list[Product]]:
    """List the products of the embedding, of each layer and of the softmax."""
    starts = [0, *config.cutoffs]
    ends = [*config.cutoffs, vocab_size]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    tokens = lanes * config.tgt_len
    in_cluster = [tokens * zipf_share(start, end, vocab_size) for start, end in zip(starts, ends, strict=True)]
    return [
        embedding_products(config, in_cluster),
        *[layer_products(config, lanes)] * config.n_layer,
        softmax_products(config, sizes, [tokens, *in_cluster[1:]]),
    ]


def zipf_share(start: int, end: int, vocab_size: int) -> float:
    """Return the fraction of a text's tokens whose rank is from start to end, where rank r occurs 1/r as often."""
    return log((end + 1) / (start + 1)) / log(vocab_size + 1)


def layer_products(config: ModelConfig, lanes: int) -> list[Product]:
    """List the products of one layer, when `lanes` lanes read one segment."""
    length = config.tgt_len
    mem_len = config.mem_len
    keys = mem_len + length
    width = config.n_head * config.d_head
    project = 2 * config.d_model * width  # one state by one of the attention's weights
    attend = 2 * width * lanes * length  # all queries with one key each
    seen = mem_len if config.same_length else mem_len + (length + 1) / 2  # keys per query, on average
    # The memory itself has no gradient; in these two cases parameters stand between it and its keys and values.
    learned = config.pre_lnorm or config.attention == "al_rfou"
    products = [
        *[Product(project * lanes * length)] * 4,  # q, k, v, output
        *[Product(project * lanes * mem_len, gradients=2 if learned else 1)] * 2,  # k and v of the memory
        *[Product(attend * keys, visible=seen / keys)] * 2,  # content, values
        *[Product(2 * lanes * length * config.d_model * config.d_inner)] * 2,  # feed-forward
    ]
    if config.attention in ("relative", "shaw"):
        products.append(Product(attend * (keys + 1), visible=seen / (keys + 1)))  # position
    if config.attention == "relative":
        products.append(Product(project * (keys + 1), gradients=1))  # r
    return products


def embedding_products(config: ModelConfig, in_cluster: list[float]) -> list[Product]:
    """List the products of the embedding: a lookup in a table costs nothing, a projection does.

    Args:
        in_cluster: how many of the tokens are in each cluster.
    """
    if config.div_val == 1:
        return []
    return [Product(2 * count * config.d_model * cluster_width(config, i)) for i, count in enumerate(in_cluster)]


def softmax_products(config: ModelConfig, sizes: list[int], scored: list[float]) -> list[Product]:
    """List the products of the softmax.

    Args:
        sizes: number of tokens in each cluster of the vocabulary.
        scored: for how many positions each cluster's distribution is needed: the first one's, which has an entry for
            each other cluster, for all.
    """
    products = []
    for i, (size, count) in enumerate(zip(sizes, scored, strict=True)):
        outputs = size + len(config.cutoffs) if i == 0 else size
        products.append(Product(2 * count * cluster_width(config, i) * outputs))
        if config.div_val > 1:
            products.append(Product(2 * count * config.d_model * cluster_width(config, i)))
    return products


def cluster_width(config: ModelConfig, cluster: int) -> int:
    """Return the width of a cluster's embedding."""
    width: int = config.d_model // config.div_val**cluster
    return width
