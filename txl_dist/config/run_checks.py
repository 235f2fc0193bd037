"""The checks of the jobs that read runs: evaluate, generate, score, look, recl, inspect, dashboard, convert.

checkpoint.format is imported by the functions that need it: with it comes torch.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from txl_dist.config.schema import (
    ConvertJob,
    DashboardJob,
    EvaluateJob,
    GenerateJob,
    InspectJob,
    LookJob,
    ModelChanges,
    PlanJob,
    PredictJob,
    ReclJob,
    ScoreJob,
)
from txl_dist.config.sections import changed_model, parse_model
from txl_dist.config.types import CheckpointChoice
from txl_dist.errors import ConfigError, UserError
from txl_dist.tracking.dashboard.dashboard import recorded_runs


def run_is_there(run: str, checkpoint: CheckpointChoice) -> Iterator[str]:
    """Check that the chosen checkpoint of a run can be read."""
    yield from run_problems(run, checkpoint)


def some_run_is_there(run: list[str], checkpoint: CheckpointChoice, model: ModelChanges) -> Iterator[str]:
    """Refuse runs of which none can be evaluated; where some can, the rows of the others say why not."""
    yield from patterns_match(run)
    problems = [
        list(run_problems(path, checkpoint)) or list(change_problems(path, checkpoint, model)) for path in run_dirs(run)
    ]
    if all(problems):
        yield from dict.fromkeys(chain(*problems))


def all_runs_are_there(run: list[str]) -> Iterator[str]:
    """Check that all runs can be compared: each has a checkpoint."""
    yield from patterns_match(run)
    for path in run_dirs(run):
        yield from run_problems(path, None)


def patterns_match(patterns: list[str]) -> Iterator[str]:
    """Check that each glob matches some run."""
    for pattern in patterns:
        if not run_dirs([pattern]):
            yield f"run={pattern}: matches no run directory with a checkpoint"


def run_dirs(patterns: list[str]) -> list[str]:
    """List the run directories that globs match."""
    from txl_dist.checkpoint import format as checkpoint_format

    return checkpoint_format.run_dirs(patterns)


def run_problems(path: str, which: CheckpointChoice) -> Iterator[str]:
    """Yield why the chosen checkpoint of a run cannot be read; nothing where it can."""
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
                    f"checkpoint=best: no checkpoint of {path} was evaluated on valid at its own step; "
                    "leave it out for the latest"
                )


def change_problems(run: str, checkpoint: CheckpointChoice, model: ModelChanges) -> Iterator[str]:
    """Check what is to be read otherwise than in training, where the checkpoint can be read."""
    from txl_dist.checkpoint.format import directory, latest, open_checkpoint

    if not model:
        return
    try:
        chosen = open_checkpoint(directory(run, checkpoint)) if isinstance(checkpoint, int) else latest(run)
    except UserError:  # which is reported where the checkpoint is chosen
        return
    if chosen is not None:
        try:
            changed_model(parse_model(chosen.config["model"]), model)
        except ConfigError as error:
            yield from error.problems


def recorded_runs_are_there(run: list[str]) -> Iterator[str]:
    """Check that each path is a directory, and each glob matches some run that has recorded something."""
    for pattern in run:
        matches = recorded_runs([pattern])
        if not matches:
            yield f"run={pattern}: matches no run directory with metrics.jsonl or events.jsonl"
        elif matches == [pattern] and not Path(pattern).is_dir():
            yield f"run={pattern}: there is no such run directory"


def page_is_written_or_served(to: str | None, serve: bool) -> Iterator[str]:
    """Check that a page is either written, to a file, or served."""
    if to is not None and serve:
        yield f"to={to}: with serve=true no file is written; leave one of them out"


def file_is_there(file: str | None) -> Iterator[str]:
    """Check that what is to be read is a file."""
    if file is not None and not Path(file).is_file():
        yield f"file={file}: there is no such file"


def there_are_two_contexts(step: int, max_context: int) -> Iterator[str]:
    """Check that there is a longer context to compare the shortest one with."""
    if max_context < 2 * step:
        yield f"max_context={max_context}: must be at least two steps of {step}, to compare a context with a longer one"


def window_has_no_memory(sliding_window: bool, model: ModelChanges) -> Iterator[str]:
    """Check that a sliding window is not given a memory, which it does not use."""
    if sliding_window and model.get("mem_len") is not None:
        yield (
            f"model.mem_len={model['mem_len']}: a sliding window reads without memory; give its length as model.tgt_len"
        )


def page_has_a_place(to: str | None) -> Iterator[str]:
    """Check that the page is a file in a folder, and takes the place of nothing but a page."""
    if to is None:
        return
    path = Path(to)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        yield f"to={to}: is not the name of a page; give one that ends with .html"
    elif not path.parent.is_dir():
        yield f"to={to}: there is no folder {path.parent}; make it first, or give another"


def continuation_has_a_place(format: str, out: str | None) -> Iterator[str]:
    """Check that images and sounds go to a file, whose name says what it is, in a folder that is there."""
    suffix = {"png": ".png", "wav": ".wav"}.get(format)
    if format == "png" and not find_spec("PIL"):
        yield "format=png: Pillow is not installed; pip install 'txl_dist[images]'"
    if out is None:
        if suffix:
            yield f"out: is missing; format={format} is written to a file; give out=NAME{suffix}"
        return
    path = Path(out)
    if path.is_dir() or (suffix and path.suffix.lower() != suffix):
        yield f"out={out}: is not the name of a file for format={format}; give one that ends with {suffix or '.txt'}"
    elif not path.parent.is_dir():
        yield f"out={out}: there is no folder {path.parent}; make it first, or give another"


def conversion_has_one_direction(
    run: str, from_: str | None, to: str | None, tokenizer_from: str | None, pairs: bool
) -> Iterator[str]:
    """Check that a model is either imported or exported, and that nothing is overwritten."""
    if (from_ is None) == (to is None):
        yield "from, to: give one of them: from=PATH imports a model as the run, to=FOLDER exports the run"
        return
    key, target = ("to", to) if from_ is None else ("run", run)
    folder = Path(str(target))
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        yield f"{key}={target}: is there already, and nothing is overwritten; give another folder"
    if from_ is not None and not any(Path(path).exists() for path in (from_, f"{from_}.index")):
        yield f"from={from_}: there is no such file or folder"
    if to is not None and tokenizer_from is not None:
        yield f"tokenizer_from={tokenizer_from}: is for from=PATH, because a run has its own; leave it out"
    if to is not None and pairs:
        yield "pairs=true: is for from=PATH, because a run knows what it reads; leave it out"


def exported_run_is_there(run: str, to: str | None, checkpoint: CheckpointChoice, model: ModelChanges) -> Iterator[str]:
    """Check that the chosen checkpoint of a run to be exported can be read, and its model changed so."""
    if to is not None:
        yield from run_problems(run, checkpoint)
        yield from change_problems(run, checkpoint, model)


def measured_run_is_there(measured: str | None) -> Iterator[str]:
    """Check that the run whose speed a plan takes can be read."""
    if measured is not None:
        yield from (problem.replace("run=", "measured=", 1) for problem in run_problems(measured, None))


Check = Callable[..., Iterator[str]]
CHECKS: dict[type, list[Check]] = {
    EvaluateJob: [some_run_is_there, window_has_no_memory],
    GenerateJob: [run_is_there, change_problems, continuation_has_a_place],
    InspectJob: [run_is_there],
    ScoreJob: [run_is_there, change_problems],
    PredictJob: [run_is_there, change_problems, file_is_there],
    LookJob: [run_is_there, change_problems, page_has_a_place],
    ReclJob: [all_runs_are_there, there_are_two_contexts],
    DashboardJob: [recorded_runs_are_there, page_is_written_or_served, page_has_a_place],
    PlanJob: [measured_run_is_there],
    ConvertJob: [conversion_has_one_direction, exported_run_is_there],
}
