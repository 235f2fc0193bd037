"""What the memory is worth to each token of a text, and where each head looks to predict it.

A text is read as the beginning of a document, as by `scoring.Scorer`: <eos> is input 0, token k of the text is input
k + 1, and it is predicted by row k, which belongs to segment k // tgt_len. A key at input p is k + 1 - p tokens before
the token that row k predicts, whatever the architecture; 1 is the token directly before it.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from txl_dist.evaluation.reading import Memory, read
from txl_dist.models.base import LanguageModel
from txl_dist.models.layers.attention_weights import AttentionWeights

SHARE_KEPT = 0.9  # of a row's weights: the largest ones that make up so much
MAX_KEYS = 24  # kept of one row of one head
PAGE_KEYS = 1_000_000  # of all rows and heads: 4 bytes each


@dataclass(frozen=True)
class LargestWeights:
    """The largest attention weights by which each token of a text is predicted.

    The heads of all layers stand side by side, those of the first layer first.

    Attributes:
        layers: for each attention sublayer its layer's number, and how many heads it has.
        weight: float32 [tokens, heads, MAX_KEYS], the largest first; 0 behind those that are kept.
        distance: int64 [tokens, heads, MAX_KEYS], how many tokens before the predicted one the key stands.
        memory: float32 [tokens, heads], the share of all weights that lies on the memory.
        reach: int64 [tokens], the largest distance with any weight.
    """

    layers: list[tuple[int, int]]
    weight: Tensor
    distance: Tensor
    memory: Tensor
    reach: Tensor

    def to_json(self) -> dict[str, Any]:
        """Return what pages/look.js decodes: weights in per mille, of each head so many keys as its count says.

        A large model keeps fewer keys of each head, so that a page holds at most PAGE_KEYS.
        """
        tokens, heads = self.memory.shape
        most = min(MAX_KEYS, max(1, PAGE_KEYS // (tokens * heads)))
        per_mille = (self.weight[..., :most] * 1000).round().long().numpy()
        kept = per_mille > 0
        return {
            "layers": self.layers,
            "count": encoded(kept.sum(-1), "u1"),
            "distance": encoded(self.distance[..., :most].numpy()[kept], "<u2"),
            "weight": encoded(per_mille[kept], "<u2"),
            "memory": encoded((self.memory * 1000).round().long().numpy(), "<u2"),
            "reach": self.reach.tolist(),
            "kept": round(per_mille.sum() / 1000 / (tokens * heads), 4),
        }


def encoded(values: np.ndarray, dtype: str) -> str:
    """Return the bytes of an array in base64."""
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


class AttentionRecorder:
    """Keep the largest weights of what `LanguageModel.observed` shows, for one lane that is read from left to right."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, int]] = []
        self.sublayers: list[list[Tensor]] = []  # of the segment that is being read
        self.segments: list[list[Tensor]] = []

    def observe(self, layer: int, attention: AttentionWeights) -> None:
        """Take the weights of one sublayer for one segment."""
        if not self.segments:
            self.layers.append((layer, attention.weights.size(1)))
        self.sublayers.append(largest_weights(attention))

    def end_segment(self) -> None:
        """Join the heads of all sublayers that have been observed since the last segment."""
        if not self.sublayers:
            return
        *by_head, reach = zip(*self.sublayers, strict=True)
        self.segments.append([*(torch.cat(values, dim=1) for values in by_head), torch.stack(reach).amax(0)])
        self.sublayers = []

    def result(self) -> LargestWeights | None:
        """Return what has been kept; None where the model shows no attention."""
        if not self.segments:
            return None
        return LargestWeights(self.layers, *(torch.cat(values) for values in zip(*self.segments, strict=True)))


def largest_weights(attention: AttentionWeights) -> list[Tensor]:
    """Return weight, distance, memory and reach of `LargestWeights` for the rows of one segment in one sublayer."""
    weights = attention.weights[0].transpose(0, 1).float()  # [rows, heads, keys]
    rows, _, keys = weights.shape
    at = torch.arange(1, rows + 1, device=weights.device)
    distance = at[:, None] + attention.mem_len - torch.arange(keys, device=weights.device)
    largest, column = weights.topk(min(MAX_KEYS, keys))
    before = largest.cumsum(-1) - largest
    kept = largest * (before < SHARE_KEPT * weights.sum(-1, keepdim=True))
    missing = (0, MAX_KEYS - kept.size(-1))
    at_key = distance[:, None].expand_as(weights).gather(-1, column)
    memory = weights[..., : attention.mem_len].sum(-1)
    seen = (weights > 0).any(1)
    reach = (distance * seen).amax(-1)
    return [value.cpu() for value in (F.pad(kept, missing), F.pad(at_key, missing), memory, reach)]


@dataclass(frozen=True)
class ObservedText:
    """What a model makes of each token of a text.

    Attributes:
        log_probs: float32 [tokens], log P(token | all tokens before it that the model remembers), in nats.
        alone: float32 [tokens], log P(token | the tokens before it in its segment), in nats.
        attention: None where the model has none.
    """

    log_probs: Tensor
    alone: Tensor
    attention: LargestWeights | None


def observe_text(model: LanguageModel, eos: int, tokens: list[int]) -> ObservedText:
    """Read a text twice: with memory, watching the attention, and each segment alone.

    Args:
        eos: the token before the text.
        tokens: of the text, at least one.
    """
    inputs = torch.tensor([[eos, *tokens[:-1]]])
    targets = torch.tensor(tokens)[:, None]
    recorder = AttentionRecorder()
    with_memory = []
    with model.observed(recorder.observe):
        for log_probs, _ in read(model, inputs, Memory.empty(model, lanes=1)):
            recorder.end_segment()
            with_memory.append(log_probs[0].cpu())
    alone = []
    for segment in inputs.split(model.config.tgt_len, dim=1):
        for log_probs, _ in read(model, segment, Memory.empty(model, lanes=1)):
            alone.append(log_probs[0].cpu())
    return ObservedText(
        torch.cat(with_memory).gather(1, targets)[:, 0],
        torch.cat(alone).gather(1, targets)[:, 0],
        recorder.result(),
    )
