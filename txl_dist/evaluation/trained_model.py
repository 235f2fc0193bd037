"""A trained model in Python: `txl_dist.load` returns one (docs/python.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from txl_dist.checkpoint.initial_weights import InitialWeights
from txl_dist.config.run_checks import change_problems, run_problems
from txl_dist.config.schema import ConvertJob, ModelChanges
from txl_dist.config.types import CheckpointChoice
from txl_dist.conversion.importing import read_model
from txl_dist.conversion.sources import is_importable, open_import_source
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.encode import encode_text
from txl_dist.evaluation.reading import Memory, read
from txl_dist.evaluation.sampling import Completion, Sampler, complete
from txl_dist.evaluation.scoring import Scorer, TokenScore
from txl_dist.models import registry
from txl_dist.models.base import LanguageModel
from txl_dist.models.config import ModelConfig
from txl_dist.runs.load import load_model, load_tokenizer, ready_to_evaluate

Text = str | bytes


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and its tokenizer.

    Attributes:
        model: the torch module; its parameters have the names that checkpoints know them by.
    """

    model: LanguageModel
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """Return the model's hyper-parameters, with the values by which it reads."""
        return self.model.config

    def encode(self, text: Text) -> Tensor:
        """Return the tokens of a text that begins a document, after `<eos>`: int64 [1, length].

        Raises:
            UserError: where the tokenizer cannot encode the text.
        """
        return torch.tensor([[self.tokenizer.eos, *encode_text(self.tokenizer, text, "text")]])

    def step(self, tokens: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Read tokens, and predict the one that follows each.

        Args:
            tokens: int64 [lanes, length]; any length, for they are read in segments of config.tgt_len.
            memory: as the step before has returned it; None where the lanes begin. A step uses it up: `copy` it first
                to read on from it twice.

        Returns:
            The log-probabilities [lanes, length, vocab_size], in nats, and the memory of the lanes.

        Raises:
            RuntimeError: where the memory is used up.
        """
        begin = Memory.empty(self.model, len(tokens)) if memory is None else memory
        readings = list(read(self.model, tokens, begin))
        _, memory = readings[-1]
        return torch.cat([log_probs for log_probs, _ in readings], dim=1), memory

    def score(self, text: Text) -> list[TokenScore]:
        """Return the log-probability of each token of a text that begins a document.

        Raises:
            UserError: where the tokenizer cannot encode the text.
        """
        scores, _ = Scorer(self.model, self.tokenizer).read(text)
        return scores

    def generate(
        self,
        prompts: Sequence[Text],
        max_tokens: int = 300,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> list[str]:
        """Continue prompts side by side; return each with its continuation.

        Args:
            prompts: a list of texts, each the beginning of a document.
            max_tokens: generated for each at most; fewer where its document ends.
            temperature: divides the logits; 0: always the likeliest token.
            top_k: sample from the so many likeliest tokens; 0: from all.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: of the samples; those of a prompt do not depend on the other prompts.

        Raises:
            UserError: where the tokenizer cannot encode a prompt.
        """
        if isinstance(prompts, (str, bytes)):
            raise TypeError("prompts: is a single text; give a list of texts")
        completions = [Completion(self.tokenizer, prompt) for prompt in prompts]
        for _ in complete(self.model, completions, Sampler(temperature, top_k, top_p), seed, max_tokens):
            pass  # the completions collect their text
        return [completion.text for completion in completions]


def load(path: str, which: CheckpointChoice, average: bool, changes: ModelChanges) -> TrainedModel:
    """Load a run's checkpoint, or a third-party one; arguments and errors are those of `txl_dist.load`."""
    if is_importable(Path(path)):
        if which is not None or average:
            raise UserError(f"{path}: is not a run directory; checkpoint and average choose among what a run has saved")
        return import_model(path, changes)
    problems = [*run_problems(path, which), *change_problems(path, which, changes)]
    if problems:
        raise ConfigError(problems)
    model, checkpoint = load_model(path, which, changes, average)
    return TrainedModel(model, load_tokenizer(path, checkpoint))


def import_model(path: str, changes: ModelChanges) -> TrainedModel:
    """Load a third-party checkpoint, without making it a run."""
    job = ConvertJob(run="none", from_=path, to=None, tokenizer_from=None, checkpoint=None, model=changes)
    imported = read_model(job, open_import_source(Path(path)))
    model = registry.build(imported.config, imported.source.vocab_size)
    InitialWeights(path, lambda names: imported.weights).load_weights(model)
    return TrainedModel(ready_to_evaluate(model), imported.tokenizer)
