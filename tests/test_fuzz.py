"""Run the fuzzer for half a minute, and check that it recognises faults."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import isolate
from tests.fuzz.kinds import KINDS

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_some_cases_of_each_kind_end_with_a_message():
    """In a process of its own: one that has threads cannot fork."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "3", "--cases", "50", "--minutes", "0.5"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr
    assert all(kind in done.stdout for kind in KINDS)


@pytest.mark.slow
def test_tracebacks_other_exit_codes_long_times_and_much_memory_are_faults(tmp_path, monkeypatch):
    def outcome(function):
        return isolate.call(function, tmp_path / "log")

    assert outcome(lambda: None).fault is None and outcome(lambda: sys.exit(2)).fault is None
    assert outcome(lambda: 1 / 0).fault == "traceback"
    assert outcome(lambda: sys.exit(3)).fault == "exit code 3"
    assert "MiB" in outcome(lambda: np.ones(300 << 20).sum()).fault
    monkeypatch.setattr(isolate, "SECONDS", 1)
    assert "seconds" in outcome(lambda: [None for _ in iter(int, 1)]).fault
    monkeypatch.setattr(isolate, "PATIENCE", 1)
    assert "seconds" in outcome(lambda: time.sleep(60)).fault
