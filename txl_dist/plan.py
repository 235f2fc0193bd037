"""Say what a run needs, before it runs: txl-plan +experiment=wt103_large nodes=4 gpus=8 device=H100."""

import json

from txl_dist.cli import command
from txl_dist.config.schema import PlanJob


def plan(job: PlanJob) -> None:
    """Print memory, time, communication, energy and checkpoints of a run, or the best splits of it.

    Raises:
        ConfigError: where the vocabulary is not known, or no split fits.
        UserError: where the measured run cannot be read.
    """
    from txl_dist.planning.dataset import find_dataset  # with torch: not for --help
    from txl_dist.planning.planner import Planner, with_engine
    from txl_dist.planning.report import WIDTH, as_json, report
    from txl_dist.tracking.console import PlainConsole

    planner = Planner(job, find_dataset(job))
    console = PlainConsole(width=WIDTH)
    planned = planner.plan(job)
    other = planner.plan(with_engine(job, activation_checkpointing=not job.engine.activation_checkpointing))
    if job.format == "json":
        print(json.dumps(as_json(planned)))
    else:
        console.print(report(planned, other, job.measured))


def main() -> None:
    command("plan", PlanJob, plan)


if __name__ == "__main__":
    main()
