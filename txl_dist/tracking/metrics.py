"""metrics.jsonl: one JSON object a logged step, with flat keys: step, tokens, train/loss, valid/bits_per_byte, ..."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to RUN_DIR/metrics.jsonl. What was logged after `step` is dropped first: a run that goes on from a
    checkpoint does those steps again."""

    def __init__(self, run_dir: str, step: int):
        self.path = Path(run_dir) / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)

    def append(self, metrics: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All logged steps of a run; a last line that was cut short when the machine stopped is none."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
