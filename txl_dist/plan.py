"""Say what a run needs, before it runs: txl-plan +experiment=wt103_large nodes=4 gpus=8 device=H100."""

import json

from txl_dist.cli import command
from txl_dist.config.schema import PlanJob

SHOWN = 10  # splits that a search prints


def plan(job: PlanJob) -> None:
    """Print memory, time, communication, energy and checkpoints of a run, or the best splits of it.

    Raises:
        ConfigError: where the vocabulary is not known, or no split fits.
        UserError: where the measured run cannot be read.
    """
    from txl_dist.planning.dataset import find_dataset  # with torch: not for --help
    from txl_dist.planning.measured import slowdown
    from txl_dist.planning.planner import Planner, with_engine
    from txl_dist.planning.report import as_json, report, search_report
    from txl_dist.planning.search import command as training_command
    from txl_dist.planning.search import search
    from txl_dist.tracking.console import PlainConsole

    planner = Planner(job, find_dataset(job), slowdown(job, job.measured) if job.measured else 1.0)
    if job.search:
        plans = search(planner, job)[:SHOWN]
        train = training_command(plans[0], given_overrides())
        found = {"plans": [as_json(plan) for plan in plans], "command": train}
        shown = search_report(plans, train)
    else:
        planned = planner.plan(job)
        checkpointing = not job.engine.activation_checkpointing
        found = as_json(planned)
        shown = report(planned, planner.plan(with_engine(job, activation_checkpointing=checkpointing)))
    if job.format == "json":
        print(json.dumps(found))
    else:
        PlainConsole(soft_wrap=True).print(shown)


def given_overrides() -> list[str]:
    """Return the overrides of this command's line, without the `++` that overrides.py gives them for Hydra."""
    from hydra.core.hydra_config import HydraConfig

    return [override.removeprefix("++") for override in HydraConfig.get().overrides.task]


def main() -> None:
    command("plan", PlanJob, plan)


if __name__ == "__main__":
    main()
