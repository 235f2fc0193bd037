"""Where the messages of a run go, through Python's `logging`; nothing else configures it.

    rank zero     all messages                        standard output, above the progress line; errors to standard error
    other ranks   warnings and errors                 standard error, which Slurm writes to the job's log
    every rank    warnings and errors, also those of  RUN_DIR/logs/rank-N.log, with time and rank
                  DeepSpeed and torch, and what ends the rank

Outside of a run nothing is configured: Python prints warnings and errors to standard error.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from txl_dist.distributed.launcher import launcher_env
from txl_dist.errors import UserError, describe_os_error, format_error

log = logging.getLogger("txl_dist")

FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
LIBRARIES = ("DeepSpeed", "torch")  # many of their loggers do not propagate, but have handlers of their own
FILE_ONLY = {"file_only": True}  # `extra` of a record that the screen has shown by other means


class RunLog:
    """Configures logging for one start of a run, within its context.

    An exception that leaves the context is written to the rank's file; showing it is up to the caller.
    """

    def __init__(self, run_dir: str):
        rank = launcher_env().rank
        formatter = logging.Formatter(FORMAT.format(rank=rank))
        self.screen: logging.Handler = ConsoleHandler()
        if rank > 0:
            self.screen = logging.StreamHandler()
            self.screen.setFormatter(formatter)
        self.screen.addFilter(lambda record: not hasattr(record, "file_only"))
        self.file = RankFile(Path(run_dir), rank)
        self.file.setFormatter(formatter)
        self.level = logging.INFO if rank == 0 else logging.WARNING
        self.replaced: list[tuple[logging.Logger, list[logging.Handler]]] = []

    def __enter__(self) -> "RunLog":
        log.setLevel(self.level)
        log.propagate = False
        self._set_handlers(log, self.screen, self.file)
        root = logging.getLogger()
        last_resort = [logging.lastResort] if logging.lastResort else []  # prints warnings, as without any handler
        self._set_handlers(root, *(root.handlers or last_resort), self.file)
        for logger in loggers_of_libraries():
            self._set_handlers(logger, self.file)
        logging.captureWarnings(True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            log_exit(format_error(error))
        elif isinstance(error, Exception):
            log_exit("".join(traceback.format_exception(type(error), error, trace)).rstrip())
        logging.captureWarnings(False)
        for logger, handlers in self.replaced:
            logger.handlers[:] = handlers
        log.propagate = True
        log.setLevel(logging.NOTSET)
        self.file.close()

    def _set_handlers(self, logger: logging.Logger, *handlers: logging.Handler) -> None:
        self.replaced.append((logger, logger.handlers[:]))
        logger.handlers[:] = handlers


def log_exit(reason: str) -> None:
    """Write why this process ends to its log file, if it belongs to a run; the caller shows it on the screen."""
    if log.handlers:
        log.error(reason, extra=FILE_ONLY)


def loggers_of_libraries() -> list[logging.Logger]:
    """Return the libraries' loggers that do not propagate, so that a handler of the root logger is not enough."""
    existing = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    return [logger for logger in existing if logger.name.partition(".")[0] in LIBRARIES and not logger.propagate]


class ConsoleHandler(logging.Handler):
    """Prints messages as they are. A progress line in a terminal stays below them, because rich redirects prints."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record: errors to standard error, all else to standard output."""
        # With its line end in one write: torchrun's children do not buffer, and all write to the same file.
        line = f"{self.format(record)}\n"
        if record.levelno >= logging.ERROR:
            with contextlib.suppress(OSError):
                print(line, end="", file=sys.stderr, flush=True)
        else:
            with output_optional():
                print(line, end="", flush=True)


class RankFile(logging.FileHandler):
    """Appends to RUN_DIR/logs/rank-N.log, which is made with its first line, once there is a run directory.

    If it cannot be written the run continues without it, and one warning says so.
    """

    def __init__(self, run_dir: Path, rank: int):
        path = run_dir / "logs" / f"rank-{rank}.log"
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.setLevel(logging.WARNING)
        self.path = path
        self.failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record, unless the file has failed before or the run directory is missing."""
        if self.failed or not self.path.parents[1].is_dir():
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            super().emit(record)
        except OSError as error:
            self.failed = True
            self.close()
            log.warning("%s; the run continues without this log", describe_os_error(error, self.path))

    def close(self) -> None:
        """Close the file; what a failing disk does not take is lost."""
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Let `emit` handle a failure to write, which logging would show as a trace for every record."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise error
        super().handleError(record)


@contextlib.contextmanager
def output_optional() -> Iterator[None]:
    """Let a run continue when standard output fails, as a log on a full disk: metrics.jsonl has everything."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):  # standard error may be the same log
            print(f"standard output: {error.strerror}; the run continues without it", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in buffers, and all that follows
