"""Continuations of fixed prompts, while a run trains (tracking.prompts)."""

import torch

from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.engine.engine import Engine
from txl_dist.evaluation.sampling import Completion, Sampler, complete
from txl_dist.models import registry
from txl_dist.models.base import LanguageModel

SAMPLER = Sampler(temperature=0.8)


class PromptSampler:
    """Continues tracking.prompts with the weights of a run, in a model of its own on rank zero.

    So every split draws the same samples, and nothing of training is touched. The same numbers are drawn each time:
    samples of several steps differ by the weights alone.
    """

    def __init__(self, job: TrainJob, index: Index):
        self.job = job
        self.vocab_size = index.vocab_size
        self.tokenizer = index.tokenizer()
        self.model: LanguageModel | None = None

    @torch.no_grad()
    def sample(self, engine: Engine) -> list[dict[str, str]]:
        """Return each prompt with what follows it on rank zero, and nothing elsewhere; every rank must call it."""
        weights = engine.full_weights()
        if not engine.group.is_rank_zero:
            return []
        if self.model is None:
            self.model = registry.build(self.job.evaluated_model, self.vocab_size).to(engine.group.device).eval()
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])
        completions = [Completion(self.tokenizer, prompt) for prompt in self.job.tracking.prompts or []]
        given = [len(completion.text) for completion in completions]
        tokens = complete(self.model, completions, SAMPLER, self.job.run.seed, self.job.tracking.sample_tokens)
        for _ in tokens:
            pass
        return [
            {"prompt": completion.text[:length], "text": completion.text[length:]}
            for completion, length in zip(completions, given, strict=True)
        ]
