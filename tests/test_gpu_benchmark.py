"""benchmarks/gpu.py on a CPU, with everything small, and what benchmarks/counts.py counts of a step on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
IMPORT = "import sys; sys.argv = ['gpu.py', 'training', 'wt103_large', 'reference']; import gpu, torch\n"


def measure(folder, *arguments, expect=0, tiny="1"):
    environment = os.environ | {"OUT": str(folder), "TXL_DIST_TINY": tiny, "CUDA_VISIBLE_DEVICES": ""}
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
    for switch in ("softmax", "relu", "checks"):
        measure(tmp_path, script, "turns", "wt103_large", switch)
    measure(tmp_path, script, "profile", "enwik8_large", "reference")
    measure(tmp_path, script, "generation", "2")
    rows = json.loads((tmp_path / "gpu.json").read_text())
    kinds = [name.split()[0] for name in rows]
    assert kinds == ["kernels", "kernels", "training", "inference", *["turns"] * 3, "profile", "generation"]
    assert all(row["machine"] == "cpu" and row["torch"] for row in rows.values())
    assert rows["training wt103_base_nvidia sdpa"]["tokens_per_second"] > 0
    assert all(
        row["ratio"] > 0 for name, row in rows.items() if name.split()[0] in ("turns", "inference", "generation")
    )
    assert "aten::mm" in (tmp_path / "profile-enwik8_large-reference.txt").read_text()
    assert (tmp_path / "profile-enwik8_large-reference.json.gz").stat().st_size > 1000


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


# Kernels of a forward and backward, and gigabytes that those move which are no products and no attention.
BUDGETS = {"wt103_large": (1185, 73), "wt103_base_nvidia": (995, 39), "enwik8_large": (1440, 77)}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget_on_a_gpu(tmp_path, name):
    code = f"import counts, sys\ncounts, _ = counts.forward_and_backward({name!r})\n"
    code += "print(counts.kernels, counts.elementwise_bytes, counts.syncs)"
    kernels, moved, synchronizations = map(int, measure(tmp_path, "-c", code, tiny="0").stdout.split()[-3:])
    assert 500 < kernels <= BUDGETS[name][0]
    assert 10e9 < moved <= BUDGETS[name][1] * 1e9
    assert synchronizations == 0


@pytest.mark.slow
def test_the_optimizer_waits_for_nothing_and_launches_few_kernels(tmp_path):
    code = "import counts\ncounts, tensors, _ = counts.optimizer_step()\n"
    code += "print(tensors, counts.kernels, counts.syncs)"
    tensors, kernels, synchronizations = map(int, measure(tmp_path, "-c", code, tiny="0").stdout.split()[-3:])
    assert tensors < kernels < 4 * tensors
    assert synchronizations == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_closed_engine_gives_its_memory_back(tmp_path, stage):
    code = f"""import gc, gpu, torch
def alive():
    gc.collect()
    storages = {{x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)}}
    return sum({{storage.data_ptr(): storage.nbytes() for storage in storages}}.values())
def train():
    with gpu.training_engine("wt103_base_nvidia", "engine.zero_stage={stage}") as built:
        gpu.steps_of(built, [])()
        return alive()
before = alive()
print(before, train(), alive())
gpu.exit_process()
"""
    before, training, after = map(int, measure(tmp_path, "-c", code).stdout.split()[-3:])
    assert training - before > 1e6
    assert after - before < 0.01 * (training - before)
