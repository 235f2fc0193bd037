"""Adaptive input and adaptive softmax (Baevski & Auli 2019; Grave et al. 2017) as Transformer-XL has them.

The vocabulary is sorted by frequency and cut into clusters. The softmax first chooses among the tokens of the first
cluster and the other clusters as wholes (the head), then within the cluster (a tail). With div_val > 1 rarer clusters
have narrower embeddings, brought to d_model and back by a projection.

ZeRO gathers parameters module by module, on all ranks in step. So both modules own directly every parameter they use,
tied ones included, and run the same operations whatever the tokens: on zero rows for a cluster without any.

How many tokens a cluster has decides how much is computed. Tokens may therefore stay on the CPU while the model is on a
GPU: then that is known without asking the GPU, which would make the CPU wait for all that it has still to do.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config.schema import ModelConfig


class Clusters(nn.Module):
    """The clusters' geometry and their parameters: `table_i` [size, width] and `projection_i` [d_model, width].

    The width of cluster i is d_model // div_val**i. With div_val 1 there is one table for all, and no projection.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.div_val = config.div_val
        self.starts = [0, *config.cutoffs]
        self.sizes = [end - start for start, end in zip(self.starts, [*config.cutoffs, vocab_size], strict=True)]

    def tables(self) -> list[Tensor]:
        """One a cluster."""
        if self.div_val == 1:
            return list(self.get_parameter("table_0").split(self.sizes))
        return [self.get_parameter(f"table_{i}") for i in range(len(self.sizes))]

    def projections(self) -> list[Tensor]:
        return [self.get_parameter(f"projection_{i}") for i in range(len(self.sizes))]

    def members(self, tokens: Tensor, first: int = 0) -> list[Tensor]:
        """For each cluster from `first` on the places of its tokens in int64 [n], possibly none; on their device."""
        bounds = torch.tensor(self.starts[1:], dtype=torch.int64, device=tokens.device)
        cluster = torch.bucketize(tokens, bounds, right=True)
        return [(cluster == i).nonzero().squeeze(1) for i in range(first, len(self.sizes))]


class AdaptiveEmbedding(Clusters):
    """Embeds tokens, scaled by sqrt(d_model)."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.d_model, self.vocab_size, self.dropout_words = config.d_model, vocab_size, config.dropout_words
        for i, size in enumerate(self.sizes if self.div_val > 1 else [vocab_size]):
            width = config.d_model // config.div_val**i
            self.register_parameter(f"table_{i}", nn.Parameter(torch.empty(size, width)))
            if self.div_val > 1:
                self.register_parameter(f"projection_{i}", nn.Parameter(torch.empty(config.d_model, width)))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [lanes, length], there or on the CPU -> [lanes, length, d_model]."""
        table = self.get_parameter("table_0")
        if self.div_val == 1:
            embedded = F.embedding(send(tokens, table.device), table)
        else:
            embedded = self.by_cluster(tokens.flatten()).view(*tokens.shape, self.d_model)
        scale = self.d_model**0.5
        if self.training and self.dropout_words:
            # A word is there or not, wherever it stands (Gal & Ghahramani 2016, section 4.2).
            words = F.dropout(embedded.new_full((self.vocab_size, 1), scale), self.dropout_words)
            return embedded * words[send(tokens, table.device)]
        return embedded * scale

    def by_cluster(self, tokens: Tensor) -> Tensor:
        """int64 [n] -> [n, d_model]."""
        places = self.members(tokens)
        tables, projections = self.tables(), self.projections()
        within = [send(tokens[at] - start, tables[0].device) for at, start in zip(places, self.starts, strict=True)]
        parts = zip(within, tables, projections, strict=True)
        rows = torch.cat([F.linear(F.embedding(each, table), projection) for each, table, projection in parts])
        return torch.empty_like(rows).index_copy(0, send(torch.cat(places), rows.device), rows)


class AdaptiveSoftmax(Clusters):
    """The distribution of the next token; without cutoffs an ordinary softmax.

    The head's outputs are the first cluster's tokens, then the other clusters in their order.

    Args:
        embedding: lends its tables with tie_weights, its projections but the first with tie_projections.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, embedding: AdaptiveEmbedding):
        super().__init__(config, vocab_size)
        for name, parameter in embedding.named_parameters():
            tied = config.tie_weights if name.startswith("table") else config.tie_projections and name != "projection_0"
            self.register_parameter(name, parameter if tied else nn.Parameter(torch.empty(parameter.shape)))
        self.bias = nn.Parameter(torch.empty(vocab_size))
        if config.cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(config.cutoffs), config.d_model))
            self.cluster_bias = nn.Parameter(torch.empty(len(config.cutoffs)))

    def forward(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """The negative log-likelihood of the targets, or all log-probabilities where `targets` is None; in nats.

        Args:
            hidden: [lanes, length, d_model].
            targets: int64 [lanes, length], there or on the CPU; -100: not scored, the result there is 0.

        Returns:
            [lanes, length], or [lanes, length, vocab_size]; float32 (float64 in a float64 model).
        """
        if targets is None:
            return self.log_probs(hidden)
        return self.nll(hidden.flatten(0, 1), targets.flatten()).view_as(targets)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[n, d_model], int64 [n] -> [n]."""
        head, *tails = self.outputs()
        places, in_head = self.members(targets, first=1), targets
        for i, at in enumerate(places):
            in_head = in_head.index_fill(0, at, self.sizes[0] + i)
        nll = F.cross_entropy(self.in_head(hidden, *head), send(in_head, hidden.device), reduction="none")
        for at, start, tail in zip(places, self.starts[1:], tails, strict=True):
            at, within = send(at, hidden.device), send(targets[at] - start, hidden.device)
            scores = logits(hidden.index_select(0, at), *tail)
            nll = nll.index_add(0, at, F.cross_entropy(scores, within, reduction="none"))
        return nll

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[..., d_model] -> [..., vocab_size]."""
        head, *tails = self.outputs()
        in_head = self.in_head(hidden, *head).log_softmax(-1)
        first, *clusters = in_head.split([self.sizes[0], *[1] * len(tails)], dim=-1)
        within = [logits(hidden, *tail).log_softmax(-1) for tail in tails]
        return torch.cat([first, *map(torch.add, clusters, within)], dim=-1)

    def in_head(self, hidden: Tensor, table: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
        """Logits of the first cluster's tokens, which have this output, and of the other clusters.

        [..., d_model] -> [..., tokens and clusters].
        """
        if projection is not None:
            hidden = hidden @ projection
        if len(self.sizes) == 1:
            return logits(hidden, table, bias)
        # Joined is what is smaller: what comes out, for a few tokens, or what goes in.
        if hidden.shape[:-1].numel() < hidden.size(-1):
            parts = (table, bias), (self.cluster_weight, self.cluster_bias)
            return torch.cat([logits(hidden, *part) for part in parts], dim=-1)
        return logits(hidden, torch.cat([table, self.cluster_weight]), torch.cat([bias, self.cluster_bias]))

    def outputs(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Each cluster's table, bias and projection. Asked for once: each time costs the gradient of a whole table."""
        projections = self.projections() if self.div_val > 1 else [None] * len(self.sizes)
        return list(zip(self.tables(), self.bias.split(self.sizes), projections, strict=True))


def logits(hidden: Tensor, table: Tensor, bias: Tensor, projection: Tensor | None = None) -> Tensor:
    """[..., d_model] -> [..., size], in float32 at least: what is made of them are logarithms."""
    if projection is not None:
        hidden = hidden @ projection
    scores = F.linear(hidden, table, bias)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Have it on a device, without waiting for what that has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":  # from pageable memory a copy would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
