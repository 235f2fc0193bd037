"""Kill a run again and again, at random moments, and see that nothing is lost: python tests/distributed/chaos.py DATA

A run of two processes under torchrun, with restarts, loses now a rank, now all, now torchrun as well, each by SIGKILL;
half of the kills come while a checkpoint is being written. The run is then left to end, and compared with one that was
left alone: the metrics, weights, optimizer states and memories must be the same to the bit.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from txl_dist.engine.checkpoint import newest

REPO = Path(__file__).resolve().parents[2]
EVERY = 5  # steps between checkpoints
VICTIMS = {"a rank": 0.6, "all ranks": 0.2, "torchrun and all ranks": 0.2}
MODEL = "n_layer=2 d_model=64 n_head=2 d_head=32 d_inner=128 tgt_len=16 mem_len=24 dropout=0.1 dropatt=0.1"
TRAIN = "max_steps={steps} eval_every=50"
SPEEDS = ("train/tokens_per_second", "train/data_wait", "train/mfu", "train/checkpoint_wait")  # differ at every start


def overrides(data: str, run_dir: Path, steps: int) -> list[str]:
    keys = [f"model.{each}" for each in MODEL.split()] + [f"train.{each}" for each in TRAIN.format(steps=steps).split()]
    keys += [f"checkpoint.every={EVERY}", "tracking.log_every=1", "tracking.mode=disabled", "data.num_lanes=8"]
    return [f"data.dir={data}", f"run.dir={run_dir}", *keys]


class Run:
    """A run that is started again as often as it is killed."""

    def __init__(self, data: str, run_dir: Path, steps: int):
        self.dir, self.keys = run_dir, overrides(data, run_dir, steps)
        self.log = run_dir.with_suffix(".log")
        self.start()

    def start(self) -> None:
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=1000"]
        command += ["--monitor-interval=0.2", "-m", "txl_dist.train", *self.keys]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "a") as log:
            self.torchrun = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)

    def ranks(self) -> list[int]:
        """The processes of the ranks that live."""
        with suppress(OSError):
            tasks = Path(f"/proc/{self.torchrun.pid}/task").iterdir()
            children = {int(each) for task in tasks for each in (task / "children").read_text().split()}
            return [each for each in children if b"txl_dist.train" in Path(f"/proc/{each}/cmdline").read_bytes()]
        return []

    def steps(self) -> int:
        """The last step that was logged."""
        file = self.dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def saving(self) -> bool:
        return any((self.dir / "checkpoints").glob(".step-*.partial"))

    def starts(self) -> list[int]:
        """The step at which each start went on."""
        told = re.findall(r": (?:going on from step ([\d,]+)|starting);", self.log.read_text())
        return [int(step.replace(",", "") or 0) for step in told]

    def kill(self, victim: str, dice: random.Random) -> None:
        ranks = self.ranks()
        if victim == "a rank":
            ranks = [dice.choice(ranks)]
        if victim == "torchrun and all ranks":
            self.torchrun.kill()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        if victim == "torchrun and all ranks":
            self.torchrun.wait()
            self.start()


def wait_for(moment: Any, run: Run, patience: float) -> bool:
    """Until a moment has come; False where it did not in `patience` seconds."""
    until = time.monotonic() + patience
    while not moment():
        if run.torchrun.poll() is not None:
            raise SystemExit(f"{run.log}: the run has ended before its time, with code {run.torchrun.returncode}")
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def chaos(data: str, folder: Path, kills: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Kill a run so many times and let it end; returns what happened at each kill.

    Raises:
        AssertionError: where it is not, to the bit, the run that was left alone.
    """
    dice, happened = random.Random(seed), []
    run = Run(data, folder / "killed", steps)
    for number in track(range(kills), "killing", console=Console(stderr=True), transient=True):
        assert wait_for(run.ranks, run, 120), "torchrun starts no ranks"
        before, saving = run.steps(), dice.random() < 0.5
        if number % 3 == 0:  # while they start, or soon after
            wait_for(lambda before=before: run.steps() > before, run, dice.uniform(0, 8))
        else:  # after some steps more
            goal = before + dice.randint(1, steps // kills)
            assert wait_for(lambda goal=goal: run.steps() >= goal, run, 300), "it does not go on"
            if saving:
                wait_for(run.saving, run, 60)
                time.sleep(dice.uniform(0, 0.01))
        assert wait_for(run.ranks, run, 120), "torchrun starts no ranks"
        victim = dice.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        happened.append({"victim": victim, "saving": run.saving(), "step": run.steps(), "start": len(run.starts())})
        run.kill(victim, dice)
    assert run.torchrun.wait(timeout=1800) == 0, run.log
    starts = run.starts()
    for kill in happened:  # where the next start went on: all that was lost
        later = starts[kill["start"] :]
        kill["lost"] = max(0, kill["step"] - later[0]) if later else 0

    alone = Run(data, folder / "alone", steps)
    assert alone.torchrun.wait(timeout=1800) == 0, alone.log
    identical(run.dir, alone.dir)
    return happened


def identical(one: Path, other: Path) -> None:
    """Whether two runs are the same to the bit in all but their speed."""
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, other)]
    mine, theirs = ([{k: v for k, v in line.items() if k not in SPEEDS} for line in each] for each in lines)
    assert mine == theirs, next(pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1])
    for kind in ("weights", "optimizer", "memory"):
        found, wanted = (newest(each).tensors(kind) for each in (one, other))  # type: ignore[union-attr]
        assert found.keys() == wanted.keys()
        different = [name for name in found if not torch.equal(found[name], wanted[name])]
        assert not different, (kind, different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared dataset")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        happened = chaos(given.data, Path(folder), given.kills, given.steps, given.seed)
    table = Table("killed", "times", "while saving", "most steps lost", box=None)
    for victim in VICTIMS:
        rows = [kill for kill in happened if kill["victim"] == victim]
        lost = max((kill["lost"] for kill in rows), default=0)
        table.add_row(victim, str(len(rows)), str(sum(kill["saving"] for kill in rows)), str(lost))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{given.steps} steps, a checkpoint every {EVERY}: the same, to the bit, as the run left alone")


if __name__ == "__main__":
    main()
