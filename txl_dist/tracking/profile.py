"""Where the time of some training steps goes, and the memory, as torch.profiler sees it."""

import contextlib
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import torch
from rich.table import Column, Table
from torch.autograd import DeviceType
from torch.profiler import record_function

from txl_dist.config.schema import TrainJob
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import UserError, describe_os_error, first_line
from txl_dist.files.atomic import atomic_file
from txl_dist.tracking.console import ConsoleReporter
from txl_dist.tracking.meter import ThroughputMeter


class Profile:
    """Records the steps in train.profile, without those that were done before this start of the run.

    Each rank writes a Chrome trace (chrome://tracing, ui.perfetto.dev) into RUN_DIR/profile/, and on a GPU a snapshot
    of its memory (pytorch.org/memory_viz). The first rank shows the costliest operators. Training goes on where a file
    cannot be written.
    """

    def __init__(
        self, job: TrainJob, start: int, group: ProcessGroup, reporter: ConsoleReporter, meter: ThroughputMeter
    ):
        self.group, self.reporter, self.meter = group, reporter, meter
        self.folder, self.gpu = Path(job.run.dir, "profile"), group.device.type == "cuda"
        first, self.last = job.train.profile or (0, 0)
        self.first = max(first, start + 1)
        self.warm_up = max(self.first - 1, start + 1)  # tracing slows down the step in which it is set up
        if job.train.profile and self.last <= start:
            reporter.say(f"train.profile={job.train.profile}: these steps are done already, nothing is profiled")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around each training step; the first one has number 1."""
        if not self.warm_up <= number <= self.last:
            yield
            return
        with self.meter.paused():
            self.begin(number)
        with record_function(f"ProfilerStep#{number}"):  # the name by which viewers know a step
            yield
        if number == self.last:
            with self.meter.paused():
                self.finish()

    def begin(self, number: int) -> None:
        if number == self.warm_up:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.prepare_trace()
        if number == self.first:
            self.profiler.start_trace()
            if self.gpu:
                torch.cuda.memory._record_memory_history(stacks="python")

    def finish(self) -> None:
        self.profiler.stop_trace()
        steps = f"steps {self.first} to {self.last}"
        try:
            self.write_files(f"steps-{self.first}-{self.last}-rank-{self.group.rank}")
            files = f"traces in {self.folder}"
        except OSError as error:
            files = f"a trace could not be written: {describe_os_error(error, self.folder)}"
            if not self.group.is_rank_zero:
                print(f"rank {self.group.rank}, {steps}: {files}", file=sys.stderr, flush=True)
        if self.gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.group.is_rank_zero:
            self.reporter.say(f"{steps}: {files}; the costliest operators are")
            self.reporter.say(costliest(self.profiler, self.gpu))

    def write_files(self, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        with atomic_file(self.folder / f"{name}.json.gz") as temporary:
            self.profiler.export_chrome_trace(str(temporary))
        if self.gpu:
            write_memory(self.folder, name)


@contextlib.contextmanager
def out_of_memory_reported(job: TrainJob, group: ProcessGroup) -> Iterator[None]:
    """Tell what to do about it and, on a GPU, write what its memory holds beside the profile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        engine = job.engine
        lines = [
            f"rank {group.rank} has no memory left on {group.device}: {first_line(error)}",
            f"Less is taken by a larger engine.gradient_accumulation than {engine.gradient_accumulation}, a higher "
            f"engine.zero_stage than {engine.zero_stage} with several processes, engine.activation_checkpointing=true, "
            "engine.offload=optimizer and more engine.pipeline_stages; the run stays the same.",
        ]
        if group.device.type == "cuda":
            folder = Path(job.run.dir) / "profile"
            try:
                path = write_memory(folder, f"out-of-memory-rank-{group.rank}")
                lines.append(f"What the memory held is in {path}, for pytorch.org/memory_viz.")
            except OSError as failure:
                lines.append(f"What the memory held could not be written: {describe_os_error(failure, folder)}")
        raise UserError("\n".join(lines)) from error


def write_memory(folder: Path, name: str) -> Path:
    """Write a snapshot of this GPU's memory, for pytorch.org/memory_viz, and return its path."""
    path = folder / f"{name}-memory.pickle"
    folder.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        torch.cuda.memory._dump_snapshot(str(temporary))
    return path


def costliest(profiler: torch.profiler.profile, gpu: bool, rows: int = 10) -> Table:
    """The operators with the most time of their own, without what they call; on a GPU that of their kernels."""
    called = [each for each in profiler.key_averages() if each.device_type == DeviceType.CPU]
    (steps,) = (each.count for each in called if each.key == "ProfilerStep*")
    time = attrgetter("self_device_time_total" if gpu else "self_cpu_time_total")  # microseconds
    operators = sorted((each for each in called if not each.is_user_annotation), key=time, reverse=True)
    total = sum(map(time, operators))
    columns = Column("operator", overflow="fold"), "calls a step", "ms a step", "share"
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for each in operators[:rows]:
        per_step = f"{each.count / steps:,.0f}", f"{time(each) / steps / 1000:,.2f}"
        table.add_row(each.key, *per_step, f"{time(each) / total:.1%}")
    return table
