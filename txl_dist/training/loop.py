"""The training loop, and one start of a run around it: from its checkpoint to the last step that is asked for."""

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import Tensor

from txl_dist.checkpoint.format import Checkpoint, directory, latest
from txl_dist.checkpoint.initial_weights import InitialWeights
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.data.segments import Segment, SegmentLoader
from txl_dist.distributed.preemption import Preempted, Preemption
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.distributed.watchdog import Watchdog
from txl_dist.engine.anomaly_guard import AnomalyDetected, BadStep, describe_bad_step
from txl_dist.engine.engine import VERSIONS, Engine, Start
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.errors import RunError
from txl_dist.evaluation.memory_use import measure_memory_use
from txl_dist.files.lock import Lock
from txl_dist.objectives.registry import build_objective
from txl_dist.runs.finished import mark_finished
from txl_dist.runs.initial_weights import initial_weights
from txl_dist.runs.resume import write_run
from txl_dist.tracking.dropped_samples import DroppedSamples
from txl_dist.tracking.gpu_peak import total_peak_flops
from txl_dist.tracking.meter import ThroughputMeter
from txl_dist.tracking.profile import Profile
from txl_dist.tracking.tracker import Tracker
from txl_dist.training.samples import PromptSampler


class Training:
    """One start of a run.

    Args:
        checkpoint: from which it resumes; None: it begins.
        lock: of the run directory, on rank 0.

    Attributes:
        start: the last step that is done already.
        stop: the last step that is asked for.
        unlogged: where the start before was stopped in an evaluation: the other metrics of that step.
        earlier_losses, losses: of the steps since the last logged one: known ones, and what the engine has returned.
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
        self.job = job
        self.index = index
        self.group = group
        self.watchdog = watchdog
        self.preemption = preemption
        self.lock = lock
        write_run(job, index, group)
        start = checkpoint or initial_weights(job, index, group)
        self.engine = build_engine(job, index, group, start)
        self.start = self.engine.step
        self.stop = min(job.train.stop_at or job.train.max_steps, job.train.max_steps)
        self.origin = describe_origin(job, start)
        self.unlogged: dict[str, Any] | None = checkpoint.data.get("unlogged") if checkpoint else None
        self.earlier_losses: list[float] = checkpoint.data.get("unlogged_losses", []) if checkpoint else []
        self.losses: list[Tensor] = []
        preemption.ask("while it was starting")
        logged = self.start - (self.unlogged is not None)
        self.tracker = Tracker(job, logged, self.engine.tokens, self.stop, group.is_rank_zero)
        self.segments = self.engine.objective.segments(
            job, index, self.engine.lanes, self.engine.origin, self.start, self.stop
        )
        self.sampler = PromptSampler(job, index) if job.tracking.prompts else None
        self.dropped = DroppedSamples(self.segments.reader, group, self.tracker.reporter)
        peak = total_peak_flops(job.engine, self.engine.precision, group)
        self.meter = ThroughputMeter(self.segments, self.start, job.tokens_per_step, self.engine.training_flops, peak)

    def run(self) -> bool:
        """Train to the last step that is asked for; after the run's last one evaluate the test split.

        Returns:
            False where the run was rolled back: it is to be resumed from its latest valid checkpoint.

        Raises:
            Preempted: on every rank, where a signal stops it; what is to be saved is saved.
            RunError: on every rank, where training cannot continue.
        """
        with self.tracker, self.engine.checkpointer:
            self.watchdog.on_stall = lambda line: self.tracker.end("failed", line)
            self.record("start", origin=self.origin, split=str(self.engine), **describe_start(self.job))
            lanes = f"{self.job.data.num_lanes} lanes of {self.job.stride} tokens per step"
            self.tracker.reporter.say(f"{self.job.run.dir}: {self.origin}; {self.engine}, {lanes}")
            try:
                self.loop()
            except AnomalyDetected as anomaly:
                self.engine.checkpointer.wait()
                if anomaly.bad_step.action == "stop":
                    self.record_bad_step(anomaly.bad_step)
                    raise RunError(self.describe(anomaly.bad_step).splitlines()) from anomaly
                self.report(anomaly.bad_step)
                self.tracker.end("rolled back")
            else:
                if self.engine.step == self.job.train.max_steps:
                    self.finish()
                return True
        self.engine.close()
        return False

    def loop(self) -> None:
        """Train on one segment per step, in order."""
        engine = self.engine
        self.meter.restart(self.start)
        profile = Profile(self.job, self.start, self.group, self.tracker.reporter, self.meter)
        if self.unlogged is not None:
            self.evaluate_log_and_save(self.unlogged)
        for segment in self.segments:
            with profile.step(engine.step + 1):
                self.losses.append(engine.train_step(segment))
            self.watchdog.beat(f"step {engine.step}")
            self.preemption.poll()
            self.dropped.tokens += engine.dropped_tokens
            if engine.guard.bad_step:
                self.report(engine.guard.bad_step)
            metrics = self.measure() if self.is_due(self.job.tracking.log_every, self.stop) else {}
            metrics |= engine.watch.metrics
            if self.memory_is_due:
                metrics |= engine.memory_drift()
            self.evaluate_log_and_save(metrics)
            self.tracker.reporter.advance(engine.step)
            if self.preemption.agreed and engine.step < self.stop:
                raise Preempted(f"after step {engine.step}")

    def finish(self) -> None:
        """Score the test split, if there is one, and mark the run as finished."""
        scores = self.evaluate("test") if "test" in self.index.splits else {}
        if scores:
            self.log(scores)
        mark_finished(self.job.run.dir, self.engine.step, scores, self.group)

    def is_due(self, every: int, last: int) -> bool:
        """Return whether something is due that is done every so many steps, and at the last one."""
        return self.engine.step % every == 0 or self.engine.step == last

    @property
    def evaluation_is_due(self) -> bool:
        """Return whether the validation split is scored after this step."""
        return self.is_due(self.job.train.eval_every, self.job.train.max_steps) and "valid" in self.index.splits

    @property
    def memory_is_due(self) -> bool:
        """Return whether it is looked at what the memory does after this step: by default at evaluations."""
        every = self.job.tracking.memory_every
        if every == 0 or self.engine.objective.reads_examples:
            return False
        if not self.job.evaluated_model.lookback or "valid" not in self.index.splits:
            return False
        return self.evaluation_is_due if every is None else self.engine.step % every == 0

    def measure(self) -> dict[str, Any]:
        """Return the metrics of the steps since the last logged one; every rank must call it.

        Raises:
            AnomalyDetected: where a step since the last reading was bad.
        """
        engine = self.engine
        engine.guard.raise_pending()
        losses = self.take_losses()
        finite = [loss for loss in losses if math.isfinite(loss)]  # one that is not would hide the others
        metrics = {
            "train/loss": fmean(finite or losses),
            "train/step_loss": losses[-1],
            "train/lr": engine.learning_rate,
            "train/grad_norm": engine.grad_norm,
        }
        return metrics | self.meter.read(engine.step) | self.dropped.read() | engine.guard.metrics()

    def take_losses(self) -> list[float]:
        """Return the loss of each step since the last logged one, and forget them; every rank must call it."""
        losses = self.earlier_losses + self.engine.global_losses(self.losses)
        self.earlier_losses = []
        self.losses = []
        return losses

    def evaluate_log_and_save(self, metrics: dict[str, Any]) -> None:
        """Do what is due after a step: an evaluation, a line of the log with these metrics, a checkpoint."""
        with self.meter.paused():
            if self.evaluation_is_due:
                try:
                    metrics = metrics | self.evaluate("valid")
                except Preempted:
                    self.save(None, unlogged=metrics)
                    raise
            if self.memory_is_due:
                metrics = metrics | self.look_at_memory()
            if metrics:
                self.log(metrics)
            if self.evaluation_is_due and self.sampler:
                self.record("samples", samples=self.sampler.sample(self.engine))
                self.watchdog.beat(f"the samples of step {self.engine.step}")
            if self.is_due(self.job.checkpoint.every, self.stop) or self.preemption.agreed:
                self.save(metrics.get("valid/loss"))

    def look_at_memory(self) -> dict[str, float]:
        """Return what the memory does for the validation split; every rank must call it."""
        began = time.perf_counter()
        segments = self.engine.objective.evaluation_segments(self.job, self.index, "valid", self.engine.lanes)
        lookback = self.job.evaluated_model.lookback
        metrics = measure_memory_use(self.engine.show, segments, lookback, self.group)
        return metrics | {"memory/seconds": time.perf_counter() - began}

    def evaluate(self, name: str) -> dict[str, float]:
        """Return the objective's metrics of a whole split, such as valid/loss and valid/perplexity.

        Raises:
            Preempted: on every rank, after the same segment.
        """
        segments = self.engine.objective.evaluation_segments(self.job, self.index, name, self.engine.lanes)
        score = self.engine.evaluate(self.until_stopped(segments, name))
        if self.preemption.agreed:
            raise Preempted(f"in the evaluation of {name} after step {self.engine.step}")
        metrics = self.engine.objective.metrics(score, self.index, name)
        return {f"{name}/{key}": value for key, value in metrics.items()}

    def until_stopped(self, segments: SegmentLoader, name: str) -> Iterator[Segment]:
        """Yield segments of a split under a progress bar, until the ranks agree that a signal has come."""
        for segment in self.tracker.reporter.watch(segments, f"evaluating {name}", len(segments)):
            yield segment
            self.watchdog.beat(f"a segment of {name}")
            if self.preemption.poll():
                return

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of the current step; every rank must call it.

        Raises:
            RunError: on every rank, where the run cannot be logged or saved on any, or another start has its lock.
        """
        self.tracker.log({"step": self.engine.step, "tokens": self.engine.tokens} | metrics)
        problems = self.tracker.problems + self.engine.checkpointer.problems
        if self.lock is not None and self.lock.lost.is_set():
            problems.append(
                f"run.dir={self.job.run.dir}: another start has taken it over, as this one was silent for too long"
            )
        self.group.raise_if_any_failed(problems)

    def record(self, kind: str, **facts: Any) -> None:
        """Record an event of the current step."""
        self.tracker.record(kind, self.engine.step, self.engine.tokens, **facts)

    def save(self, valid_loss: float | None, **more: Any) -> None:
        """Save a checkpoint of the current step, with what the run is trained on and more facts."""
        self.earlier_losses = self.take_losses()
        data = {
            "fingerprint": self.index.fingerprint,
            "vocab_size": self.index.vocab_size,
            "tokenizer": self.index.tokenizer_files,
            "place": self.index.store.absolute_location,
            "examples": None if self.index.examples is None else self.index.examples.model_dump(),
            "unlogged_losses": self.earlier_losses,
        }
        with self.meter.saving():
            self.engine.save(data | more, valid_loss)
        self.record("checkpoint", path=str(directory(self.job.run.dir, self.engine.step)), valid_loss=valid_loss)
        self.watchdog.beat(f"the checkpoint of step {self.engine.step}")

    def report(self, bad_step: BadStep) -> None:
        """Record and show a bad step."""
        self.record_bad_step(bad_step)
        self.tracker.reporter.say(self.describe(bad_step))

    def record_bad_step(self, bad_step: BadStep) -> None:
        """Record a bad step, which may lie before the current one."""
        tokens = self.engine.origin.tokens_at(bad_step.step, self.job.tokens_per_step)
        self.tracker.record("bad_step", bad_step.step, tokens, why=bad_step.why, action=bad_step.action)

    def describe(self, bad_step: BadStep) -> str:
        """Say what is wrong with a step, and what happens now."""
        return describe_bad_step(bad_step, self.segments.plan, self.job.guard, latest(self.job.run.dir))


def build_engine(job: TrainJob, index: Index, group: ProcessGroup, start: Start) -> Engine:
    """Build the engine that the config asks for, with the state of a checkpoint or with given weights."""
    kind = PipelineEngine if job.engine.pipeline_stages > 1 else ZeroEngine
    return kind(job, build_objective(job, index), index.vocab_size, group, start)


def describe_origin(job: TrainJob, start: Start) -> str:
    """Say from where a start resumes, and whether with another optimizer than before; or with what it begins."""
    if start is None:
        return "starting"
    if isinstance(start, InitialWeights):
        return f"starting with the weights of {start.origin}"
    before = start.config["optimizer"]["name"]
    change = f" with {job.optimizer.name} in place of {before}" if before != job.optimizer.name else ""
    return f"resuming from step {start.step:,}{change}"


def describe_start(job: TrainJob) -> dict[str, Any]:
    """Return what is recorded of each start beside its origin and split."""
    return {"host": socket.gethostname(), "versions": VERSIONS, "config": asdict(job)}
