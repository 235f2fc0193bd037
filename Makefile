# Each target prints the plain commands that it runs; they work without make, too.
PYTHON ?= python3
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
PROCESSES ?= $(if $(filter 0,$(GPUS)),2,$(GPUS))
BIN := .venv/bin
# The processes share the cores.
export OMP_NUM_THREADS ?= $(shell cores=$$(nproc); echo $$((cores > $(PROCESSES) ? cores / $(PROCESSES) : 1)))
# DeepSpeed shall build nothing at installation, so that no compiler is needed.
export DS_BUILD_OPS ?= 0

# A file of tests stays in one process, which makes its runs once; files that take long come first.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

.PHONY: train test quick check

train: .venv/installed
	$(BIN)/python -m txl_dist.prepare corpus=stdlib
	$(BIN)/torchrun --nproc_per_node=$(PROCESSES) -m txl_dist.train +experiment=quickstart 'tracking.prompts=["import ", "def main("]'
	$(BIN)/python -m txl_dist.generate run=runs/quickstart prompt="import " max_tokens=110
	@echo "Open runs/quickstart/dashboard.html in a browser: all of the run in one page."

test: check
	$(PYTEST)

# Without the tests that take long or start several processes.
quick: .venv/installed
	$(PYTEST) -m "not slow and not distributed and not slurm"

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[test]"
	touch $@
