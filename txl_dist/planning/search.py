"""Try all splits of a run over its devices: data parallel x stages x ZeRO x micro-batches x checkpointing x offload."""

from collections.abc import Iterator, Sequence
from itertools import product

from txl_dist.config.parse import failed_checks
from txl_dist.config.quoting import quote_for_shell
from txl_dist.config.schema import PlanJob
from txl_dist.errors import ConfigError
from txl_dist.planning.planner import Plan, Planner, with_engine

SEARCHED = ("zero_stage", "pipeline_stages", "gradient_accumulation", "activation_checkpointing", "offload")
OFFLOADS = ("none", "optimizer", "parameters")
PLAN_KEYS = ("nodes", "gpus", "device", "vocab_size", "epoch_tokens", "measured", "search", "format", "assume")


def candidates(job: PlanJob) -> Iterator[PlanJob]:
    """Yield the job with each split that training would accept."""
    ranks = job.nodes * job.gpus
    for stages in divisors(ranks):
        for accumulation in divisors(job.data.num_lanes):
            for zero, checkpointing, offload in product(range(4), (False, True), OFFLOADS):
                values = (zero, stages, accumulation, checkpointing, offload)
                candidate = with_engine(job, **dict(zip(SEARCHED, values, strict=True)), stage_layers=None)
                if next(failed_checks(PlanJob, vars(candidate)), None) is None:
                    yield candidate


def divisors(number: int) -> list[int]:
    """Return all numbers that divide a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def search(planner: Planner, job: PlanJob) -> list[Plan]:
    """Return the plans of all splits that fit, the fastest first; of equally fast ones that which needs less memory.

    Raises:
        ConfigError: where training accepts no split, or none fits.
    """
    plans = [planner.plan(candidate) for candidate in candidates(job)]
    if not plans:
        refused = f"search=true: no split over {job.nodes * job.gpus} devices is accepted"
        raise ConfigError([refused, *failed_checks(PlanJob, vars(job))])
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(max(memory.total for memory in plan.memory) for plan in plans)
        usable = planner.rates.usable_memory
        raise ConfigError(
            [
                f"search=true: no split fits; the smallest needs {least / 2**30:.1f} GiB per device, of which tensors "
                f"can fill {usable / 2**30:.1f}; give more gpus or nodes, or fewer data.num_lanes"
            ]
        )
    return sorted(fitting, key=lambda plan: (plan.time.total, max(memory.total for memory in plan.memory)))


def command(plan: Plan, overrides: Sequence[str]) -> str:
    """Return the command that trains by a plan.

    Args:
        overrides: those that the planner was started with.
    """
    job = plan.job
    chosen = [f"engine.{key}" for key in SEARCHED]
    kept = [override for override in overrides if not is_one_of(override, [*PLAN_KEYS, *chosen, "engine.stage_layers"])]
    values = {key: getattr(job.engine, key) for key in SEARCHED}
    split = [f"engine.{key}={str(value).lower()}" for key, value in values.items()]
    if job.nodes > 1:
        program = f"sbatch --nodes={job.nodes} --gpus-per-node={job.gpus} slurm/train.sh"
    else:
        program = f"torchrun --nproc_per_node={job.gpus} -m txl_dist.train"
    return " ".join([program, *map(quote_for_shell, [*kept, *split])])


def is_one_of(override: str, keys: Sequence[str]) -> bool:
    """Return whether an override is of one of some keys, or of one below it."""
    given = override.lstrip("+~").partition("=")[0]
    return any(given == key or given.startswith(f"{key}.") for key in keys)
