"""Write and read metrics.jsonl: a JSON object per logged step, with flat keys such as train/loss and valid/loss.

tracking/schema.py says what each key means. JSON has no NaN and no Infinity: null stands for a number that is not
finite, and is read as NaN. Files of earlier versions contain these words, which only Python reads.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from txl_dist.tracking.json_lines import append_line, cut, lines_backwards

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends to RUN_DIR/metrics.jsonl.

    Lines after `step` are cut off first, because a run that resumes from a checkpoint does those steps again. Lines
    before it are neither read nor written again, however many there are.
    """

    def __init__(self, run_dir: str, step: int):
        self.path = Path(run_dir) / FILE
        lines = lines_backwards(self.path, read_line)
        cut(self.path, next((end for end, line in lines if line and line["step"] <= step), 0))

    def append(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step.

        Raises:
            OSError: if they cannot be written; it names the file.
        """
        append_line(self.path, {key: value if math.isfinite(value) else None for key, value in metrics.items()})


def read_line(line: bytes) -> dict[str, Any] | None:
    """Return the metrics of a line; None if it is damaged, or contains anything but names and numbers."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict):
        return None
    if type(metrics.get("step")) is not int or type(metrics.get("tokens")) is not int:
        return None
    metrics = {key: math.nan if value is None else value for key, value in metrics.items()}
    return metrics if all(map(is_number, metrics.values())) else None


def is_number(value: object) -> bool:
    """Return whether a value is a float or a 64-bit integer; true and false are not."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def last_line(run_dir: str) -> dict[str, Any] | None:
    """Return the last logged metrics of a run; None if there are none, or the last line is damaged.

    Raises:
        UserError: if metrics.jsonl is not a file.
    """
    return next((line for _, line in lines_backwards(Path(run_dir) / FILE, read_line)), None)


def read_metrics(run_dir: str, warns: bool = True) -> list[dict[str, Any]]:
    """Return all logged metrics of a run, without lines that cannot be read.

    Args:
        warns: whether a warning names each of these.
    """
    path = Path(run_dir) / FILE
    lines = [line for _, line in lines_backwards(path, read_line)][::-1]
    for number, line in enumerate(lines, 1):
        if line is None and warns:
            log.warning("%s: line %d cannot be read, and is left out", path, number)
    return [line for line in lines if line]
