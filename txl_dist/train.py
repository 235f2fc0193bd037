"""Train, or continue, a run: `torchrun --nproc_per_node=N -m txl_dist.train +experiment=quickstart`."""

# ruff: noqa: E402
import os

from txl_dist.distributed.preemption import REQUEUE, Preempted, Preemption, hold_signals, pending

if __name__ == "__main__":
    hold_signals()  # before the imports that take seconds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a C++ trace of every lost connection, which is told

import gc
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from txl_dist.checkpoint.format import Checkpoint, latest
from txl_dist.cli import command
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.data.lanes import LanePlan
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import NOT_SCORED, Segment, Segments, whole_split
from txl_dist.distributed.process_group import ProcessGroup, exit_process, process_group
from txl_dist.distributed.watchdog import Watchdog
from txl_dist.engine.anomaly_guard import BadStep, in_words
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.errors import ConfigError, RunError
from txl_dist.files.lock import Lock
from txl_dist.models.flops import training_flops
from txl_dist.runs.resume import find_resume_point, run_locked, write_run
from txl_dist.tracking.meter import ThroughputMeter
from txl_dist.tracking.profile import Profile, out_of_memory_reported
from txl_dist.tracking.result import show_result
from txl_dist.tracking.skipped import DroppedSamples
from txl_dist.tracking.tracker import Tracker


def train(job: TrainJob) -> None:
    """Train from the run's newest whole checkpoint, or from the beginning, to train.max_steps (or train.stop_at).

    Where a signal stops it, the process exits with the code REQUEUE, and the same command goes on.
    """
    with Watchdog(job.guard.stall_timeout) as watchdog:
        group = process_group(watchdog.patience)
        if problems := group.gather([]):  # with the configs of others, as data that are not on their host
            raise ConfigError(problems)
        watchdog.meet(group)
        index = Index.open(job.data.dir)
        preemption = Preemption(group)
        try:
            with run_locked(job, group, preemption) as lock:
                over = False
                while not over:  # it goes back to its newest checkpoint as another start would
                    gc.collect()  # the engine of the start before, which refers to itself
                    checkpoint, over = find_resume_point(job, index, group)
                    beyond = None if over else end_passed(job, checkpoint)
                    if beyond:
                        break
                    preemption.ask("before the model was built")
                    with out_of_memory_reported(job, group):
                        over = over or Training(job, index, checkpoint, group, watchdog, preemption, lock).run()
                preemption.finish()
                if group.is_rank_zero and beyond:
                    print(f"{job.run.dir}: {beyond}; nothing to do", flush=True)
                elif group.is_rank_zero:
                    show_result(job, index.splits)
        except Preempted as where:
            stop(where, group)


def end_passed(job: TrainJob, checkpoint: Checkpoint | None) -> str | None:
    """Say which end of training a checkpoint lies beyond; None where it lies beyond neither."""
    step = checkpoint.step if checkpoint else 0
    for key, end in (("train.max_steps", job.train.max_steps), ("train.stop_at", job.train.stop_at)):
        if end is not None and step > end:
            return f"is at step {step:,}, beyond {key}={end}"
    return None


class Training:
    """One start of a run: from its checkpoint's step to the last one that is asked for.

    Attributes:
        lock: of the run directory, on the first rank.
        unlogged: where the start before was stopped in an evaluation: the other metrics of that step.
    """

    def __init__(
        self,
        job: TrainJob,
        index: Index,
        checkpoint: Checkpoint | None,
        group: ProcessGroup,
        watchdog: Watchdog,
        preemption: Preemption,
        lock: Lock | None,
    ):
        self.job, self.index, self.watchdog, self.preemption = job, index, watchdog, preemption
        self.lock = lock
        write_run(job, index, group)
        engine = PipelineEngine if job.engine.pipeline_stages > 1 else ZeroEngine
        self.engine = engine(job, index.vocab_size, group, checkpoint)
        self.start, self.origin = self.engine.step, describe_origin(job, checkpoint)
        self.stop = min(job.train.stop_at or job.train.max_steps, job.train.max_steps)
        self.unlogged = checkpoint.data.get("unlogged") if checkpoint else None
        preemption.ask("while it was starting")
        self.tracker = Tracker(job, self.start - (self.unlogged is not None), self.stop, group.is_rank_zero)
        self.segments = self.training_segments()

    def run(self) -> bool:
        """Whether the run has come to its end; else it is to go back to its newest checkpoint."""
        job = self.job
        with self.tracker, self.engine.checkpointer:
            lanes = f"{job.data.num_lanes} lanes of {job.model.tgt_len} tokens a step"
            self.tracker.reporter.say(f"{job.run.dir}: {self.origin}; {self.engine}, {lanes}")
            try:
                self.loop()
            except BadStep as bad:
                self.engine.checkpointer.wait()
                if bad.action == "stop":
                    raise RunError(self.told(bad).splitlines()) from bad
                self.tracker.reporter.say(self.told(bad))
            else:
                if self.engine.step == job.train.max_steps and "test" in self.index.splits:
                    self.log(self.evaluate("test"))
                return True
        self.engine.close()
        return False

    def loop(self) -> None:
        """One segment a step, in order."""
        job, engine, reporter = self.job, self.engine, self.tracker.reporter
        flops = training_flops(job.model, self.index.vocab_size, job.data.num_lanes)
        self.meter = ThroughputMeter(self.segments, self.start, job.tokens_per_step, flops, engine.peak())
        profile = Profile(job, self.start, engine.group, reporter, self.meter)
        skipped = DroppedSamples(self.segments.reader, engine.group, reporter)
        if self.unlogged is not None:
            self.round_off(self.unlogged)
        for segment in self.segments:
            with profile.step(engine.step + 1):
                loss = engine.train_step(segment)
            skipped.tokens += engine.skipped
            self.watchdog.beat(f"step {engine.step}")
            self.preemption.poll()
            if engine.guard.bad:
                reporter.say(self.told(engine.guard.bad))
            metrics: dict[str, Any] = {}
            if self.due(job.tracking.log_every, also=self.stop):
                engine.guard.check()
                metrics |= {"train/loss": engine.mean(loss)}
                metrics |= {"train/lr": engine.learning_rate, "train/grad_norm": engine.grad_norm}
                metrics |= self.meter.read(engine.step) | skipped.read() | engine.guard.metrics()
            self.round_off(metrics)
            reporter.advance(engine.step)
            if self.preemption.agreed and engine.step < self.stop:
                raise Preempted(f"after step {engine.step}")

    def round_off(self, metrics: dict[str, Any]) -> None:
        """What is due after a step: an evaluation, a line of the log, a checkpoint."""
        with self.meter.paused():
            if self.due(self.job.train.eval_every, also=self.job.train.max_steps) and "valid" in self.index.splits:
                try:
                    metrics |= self.evaluate("valid")
                except Preempted:
                    self.save(None, unlogged=metrics)
                    raise
            if metrics:
                self.log(metrics)
            if self.due(self.job.checkpoint.every, also=self.stop) or self.preemption.agreed:
                self.save(metrics.get("valid/loss"))

    def due(self, every: int, also: int = 0) -> bool:
        return self.engine.step % every == 0 or self.engine.step == also

    def save(self, valid_loss: float | None, **more: Any) -> None:
        index = self.index
        data = {"fingerprint": index.fingerprint, "vocab_size": index.vocab_size, "tokenizer": index.tokenizer_files}
        data |= {"place": index.store.absolute_location}
        with self.meter.saving():
            self.engine.save(data | more, valid_loss)
        self.watchdog.beat(f"the checkpoint of step {self.engine.step}")

    def log(self, metrics: dict[str, Any]) -> None:
        self.tracker.log({"step": self.engine.step, "tokens": self.engine.tokens} | metrics)
        lost = self.lock is not None and self.lock.lost.is_set()
        taken = [f"run.dir={self.job.run.dir}: another start has taken it over, as this one was silent for too long"]
        self.engine.group.raise_if_any_failed(self.tracker.problems + self.engine.checkpointer.problems + taken * lost)

    def told(self, bad: BadStep) -> str:
        return in_words(bad, self.segments.plan, self.job.guard, latest(self.job.run.dir))

    def training_segments(self) -> Segments:
        data, model, split = self.job.data, self.job.model, self.index.splits["train"]
        plan = LanePlan(
            split.document_starts,
            data.num_lanes,
            model.tgt_len,
            seed=self.job.run.seed,
            order=data.order,
            reset_memory=data.reset_memory,
            origin=self.engine.origin,
        )
        reader = SampleReader(self.index, "train", fill_value=NOT_SCORED if data.on_error == "skip_sample" else None)
        lanes, eos = self.engine.lanes, self.index.eos
        return Segments(plan, reader, lanes, eos, self.start, self.stop, data.workers, model.mem_len)

    def evaluate(self, name: str) -> dict[str, float]:
        """Metrics of a whole split, such as valid/loss, valid/perplexity and valid/bits_per_byte.

        Raises:
            Preempted: on every rank, after the same segment.
        """
        data, tgt_len = self.job.data, self.job.evaluation.of(self.job.model).tgt_len
        lanes = data.num_lanes, tgt_len, data.reset_memory, self.engine.lanes
        score = self.engine.evaluate(self.until_stopped(whole_split(self.index, name, *lanes, data.workers), name))
        if self.preemption.agreed:
            raise Preempted(f"in the evaluation of {name} after step {self.engine.step}")
        return {f"{name}/{key}": value for key, value in score.metrics(self.index.splits[name].bytes).items()}

    def until_stopped(self, segments: Segments, name: str) -> Iterator[Segment]:
        for segment in self.tracker.reporter.watch(segments, f"evaluating {name}", len(segments)):
            yield segment
            self.watchdog.beat(f"a segment of {name}")
            if self.preemption.poll():
                return


def describe_origin(job: TrainJob, checkpoint: Checkpoint | None) -> str:
    """Describe from where a start goes on, and whether another optimizer than before does."""
    if checkpoint is None:
        return "starting"
    before = checkpoint.config["optimizer"]["name"]
    change = f" with {job.optimizer.name} in place of {before}" if before != job.optimizer.name else ""
    return f"going on from step {checkpoint.step:,}{change}"


def stop(where: Preempted, group: ProcessGroup) -> NoReturn:
    """Tell by which signals and where the run was stopped, and end all ranks."""
    signals = " and ".join(group.gather(pending()))
    if group.is_rank_zero:
        told = f"Stopped by {signals} {where}; the same command goes on from there (exit code {REQUEUE})."
        print(told, file=sys.stderr, flush=True)
    group.gather([])  # launchers end all ranks as soon as one has ended: none may before it is told
    exit_process(REQUEUE)


def main() -> None:
    command("train", TrainJob, train)
    exit_process()


if __name__ == "__main__":
    main()
