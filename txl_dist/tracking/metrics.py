"""metrics.jsonl: one JSON object per logged step, with flat keys: step, tokens, train/loss, valid/bits_per_byte, ...

JSON has no NaN and no Infinity: null stands for a number that is not finite, and is read as NaN. Files of earlier
versions have such words, which only Python reads.
"""

import json
import math
import sys
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from txl_dist.errors import UserError


class MetricsFile:
    """Appends to RUN_DIR/metrics.jsonl. What was logged after `step` is cut off first: a run that goes on from a
    checkpoint does those steps again. What comes before is neither read nor written again, however much it is."""

    def __init__(self, run_dir: str, step: int):
        self.path = Path(run_dir) / "metrics.jsonl"
        kept = (end for end, line in backwards(self.path) if line and line["step"] <= step)
        with self.path.open("ab") as file:
            file.truncate(next(kept, 0))

    def append(self, metrics: dict[str, Any]) -> None:
        """Add a logged step.

        Raises:
            OSError: with the file's name, where it cannot be written.
        """
        try:
            with self.path.open("a") as file:
                finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error  # a full disk comes without a name


def backwards(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The lines from the last one on: the byte where each ends, and what it tells, None where it cannot be read.

    A last line that was cut short when the machine stopped is none.

    Raises:
        UserError: where something else stands in the file's place.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file; move it away")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        while end:
            begin = content.rfind(b"\n", 0, end - 1) + 1
            yield end, read_line(content[begin:end])
            end = begin


def read_line(line: bytes) -> dict[str, Any] | None:
    """Return the metrics of a line; None where it is damaged, or holds anything but names and numbers."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict) or not type(metrics.get("step")) is type(metrics.get("tokens")) is int:
        return None
    metrics = {key: math.nan if value is None else value for key, value in metrics.items()}
    return metrics if all(map(is_number, metrics.values())) else None


def is_number(value: object) -> bool:
    """Return whether it is a float or a 64-bit integer; true is not."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def last_line(run_dir: str) -> dict[str, Any] | None:
    return next((line for _, line in backwards(Path(run_dir) / "metrics.jsonl")), None)


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All logged steps of a run. Lines that cannot be read are named, on standard error, and left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = [line for _, line in backwards(path)][::-1]
    for number, line in enumerate(lines, 1):
        if line is None:
            print(f"{path}: line {number} cannot be read, and is left out", file=sys.stderr)
    return [line for line in lines if line]
