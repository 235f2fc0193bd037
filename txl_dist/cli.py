"""How the entry points start: Hydra composes conf/, `check.read` checks it, the job runs.

`python -m txl_dist.train data.num_lanes=32` and the installed package find the same conf/. A user's mistake is told on
one screen, once, and ends every rank with exit code 2.
"""

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf

from txl_dist.config.checks import parse_config
from txl_dist.config.overrides import CONF, CommandLine
from txl_dist.distributed.launcher import launcher_env
from txl_dist.distributed.preemption import signal_within
from txl_dist.errors import ConfigError, RunError, UserError, describe_os_error, first_line, format_error

Job = TypeVar("Job")

# Seconds that a rank waits before it tells an error. Where another has stopped, and said why, the connections to it
# break; the launcher ends this rank in the meantime.
FAREWELL = 10
PARTING = 30  # seconds that a rank which ends with all others waits for them


def command(name: str, schema: type[Job], run: Callable[[Job], None]) -> None:
    """Run one entry point: compose conf/`name`.yaml with the command line's overrides, check it, call `run`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors whole, and they are told here like all others
    sys.stdout = Output.replace(sys.stdout)
    keep_freed_memory()
    with errors_reported():
        launcher_env()  # a wrong one is told before all else
        line = CommandLine(sys.argv[1:])
        sys.argv[1:] = line.for_hydra()
        composing = True

        @hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")
        def job(config: DictConfig) -> None:
            nonlocal composing
            with errors_reported():
                with line.errors_described():
                    values = OmegaConf.to_container(config, resolve=True)
                composing = False
                run(parse_config(schema, values))
                composing = True  # the next one of a sweep

        with line.errors_described(lambda: composing):
            job()


class OutputFailed(OSError):
    """Standard output cannot be written. A run goes on without it (tracking/console.py), all else ends."""


class Output(io.TextIOWrapper):
    """Standard output: what its encoding lacks, lone surrogates of file names among it, is written as an escape."""

    @classmethod
    def replace(cls, stream: TextIO | None) -> TextIO | None:
        """Return the stream anew as an Output; one that is closed, or no file, stays."""
        if not isinstance(stream, io.TextIOWrapper):
            return stream
        encoding, buffered = stream.encoding, stream.line_buffering
        return cls(stream.detach(), encoding, "backslashreplace", line_buffering=buffered)

    def write(self, text: str) -> int:
        with failure_marked():
            return super().write(text)

    def flush(self) -> None:
        with failure_marked():
            super().flush()


@contextlib.contextmanager
def failure_marked() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputFailed(error.errno, error.strerror) from error


def flush_output() -> None:
    if sys.stdout is not None:  # it is closed
        sys.stdout.flush()


def end_without_output(cause: BaseException | None) -> NoReturn:
    """End with exit code 1: quietly where the reader of standard output has left (`... | head`), else with a reason."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more when it ends
    if isinstance(cause, OSError) and not isinstance(cause, BrokenPipeError):
        print(f"Stopped:\n  standard output: {describe_os_error(cause)}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def read_standard_input(key: str) -> bytes:
    """Read all of standard input, which stands in where `key` is not given.

    Raises:
        UserError: where there is none that can be read.
    """
    if sys.stdin is None:
        raise UserError(f"{key}: is missing, and standard input is closed; give {key}=...")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"{key}: standard input cannot be read: {describe_os_error(error)}") from error


@contextlib.contextmanager
def errors_reported() -> Iterator[None]:
    """Turn a user's mistake into words on standard error and exit code 2, and what else ends a run into exit code 1.

    A mistake in the config is every rank's: they agree on what is wrong, the first tells it, and all end together. What
    all ranks know alike is told in the same way.
    """
    try:
        try:
            yield
            flush_output()
        except SystemExit:
            flush_output()
            raise
        except OutputFailed:
            raise
        except OSError as error:  # of a file that no part of ours has answered for, as on a full disk
            raise RunError([describe_os_error(error)]) from error
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error) and not has_met_others():
                lack = f"there is not enough memory: {first_line(error)}; take shorter lengths or fewer lanes"
                raise RunError([lack]) from error
            raise
    except ConfigError as error:
        end_together(error, 2)
    except RunError as error:
        end_together(error, 1)
    except UserError as error:
        print(format_error(error), file=sys.stderr, flush=True)
        end_process(2)
    except OutputFailed as error:
        end_without_output(error.__cause__)
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
        from txl_dist.distributed.process_group import exit_process

        exit_process(code)
    raise SystemExit(code) from None


def end_if_cut_off(error: RuntimeError) -> None:
    """End the ranks of this host in words, with exit code 1, where an error says that a connection broke."""
    from txl_dist.distributed.process_group import process_group

    peers = process_group().peers
    if signal_within(FAREWELL + peers.turn):
        end_process(1)
    if broken := peers.broken(error):
        print(format_error(RunError(broken)), file=sys.stderr, flush=True)
        peers.end_mates()
        end_process(1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, Python or torch could not allocate; on a CPU torch has no exception of its own for that."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def end_together(error: ConfigError | RunError, code: int) -> NoReturn:
    """Tell the problems of all ranks, once, and end all ranks with an exit code."""
    if launcher_env().size == 1:
        print(format_error(error), file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    import torch.distributed as dist  # seconds to import, and only processes that are several need it

    from txl_dist.distributed.process_group import exit_process, process_group, time_limit

    untold = [error]

    def end_alone() -> None:
        for each in untold:
            print(format_error(each), file=sys.stderr, flush=True)
        exit_process(code)

    agreed = dist.is_initialized()  # then the problems are those of all ranks already
    try:
        group = process_group()
        with time_limit(PARTING, end_alone):
            problems = error.problems if agreed else group.gather(error.problems)
            if group.is_rank_zero:
                print(format_error(type(error)(problems)), file=sys.stderr, flush=True)
                untold.clear()
            group.gather([])  # torchrun ends all ranks as soon as one has ended: none may before it is told
    except RuntimeError:
        end_alone()
    except UserError:
        print(format_error(error), file=sys.stderr, flush=True)
        raise
    exit_process(code)


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
