"""Score texts of a user: the log-probability of every token.

from txl_dist.evaluation.scoring import Scorer
scores, next_log_probs = Scorer.open("runs/mine").read("It was a")
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from txl_dist.config.schema import ModelChanges
from txl_dist.config.types import CheckpointChoice
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.evaluation.both_sides import log_probs_from_both_sides
from txl_dist.evaluation.encode import encode_text
from txl_dist.evaluation.reading import Memory, read
from txl_dist.models.base import LanguageModel
from txl_dist.runs.load import load_model, load_tokenizer


class TokenScore(NamedTuple):
    """A token of a text. log_prob: log P(token | all tokens before it that the model remembers), in nats."""

    token: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class Scorer:
    """A trained model and its tokenizer. A text is read as the beginning of a document: after `<eos>`."""

    model: LanguageModel
    tokenizer: Tokenizer

    @classmethod
    def open(
        cls, run: str, which: CheckpointChoice = None, changes: ModelChanges | None = None, average: bool = False
    ) -> "Scorer":
        """Load the checkpoint of a run.

        Args:
            run: the run directory.
            which: a step, "best", or None for the latest valid checkpoint.
            changes: keys of the model that are read with other values than in training, such as mem_len.
            average: load the averaged weights.

        Raises:
            UserError: where the checkpoint or the tokenizer cannot be read.
        """
        model, checkpoint = load_model(run, which, changes, average)
        return cls(model, load_tokenizer(run, checkpoint))

    def read(self, text: str | bytes) -> tuple[list[TokenScore], Tensor]:
        """Score each token of a text, segment by segment with memory.

        Returns:
            The scores, and the log-probabilities of the next token: float32 [vocab_size], in nats.

        Raises:
            UserError: where the tokenizer cannot encode the text.
        """
        tokens = encode_text(self.tokenizer, text, "text")
        inputs = torch.tensor([[self.tokenizer.eos, *tokens]])
        log_probs = torch.empty(0)
        text_log_probs: list[float] = []
        for log_probs, _ in read(self.model, inputs, Memory.empty(self.model, lanes=1)):
            # One target fewer in the last segment: the token after the text is not known.
            start = len(text_log_probs)
            targets = inputs[0, start + 1 : start + 1 + log_probs.size(1), None].to(log_probs.device)
            text_log_probs += log_probs[0, : len(targets)].gather(-1, targets)[:, 0].tolist()
        return self.describe(tokens, text_log_probs), log_probs[0, -1].cpu()

    def read_both_sides(self, text: str | bytes) -> list[TokenScore]:
        """Score each token of a text from what stands before it and behind it.

        Raises:
            UserError: where the tokenizer cannot encode the text, or the model predicts from left to right only.
        """
        tokens = encode_text(self.tokenizer, text, "text")
        inputs = torch.tensor([self.tokenizer.eos, *tokens])
        return self.describe(tokens, log_probs_from_both_sides(self.model, inputs) if tokens else [])

    def describe(self, tokens: list[int], log_probs: list[float]) -> list[TokenScore]:
        """Return the scores of tokens with their texts."""
        decoder = self.tokenizer.decoder()
        return [
            TokenScore(token, decoder.feed(token), log_prob) for token, log_prob in zip(tokens, log_probs, strict=True)
        ]

    def likeliest(self, log_probs: Tensor, count: int) -> list[TokenScore]:
        """Return the `count` likeliest tokens of log-probabilities [vocab_size], the likeliest first."""
        values, tokens = log_probs.topk(min(count, len(log_probs)))
        return [
            TokenScore(token, self.tokenizer.decode([token]), log_prob)
            for token, log_prob in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
