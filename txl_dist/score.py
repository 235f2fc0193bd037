"""The log-probability of every token of a text: `python -m txl_dist.score run=RUN_DIR text="It was a"`.

In Python: `scores, after = Scorer.open("runs/mine").read("It was a")`; `after` is the next token's distribution.
"""

import json
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import CheckpointChoice, LengthsConfig, ScoreJob
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.runs.load import encode_text, load_model, load_tokenizer
from txl_dist.tracking.console import PlainConsole


class TokenScore(NamedTuple):
    """log_prob: log P(token | all tokens before it, as far as the model remembers), in nats."""

    token: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class Scorer:
    """A trained model that is asked about texts. A text is read as a document's beginning: after `<eos>`."""

    model: TransformerXL
    tokenizer: Tokenizer

    @classmethod
    def open(
        cls, run: str, which: CheckpointChoice = None, lengths: LengthsConfig | None = None, average: bool = False
    ) -> "Scorer":
        """Of a run's checkpoint (the newest, where none is named), with other lengths or averaged weights."""
        model, checkpoint = load_model(run, which, lengths or LengthsConfig(None, None, None, None), average)
        return cls(model, load_tokenizer(run, checkpoint))

    @torch.no_grad()
    def read(self, text: str | bytes) -> tuple[list[TokenScore], Tensor]:
        """The score of each token of a text, and log P of each token of the vocabulary to be the one after it.

        The latter is float32 [vocab_size], in nats.
        """
        tokens, pieces = encode_text(self.tokenizer, text, "text"), self.tokenizer.decoder()
        inputs, memory = torch.tensor([self.tokenizer.eos, *tokens]), self.model.empty_cache(1)
        length = self.model.config.tgt_len
        found: list[float] = []
        log_probs = torch.empty(0)
        for start in range(0, len(inputs), length):
            segment = inputs[None, start : start + length]
            lookback = torch.arange(start, start + segment.size(1))[None]
            log_probs, memory = self.model(segment, None, lookback, memory)
            targets = inputs[start + 1 : start + 1 + length, None]  # none for the last input: it is the text's end
            found += log_probs[0, : len(targets)].gather(-1, targets.to(log_probs.device))[:, 0].tolist()
        scores = [TokenScore(token, pieces.feed(token), nats) for token, nats in zip(tokens, found, strict=True)]
        return scores, log_probs[0, -1].cpu()


def score(job: ScoreJob) -> None:
    """Print a table, or one JSON object."""
    scorer = Scorer.open(job.run, job.checkpoint, job.model, job.average)
    scores, after = scorer.read(job.text if job.text is not None else read_standard_input("text"))
    log_probs, tokens = after.topk(min(job.next, len(after)))
    follow = [
        TokenScore(token, scorer.tokenizer.decode([token]), log_prob)
        for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True)
    ]
    total = sum(each.log_prob for each in scores)
    if job.format == "json":
        told = {"log_prob": total, "tokens": [each._asdict() for each in scores]}
        print(json.dumps(told | {"next": [each._asdict() for each in follow]}))
        return
    console = PlainConsole()
    console.print(table("token", scores))
    console.print(f"\n{len(scores):,} tokens, log-probability {total:,.4f} nats\n")
    if follow:
        console.print(table("next token", follow))


def table(title: str, scores: list[TokenScore]) -> Table:
    rows = Table(title, "number", "log-probability", "probability", box=None, padding=(0, 3, 0, 0))
    for column in rows.columns[1:]:
        column.justify = "right"
    for each in scores:
        rows.add_row(repr(each.text), f"{each.token}", f"{each.log_prob:.4f}", f"{exp(each.log_prob):.4f}")
    return rows


def main() -> None:
    command("score", ScoreJob, score)


if __name__ == "__main__":
    main()
