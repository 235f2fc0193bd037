"""A gated recurrence whose layers remember two things of every lane: a running mean, and the token before.

gate = sigmoid(W_g [x_t ; x_(t - 1)])
m_t = gate m_(t - 1) + (1 - gate) W_v x_t
h_t <- h_t + W_o m_t
"""

from typing import Annotated, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from txl_dist.config.types import ALWAYS, SCHEMA, Fraction, Size
from txl_dist.models.base import DEFAULT_RUNTIME, LanguageModel
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout
from txl_dist.models.layers.transfer import to_device


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class RecurrentConfig(ModelConfig):
    """The keys of conf/model/recurrent.yaml."""

    name: Literal["recurrent"]
    d_model: Size
    dropout: Annotated[Fraction, ALWAYS]


class Layer(nn.Module):
    """One gated mean over time, which ends where a position may not look back."""

    def __init__(self, d_model, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.gate = nn.Linear(2 * d_model, d_model)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.dropout = Dropout(dropout, variational=False)

    def forward(self, carry, state, shared, noise=None):
        """Read a segment, token by token."""
        hidden, lookback = carry
        begins = to_device(lookback, hidden.device)[..., None] == 0
        inputs = self.norm(hidden)
        mean, before = state["memory"], state["before"]
        means = []
        for t in range(hidden.size(1)):
            mean = mean.masked_fill(begins[:, t], 0.0)
            before = before.masked_fill(begins[:, t], 0.0)
            gate = self.gate(torch.cat([inputs[:, t], before], dim=-1)).sigmoid()
            mean = gate * mean + (1 - gate) * self.value(inputs[:, t])
            before = inputs[:, t]
            means.append(mean)
        hidden = hidden + self.dropout(self.out(torch.stack(means, dim=1)), noise)
        return (hidden, lookback), {"memory": mean, "before": before}

    def products(self, positions, d_model):
        """List the products of matrices: two of the gate's, one of the value, one of the output."""
        return [Product(2 * positions * 2 * d_model * d_model), *[Product(2 * positions * d_model * d_model)] * 2]


class Recurrent(LanguageModel):
    """Embedding, gated recurrences and a softmax of its own."""

    Config = RecurrentConfig
    last_only = ("norm", "head")
    token_head = "head"

    def __init__(self, config, vocab_size, runtime=DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config.d_model, config.dropout) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, vocab_size)
        self.complete()

    def initialise(self):
        """Draw matrices from a normal distribution."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)
            else:
                nn.init.constant_(parameter, float("norm.weight" in name))

    def embed(self, inputs, noise=None):
        """Look up the tokens."""
        tokens, lookback = inputs
        return self.embedding(to_device(tokens, self.embedding.weight.device)), lookback

    def output(self, carry, noise=None):
        """Normalise the hidden states."""
        hidden, _ = carry
        return self.norm(hidden)

    @property
    def output_width(self):
        """Return d_model."""
        return self.config.d_model

    def predict_tokens(self, hidden, targets):
        """Compute the losses of targets, or all log-probabilities."""
        logits = self.head(hidden)
        if targets is None:
            return logits.log_softmax(-1)
        targets = to_device(targets, logits.device).flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(hidden.shape[:2])

    def state_shapes(self):
        """Return the mean, and the token before."""
        return [{"memory": (self.config.d_model,), "before": (self.config.d_model,)} for _ in self.layers]

    def body_products(self, lanes, targets):
        """List those of the layers; a lookup costs nothing."""
        positions = lanes * self.config.tgt_len
        return [[], *(layer.products(positions, self.config.d_model) for layer in self.layers)]

    def head_products(self, lanes, targets):
        """List that of the head."""
        return [Product(2 * lanes * targets * self.config.d_model * self.vocab_size)]
