"""Run cases: python -m tests.fuzz --seed 1 --cases 2000 --minutes 20; or show one: --case N --keep FOLDER."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

from .isolate import Outcome, call, command
from .kinds import KINDS, Command
from .specimens import make, warm_up


def main() -> int:
    given = parse()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        specimens = made(folder)
        if given.case is not None:
            return show(given.seed, given.case, specimens, Path(given.keep or folder / "case"))
        tally = fuzz(given.seed, range(given.cases), given.minutes, given.kinds, specimens, folder)
        return bool(tally.faults)


def made(folder: Path) -> Path:
    """Make the specimens in a folder, and make it the working directory."""
    os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    specimens = folder / "specimens"
    specimens.mkdir()
    os.chdir(specimens)
    make(specimens)
    return specimens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--case", type=int, help="this one alone, with its command and output")
    parser.add_argument("--keep", help="with --case: a folder for its files, which stay")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="these kinds alone")
    return parser.parse_args()


def kind_of(case: int) -> str:
    return list(KINDS)[case % len(KINDS)]


def build(seed: int, case: int, specimens: Path, folder: Path) -> tuple[str, Command]:
    """Make the files of a case in `folder`; return its kind and its command."""
    kind = kind_of(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return kind, KINDS[kind](specimens, folder, Random(f"{seed} {case}"))


def attempt(seed: int, case: int, specimens: Path, folder: Path) -> tuple[str, Command, Outcome]:
    kind, (module, *arguments) = build(seed, case, specimens, folder)
    return kind, [module, *arguments], call(command(f"txl_dist.{module}", *arguments), folder.with_name("log"))


def show(seed: int, case: int, specimens: Path, folder: Path) -> int:
    kind, line, outcome = attempt(seed, case, specimens, folder)
    print(f"{kind}: {line}\n{outcome.output}\n{outcome._replace(output='')}\nfault: {outcome.fault}")
    return outcome.fault is not None


class Tally:
    """Count how cases end, and print it."""

    def __init__(self, seed: int):
        self.seed = seed
        self.ends: Counter[tuple[str, int]] = Counter()
        self.faults: list[int] = []
        self.peak = 0
        self.slowest = 0.0

    def add(self, case: int, kind: str, outcome: Outcome) -> None:
        self.ends[kind, outcome.code] += 1
        self.peak = max(self.peak, outcome.peak)
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.fault:
            self.faults.append(case)
            last = (outcome.output.strip().splitlines() or [""])[-1][:200]
            print(f"case {case} ({kind}): {outcome.fault}: {last}", flush=True)
            print(f"  python -m tests.fuzz --seed {self.seed} --case {case}", flush=True)
        if self.ends.total() % 100 == 0:
            print(f"{self.ends.total()} cases, {len(self.faults)} failed", flush=True)

    def show(self) -> None:
        print(f"{'kind':<16}{'exit 0':>8}{'1':>8}{'2':>8}")
        for name in KINDS:
            print(f"{name:<16}" + "".join(f"{self.ends[name, code]:>8}" for code in (0, 1, 2)))
        most = f"at most {self.peak} MiB and {self.slowest:.1f} s for one"
        print(f"{self.ends.total()} cases, {len(self.faults)} failed; {most}")


def fuzz(seed: int, cases: Iterable[int], minutes: float, kinds: list[str], specimens: Path, folder: Path) -> Tally:
    """Run cases of some kinds until the time is over."""
    until = time.monotonic() + 60 * minutes
    tally = Tally(seed)
    for case in cases:
        if kind_of(case) not in kinds:
            continue
        if time.monotonic() > until:
            print(f"the time is over before case {case}")
            break
        kind, _, outcome = attempt(seed, case, specimens, folder / "case")
        tally.add(case, kind, outcome)
    tally.show()
    return tally


if __name__ == "__main__":
    sys.exit(main())
