"""The speed of a run that has trained, beside what a plan would have said of it."""

from dataclasses import asdict
from statistics import median

from pydantic import TypeAdapter

from txl_dist.checkpoint.format import find_checkpoint
from txl_dist.config.schema import PlanJob
from txl_dist.errors import UserError
from txl_dist.planning.dataset import Dataset
from txl_dist.planning.planner import Planner
from txl_dist.tracking.metrics import read_metrics

RATE = "train/tokens_per_second"


def slowdown(job: PlanJob, run: str) -> float:
    """Return how many times as long a step of a run has taken as a plan says that it does on the job's devices.

    The run's model and split are those of its latest checkpoint, its rate the median of what it has logged.

    Raises:
        UserError: where its checkpoint cannot be read, or it has logged no rate.
    """
    checkpoint = find_checkpoint(run, None)
    rates = [line[RATE] for line in read_metrics(run) if RATE in line]
    if not rates or "imported" in checkpoint.state:
        raise UserError(f"measured={run}: has logged no {RATE}; give a run that has trained")
    written_by = checkpoint.state["written_by"]
    own = asdict(job) | checkpoint.config
    own |= {"nodes": 1, "gpus": written_by["ranks"], "vocab_size": checkpoint.data["vocab_size"]}
    if own["gpus"] > job.gpus and own["gpus"] % job.gpus == 0:
        own |= {"nodes": own["gpus"] // job.gpus, "gpus": job.gpus}
    own["engine"] = own["engine"] | {"precision": written_by["precision"]}
    measured = TypeAdapter(PlanJob).validate_python(own)
    plan = Planner(measured, Dataset(checkpoint.data["vocab_size"], None, "of the run")).plan(measured)
    return plan.tokens_per_second / median(rates)
