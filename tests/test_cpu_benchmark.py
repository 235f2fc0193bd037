"""benchmarks/cpu.py keeps each row as soon as it is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KILLED_IN_THE_SECOND = """
import os, sys
from pathlib import Path
import cpu

def measure(row, data):
    if row.goal == 2:
        os._exit(9)
    return {"ours": 3.0, "theirs": 2.0, "ratio": row.ratio(3.0, 2.0), "goal": row.goal}

cpu.FILE = Path("cpu.json")
cpu.ROWS = {f"row {goal}": cpu.Row(goal, None, None, {}, unit="s") for goal in (1, 2, 3)}
cpu.measure = measure
sys.argv = ["cpu.py", *sys.argv[1:]]
cpu.main()
"""


def measure(folder, *words, expect=0):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    command = [sys.executable, "-c", KILLED_IN_THE_SECOND, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout, json.loads((folder / "cpu.json").read_text())["rows"]


@pytest.mark.slow
def test_rows_are_printed_and_kept_as_they_come(tmp_path):
    shown, rows = measure(tmp_path, expect=9)
    assert list(rows) == ["row 1"] and "row 1" in shown
    assert rows["row 1"]["ratio"] == pytest.approx(2 / 3) and rows["row 1"]["unit"] == "s"  # less time is faster
    _, rows = measure(tmp_path, "row", "3")
    assert list(rows) == ["row 1", "row 3"]
