"""What the ranks send each other in a step, by kind, as DeepSpeed 0.19 and the engine do it.

Of a payload each of R ranks sends (R - 1) / R in a ring that gathers or scatters it, and twice as much in one that
reduces it on all of them.
"""

from txl_dist.config.schema import TrainJob
from txl_dist.models.base import DTYPES
from txl_dist.planning.memory import REUSE, Stage

KINDS = ("gradients", "weights", "carries", "carry gradients", "tied gradients")


def sent(job: TrainJob, stages: list[Stage], number: int, precision: str, on_gpu: bool) -> dict[str, float]:
    """Return the bytes that a rank of a stage sends in a step, by KINDS.

    gradients: to reduce them over the data-parallel ranks, at ZeRO 2 and 3 once for each micro-batch. weights: updated
    ones at ZeRO 1 and 2; at 3 those that are gathered to compute. carries: to the next stage of the pipeline, and their
    gradients back. tied gradients: between the first and the last stage.
    """
    stage = stages[number]
    zero = job.engine.zero_stage
    b = DTYPES[precision].itemsize
    payload = b * stage.num_parameters
    ring = (stage.data_parallel - 1) / stage.data_parallel
    times = stage.micro_batches
    kinds = dict.fromkeys(KINDS, 0.0)
    if zero == 3:
        # gloo, which CPUs have, reduces on all ranks where NCCL reduces and scatters.
        kinds["gradients"] = (1 if on_gpu else 2) * ring * payload * times
        # Weights that backward needs soon after forward stay.
        kinds["weights"] = ring * payload * times * (2 if stage.num_parameters > REUSE else 1)
    else:
        kinds["gradients"] = 2 * ring * payload * (times if zero == 2 else 1)
        kinds["weights"] = ring * payload if zero else 0
    if number < len(stages) - 1:
        kinds["carries"] = times * sum(stage.parts[-1].carry)
    if number:
        kinds["carry gradients"] = times * stages[number - 1].parts[-1].carry[0]
    if len(stages) > 1 and number in (0, len(stages) - 1):
        kinds["tied gradients"] = b * tied_parameters(stages)
    return kinds


def tied_parameters(stages: list[Stage]) -> int:
    """Return how many parameters the first stage and the last one share."""
    embedding = stages[0].parts[0].parameters
    head = stages[-1].parts[-1].parameters
    return sum(size for name, size in embedding.items() if name in head)
