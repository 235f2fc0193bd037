"""The checks of the jobs that read the checkpoints of runs: evaluate, generate, score, recl, inspect, convert."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from txl_dist.config.schema import (
    CheckpointChoice,
    ConvertedModelConfig,
    ConvertJob,
    EvaluateJob,
    GenerateJob,
    InspectJob,
    LengthsConfig,
    ReclJob,
    ScoreJob,
)
from txl_dist.errors import UserError


def run_is_there(run: str, checkpoint: CheckpointChoice) -> Iterator[str]:
    yield from run_problems(run, checkpoint)


def some_run_is_there(run: list[str], checkpoint: CheckpointChoice) -> Iterator[str]:
    """Refuse runs of which none can be evaluated; where some can, the rows of the others say why not."""
    yield from globs_match(run)
    problems = [list(run_problems(path, checkpoint)) for path in run_dirs(run)]
    if all(problems):
        yield from chain(*problems)


def all_runs_are_there(run: list[str]) -> Iterator[str]:
    yield from globs_match(run)
    for path in run_dirs(run):
        yield from run_problems(path, None)


def there_are_two_contexts(step: int, max_context: int) -> Iterator[str]:
    if max_context < 2 * step:
        yield f"max_context={max_context}: must be at least two steps of {step}, to compare a context with a longer one"


def globs_match(patterns: list[str]) -> Iterator[str]:
    for pattern in patterns:
        if not run_dirs([pattern]):
            yield f"run={pattern}: matches no run directory with a checkpoint"


def run_dirs(patterns: list[str]) -> list[str]:
    from txl_dist.checkpoint import format as checkpoint  # torch: seconds to import, and `prepare` never needs it

    return checkpoint.run_dirs(patterns)


def run_problems(path: str, which: CheckpointChoice) -> Iterator[str]:
    """Say why a run's checkpoint cannot be read."""
    from txl_dist.checkpoint.format import best, latest, steps

    if not Path(path).is_dir():
        hint = "; a list is given as run=[one,other]" if "," in path else ""
        yield f"run={path}: there is no such run directory{hint}"
    elif not steps(path):
        yield f"run={path}: holds no checkpoint"
    elif isinstance(which, int):
        if which not in steps(path):
            yield f"checkpoint={which}: {path} has checkpoints of steps {', '.join(map(str, steps(path)))}"
    else:
        try:
            latest(path)
        except UserError as error:
            yield from str(error).splitlines()
        else:
            if which == "best" and best(path) is None:
                yield (
                    f"checkpoint=best: no checkpoint of {path} was evaluated on valid at its very step; "
                    "leave it out for the newest"
                )


def conversion_has_one_direction(
    run: str, from_: str | None, to: str | None, tokenizer_from: str | None, model: ConvertedModelConfig
) -> Iterator[str]:
    if (from_ is None) == (to is None):
        yield "from, to: give one of them: from=PATH imports a model as the run, to=FOLDER exports the run"
        return
    key, target = ("run", run) if from_ else ("to", to)
    if (place := Path(str(target))).exists() and not (place.is_dir() and not any(place.iterdir())):
        yield f"{key}={target}: is there already, and nothing is overwritten; give another folder"
    if from_ is not None and not Path(from_).exists():
        yield f"from={from_}: there is no such file or folder"
    if to is not None:
        given = {"tokenizer_from": tokenizer_from, "model.cutoffs": model.cutoffs, "model.pre_lnorm": model.pre_lnorm}
        yield from (
            f"{key}={value}: is for from=PATH; a run knows its own" for key, value in given.items() if value is not None
        )


def exported_run_is_there(run: str, to: str | None, checkpoint: CheckpointChoice) -> Iterator[str]:
    if to is not None:
        yield from run_problems(run, checkpoint)


def window_has_no_memory(sliding_window: bool, model: LengthsConfig) -> Iterator[str]:
    if sliding_window and model.mem_len is not None:
        yield f"model.mem_len={model.mem_len}: a sliding window reads without memory; its length is model.tgt_len"


Check = Callable[..., Iterator[str]]
CHECKS: dict[type, list[Check]] = {
    EvaluateJob: [some_run_is_there, window_has_no_memory],
    GenerateJob: [run_is_there],
    InspectJob: [run_is_there],
    ScoreJob: [run_is_there],
    ReclJob: [all_runs_are_there, there_are_two_contexts],
    ConvertJob: [conversion_has_one_direction, exported_run_is_there],
}
