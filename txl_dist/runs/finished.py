"""RUN_DIR/finished.json: the fact that a run has done its last step and scored its test split.

A start decides by this file whether there is anything left to do; it never decides by what was logged.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import describe_os_error
from txl_dist.files.atomic import atomic_file
from txl_dist.files.parsing import PARSE_ERRORS, Number, Size, describe, read_json
from txl_dist.tracking.metrics import last_line

log = logging.getLogger(__name__)


class Finished(BaseModel):
    """The content of finished.json.

    Attributes:
        step: the last step, which was train.max_steps.
        metrics: of the test split at that step, such as test/loss; None for a number that is not finite.
    """

    step: Size
    metrics: dict[str, Number | None]


def path_of(run_dir: str) -> Path:
    """Return the path of a run's finished.json."""
    return Path(run_dir) / "finished.json"


def mark_finished(run_dir: str, step: int, metrics: dict[str, float], group: ProcessGroup) -> None:
    """Write finished.json on rank zero. Every rank must call it.

    Args:
        step: the last one of the run.
        metrics: of the test split, empty if the data have none.

    Raises:
        RunError: on every rank, if it cannot be written.
    """
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    with writing_to(run_dir, group):
        if group.is_rank_zero:
            with atomic_file(path_of(run_dir)) as temporary:
                temporary.write_text(json.dumps({"step": step, "metrics": finite}) + "\n")


def unmark_finished(run_dir: str) -> None:
    """Remove finished.json, because the run is trained further."""
    path_of(run_dir).unlink(missing_ok=True)


def finished_step(run_dir: str) -> int | None:
    """Return the step at which a run was finished; None if it was not, or its finished.json is damaged."""
    path = path_of(run_dir)
    if not path.exists():
        return step_logged_by_0_1(run_dir)
    try:
        return Finished.model_validate(read_json(path)).step
    except (OSError, *PARSE_ERRORS) as error:
        log.warning("%s: cannot be read (%s); the test split is scored again", path, describe(error))
        return None


def step_logged_by_0_1(run_dir: str) -> int | None:
    """Return the step at which version 0.1, which wrote no finished.json, has logged the score of the test split.

    For one version only: from 0.3 on such a run scores its test split again.

    Raises:
        UserError: if metrics.jsonl is not a file.
    """
    last = last_line(run_dir)
    return last["step"] if last and "test/loss" in last else None


@contextlib.contextmanager
def writing_to(run_dir: str, group: ProcessGroup) -> Iterator[None]:
    """Turn an OSError of any rank in this context into a RunError on every rank. Every rank must enter it."""
    problems: list[str] = []
    try:
        yield
    except OSError as error:
        problems.append(f"run.dir={run_dir}: cannot be written: {describe_os_error(error, run_dir)}")
    group.raise_if_any_failed(problems)
