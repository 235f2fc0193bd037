"""A run is killed again and again, at random moments, and nothing is lost.

It is one of two processes under torchrun, with restarts, and loses now a rank, now all, now torchrun as well, each by
SIGKILL; half of the kills come while a checkpoint is being written. More of them:

    python -m pytest -s tests/distributed/test_chaos.py --kills=25
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
EVERY = 5  # steps between checkpoints
VICTIMS = {"a rank": 0.6, "all ranks": 0.2, "torchrun and all ranks": 0.2}
KEYS = ["model.dropout=0.1", "model.dropatt=0.1", "train.eval_every=50", f"checkpoint.every={EVERY}"]


class Run:
    """A run that is started again as often as it is killed."""

    def __init__(self, run_dir, *overrides):
        self.dir = run_dir
        self.overrides = [*overrides, f"run.dir={run_dir}"]
        self.log = run_dir.with_suffix(".log")
        self.start()

    def start(self):
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=1000"]
        command += ["--monitor-interval=0.2", "-m", "txl_dist.train", *self.overrides]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("a") as log:
            self.torchrun = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)

    def ranks(self):
        """The processes of the ranks that live."""
        with suppress(OSError):
            tasks = Path(f"/proc/{self.torchrun.pid}/task").iterdir()
            children = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
            return [pid for pid in children if b"txl_dist.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return []

    def step(self):
        """The last one that was logged."""
        file = self.dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def saving(self):
        return any((self.dir / "checkpoints").glob(".step-*.partial"))

    def starts(self):
        """The step at which each start went on."""
        origins = re.findall(r": (?:resuming from step ([\d,]+)|starting);", self.log.read_text())
        return [int(step.replace(",", "") or 0) for step in origins]

    def wait_for(self, moment, patience=300):
        """Until a moment has come; False where it did not in `patience` seconds."""
        until = time.monotonic() + patience
        while not moment():
            assert self.torchrun.poll() is None, f"the run has ended before its time:\n{self.log.read_text()[-3000:]}"
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def kill(self, victim, ranks):
        if victim == "torchrun and all ranks":
            self.torchrun.kill()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        if victim == "torchrun and all ranks":
            self.torchrun.wait()
            self.start()


def test_a_run_that_is_killed_again_and_again_loses_nothing(small, check_identical, tmp_path, pytestconfig, capsys):
    kills = pytestconfig.getoption("kills")
    rng = random.Random(1)
    happened = []
    # Each kill comes after at most so many steps, and after the last one there are some left.
    steps = 20 * (kills + 1)
    overrides = [*small, *KEYS, f"train.max_steps={steps}"]
    run = Run(tmp_path / "killed", *overrides)
    for number in range(kills):
        assert run.wait_for(run.ranks)
        before = run.step()
        saving = rng.random() < 0.5
        if number % 3 == 0:  # while they start, or soon after
            run.wait_for(lambda before=before: run.step() > before, rng.uniform(0, 8))
        else:
            goal = before + rng.randint(1, 20)
            assert run.wait_for(lambda goal=goal: run.step() >= goal), run.log.read_text()[-3000:]
        assert run.wait_for(run.ranks)
        victim = rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        ranks = [rng.choice(run.ranks())] if victim == "a rank" else run.ranks()
        if number % 3 and saving:
            run.wait_for(run.saving)
            time.sleep(rng.uniform(0, 0.005))
        happened.append({"victim": victim, "saving": run.saving(), "step": run.step(), "start": len(run.starts())})
        run.kill(victim, ranks)
        with capsys.disabled():
            print(f"\n{number + 1}: {happened[-1]}", end="", flush=True)
    assert run.torchrun.wait(timeout=1800) == 0, run.log.read_text()[-3000:]

    alone = Run(tmp_path / "alone", *overrides)
    assert alone.torchrun.wait(timeout=1800) == 0, alone.log.read_text()[-3000:]
    check_identical(run.dir, alone.dir)

    # What is done again is one interval, and the steps that were done while the last checkpoint was being written.
    starts = run.starts()
    lost = [max(0, kill["step"] - starts[kill["start"]]) for kill in happened if kill["start"] < len(starts)]
    with capsys.disabled():
        print(f"\nsteps lost: {lost}", flush=True)
    assert max(lost) <= 2 * EVERY
    assert any(kill["step"] for kill in happened) and len({kill["victim"] for kill in happened}) > 1
