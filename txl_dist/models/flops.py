"""Floating-point operations of a forward: counted, not measured, so that every rank finds the same number.

A product of matrices [a, b] x [b, c] counts 2abc (a multiplication and an addition each); what is done element by
element counts nothing. A backward costs twice a forward, less what needs no gradient (the memory's keys and values).
"""

from math import log

from txl_dist.config import ModelConfig


def flops(config: ModelConfig, vocab_size: int, lanes: int) -> list[float]:
    """Of the embedding, of each layer and of the softmax, when `lanes` lanes read one segment."""
    starts, ends = [0, *config.cutoffs], [*config.cutoffs, vocab_size]
    tokens = lanes * config.tgt_len
    members = [tokens * zipf_share(start, end, vocab_size) for start, end in zip(starts, ends, strict=True)]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return [
        embedding_flops(config, members),
        *[layer_flops(config, lanes)] * config.n_layer,
        softmax_flops(config, sizes, [tokens, *members[1:]]),
    ]


def zipf_share(start: int, end: int, vocab_size: int) -> float:
    """The share of a text's tokens that are among the words of ranks start to end, where rank r occurs 1/r as often."""
    return log((end + 1) / (start + 1)) / log(vocab_size + 1)


def layer_flops(config: ModelConfig, lanes: int) -> float:
    length, keys = config.tgt_len, config.mem_len + config.tgt_len
    d_model, width = config.d_model, config.n_head * config.d_head
    project = 2 * d_model * width * lanes * (2 * length + 2 * keys)  # q and output, k and v
    attend = 2 * width * lanes * length * 2 * keys  # content and values
    if config.attention in ("relative", "shaw"):
        attend += 2 * width * lanes * length * (keys + 1)  # position
    if config.attention == "relative":
        project += 2 * d_model * width * (keys + 1)  # r
    return project + attend + 4 * lanes * length * d_model * config.d_inner


def embedding_flops(config: ModelConfig, members: list[float]) -> float:
    """members: how many of the tokens are in each cluster. A table is looked up, for nothing; a projection costs."""
    if config.div_val == 1:
        return 0
    return sum(2 * count * config.d_model * width(config, i) for i, count in enumerate(members))


def softmax_flops(config: ModelConfig, sizes: list[int], scored: list[float]) -> float:
    """sizes: tokens in the vocabulary's clusters. scored: for how many positions each cluster's distribution is needed;
    the first one's, with one entry for each other cluster, for all."""
    total = 0.0
    for i, (size, count) in enumerate(zip(sizes, scored, strict=True)):
        outputs = size + len(config.cutoffs) if i == 0 else size
        total += 2 * count * width(config, i) * outputs
        if config.div_val > 1:
            total += 2 * count * config.d_model * width(config, i)
    return total


def width(config: ModelConfig, cluster: int) -> int:
    """Of a cluster's embedding."""
    return config.d_model // config.div_val**cluster
