"""Profiles of some training steps by torch.profiler: where the time goes, and the memory."""

import contextlib
import logging
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import torch
from rich.table import Column, Table
from torch.autograd import DeviceType
from torch.profiler import record_function

from txl_dist.config.schema import TrainJob
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import describe_os_error
from txl_dist.files.atomic import atomic_file
from txl_dist.tracking.console import ConsoleReporter
from txl_dist.tracking.meter import ThroughputMeter

log = logging.getLogger(__name__)


class Profile:
    """Records the steps in train.profile, without those that were done before this start of the run.

    Each rank writes a Chrome trace (chrome://tracing, ui.perfetto.dev) into RUN_DIR/profile/, and on a GPU a snapshot
    of its memory (pytorch.org/memory_viz). Rank 0 shows the costliest operators. Training continues where a file cannot
    be written.

    Args:
        start: the last step that is done already.
    """

    def __init__(
        self, job: TrainJob, start: int, group: ProcessGroup, reporter: ConsoleReporter, meter: ThroughputMeter
    ):
        self.group = group
        self.reporter = reporter
        self.meter = meter
        self.folder = Path(job.run.dir, "profile")
        self.gpu = group.device.type == "cuda"
        first, self.last = job.train.profile or (0, 0)
        self.first = max(first, start + 1)
        self.warm_up = max(self.first - 1, start + 1)  # tracing slows down the step in which it is set up
        self.profiler: torch.profiler.profile | None = None  # made only where steps are profiled
        if job.train.profile and self.last <= start:
            reporter.say(f"train.profile={job.train.profile}: these steps are done already, nothing is profiled")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enter around each training step; the first one has number 1."""
        if not self.warm_up <= number <= self.last:
            yield
            return
        with self.meter.paused():
            self._begin(number)
        with record_function(f"ProfilerStep#{number}"):  # the name by which viewers know a step
            yield
        if number == self.last:
            with self.meter.paused():
                self._finish()

    def _begin(self, number: int) -> None:
        if number == self.warm_up:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.prepare_trace()
        assert self.profiler is not None
        if number == self.first:
            self.profiler.start_trace()
            if self.gpu:
                torch.cuda.memory._record_memory_history(stacks="python")

    def _finish(self) -> None:
        assert self.profiler is not None
        self.profiler.stop_trace()
        steps = f"steps {self.first} to {self.last}"
        try:
            self._write_files(self.profiler, f"steps-{self.first}-{self.last}-rank-{self.group.rank}")
            files = f"traces in {self.folder}"
        except OSError as error:
            files = f"a trace could not be written: {describe_os_error(error, self.folder)}"
            if not self.group.is_rank_zero:
                log.warning("%s: %s", steps, files)
        if self.gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.group.is_rank_zero:
            self.reporter.say(f"{steps}: {files}; the costliest operators are")
            self.reporter.show(costliest_operators(self.profiler, self.gpu))

    def _write_files(self, profiler: torch.profiler.profile, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        with atomic_file(self.folder / f"{name}.json.gz") as temporary:
            profiler.export_chrome_trace(str(temporary))
        if self.gpu:
            write_memory_snapshot(self.folder, name)


def write_memory_snapshot(folder: Path, name: str) -> Path:
    """Write a snapshot of this GPU's memory, for pytorch.org/memory_viz, and return its path."""
    path = folder / f"{name}-memory.pickle"
    folder.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        torch.cuda.memory._dump_snapshot(str(temporary))
    return path


def costliest_operators(profiler: torch.profiler.profile, gpu: bool, rows: int = 10) -> Table:
    """Return a table of the operators with the most time of their own, without what they call.

    On a GPU it is the time of their kernels.
    """
    called = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    (steps,) = (event.count for event in called if event.key == "ProfilerStep*")
    time = attrgetter("self_device_time_total" if gpu else "self_cpu_time_total")  # microseconds
    operators = sorted((event for event in called if not event.is_user_annotation), key=time, reverse=True)
    total = sum(map(time, operators))
    name = Column("operator", overflow="fold")
    table = Table(name, "calls per step", "ms per step", "share", box=None, padding=(0, 2, 0, 0))
    for operator in operators[:rows]:
        calls = f"{operator.count / steps:,.0f}"
        milliseconds = f"{time(operator) / steps / 1000:,.2f}"
        table.add_row(operator.key, calls, milliseconds, f"{time(operator) / total:.1%}")
    return table
