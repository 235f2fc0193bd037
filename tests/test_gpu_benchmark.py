"""benchmarks/gpu.py on a CPU, with everything small: no error but a GPU's own is left for the day that there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
IMPORT = "import sys; sys.argv = ['gpu.py', 'training', 'wt103_large', 'reference']; import gpu, torch\n"


def measure(folder, *arguments, expect=0):
    environment = os.environ | {"OUT": str(folder), "TXL_DIST_TINY": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.slow
def test_rows_are_kept_as_they_come(tmp_path):
    script = str(BENCHMARKS / "gpu.py")
    measure(tmp_path, script, "kernels", "reference")
    measure(tmp_path, script, "training", "wt103_base_nvidia", "sdpa")
    measure(tmp_path, script, "inference", "2")
    rows = json.loads((tmp_path / "gpu.json").read_text())
    kinds = [name.split()[0] for name in rows]
    assert kinds == ["kernels", "kernels", "training", "inference"]
    assert all(row["machine"] == "cpu" and row["torch"] for row in rows.values())
    assert rows["training wt103_base_nvidia sdpa"]["tokens_per_second"] > 0
    assert rows["inference 2"]["ratio"] > 0


@pytest.mark.slow
def test_a_row_without_memory_is_kept_as_one_that_failed(tmp_path):
    code = f"{IMPORT}def training(*given):\n    raise torch.OutOfMemoryError('Tried to allocate 99 GiB')\n"
    measure(tmp_path, "-c", f"{code}gpu.training = training\nsys.exit(gpu.main())", expect=1)
    (row,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert row["failed"] == "out of memory: Tried to allocate 99 GiB"


@pytest.mark.slow
def test_what_is_not_a_number_is_no_success(tmp_path):
    code = f"{IMPORT}sys.argv = ['gpu.py', 'kernels', 'sdpa']\nattend = gpu.attend\n"
    code += (
        "gpu.attend = lambda backend, *given: attend(backend, *given) * (float('nan') if backend == 'sdpa' else 1)\n"
    )
    measure(tmp_path, "-c", f"{code}sys.exit(gpu.main())", expect=1)
    (row,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert "not finite" in row["failed"] or "other bits" in row["failed"]
