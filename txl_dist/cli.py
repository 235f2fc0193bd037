"""How the entry points start: Hydra composes conf/, `check.read` checks it, the job runs.

`python -m txl_dist.train data.num_lanes=32` and the installed package find the same conf/. A user's mistake is told on
one screen, once, and ends every rank with exit code 2.
"""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from txl_dist.check import read
from txl_dist.errors import ConfigError, RunError, UserError, first_line, told
from txl_dist.placement import placement
from txl_dist.preemption import wait_for_signal

Job = TypeVar("Job")

PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

# The keys whose values are texts, and what is Hydra's grammar all the same: a quoted text, and a list of prompts.
TEXTS = {
    "prompt": re.compile(r"""\[.*\]|(['"])((?!\1).)*\1""", re.DOTALL),
    "text": re.compile(r"""(['"])((?!\1).)*\1""", re.DOTALL),
}

# Seconds that a rank waits before it tells an error. Where another has stopped, and said why, the connections to it
# break; the launcher ends this rank in the meantime.
FAREWELL = 10
PARTING = 30  # seconds that a rank which ends with all others waits for them

# What Hydra would do by itself and we do not want: a folder of its own for every start, and logging to a file.
OURS = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra/help=txl_dist",
]


def command(name: str, schema: type[Job], run: Callable[[Job], None]) -> None:
    """Run one entry point: compose conf/`name`.yaml with the command line's overrides, check it, call `run`."""
    given = [each for each in sys.argv[1:] if not each.startswith("--local_rank=")]  # deepspeed adds it, and LOCAL_RANK
    sys.argv[1:] = [*map(spell_out, given), *OURS]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors whole, and they are told here like all others

    @hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")
    def job(config: DictConfig) -> None:
        with mistakes_told():
            run(read(schema, OmegaConf.to_container(config, resolve=True)))

    keep_freed_memory()
    with mistakes_told():
        placement()  # a wrong one is told before all else
        job()


@contextlib.contextmanager
def mistakes_told() -> Iterator[None]:
    """Turn a user's mistake into words on standard error and exit code 2, and what else ends a run into exit code 1.

    A mistake in the config is every rank's: they agree on what is wrong, the first tells it, and all end together. What
    all ranks know alike is told in the same way.
    """
    try:
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            words = str(error).partition("Config search path")[0].split()  # of Hydra's answer, what helps
            raise ConfigError([" ".join(words)]) from error
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error) and not has_met_others():
                raise RunError([f"there is not enough memory: {first_line(error)}"]) from error
            raise
    except ConfigError as error:
        end_together(error, 2)
    except RunError as error:
        end_together(error, 1)
    except UserError as error:
        print(told(error), file=sys.stderr, flush=True)
        end_process(2)
    except KeyboardInterrupt:
        end_process(130)
    except Exception as error:
        if not has_met_others():
            raise
        if isinstance(error, RuntimeError):
            end_if_cut_off(error)
        sys.excepthook(type(error), error, error.__traceback__)
        end_process(1)


def has_met_others() -> bool:
    """Whether this process is one of several that have found each other; costs no import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def end_process(code: int) -> NoReturn:
    """End this process. One of several goes without Python's shutdown, which would wait for the others."""
    if has_met_others():
        from txl_dist.engine.launch import leave

        leave(code)
    raise SystemExit(code) from None


def end_if_cut_off(error: RuntimeError) -> None:
    """End the ranks of this host in words, with exit code 1, where an error says that a connection broke."""
    from txl_dist.engine.launch import world

    peers = world().peers
    wait_for_signal(FAREWELL + peers.turn, then=lambda: end_process(1))
    if broken := peers.broken(error):
        print(told(RunError(broken)), file=sys.stderr, flush=True)
        peers.end_mates()
        end_process(1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, Python or torch could not allocate; on a CPU torch has no exception of its own for that."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def end_together(error: ConfigError | RunError, code: int) -> NoReturn:
    """Tell the problems of all ranks, once, and end all ranks with an exit code."""
    if placement().size == 1:
        print(told(error), file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    import torch.distributed as dist  # seconds to import, and only processes that are several need it

    from txl_dist.engine.launch import leave, time_limit, world

    untold = [error]

    def end_alone() -> None:
        for each in untold:
            print(told(each), file=sys.stderr, flush=True)
        leave(code)

    agreed = dist.is_initialized()  # then the problems are those of all ranks already
    try:
        ranks = world()
        with time_limit(PARTING, end_alone):
            problems = error.problems if agreed else ranks.gather(error.problems)
            if ranks.first:
                print(told(type(error)(problems)), file=sys.stderr, flush=True)
                untold.clear()
            ranks.gather([])  # torchrun ends all ranks as soon as one has ended: none may before it is told
    except RuntimeError:
        end_alone()
    except UserError:
        print(told(error), file=sys.stderr, flush=True)
        raise
    leave(code)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, large tensors included.

    By default they are mapped anew each time, and the kernel clears each of their pages when it is first touched: on a
    CPU about a tenth of a small model's step.
    """
    with contextlib.suppress(AttributeError):  # another C library, which goes its own way
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def spell_out(argument: str) -> str:
    """Make an override say what its author meant.

    `a.b=1` becomes `++a.b=1`, so that an unknown key reaches our check and is reported with all other problems (Hydra
    would stop at the first). A text is no grammar of Hydra's: it is quoted, unless it is quoted already.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    if key in TEXTS and not TEXTS[key].fullmatch(value):
        quoted = value.replace("\\'", "\\\\'").replace("'", "\\'").replace("${", "\\${")
        return f"{key}='{quoted}'"
    if key[:1] in ("+", "~") or "@" in key or key.startswith("hydra") or (CONF / key).is_dir():
        return argument
    return "++" + argument
