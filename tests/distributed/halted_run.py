"""Train, as txl_dist.train does, and halt where a test wishes (halt.py).

HALT=module:name, HALT_CALL=N, HALT_RANK, HALT_FILE: this rank makes the file when it calls that function for the Nth
time, and continues when a test has made HALT_FILE.over. Until it halts the watchdog is kept awake, however slowly all
ranks start: a short guard.stall_timeout is enough.

As a Python of slurm/train.sh it is given `-m txl_dist.train` as well.
"""

# ruff: noqa: E402
import os

from txl_dist.distributed.preemption import hold_signals

hold_signals()
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import importlib
import itertools
import sys
import threading
import time
from functools import reduce
from pathlib import Path

from txl_dist.distributed.watchdog import Watchdog
from txl_dist.train import main

file = Path(os.environ.get("HALT_FILE", os.devnull))
start = Watchdog.start


def start_and_keep_awake(watchdog, group):
    def keep_awake():
        while not file.is_file():
            watchdog.idle = 0.0
            time.sleep(0.05)

    start(watchdog, group)
    threading.Thread(target=keep_awake, daemon=True).start()


def halt(where, number):
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), itertools.count(1)

    def halting(*values, **options):
        if next(calls) == number:
            file.touch()
            while not file.with_suffix(".over").exists():
                time.sleep(0.01)
        return function(*values, **options)

    setattr(owner, name, halting)


Watchdog.start = start_and_keep_awake
if os.environ.get("HALT_RANK") == os.environ.get("RANK", os.environ.get("SLURM_PROCID")):
    halt(os.environ["HALT"], int(os.environ["HALT_CALL"]))
if sys.argv[1] == "-m":
    del sys.argv[1:3]
main()
