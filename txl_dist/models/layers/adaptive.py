"""Adaptive input and adaptive softmax (Baevski & Auli 2019; Grave et al. 2017) as Transformer-XL has them.

The vocabulary is sorted by frequency and cut into clusters. The softmax first chooses among the tokens of the first
cluster and the other clusters as units (the head), then within the cluster (a tail). With div_val > 1 rarer clusters
have narrower embeddings, projected to d_model and back.

ZeRO gathers parameters module by module, on all ranks in step. So both modules own directly every parameter they use,
tied ones included, and run the same operations whatever the tokens: on zero rows for a cluster without any.

How many tokens a cluster has decides how much is computed. Tokens may therefore stay on the CPU while the model is on a
GPU: counting them there does not make the CPU wait for the GPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.models.layers.cost import Product, zipf_share
from txl_dist.models.layers.cross_entropy import cross_entropy, log_softmax
from txl_dist.models.layers.dropout import Noise, WordDropout
from txl_dist.models.layers.transfer import to_device


class VocabularyClusters(nn.Module):
    """A vocabulary cut into clusters, and their parameters: `table_i` [size, width], `projection_i` [d_model, width].

    The width of cluster i is d_model // div_val**i. With div_val 1 there is one table for all, and no projection.

    Args:
        cutoffs: first tokens of the clusters but the first; empty: one cluster.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: list[int], div_val: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.cutoffs = cutoffs
        self.div_val = div_val
        self.starts = [0, *cutoffs]
        self.sizes = [end - start for start, end in zip(self.starts, [*cutoffs, vocab_size], strict=True)]

    def expected_counts(self, tokens: int) -> list[float]:
        """Return how many of so many tokens each cluster has, where frequencies follow Zipf's law."""
        ends = [*self.cutoffs, self.vocab_size]
        return [tokens * zipf_share(start, end, self.vocab_size) for start, end in zip(self.starts, ends, strict=True)]

    def width(self, cluster: int) -> int:
        """Return the width of a cluster's table."""
        width: int = self.d_model // self.div_val**cluster
        return width

    def tables(self) -> list[Tensor]:
        """Return each cluster's table, [size, width]."""
        if self.div_val == 1:
            return list(self.get_parameter("table_0").split(self.sizes))
        return [self.get_parameter(f"table_{i}") for i in range(len(self.sizes))]

    def projections(self) -> list[Tensor]:
        """Return each cluster's projection, [d_model, width]; there are some with div_val > 1 only."""
        return [self.get_parameter(f"projection_{i}") for i in range(len(self.sizes))]

    def token_positions(self, tokens: Tensor, first: int = 0) -> list[Tensor]:
        """Find the positions of each cluster's tokens, for the clusters from number `first` on.

        Args:
            tokens: int64 [n].

        Returns:
            int64 [count] for each cluster, possibly none; on the tokens' device.
        """
        bounds = torch.tensor(self.starts[1:], dtype=torch.int64, device=tokens.device)
        cluster = torch.bucketize(tokens.contiguous(), bounds, right=True)
        return [(cluster == i).nonzero().squeeze(1) for i in range(first, len(self.sizes))]


class AdaptiveEmbedding(VocabularyClusters):
    """Token embeddings, scaled by sqrt(d_model).

    Args:
        dropout_words: probability to drop a word of the vocabulary, wherever it stands in a segment.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: list[int], div_val: int, dropout_words: float = 0.0):
        super().__init__(vocab_size, d_model, cutoffs, div_val)
        self.word_dropout = WordDropout(dropout_words)
        for i, size in enumerate(self.sizes if div_val > 1 else [vocab_size]):
            self.register_parameter(f"table_{i}", nn.Parameter(torch.empty(size, self.width(i))))
            if div_val > 1:
                self.register_parameter(f"projection_{i}", nn.Parameter(torch.empty(d_model, self.width(i))))

    def forward(self, tokens: Tensor, noise: Noise | None = None) -> Tensor:
        """Embed int64 [lanes, length], on the weights' device or the CPU, as [lanes, length, d_model]."""
        table = self.get_parameter("table_0")
        if self.div_val == 1:
            embedded = F.embedding(to_device(tokens, table.device), table)
        else:
            embed = self.embed_by_cluster if tokens.device.type == "cpu" else self.embed_by_all
            embedded = embed(tokens.flatten()).view(*tokens.shape, self.d_model)
        scaled: Tensor = self.word_dropout(embedded * self.d_model**0.5, to_device(tokens, table.device), noise)
        return scaled

    def products(self, counts: list[float]) -> list[Product]:
        """List the products of matrices for so many tokens of each cluster; a lookup costs nothing."""
        if self.div_val == 1:
            return []
        return [Product(2 * count * self.d_model * self.width(i)) for i, count in enumerate(counts)]

    def embed_by_cluster(self, tokens: Tensor) -> Tensor:
        """Embed int64 [n] as [n, d_model], each token by its cluster's table and projection."""
        positions = self.token_positions(tokens)
        rows = []
        for at, start, table, projection in zip(positions, self.starts, self.tables(), self.projections(), strict=True):
            within = to_device(tokens[at] - start, table.device)
            rows.append(F.linear(F.embedding(within, table), projection))
        by_cluster = torch.cat(rows)
        order = to_device(torch.cat(positions), by_cluster.device)
        return torch.empty_like(by_cluster).index_copy(0, order, by_cluster)

    def embed_by_all(self, tokens: Tensor) -> Tensor:
        """Embed int64 [n] as [n, d_model], each token by all clusters, of which its own is kept.

        Nothing is counted: what a GPU does is the same for all tokens, and the CPU does not wait for it.
        """
        embedded = self.get_parameter("table_0").new_zeros(())
        for start, size, table, projection in zip(
            self.starts, self.sizes, self.tables(), self.projections(), strict=True
        ):
            rows = F.linear(F.embedding((tokens - start).clamp(0, size - 1), table), projection)
            embedded = torch.where(tokens[:, None] >= start, rows, embedded)
        return embedded


class AdaptiveSoftmax(VocabularyClusters):
    """The distribution of the next token; without cutoffs an ordinary softmax.

    The head's outputs are the first cluster's tokens, then the other clusters in their order.

    Args:
        embedding: has the same clusters; its tables are shared with tie_weights, its projections but the first with
            tie_projections.
    """

    def __init__(self, embedding: AdaptiveEmbedding, tie_weights: bool, tie_projections: bool):
        super().__init__(embedding.vocab_size, embedding.d_model, embedding.cutoffs, embedding.div_val)
        for name, parameter in embedding.named_parameters():
            tied = tie_weights if name.startswith("table") else tie_projections and name != "projection_0"
            self.register_parameter(name, parameter if tied else nn.Parameter(torch.empty(parameter.shape)))
        self.bias = nn.Parameter(torch.empty(self.vocab_size))
        if self.cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(self.cutoffs), self.d_model))
            self.cluster_bias = nn.Parameter(torch.empty(len(self.cutoffs)))

    def forward(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Compute the negative log-likelihood of targets, or all log-probabilities where `targets` is None; in nats.

        Args:
            hidden: [lanes, length, d_model].
            targets: int64 [lanes, length], on the same device or the CPU; -100: not scored, the result there is 0.

        Returns:
            [lanes, length], or [lanes, length, vocab_size]; float32 (float64 in a float64 model).
        """
        if targets is None:
            return self.log_probs(hidden)
        return self.nll(hidden.flatten(0, 1), targets.flatten()).view_as(targets)

    def products(self, counts: list[float]) -> list[Product]:
        """List the products of matrices.

        Args:
            counts: for how many positions each cluster's distribution is needed: for all, that of the first one, which
                has an entry for each other cluster.
        """
        products = []
        for i, (size, count) in enumerate(zip(self.sizes, counts, strict=True)):
            outputs = size + len(self.cutoffs) if i == 0 else size
            products.append(Product(2 * count * self.width(i) * outputs))
            if self.div_val > 1:
                products.append(Product(2 * count * self.d_model * self.width(i)))
        return products

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the negative log-likelihood of targets, int64 [n], after hidden states [n, d_model]: [n]."""
        head, *tails = self.outputs()
        positions = self.token_positions(targets, first=1)
        in_head = targets
        for i, at in enumerate(positions):
            in_head = in_head.index_fill(0, at, self.sizes[0] + i)
        nll = cross_entropy(logits(hidden, *head), to_device(in_head, hidden.device))
        for at, start, tail in zip(positions, self.starts[1:], tails, strict=True):
            rows = to_device(at, hidden.device)
            within = to_device(targets[at] - start, hidden.device)
            nll = nll.index_add(0, rows, cross_entropy(logits(hidden.index_select(0, rows), *tail), within))
        return nll

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Compute all log-probabilities: [..., d_model] -> [..., vocab_size]."""
        sizes = [self.sizes[0] + len(self.cutoffs), *self.sizes[1:]]
        by_cluster = zip(sizes, self.outputs(), strict=True)
        of_head, *within = [log_softmax(logits(hidden, *output)[..., :size]) for size, output in by_cluster]
        first, *clusters = of_head.split([self.sizes[0], *[1] * len(self.cutoffs)], dim=-1)
        return torch.cat([first, *map(torch.add, clusters, within)], dim=-1)

    def outputs(self) -> list[tuple[list[Tensor], list[Tensor], Tensor | None]]:
        """Return the tables, biases and projection of the head and of each tail.

        Call it once per forward: each call costs the gradient of a whole table.
        """
        tables = [[table] for table in self.tables()]
        biases = [[bias] for bias in self.bias.split(self.sizes)]
        if self.cutoffs:
            tables[0].append(self.cluster_weight)
            biases[0].append(self.cluster_bias)
        projections = self.projections() if self.div_val > 1 else [None] * len(self.sizes)
        return list(zip(tables, biases, projections, strict=True))


def logits(hidden: Tensor, tables: list[Tensor], biases: list[Tensor], projection: Tensor | None) -> Tensor:
    """Compute the logits of the outputs that stand in several tables, one after the other: [..., d_model] -> [..., n].

    On a GPU there may be some of -inf behind them; see `padding`.
    """
    if projection is not None:
        hidden = hidden @ projection
    # Concatenate whichever is smaller: the results, for a few rows, or the weights.
    if hidden.shape[:-1].numel() < hidden.size(-1):
        return concatenate([F.linear(hidden, *output) for output in zip(tables, biases, strict=True)], dim=-1)
    if added := padding(sum(map(len, tables)), hidden.device):
        tables = [*tables, tables[0].new_zeros(added, hidden.size(-1))]
        biases = [*biases, biases[0].new_full((added,), -torch.inf)]
    return F.linear(hidden, concatenate(tables), concatenate(biases))


def padding(size: int, device: torch.device) -> int:
    """Return how many outputs to add to `size`, so that products and kernels are fast.

    On a GPU both want rows that begin at multiples of 16 bytes: of 16 numbers, to be certain.
    """
    return 0 if device.type == "cpu" or size % 16 == 0 else -size % 64


def concatenate(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate, a single part without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
