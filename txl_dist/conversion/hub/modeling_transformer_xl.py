"""Transformer-XL (Dai et al. 2019): a language model that reads text segment by segment and remembers.

    q, k, v = h W_q, [memory ; h] W_k, [memory ; h] W_v;  r = R W_r                   (section 3.3)
    score of a query for a key at distance d = ((q + u) k + (q + v) r_d) / sqrt(d_head), for d >= 0
    h <- LayerNorm(h + W_o softmax(score) v)
    h <- LayerNorm(h + feed-forward(h))

The memory of a layer is transformers' own cache with a sliding window: keys and values of the last mem_len positions.
They are those of the remembered hidden states, because W_k and W_v do not change between segments; so a new token costs
the same however long the text is, and nothing of the past is recomputed. At first the memory is empty.

Written for scoring and generation by txl_dist, which also trains such models.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_transformer_xl import TransformerXLConfig

# ------------------------------------------------------------------------------- adaptive embedding and softmax


class VocabularyClusters(nn.Module):
    """The vocabulary in clusters of tokens, the frequent ones first; with div_val > 1 rarer ones have narrower tables.

    The width of cluster i is d_model // div_val**i. With div_val 1 there is one table for all, and no projection.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.div_val = config.div_val
        self.starts = [0, *config.cutoffs]
        self.sizes = [end - start for start, end in zip(self.starts, [*config.cutoffs, config.vocab_size], strict=True)]

    def add_tables(self, config: TransformerXLConfig) -> None:
        """Add the parameters `table_i`, [size, width]."""
        for i, size in enumerate(self.sizes if config.div_val > 1 else [config.vocab_size]):
            width = config.d_model // config.div_val**i
            self.register_parameter(f"table_{i}", nn.Parameter(torch.empty(size, width)))

    def add_projection(self, config: TransformerXLConfig, i: int) -> None:
        """Add the parameter `projection_i`, [d_model, width]."""
        width = config.d_model // config.div_val**i
        self.register_parameter(f"projection_{i}", nn.Parameter(torch.empty(config.d_model, width)))

    def tables(self) -> list[Tensor]:
        """Return each cluster's table, [size, width]."""
        if self.div_val == 1:
            return list(self.get_parameter("table_0").split(self.sizes))
        return [self.get_parameter(f"table_{i}") for i in range(len(self.sizes))]


class AdaptiveEmbedding(VocabularyClusters):
    """Token embeddings, scaled by sqrt(d_model)."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.d_model = config.d_model
        self.add_tables(config)
        if config.div_val > 1:
            for i in range(len(self.sizes)):
                self.add_projection(config, i)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int64 [batch, length] as [batch, length, d_model]."""
        if self.div_val == 1:
            return F.embedding(tokens, self.get_parameter("table_0")) * self.d_model**0.5
        embedded = self.get_parameter("projection_0").new_empty(*tokens.shape, self.d_model)
        for i, (start, size, table) in enumerate(zip(self.starts, self.sizes, self.tables(), strict=True)):
            in_cluster = (tokens >= start) & (tokens < start + size)
            rows = F.embedding(tokens[in_cluster] - start, table)
            embedded[in_cluster] = F.linear(rows, self.get_parameter(f"projection_{i}"))
        return embedded * self.d_model**0.5


class AdaptiveSoftmax(VocabularyClusters):
    """A softmax among the first cluster's tokens and the other clusters as units, then within the cluster.

    Tied tables and projections are the embedding's; all others are parameters of this module.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.tie_weights = config.tie_weights
        self.tie_projections = config.tie_projections
        if not config.tie_weights:
            self.add_tables(config)
        for i in range(len(self.sizes)):
            if config.div_val > 1 and not self.is_tied(i):
                self.add_projection(config, i)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        if config.cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(config.cutoffs), config.d_model))
            self.cluster_bias = nn.Parameter(torch.empty(len(config.cutoffs)))

    def is_tied(self, i: int) -> bool:
        """Return whether the projection of cluster i is the embedding's; the first cluster's never is."""
        return self.tie_projections and i > 0

    def forward(self, hidden: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Compute log-probabilities: [batch, length, d_model] -> [batch, length, vocab_size], float32 at least."""
        tables = embedding.tables() if self.tie_weights else self.tables()
        biases = list(self.bias.split(self.sizes))
        if len(tables) > 1:
            tables[0] = torch.cat([tables[0], self.cluster_weight])
            biases[0] = torch.cat([biases[0], self.cluster_bias])
        log_probs = []
        for i, (table, bias) in enumerate(zip(tables, biases, strict=True)):
            narrow = hidden
            if self.div_val > 1:
                narrow = hidden @ (embedding if self.is_tied(i) else self).get_parameter(f"projection_{i}")
            scores = F.linear(narrow, table, bias)
            log_probs.append(scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1))
        head, *tails = log_probs
        first, *clusters = head.split([self.sizes[0], *[1] * len(tails)], dim=-1)
        return torch.cat([first, *map(torch.add, clusters, tails)], dim=-1)


# --------------------------------------------------------------------------------------------------- attention


def sinusoids(keys: int, d_model: int, clamp_len: int, like: Tensor) -> Tensor:
    """Encode distances keys - 1, ..., 1, 0, -1 as R, [keys + 1, d_model]: all sines, then all cosines.

    The last row stands for the future, which no query sees: `skew` needs one column more than there are keys.
    """
    distance = torch.arange(keys - 1, -2, -1, dtype=torch.float64, device=like.device)
    if clamp_len > 0:
        distance = distance.clamp(max=clamp_len)
    frequency = 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64, device=like.device) / -d_model)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def skew(by_distance: Tensor) -> Tensor:
    """Turn scores by distance into scores by key (appendix B): [..., length, keys + 1] -> [..., length, keys].

    Query i of n has distance d in column keys - 1 - d and wants it at key keys - n + i - d, n - 1 - i columns further
    left. Leaving out the first n - 1 numbers and reading on in rows one shorter does just this.
    """
    *batch, length, columns = by_distance.shape
    keys = columns - 1
    return by_distance.flatten(-2).narrow(-1, length - 1, length * keys).view(*batch, length, keys)


class RelativeAttention(nn.Module):
    """Relative multi-head attention over memory and segment, residual connection and layer normalisation."""

    def __init__(self, config: TransformerXLConfig, layer: int):
        super().__init__()
        d_model = config.d_model
        width = config.n_head * config.d_head
        self.layer = layer
        self.pre_lnorm = config.pre_lnorm
        self.dropatt = config.dropatt
        self.n_head = config.n_head
        self.d_head = config.d_head
        self.q_net = nn.Linear(d_model, width, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * width, bias=False)
        self.r_net = nn.Linear(d_model, width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.v = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.layer_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, memory: DynamicCache, encoding: Tensor, visible: Tensor) -> Tensor:
        """Attend from a segment to its memory and to itself; the segment is added to the memory.

        Args:
            hidden: [batch, length, d_model].
            encoding: [keys + 1, d_model], of `sinusoids`.
            visible: bool [batch or 1, 1, length, keys].

        Returns:
            [batch, length, d_model].
        """
        x = self.layer_norm(hidden) if self.pre_lnorm else hidden
        query, key, value = map(self.heads, [self.q_net(x), *self.kv_net(x).chunk(2, dim=-1)])
        key, value = memory.update(key, value, self.layer)
        content = (query + self.u[:, None]) @ key.transpose(-1, -2)
        position = skew(self.by_distance(query + self.v[:, None], encoding))
        scores = (content + position) * self.d_head**-0.5
        attended = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = F.dropout(attended, self.dropatt, self.training) @ value
        hidden = hidden + self.dropout(self.o_net(attended.transpose(1, 2).flatten(-2)))
        return hidden if self.pre_lnorm else self.layer_norm(hidden)

    def by_distance(self, query: Tensor, encoding: Tensor) -> Tensor:
        """Compute query (R W_r)^T: [batch, n_head, length, d_head] -> [batch, n_head, length, keys + 1], contiguous."""
        if query.size(2) < self.d_head:  # then (query W_r^T) R^T is less work: nothing is projected for every key
            weight = self.r_net.weight.unflatten(0, (self.n_head, self.d_head))
            return (query @ weight) @ encoding.T
        return query @ self.heads(self.r_net(encoding)).transpose(-1, -2)

    def heads(self, x: Tensor) -> Tensor:
        """Split into heads: [..., length, n_head * d_head] -> [..., n_head, length, d_head]."""
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(-2, -3)


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer, with residual connection and layer normalisation."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_lnorm = config.pre_lnorm

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position alone: [batch, length, d_model] -> [batch, length, d_model]."""
        inner = self.inner(self.layer_norm(hidden) if self.pre_lnorm else hidden).relu()
        hidden = hidden + self.dropout(self.outer(self.dropout(inner)))
        return hidden if self.pre_lnorm else self.layer_norm(hidden)


class Layer(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: TransformerXLConfig, layer: int):
        super().__init__()
        self.attention = RelativeAttention(config, layer)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, memory: DynamicCache, encoding: Tensor, visible: Tensor) -> Tensor:
        """Run both sublayers; arguments and result are those of `RelativeAttention.forward`."""
        return self.feed_forward(self.attention(hidden, memory, encoding, visible))


# ------------------------------------------------------------------------------------------------------- model


class TransformerXLForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Its logits are log-probabilities, as an adaptive softmax computes them."""

    config_class = TransformerXLConfig
    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.embedding = AdaptiveEmbedding(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layer))
        self.softmax = AdaptiveSoftmax(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Continue to read a text, in segments of tgt_len.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: [batch, length or more], 0 at padding, which stands before a text. Its last column is the
                last input's; earlier positions of the memory than its first column count as text.
            past_key_values: the memory that an earlier call returned; None: a text begins.
            labels: int64 [batch, length], often the inputs: each is predicted from the tokens before it; -100: not
                scored. The first has none before it in this call, and is not scored.
            logits_to_keep: the number of positions, counted from the end, whose logits are returned; 0: all.

        Returns:
            loss: with labels, the mean negative log-likelihood in nats per scored token.
            logits: log-probabilities of the next token [batch, length, vocab_size], float32 at least.
            past_key_values: the memory.
        """
        memory = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        first = attention_mask.size(1) - input_ids.size(1)  # the column of the first input
        read = []
        for start in range(0, input_ids.size(1), self.config.tgt_len):
            segment = input_ids[:, start : start + self.config.tgt_len]
            read.append(self.read(segment, attention_mask[:, : first + start + segment.size(1)], memory))
        hidden = torch.cat(read, dim=1)
        logits = self.softmax(self.dropout(hidden[:, -logits_to_keep:]), self.embedding)
        loss = None
        if labels is not None:
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=memory)

    def read(self, segment: Tensor, mask: Tensor, memory: DynamicCache) -> Tensor:
        """Read a segment, int64 [batch, length] -> [batch, length, d_model]; remember it, detached (section 3.2)."""
        remembered = min(memory.get_seq_length(), self.config.mem_len)
        hidden = self.dropout(self.embedding(segment))
        keys = remembered + segment.size(1)
        encoding = self.dropout(sinusoids(keys, self.config.d_model, self.config.clamp_len, like=hidden))
        visible = self.visible(mask, keys, segment.size(1))
        for layer in self.layers:
            hidden = layer(hidden, memory, encoding, visible)
        for cache in memory.layers:
            cache.keys = cache.keys.detach()
            cache.values = cache.values.detach()
        return hidden

    def visible(self, mask: Tensor, keys: int, length: int) -> Tensor:
        """Return the keys that each query may attend to: bool [batch, 1, length, keys].

        Args:
            mask: [batch, any], nonzero at tokens; its last column is the last key's.
        """
        key = torch.arange(keys, device=mask.device)
        distance = key[-length:, None] - key
        visible = distance >= 0
        if self.config.same_length:
            visible &= distance < self.config.mem_len
        token = F.pad(mask[:, -keys:].bool(), (max(0, keys - mask.size(1)), 0), value=True)
        # A padding position sees itself, so that its softmax is defined.
        return (visible & token[:, None, :] | (distance == 0))[:, None]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as the authors' code does."""
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                mean = float(isinstance(module, nn.LayerNorm))
                nn.init.normal_(parameter, mean, 0.01 if name.startswith("projection") else self.config.init_std)
