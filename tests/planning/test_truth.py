"""Predictions held against real processes that train: benchmarks/plan.py, on some of its rows."""

import json
import subprocess

import pytest

from tests.conftest import REPO

SCRIPT = REPO / "benchmarks" / "plan.py"


def errors(run, folder, table, *rows):
    run(SCRIPT, table, *rows, OUT=str(folder))
    return [row["error"] for row in json.loads((folder / "plan.json").read_text())[table].values()]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["ZeRO 2", "2 stages, ZeRO 1"])
def test_memory_is_as_predicted(run, tmp_path, split):
    found = errors(run, tmp_path, "memory", split)
    assert len(found) == 4 and max(map(abs, found)) < 0.1, found


@pytest.mark.slow
@pytest.mark.parametrize("split", ["ZeRO 1"])
def test_traffic_is_as_predicted(run, tmp_path, split):
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    (error,) = errors(run, tmp_path, "traffic", split)
    assert abs(error) < 0.05
