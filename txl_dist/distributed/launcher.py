"""Which of how many processes this one is: what its launcher tells by environment variables.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_... for each task
of a job step. A process without either is alone, also in an salloc shell or a batch script: Slurm sets variables there,
too, but none of a step. This module needs no torch, which takes seconds to import.
"""

import os
import re
from dataclasses import dataclass

from txl_dist.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # SLURM_NTASKS is set in batch scripts, too
LAUNCHERS = "start with torchrun, srun or deepspeed, which set them all, or unset them all to train with one process"


@dataclass(frozen=True)
class RankInfo:
    """One process of `size`. address, port: where the first one waits for the others; port 0: any free one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    by_srun: bool = False


def launcher_env() -> RankInfo:
    """Of this process.

    Raises:
        UserError: where variables are missing, are no numbers or contradict each other.
    """
    if any(name in os.environ for name in TORCHRUN):
        rank, size, local_rank = numbers(TORCHRUN)
        if size > 1 or "MASTER_ADDR" in os.environ:
            return RankInfo(rank, size, local_rank, *meeting_point())
    elif SRUN[1] in os.environ:
        rank, size, local_rank = numbers(SRUN)
        if size > 1:
            require("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
            first, port = first_host(os.environ["SLURM_STEP_NODELIST"]), port_of_step()
            return RankInfo(rank, size, local_rank, *meeting_point(first, port), by_srun=True)
    return RankInfo()


def numbers(names: tuple[str, str, str]) -> tuple[int, int, int]:
    """The values of a launcher's variables for rank, size and local rank."""
    missing = [name for name in names if name not in os.environ]
    told = {name: os.environ[name] for name in names if name not in missing}
    problems = [f"{key}={value}: must be a whole number" for key, value in told.items() if not value.isdecimal()]
    if missing:
        there = " and ".join(f"{key}={value}" for key, value in told.items())
        problems.append(f"{' and '.join(missing)}: not set, but {there}; {LAUNCHERS}")
    if not problems:
        size = int(told[names[1]])
        problems = [
            f"{name}={told[name]}: must be less than {names[1]}={size}"
            for name in (names[0], names[2])
            if int(told[name]) >= size
        ]
    if problems:
        raise UserError("\n".join(problems))
    rank, size, local_rank = (int(told[name]) for name in names)
    return rank, size, local_rank


def require(*names: str) -> None:
    """Raise UserError where a variable that srun sets beside the others is missing, or is not the number that it is."""
    problems = [f"{name}: not set, but {SRUN[1]} is; {LAUNCHERS}" for name in names if not os.environ.get(name)]
    given = {name: os.environ[name] for name in names if name.endswith("_ID") and os.environ.get(name)}
    problems += [f"{name}={value}: must be a whole number" for name, value in given.items() if not value.isdecimal()]
    if problems:
        raise UserError("\n".join(problems))


def patience() -> float:
    """Return the seconds for which processes wait for each other at the start."""
    given = os.environ.get("TXL_DIST_PATIENCE", "600")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise UserError(f"TXL_DIST_PATIENCE={given}: must be a number of seconds above 0, as 600")
    return seconds


def meeting_point(address: str = "", port: int = 0) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT or, where they are not set, what is given."""
    told = {"MASTER_ADDR": os.environ.get("MASTER_ADDR", address), "MASTER_PORT": os.environ.get("MASTER_PORT", port)}
    if missing := [name for name, value in told.items() if not value]:
        raise UserError(f"{' and '.join(missing)}: not set, and the processes must meet somewhere; {LAUNCHERS}")
    number = str(told["MASTER_PORT"])
    if not (number.isdecimal() and 0 < int(number) < 65536):
        raise UserError(f"MASTER_PORT={number}: must be the number of a port, from 1 to 65535")
    return str(told["MASTER_ADDR"]), int(number)


def first_host(nodelist: str) -> str:
    """Of a list in Slurm's way: `node[003-007,012],login` -> `node003`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodelist).partition(",")[0]


def port_of_step() -> int:
    """The same for all tasks of a job step, and hardly that of another which shares a node with it."""
    job, step = (int(os.environ[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 15000 + (101 * job + step) % 15000
