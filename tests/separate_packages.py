"""Packages that the environment of the tests cannot have, in folders of their own."""

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path


def install(config, pins):
    """Install the packages that a file of pins names, once, in a folder that is kept with pytest's cache; return it.

    Raises:
        CalledProcessError: if pip fails.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(f"{version} {pins.read_text()}".encode()).hexdigest()[:12]
    folder = config.cache.mkdir(pins.stem) / name
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, and each of them asks for it
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            subprocess.run([*command, "--target", str(partial), "--requirement", str(pins)], check=True)
            partial.rename(folder)
    return Path(folder)
