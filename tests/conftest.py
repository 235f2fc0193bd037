"""What several tests need: a small corpus, prepared, and commands run as a user runs them."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from omegaconf import OmegaConf

from tests import separate_packages
from tests.other_package.install import install
from tests.warm_python import warm_python
from txl_dist.checkpoint.format import latest
from txl_dist.cli import CONF
from txl_dist.data.index import Index
from txl_dist.models.transformer_xl import TransformerXLConfig
from txl_dist.tracking.schema import METRICS

REPO = Path(__file__).resolve().parents[1]

# A shared machine is slow at times; what counts is what is found.
settings.register_profile("patient", deadline=None, max_examples=60)
settings.load_profile("patient")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often tests/distributed/test_chaos.py kills its run")


def pytest_collection_modifyitems(items):
    """Mark what stands in tests/distributed/; files with slow tests come first, so that no process is left with one."""
    for item in items:
        if item.path.parent.name == "distributed":
            item.add_marker("distributed")
    slow = {item.path for item in items if any(map(item.get_closest_marker, ("distributed", "slow", "slurm")))}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def transformers5(request):
    """The environment of a process that imports transformers 5; that of the tests has transformers 4."""
    folder = separate_packages.install(request.config, REPO / "tests/conversion/transformers5.txt")
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def python():
    """An interpreter that has imported everything already."""
    with warm_python() as path:
        yield path


@pytest.fixture(scope="session")
def run(python):
    """Run `python -m MODULE ...`, or a script; under torchrun where `processes` are given.

    In an interpreter that has imported everything already, but where it is to be a `fresh` one.
    """

    def run(module, *overrides, processes=None, cwd=REPO, expect=0, stdin="", fresh=False, **environment):
        interpreter = sys.executable if fresh else python
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes else []
        target = [str(module)] if str(module).endswith(".py") else ["-m", module]
        done = subprocess.run(
            [interpreter, *launcher, *target, *overrides],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            env=os.environ
            | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": interpreter}
            | environment,
            timeout=600,
        )
        assert expect is None or done.returncode == expect, f"{overrides}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def without_torchrun(stderr):
    """Return what the ranks have printed: torchrun's own report, which repeats the message of one, is cut off."""
    return re.split(r"^E\d{4} .*torch/distributed/elastic/", stderr, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 small documents in a made-up language, each with words of its own to remember."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    for number in range(60):
        names = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(5)]
        lines = (" ".join(rng.choices(["the", "and", "of", *names], k=8)) for _ in range(rng.randint(5, 30)))
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, run, tmp_path_factory):
    """The corpus, prepared with bytes; samples and shards are small, so that lanes cross them.

    Valid and test are ten segments each: evaluations would take more of the tests' time than training does.
    """
    folder = tmp_path_factory.mktemp("dataset") / "bytes"
    parts = {"valid": [1, 10, 17], "test": [2, 7]}
    parts["train"] = [number for number in range(60) if number not in (1, 2, 7, 10, 17, 19, 20, 24, 25, 47, 50, 51)]
    texts = [
        f"corpus.{split}=[{','.join(f'{corpus}/{number:03d}.txt' for number in numbers)}]"
        for split, numbers in parts.items()
    ]
    cut = ["data.sample_tokens=256", "data.shard_samples=16"]
    run("txl_dist.prepare", "corpus=text", "tokenizer=bytes", *texts, f"data.dir={folder}", *cut)
    return folder


@pytest.fixture(scope="session")
def damage():
    """Flip a bit in the last token of some samples of a dataset."""

    def damage(folder, *samples, split="train"):
        index = Index.open(str(folder))
        facts = index.splits[split]
        for number in samples:
            path = Path(folder) / facts.shards[number // index.shard_samples].name
            content = bytearray(path.read_bytes())
            data_start = content.index(b"\x93NUMPY", int(facts.sample_table["offset"][number])) + 128
            content[data_start + min(index.sample_tokens, facts.tokens - number * index.sample_tokens) * 2 - 1] ^= 1
            path.write_bytes(content)

    return damage


@pytest.fixture(scope="session")
def small(dataset):
    """Overrides of a training run of seconds."""
    return [
        f"data.dir={dataset}",
        "data.num_lanes=8",
        "model.n_layer=2",
        "model.d_model=32",
        "model.n_head=2",
        "model.d_head=16",
        "model.d_inner=64",
        "model.tgt_len=16",
        "model.mem_len=24",
        "model.dropout=0.0",
        "optimizer.lr=3e-3",
        "train.max_steps=20",
        "train.eval_every=10",
        "checkpoint.every=10",
        "tracking.log_every=1",
        "tracking.mode=disabled",
    ]


@pytest.fixture(scope="session")
def other_package(tmp_path_factory):
    """A folder in which a package with an architecture of its own is installed."""
    return install(tmp_path_factory.mktemp("other-package"))


@pytest.fixture(scope="session")
def metrics():
    """The lines of a run's metrics.jsonl."""
    return lambda run_dir: [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


# What differs at every start.
SPEEDS = {"time", *(metric.key for metric in METRICS if not metric.is_exact)}


@pytest.fixture(scope="session")
def check_identical(metrics):
    """Two runs are the same to the bit: all that they logged but how fast they were, and their newest checkpoints."""

    def check_identical(one, other):
        one_log, other_log = (
            [{key: value for key, value in line.items() if key not in SPEEDS} for line in metrics(run_dir)]
            for run_dir in (one, other)
        )
        assert one_log == other_log
        assert latest(one).state == latest(other).state
        for kind in ("weights", "optimizer", "memory"):
            one_tensors = latest(one).tensors(kind)
            other_tensors = latest(other).tensors(kind)
            assert one_tensors.keys() == other_tensors.keys()
            assert not [name for name in one_tensors if not torch.equal(one_tensors[name], other_tensors[name])], kind

    return check_identical


SIZES = {"n_layer": 2, "d_model": 24, "n_head": 2, "d_head": 10, "d_inner": 50, "tgt_len": 7, "mem_len": 11}


@pytest.fixture(scope="session")
def make_config():
    """The default model, without dropout and small; `options` change it."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/transformer_xl.yaml"))
    return lambda **options: TransformerXLConfig(**{**defaults, **SIZES, "dropout": 0.0, **options})


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
