"""The objectives that objective.name can name."""

from functools import partial

from txl_dist.config.schema import (
    ClassificationConfig,
    ObjectiveConfig,
    PermutationLMConfig,
    SpanQAConfig,
    TaskConfig,
    TrainJob,
)
from txl_dist.data.format import Examples
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.base import HeadBuilder
from txl_dist.objectives.base import Objective
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.objectives.classification import Classification, classification_head
from txl_dist.objectives.examples import ExampleObjective
from txl_dist.objectives.permutation_lm import PermutationLM
from txl_dist.objectives.span_qa import SpanQA, span_head


def build_objective(job: TrainJob, index: Index) -> Objective:
    """Return what a model is trained for on a dataset.

    Raises:
        UserError: where the tokenizer of the dataset, which permutation language modelling needs, cannot be read.
    """
    if isinstance(job.objective, PermutationLMConfig):
        return PermutationLM(job.objective, index.tokenizer())
    if isinstance(job.objective, TaskConfig):
        return build_task(job.objective, index.examples, index.tokenizer())
    return CausalLM(job.first_scored)


def build_task(config: TaskConfig, examples: Examples | None, tokenizer: Tokenizer) -> ExampleObjective:
    """Return a task.

    Args:
        examples: what kind of examples it is for.
        tokenizer: of the data.
    """
    assert examples is not None
    if isinstance(config, ClassificationConfig):
        return Classification(config, examples, tokenizer)
    return SpanQA(config, tokenizer)


def head_builder(config: ObjectiveConfig, examples: Examples | None) -> HeadBuilder | None:
    """Return what builds the head of a model; None where it predicts tokens.

    Args:
        examples: of the data that it is trained on.
    """
    if isinstance(config, ClassificationConfig):
        assert examples is not None
        return partial(classification_head, config, examples)
    if isinstance(config, SpanQAConfig):
        return partial(span_head, config)
    return None
