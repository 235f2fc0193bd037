"""How the entry points start: Hydra composes conf/, `parse_config` checks the result, the job runs.

`txl-train data.num_lanes=32`, `python -m txl_dist.train ...` and an installed package find the same conf/. A user's
mistake is reported once, on one screen, and ends every rank with exit code 2.

Nothing here imports torch, DeepSpeed or numpy before a job runs: `--help`, `--cfg` and shell completion answer at once.
"""

import contextlib
import ctypes
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf

from txl_dist.config.overrides import CONF, CommandLine
from txl_dist.distributed.launcher import launcher_env
from txl_dist.distributed.preemption import signal_within
from txl_dist.errors import ConfigError, RunError, UserError, describe_os_error, first_line, format_error

Job = TypeVar("Job")

# Seconds that a rank waits before it reports an error. Where another rank has stopped, and said why, the connections to
# it break; the launcher ends this rank in the meantime.
FAREWELL = 10
PARTING = 30  # seconds that a rank which ends with all others waits for them


def command(name: str, schema: type[Job], run: Callable[[Job], None]) -> None:
    """Run one entry point: compose conf/`name`.yaml with the command line's overrides, check it, call `run`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and they are reported here like all others
    sys.stdout = Output.replace(sys.stdout)
    keep_freed_memory()
    with errors_reported():
        launcher_env()  # its errors come before all others
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
                from txl_dist.config.parse import parse_config  # the checks import numpy

                run(parse_config(schema, values))
                composing = True  # the next job of a sweep

        with line.errors_described(lambda: composing):
            job()


class OutputFailed(OSError):
    """Standard output cannot be written. Training continues without it (tracking/console.py), other commands end."""


class Output(io.TextIOWrapper):
    """Standard output that escapes what its encoding lacks, such as the lone surrogates of file names."""

    @classmethod
    def replace(cls, stream: TextIO | None) -> TextIO | None:
        """Return an Output that takes the place of a stream; one that is closed, or not a file, stays."""
        if not isinstance(stream, io.TextIOWrapper):
            return stream
        encoding = stream.encoding
        line_buffering = stream.line_buffering
        return cls(stream.detach(), encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        with failure_marked():
            return super().write(text)

    def flush(self) -> None:
        with failure_marked():
            super().flush()


@contextlib.contextmanager
def failure_marked() -> Iterator[None]:
    """Raise OutputFailed where the operating system refuses to write."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(error.errno, error.strerror) from error


def flush_output() -> None:
    if sys.stdout is not None:  # None where it is closed
        sys.stdout.flush()


def end_without_output(cause: BaseException | None) -> NoReturn:
    """End with exit code 1: silently where the reader of standard output has left (`| head`), else with a reason."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())  # Python flushes once more when it ends
    if isinstance(cause, OSError) and not isinstance(cause, BrokenPipeError):
        print(f"Stopped:\n  standard output: {describe_os_error(cause)}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def read_standard_input(key: str) -> bytes:
    """Read all of standard input, the default of `key`.

    Raises:
        UserError: where it is closed or cannot be read.
    """
    if sys.stdin is None:
        raise UserError(f"{key}: is missing, and standard input is closed; give {key}=...")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"{key}: standard input cannot be read: {describe_os_error(error)}; give {key}=...") from error


@contextlib.contextmanager
def errors_reported() -> Iterator[None]:
    """Report a user's mistake on standard error and exit with code 2; for what else ends a run exit with code 1.

    The problems of a config are collected from all ranks, rank 0 reports them, and all ranks end together. So are
    those that all ranks raise alike (RunError).
    """
    try:
        with library_errors_as_run_errors():
            yield
    except ConfigError as error:
        end_together(error, 2)
    except RunError as error:
        end_together(error, 1)
    except UserError as error:
        report(error)
        end_process(2)
    except OutputFailed as error:
        end_without_output(error.__cause__)
    except KeyboardInterrupt:
        end_process(130)
    except Exception as error:
        if not is_one_of_several():
            raise
        if isinstance(error, RuntimeError):
            end_if_cut_off(error)
        sys.excepthook(type(error), error, error.__traceback__)
        end_process(1)


@contextlib.contextmanager
def library_errors_as_run_errors() -> Iterator[None]:
    """Raise RunError where the operating system refuses something, or a process that is alone lacks memory."""
    try:
        yield
        flush_output()
    except SystemExit:
        flush_output()
        raise
    except OutputFailed:
        raise
    except OSError as error:  # of a file for which no function of ours has answered, as on a full disk
        raise RunError([describe_os_error(error)]) from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and not is_one_of_several():
            problem = f"there is not enough memory: {first_line(error)}; take shorter lengths or fewer lanes"
            raise RunError([problem]) from error
        raise


def report(error: UserError) -> None:
    """Print an error on standard error, and leave it for torchrun, which repeats it below its own trace."""
    message = format_error(error)
    print(message, file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The format of torch.distributed.elastic.multiprocessing.errors, whose import would take seconds. For torchrun
        # the earliest failure is the root cause: a second less, and it is this one, not that of a rank without message.
        details = {"py_callstack": message, "timestamp": int(time.time()) - 1}
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


def is_one_of_several() -> bool:
    """Return whether this process belongs to a process group of several; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def end_process(code: int) -> NoReturn:
    """End this process; one of several without Python's shutdown, which would wait for the others."""
    if is_one_of_several():
        from txl_dist.distributed.process_group import exit_process

        exit_process(code)
    raise SystemExit(code) from None


def end_if_cut_off(error: RuntimeError) -> None:
    """End the ranks of this host with a message and exit code 1, where an error says that a connection broke."""
    from txl_dist.distributed.process_group import process_group

    peers = process_group().peers
    if signal_within(FAREWELL + peers.turn):
        end_process(1)
    if broken := peers.broken_connection(error):
        report(RunError(broken))
        peers.end_local()
        end_process(1)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether numpy, Python or torch could not allocate; on a CPU torch has no exception of its own for it."""
    messages = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def end_together(error: ConfigError | RunError, code: int) -> NoReturn:
    """Report the problems of all ranks, once, and end all ranks with an exit code."""
    if launcher_env().size == 1:
        report(error)
        raise SystemExit(code) from None
    import torch.distributed as dist  # seconds to import, and only processes that are several need it

    from txl_dist.distributed.process_group import exit_process, process_group, time_limit

    unreported = [error]

    def end_alone() -> None:
        for own in unreported:
            report(own)
        exit_process(code)

    agreed = dist.is_initialized()  # then the problems are those of all ranks already
    try:
        group = process_group()
        with time_limit(PARTING, end_alone):
            problems = error.problems if agreed else group.gather(error.problems)
            if group.is_rank_zero:
                report(type(error)(problems))
                unreported.clear()
            group.gather([])  # torchrun ends all ranks as soon as one has ended: none may end before the report
    except RuntimeError:
        end_alone()
    except UserError:
        report(error)
        raise
    exit_process(code)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation, that of large tensors included.

    By default large blocks are mapped anew each time, and the kernel clears each page when it is first touched: on a
    CPU this takes about a tenth of a small model's step.
    """
    with contextlib.suppress(AttributeError):  # another C library, without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD = -1
        M_MMAP_MAX = -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
