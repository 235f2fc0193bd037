"""RUN_DIR/skipped_steps.json: the steps of a run that make no update, and why.

The anomaly guard adds to the file, and a person may edit it: `[{"step": 1200, "why": "bad text"}, ...]`.
"""

import json
from collections import Counter
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from txl_dist.config.types import SCHEMA, PositiveInt
from txl_dist.errors import UserError, describe_os_error
from txl_dist.files.atomic import atomic_file

SKIPPED_FILE = "skipped_steps.json"
FORMER_FILE = "passed_steps.json"  # its name in version 0.1: read where the new one is absent, never written
REMEDY = 'write it as [{"step": 1200, "why": "bad text"}, ...], or remove it to skip no step'


@dataclass(config=SCHEMA, frozen=True)
class SkippedStep:
    """One entry of skipped_steps.json; steps are numbered as in the log, from 1."""

    step: PositiveInt
    why: str


def read_skipped_steps(run_dir: str) -> dict[int, str]:
    """Return the steps that a run skips, each with its reason; empty without a file.

    Raises:
        UserError: where the file cannot be read, or has another shape.
    """
    path = Path(run_dir, SKIPPED_FILE)
    try:
        if not path.exists():
            path = Path(run_dir, FORMER_FILE)
        if not path.exists():
            return {}
        if not path.is_file():
            raise UserError(f"{path}: is not a file; {REMEDY}")
        entries = TypeAdapter(list[SkippedStep]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{describe_os_error(error, path)}; {REMEDY}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {describe_first_problem(error)}; {REMEDY}") from error
    counts = Counter(entry.step for entry in entries)
    repeated = [step for step, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{path}: step {repeated[0]} is listed twice; {REMEDY}")
    return {entry.step: entry.why for entry in entries}


def describe_first_problem(error: ValidationError) -> str:
    """Return where a JSON document first differs from its schema, and how, as `at [0].why: Field required`."""
    problem = error.errors()[0]
    position = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"])
    return f"at {position}: {problem['msg']}" if position else problem["msg"]


def write_skipped_steps(run_dir: str, skipped: dict[int, str]) -> None:
    """Replace skipped_steps.json, one step per line.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    lines = [json.dumps({"step": step, "why": why}) for step, why in sorted(skipped.items())]
    with atomic_file(Path(run_dir, SKIPPED_FILE)) as temporary:
        temporary.write_text("[" + ",\n ".join(lines) + "]\n")
