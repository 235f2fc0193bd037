"""What may differ between two starts of a run: each key says so itself (config/types.py)."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from txl_dist.config.schema import DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig, TrainConfig, TrainJob
from txl_dist.config.types import ALWAYS, LANES, MayChange, may_change
from txl_dist.models.config import ModelConfig

# The sections that are newer than some runs, as those runs had them.
EARLIER = {"objective": {"name": "causal_lm"}}
# The keys that are newer than some runs, and by which lanes stand where they do.
EARLIER_VALUES = {"train.tbptt": 1}


class Change(NamedTuple):
    """A key that has another value now than when the run was started."""

    key: str
    before: Any
    now: Any
    allowed: MayChange


def changes(
    started: Mapping[str, Any],
    run: RunConfig,
    data: DataConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
) -> Iterator[Change]:
    """Yield what a config changes of the one that a checkpoint was made with.

    Args:
        started: the checkpoint's config, as nested dicts. It may lack keys and sections that are newer.
    """
    sections: dict[str, RunConfig | DataConfig | ModelConfig | OptimizerConfig | ObjectiveConfig | TrainConfig] = {
        "run": run,
        "data": data,
        "model": model,
        "optimizer": optimizer,
        "objective": objective,
        "train": train,
    }
    started = EARLIER | dict(started)
    for name, section in sections.items():
        marks = model.may_change() if section is model else may_change(type(section), unmarked=ALWAYS)
        values = asdict(section)
        for key, allowed in marks.items():
            before = started[name].get(key, EARLIER_VALUES.get(f"{name}.{key}", values[key]))
            if before != values[key]:
                yield Change(f"{name}.{key}", before, values[key], allowed)


def lanes_changed(started: Mapping[str, Any], job: TrainJob) -> bool:
    """Return whether the lanes of a run are others than those of a checkpoint, so that its memory has no meaning."""
    found = changes(started, job.run, job.data, job.model, job.optimizer, job.objective, job.train)
    return any(change.allowed is LANES for change in found)


def refused_changes(
    started: Mapping[str, Any],
    run: RunConfig,
    data: DataConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
) -> Iterator[str]:
    """Yield what a config changes, but must not, of the config that a checkpoint was made with."""
    trained_by = started["optimizer"]["name"]
    if KINDRED[trained_by] != KINDRED[optimizer.name]:
        yield (
            f"optimizer.name={optimizer.name}: the run in {run.dir} was trained with {trained_by}, whose states are of "
            f"another kind; give optimizer={trained_by}, or another run.dir for another run"
        )
    for change in changes(started, run, data, model, optimizer, objective, train):
        described = f"{change.key}={change.now}: the run in {run.dir} was started with {change.before}"
        if change.allowed is ALWAYS:
            continue
        if change.allowed is not LANES:
            yield f"{described}; give that, or another run.dir for another run"
        elif run.on_lane_change == "refuse":
            yield (
                f"{described}, and its memory belongs to those lanes, at their positions in the data; give that, or "
                "run.on_lane_change=reset_memory to resume at the same share of the epoch with empty memories, "
                "or another run.dir for another run"
            )


# Optimizers that keep the same states: one continues where the other has stopped.
KINDRED = {"adam": "adam", "adamw": "adam", "lamb": "lamb"}
