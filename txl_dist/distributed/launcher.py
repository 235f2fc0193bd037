"""The rank of this process and the rendezvous address, from the environment variables of its launcher.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_... for each task
of a job step. A process with neither is alone, also in an salloc shell or a batch script, where Slurm sets variables of
the job but none of a step. This module does not need torch, which takes seconds to import.
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
    """One process among `size`.

    Attributes:
        local_rank: its number on its host.
        address: where rank zero waits for the others.
        port: where rank zero waits for the others; 0: any free one.
        by_srun: whether srun started it, which may show each process its own GPU only.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    by_srun: bool = False


def launcher_env() -> RankInfo:
    """Return the rank, world size and rendezvous address of this process.

    Raises:
        UserError: if variables are missing, are not numbers or contradict each other.
    """
    if any(name in os.environ for name in TORCHRUN):
        rank, size, local_rank = read_ranks(TORCHRUN)
        if size > 1 or "MASTER_ADDR" in os.environ:
            return RankInfo(rank, size, local_rank, *rendezvous_address())
    elif SRUN[1] in os.environ:
        rank, size, local_rank = read_ranks(SRUN)
        if size > 1:
            require_step_variables()
            host = first_host(os.environ["SLURM_STEP_NODELIST"])
            return RankInfo(rank, size, local_rank, *rendezvous_address(host, port_of_step()), by_srun=True)
    return RankInfo()


def read_ranks(names: tuple[str, str, str]) -> tuple[int, int, int]:
    """Return rank, world size and local rank from the variables of these names.

    Raises:
        UserError: if one is missing, is not a number, or is too large for the world size.
    """
    values = {name: os.environ[name] for name in names if name in os.environ}
    missing = [name for name in names if name not in values]
    problems = not_numbers(values)
    if missing:
        present = " and ".join(f"{name}={value}" for name, value in values.items())
        problems.append(f"{' and '.join(missing)}: not set, but {present}; {LAUNCHERS}")
    if not problems:
        rank, size, local_rank = (int(values[name]) for name in names)
        for name, value in ((names[0], rank), (names[2], local_rank)):
            if value >= size:
                problems.append(f"{name}={values[name]}: must be less than {names[1]}={size}")
    if problems:
        raise UserError("\n".join(problems))
    return rank, size, local_rank


def require_step_variables() -> None:
    """Raise UserError if a variable that srun sets for a job step is missing, or is not a number but should be."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    values = {name: os.environ.get(name, "") for name in names}
    problems = [f"{name}: not set, but {SRUN[1]} is; {LAUNCHERS}" for name, value in values.items() if not value]
    problems += not_numbers({name: value for name, value in values.items() if name.endswith("_ID") and value})
    if problems:
        raise UserError("\n".join(problems))


def not_numbers(values: dict[str, str]) -> list[str]:
    """Describe the variables whose value is not a whole number."""
    return [f"{name}={value}: must be a whole number" for name, value in values.items() if not value.isdecimal()]


def patience() -> float:
    """Return the seconds for which processes wait for each other at the start.

    Raises:
        UserError: if TXL_DIST_PATIENCE is not a positive number.
    """
    given = os.environ.get("TXL_DIST_PATIENCE", "600")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise UserError(f"TXL_DIST_PATIENCE={given}: must be a number of seconds above 0, such as 600")
    return seconds


def rendezvous_address(address: str = "", port: int = 0) -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT, with the arguments as defaults.

    Raises:
        UserError: if either is missing, or the port is not one.
    """
    values = {"MASTER_ADDR": os.environ.get("MASTER_ADDR", address)}
    values["MASTER_PORT"] = os.environ.get("MASTER_PORT", str(port or ""))
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)}: not set, but the processes must find each other; {LAUNCHERS}")
    number = values["MASTER_PORT"]
    if not (number.isdecimal() and 0 < int(number) < 65536):
        raise UserError(f"MASTER_PORT={number}: must be the number of a port, from 1 to 65535")
    return values["MASTER_ADDR"], int(number)


def first_host(nodelist: str) -> str:
    """Return the first host of a list in Slurm's notation: `node[003-007,012],login` -> `node003`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodelist).partition(",")[0]


def port_of_step() -> int:
    """Return a port that all tasks of a job step agree on, and that another step on the same node hardly uses."""
    job = int(os.environ["SLURM_JOB_ID"])
    step = int(os.environ["SLURM_STEP_ID"])
    return 15000 + (101 * job + step) % 15000
