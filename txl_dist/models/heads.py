"""Heads for fine-tuning: what reads the last hidden states of a model, where it is not to predict tokens.

A lane has one example, or one segment of it. Segments are padded on the left: the last position is that of the
classifier piece (CLS), which has read all of the example.

    classification, scores   out(dropout(tanh(summary(CLS))))                           as XLNet's authors read CLS
    answers                  a start and an end, each by its own softmax over positions
    answers with beams       the end after the start: of pairs (position, start), and whether there is an answer at all

Names and formulas are those of transformers' XLNetForSequenceClassification, XLNetForQuestionAnsweringSimple and
XLNetForQuestionAnswering.
"""

from abc import ABC, abstractmethod
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.transfer import to_device

BEAMS = 5  # of XLNet's authors: starts that are looked at, and ends of each
IMPOSSIBLE = -1e30  # the logit of a position where no answer can be: finite, for sums and differences


class TaskHead(nn.Module, ABC):
    """A head that reads the last hidden states of a model, after the model's own dropout."""

    @abstractmethod
    def forward(self, hidden: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute the loss of each lane: [lanes, 1], float32 at least; 0 where the lane has no target.

        Args:
            hidden: [lanes, length, width].
            targets: [lanes, ...], on any device.
            noise: the randomness of the lanes at this step; needed for dropout, in training only.
        """

    @abstractmethod
    def outputs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Predict, in evaluation: float32 [lanes, ...]. Of the targets it reads no more than where answers can be."""

    @abstractmethod
    def products(self, lanes: int, length: int) -> list[Product]:
        """List the products of a loss, when `lanes` have read a segment of `length` tokens."""

    def initialise(self, init_std: float) -> None:
        """Draw all weights from N(0, init_std); biases are 0, and layer normalisation changes no scale."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, init_std)


def linear_product(rows: int, inputs: int, outputs: int) -> Product:
    """Return the product of a linear layer: [rows, inputs] x [inputs, outputs]."""
    return Product(2 * rows * inputs * outputs)


# ------------------------------------------------------------------------------------------------ classes and scores


class SummaryHead(TaskHead):
    """Numbers of a whole example, from the summary of XLNet's authors: a layer with tanh of the last hidden state.

    Args:
        num_outputs: numbers of an example.
        dropout: of the summary.
    """

    def __init__(self, width: int, num_outputs: int, dropout: float):
        super().__init__()
        self.summary = nn.Linear(width, width)
        self.out = nn.Linear(width, num_outputs)
        self.dropout = Dropout(dropout, variational=False)

    def read(self, hidden: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute the numbers of each lane: [lanes, length, width] -> [lanes, 1, num_outputs]."""
        summary = self.summary(hidden[:, -1:]).tanh()
        numbers: Tensor = self.out(self.dropout(summary, noise))
        return numbers

    def outputs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the numbers of each lane: float32 [lanes, num_outputs]."""
        return self.read(hidden)[:, 0].float()

    def products(self, lanes: int, length: int) -> list[Product]:
        """List the products of the summary, and of what is read from it."""
        width = self.summary.in_features
        return [linear_product(lanes, width, width), linear_product(lanes, width, self.out.out_features)]


class ClassificationHead(SummaryHead):
    """The class of an example; its outputs are logits."""

    def forward(self, hidden: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute the negative log-likelihood of classes, int64 [lanes, 1], in nats; -100: no target."""
        return cross_entropy.predict(self.read(hidden, noise), targets)


class ScoreHead(SummaryHead):
    """A number that is said of an example."""

    def __init__(self, width: int, dropout: float):
        super().__init__(width, 1, dropout)

    def forward(self, hidden: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute the squared error of scores, float32 [lanes, 1]; NaN: no target."""
        scores = to_device(targets, hidden.device)
        errors = self.read(hidden, noise)[:, 0] - scores
        return errors.masked_fill(scores.isnan(), 0.0).square()


# ---------------------------------------------------------------------------------------------------------- answers


class SpanPredictions(NamedTuple):
    """The likeliest answers of each lane: `beams` starts, the likeliest first, and for each as many ends.

    Positions are those in the segment; log-probabilities in nats, far below any other where no answer can be.

    Attributes:
        start_log_prob: [lanes, beams].
        start: int64 [lanes, beams].
        end_log_prob: [lanes, beams, beams], of each start's ends, if it is the start.
        end: int64 [lanes, beams, beams].
        no_answer: [lanes], higher where it is likelier that there is no answer.
    """

    start_log_prob: Tensor
    start: Tensor
    end_log_prob: Tensor
    end: Tensor
    no_answer: Tensor

    def pack(self) -> Tensor:
        """Return all numbers of a lane as one row: float32 [lanes, ...], where positions below 2^24 are exact."""
        return torch.cat([field.flatten(1).float() for field in self[:-1]] + [self.no_answer[:, None].float()], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "SpanPredictions":
        """Return what `pack` has packed: [lanes, 2 beams (beams + 1) + 1]."""
        beams = isqrt(packed.size(1) // 2)
        ends = (beams, beams)
        start_log_prob, start, end_log_prob, end, no_answer = packed.split([beams, beams, beams**2, beams**2, 1], dim=1)
        return cls(
            start_log_prob,
            start.long(),
            end_log_prob.unflatten(1, ends),
            end.long().unflatten(1, ends),
            no_answer.squeeze(1),
        )


class AnswerHead(TaskHead):
    """A span of a passage, or none.

    Targets are int64 [lanes, 2 + length]: the start and the end position of the answer in the segment, the last
    position for both if there is no answer, -100 for both if nothing is scored; then for each position 1 where an
    answer can be (the passage, and the last position), else 0.

    Args:
        beams: how many starts, and ends of each, are predicted; no more than a segment has positions.
    """

    def __init__(self, beams: int):
        super().__init__()
        self.beams = beams

    @abstractmethod
    def predict(self, hidden: Tensor, targets: Tensor) -> SpanPredictions:
        """Find the likeliest answers."""

    def outputs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the likeliest answers, packed."""
        return self.predict(hidden, targets).pack()


class SpanHead(AnswerHead):
    """A start and an end that know nothing of each other."""

    def __init__(self, width: int, beams: int = 20):
        super().__init__(beams)
        self.out = nn.Linear(width, 2)

    def forward(self, hidden: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute half of the negative log-likelihoods of start and end, in nats."""
        targets = to_device(targets, hidden.device)
        logits = mask_impossible(self.out(hidden).mT, targets)
        return cross_entropy.predict(logits, targets[:, :2]).mean(dim=1, keepdim=True)

    def predict(self, hidden: Tensor, targets: Tensor) -> SpanPredictions:
        """Find the likeliest starts, and the likeliest ends, the same for each start.

        That there is no answer is compared with the best of these spans: the difference of log-probabilities.
        """
        targets = to_device(targets, hidden.device)
        log_probs = cross_entropy.log_softmax(mask_impossible(self.out(hidden).mT, targets))
        top, position = log_probs.topk(min(self.beams, hidden.size(1)))
        start_log_prob, end_log_prob = top.unbind(1)
        start, end = (positions.contiguous() for positions in position.unbind(1))
        last = hidden.size(1) - 1
        is_span = (start[:, :, None] <= end[:, None]) & (end[:, None] < last)
        spans = (start_log_prob[:, :, None] + end_log_prob[:, None]).masked_fill(~is_span, IMPOSSIBLE)
        beams = (-1, start.size(1), -1)
        return SpanPredictions(
            start_log_prob,
            start,
            end_log_prob[:, None].expand(beams),
            end[:, None].expand(beams),
            log_probs[:, :, -1].sum(1) - spans.amax(dim=(1, 2)),
        )

    def products(self, lanes: int, length: int) -> list[Product]:
        """List the one product, of every position."""
        return [linear_product(lanes * length, self.out.in_features, 2)]


class BeamSpanHead(AnswerHead):
    """An end that knows the start, and a number of its own that says whether there is an answer.

    In training both are computed from the true start; in evaluation the end from each of the likeliest starts, and
    the number from the mean of all positions, each as likely as it is the start.

    Args:
        eps: of the layer normalisation.
    """

    def __init__(self, width: int, eps: float, beams: int = BEAMS):
        super().__init__(beams)
        self.start = nn.Linear(width, 1)
        self.end = PairScore(width, nn.LayerNorm(width, eps=eps), has_bias=True)
        self.answer = PairScore(width, nn.Identity(), has_bias=False)

    def forward(self, hidden: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Compute half of three negative log-likelihoods, in nats: of start, end, and of whether there is an answer."""
        targets = to_device(targets, hidden.device)
        start = targets[:, :1]
        start_state = hidden.take_along_dim(start.clamp(min=0)[:, :, None], dim=1)
        ends = self.end(hidden, start_state)
        logits = torch.stack([self.start(hidden).squeeze(2), ends], dim=1)
        span_nats = cross_entropy.predict(mask_impossible(logits, targets), targets[:, :2]).sum(1, keepdim=True)
        no_answer = self.answer(start_state, hidden[:, -1:]).to(span_nats.dtype)
        is_last = (start == hidden.size(1) - 1).to(span_nats.dtype)
        answer_nats = F.binary_cross_entropy_with_logits(no_answer, is_last, reduction="none")
        return (span_nats + answer_nats.where(start >= 0, 0.0)) / 2

    def predict(self, hidden: Tensor, targets: Tensor) -> SpanPredictions:
        """Find the likeliest starts, and for each the likeliest ends."""
        targets = to_device(targets, hidden.device)
        beams = min(self.beams, hidden.size(1))
        start_log_probs = cross_entropy.log_softmax(mask_impossible(self.start(hidden).mT, targets))
        start_log_prob, start = start_log_probs.squeeze(1).topk(beams)
        start_states = hidden.take_along_dim(start[:, :, None], dim=1)
        ends = self.end(hidden[:, None], start_states[:, :, None])
        end_log_prob, end = cross_entropy.log_softmax(mask_impossible(ends, targets)).topk(beams)
        start_state = start_log_probs.exp().to(hidden.dtype) @ hidden
        no_answer = self.answer(start_state, hidden[:, -1:]).squeeze(1)
        return SpanPredictions(start_log_prob, start, end_log_prob, end, no_answer)

    def products(self, lanes: int, length: int) -> list[Product]:
        """List the products of the starts, of the ends after one start, and of whether there is an answer."""
        starts = linear_product(lanes * length, self.start.in_features, 1)
        return [starts, *self.end.products(lanes * length, lanes), *self.answer.products(lanes, lanes)]


def mask_impossible(logits: Tensor, targets: Tensor) -> Tensor:
    """Lower the logits of positions where no answer can be.

    Args:
        logits: [lanes, any, length].
        targets: those of an `AnswerHead`, on the same device.

    Returns:
        [lanes, any, length], float32 at least.
    """
    is_impossible = targets[:, None, 2:] == 0
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(is_impossible, IMPOSSIBLE)


class PairScore(nn.Module):
    """A number of two vectors: dense_1(norm(tanh(dense_0 of both side by side)))."""

    def __init__(self, width: int, norm: nn.Module, has_bias: bool):
        super().__init__()
        self.dense_0 = PairLinear(width)
        self.layer_norm = norm
        self.dense_1 = nn.Linear(width, 1, bias=has_bias)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Score pairs: two [..., width] that broadcast -> [...]."""
        score: Tensor = self.dense_1(self.layer_norm(self.dense_0(first, second).tanh()))
        return score.squeeze(-1)

    def products(self, first_rows: int, second_rows: int) -> list[Product]:
        """List the products where each of the first vectors is in one pair."""
        width = self.dense_1.in_features
        halves = [linear_product(rows, width, width) for rows in (first_rows, second_rows)]
        return [*halves, linear_product(first_rows, width, 1)]


class PairLinear(nn.Module):
    """A linear layer of two vectors side by side, each of which is multiplied once, in however many pairs it is.

    Attributes:
        weight: [width, 2 width].
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2 * width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Transform pairs: two [..., width] that broadcast -> [..., width]."""
        of_first, of_second = self.weight.chunk(2, dim=1)
        return F.linear(first, of_first) + F.linear(second, of_second, self.bias)
