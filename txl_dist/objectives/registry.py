"""The objectives that objective.name can name."""

from txl_dist.config.schema import PermutationLMConfig, TrainJob
from txl_dist.data.index import Index
from txl_dist.objectives.base import Objective
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.objectives.permutation_lm import PermutationLM


def build_objective(job: TrainJob, index: Index) -> Objective:
    """Return what a model is trained for on a dataset.

    Raises:
        UserError: where the tokenizer of the dataset, which permutation language modelling needs, cannot be read.
    """
    if isinstance(job.objective, PermutationLMConfig):
        return PermutationLM(job.objective, index.tokenizer())
    return CausalLM(job.first_scored)
