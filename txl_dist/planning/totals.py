"""What a plan comes to over the whole run: time, energy, epochs, and its checkpoints."""

from dataclasses import dataclass

from txl_dist.planning.planner import Plan


@dataclass(frozen=True)
class Totals:
    """Of a run from its first step to train.max_steps, without evaluation.

    Attributes:
        epochs: None where the size of an epoch is not known.
        checkpoint: bytes of one: weights and optimizer in fp32, and the lanes' states.
        pause: seconds for which training waits while a checkpoint is copied to the memory of the machines.
        save: seconds until it is written, while training continues.
    """

    tokens: int
    epochs: float | None
    seconds: float
    kwh: float
    checkpoint: float
    pause: float
    save: float


def totals(plan: Plan) -> Totals:
    """Return what a plan comes to."""
    job = plan.job
    steps = job.train.max_steps
    tokens = steps * job.tokens_per_step
    seconds = steps * plan.time.total
    copies = 3 if job.optimizer.average_from is None else 4  # of each parameter: itself, two moments, its mean
    states = sum(part.state for stage in plan.stages for part in stage.parts)
    states *= plan.split.accumulation * plan.split.data_parallel
    checkpoint = 4 * copies * plan.num_parameters + states
    return Totals(
        tokens=tokens,
        epochs=tokens / plan.dataset.epoch_tokens if plan.dataset.epoch_tokens else None,
        seconds=seconds,
        kwh=plan.rates.watts * seconds / 3.6e6,
        checkpoint=checkpoint,
        pause=checkpoint / plan.split.ranks / plan.rates.host,
        save=checkpoint / (job.assume.disk * 1e9),
    )
