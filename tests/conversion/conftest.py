"""What tests of exported folders need: transformers 5, beside the environment's transformers 4."""

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def transformers5(request):
    """The environment of a process that imports transformers 5; it is installed once, and kept with pytest's cache."""
    pins = Path(__file__).with_name("transformers5.txt")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(f"{version} {pins.read_text()}".encode()).hexdigest()[:12]
    folder = request.config.cache.mkdir("transformers5") / name
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, and each of them asks for it
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            subprocess.run([*command, "--target", str(partial), "--requirement", str(pins)], check=True)
            partial.rename(folder)
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
