"""Train, or continue, a run: `torchrun --nproc_per_node=N -m txl_dist.train +experiment=quickstart`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from txl_dist.check import continues
from txl_dist.cli import command
from txl_dist.config import TrainJob
from txl_dist.data.lanes import LanePlan
from txl_dist.data.segments import NOT_SCORED, Segments, whole_split
from txl_dist.data.shards import Index, SampleReader
from txl_dist.engine.checkpoint import Checkpoint, newest
from txl_dist.engine.launch import World, leave, world
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.errors import ConfigError, UserError
from txl_dist.models.flops import training_flops
from txl_dist.tracking.meter import Meter
from txl_dist.tracking.profile import Profile
from txl_dist.tracking.result import is_tested, show_result
from txl_dist.tracking.skipped import Skipped
from txl_dist.tracking.tracker import Tracker


def train(job: TrainJob) -> None:
    """Train from the run's newest whole checkpoint, or from the beginning, to train.max_steps (or train.stop_at)."""
    ranks, index = world(), Index.open(job.data.dir)
    checkpoint, over = standing(job, index, ranks)
    if not over:
        Training(job, index, checkpoint, ranks).run()
    if ranks.first:
        show_result(job)


class Training:
    """One start of a run: from its checkpoint's step to the last one that is asked for."""

    def __init__(self, job: TrainJob, index: Index, checkpoint: Checkpoint | None, ranks: World):
        self.job, self.index = job, index
        write_run(job, index, ranks)
        engine = PipelineEngine if job.engine.pipeline_stages > 1 else ZeroEngine
        self.engine = engine(job, index.vocab_size, ranks, checkpoint)
        self.start = self.engine.step
        self.stop = min(job.train.stop_at or job.train.max_steps, job.train.max_steps)
        self.tracker = Tracker(job, self.start, self.stop, ranks.first)
        self.data = {
            "fingerprint": index.fingerprint,
            "vocab_size": index.vocab_size,
            "tokenizer": dict(index.tokenizer_files),
        }

    def run(self) -> None:
        job, origin = self.job, f"going on from step {self.start:,}" if self.start else "starting"
        with self.tracker, self.engine.saver:
            lanes = f"{job.data.num_lanes} lanes of {job.model.tgt_len} tokens a step"
            self.tracker.screen.say(f"{job.run.dir}: {origin}; {self.engine}, {lanes}")
            self.loop()
            if self.engine.step == self.job.train.max_steps and "test" in self.index.splits:
                self.log(self.evaluate("test"))

    def loop(self) -> None:
        """One segment a step, in order."""
        job, engine, segments = self.job, self.engine, self.segments()
        flops = training_flops(job.model, self.index.vocab_size, job.data.num_lanes)
        meter = Meter(segments, self.start, job.tokens_per_step, flops, engine.peak())
        profile = Profile(job, self.start, engine.world, self.tracker.screen, meter)
        skipped = Skipped(segments.reader, engine.world, self.tracker.screen)
        for segment in segments:
            with profile.step(engine.step + 1):
                loss = engine.train_step(segment)
            skipped.tokens += engine.skipped
            metrics: dict[str, Any] = {}
            if self.due(job.tracking.log_every, also=self.stop):
                metrics |= {"train/loss": engine.mean(loss)}
                metrics |= {"train/lr": engine.learning_rate, "train/grad_norm": engine.grad_norm}
                metrics |= meter.read(engine.step) | skipped.read()
            with meter.paused():
                if self.due(job.train.eval_every, also=job.train.max_steps) and "valid" in self.index.splits:
                    metrics |= self.evaluate("valid")
                if metrics:
                    self.log(metrics)
                if self.due(job.checkpoint.every, also=self.stop):
                    with meter.saving():
                        engine.save(self.data, metrics.get("valid/loss"))
            self.tracker.screen.advance(engine.step)

    def due(self, every: int, also: int = 0) -> bool:
        return self.engine.step % every == 0 or self.engine.step == also

    def log(self, metrics: dict[str, Any]) -> None:
        self.tracker.log({"step": self.engine.step, "tokens": self.engine.tokens} | metrics)
        self.engine.world.end_on(self.tracker.problems + self.engine.saver.problems)

    def segments(self) -> Segments:
        data, split = self.job.data, self.index.splits["train"]
        plan = LanePlan(
            split.document_starts,
            data.num_lanes,
            self.job.model.tgt_len,
            seed=self.job.run.seed,
            order=data.order,
            reset_memory=data.reset_memory,
            origin=self.engine.origin,
        )
        reader = SampleReader(self.index, "train", lost=NOT_SCORED if data.on_error == "skip_sample" else None)
        lanes, mem_len = self.engine.lanes, self.job.model.mem_len
        return Segments(plan, reader, lanes, self.index.eos, self.start, self.stop, data.workers, mem_len)

    def evaluate(self, name: str) -> dict[str, float]:
        """Metrics of a whole split, such as valid/loss, valid/perplexity and valid/bits_per_byte."""
        data, tgt_len = self.job.data, self.job.evaluation.of(self.job.model).tgt_len
        lanes = data.num_lanes, tgt_len, data.reset_memory, self.engine.lanes
        segments = whole_split(self.index, name, *lanes, data.workers)
        score = self.engine.evaluate(self.tracker.screen.watch(segments, f"evaluating {name}", len(segments)))
        return {f"{name}/{key}": value for key, value in score.metrics(self.index.splits[name].bytes).items()}


def standing(job: TrainJob, index: Index, ranks: World) -> tuple[Checkpoint | None, bool]:
    """The run's newest whole checkpoint, and whether the run is over. The first rank reads all of its files, tells
    which newer checkpoints are damaged, and decides for all ranks.

    Raises:
        ConfigError: on every rank, where none of its checkpoints is whole, or it is of other data or another run.
    """
    checkpoint, over, problems = None, False, []
    if ranks.first:
        try:
            over = is_tested(job)
            checkpoint = newest(job.run.dir, contents=True, tell=lambda damage: print(damage, flush=True))
        except UserError as error:
            problems = str(error).splitlines()
        if checkpoint:
            over = over and checkpoint.step >= job.train.max_steps  # else its last one is lost
            if checkpoint.data["fingerprint"] != index.fingerprint:
                problems.append(
                    f"data.dir={job.data.dir}: is not what the run in {job.run.dir} was started with "
                    f"(fingerprint {index.fingerprint[:12]}, not {checkpoint.data['fingerprint'][:12]}); "
                    "give that data, or another run.dir for another run"
                )
            # Checked before, but of what sizes alone took for whole.
            problems += continues(checkpoint.config, job.run, job.data, job.model, job.optimizer)
    checkpoint, over, problems = ranks.broadcast((checkpoint, over, problems))
    if problems:
        raise ConfigError(problems)
    return checkpoint, over


def write_run(job: TrainJob, index: Index, ranks: World) -> None:
    """Put beside the checkpoints what a run directory needs to stand alone: its config and its tokenizer.

    Raises:
        RunError: on every rank, where the first one, which writes, cannot.
    """
    run_dir, problems = Path(job.run.dir), []
    if ranks.first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            partial = run_dir / ".config.partial"
            OmegaConf.save(OmegaConf.create(asdict(job)), partial)
            os.replace(partial, run_dir / "config.yaml")
            index.tokenizer().save(run_dir / "tokenizer")
        except OSError as error:
            problems.append(f"run.dir={job.run.dir}: cannot be written: {error.filename}: {error.strerror}")
    ranks.end_on(problems)


def main() -> None:
    command("train", TrainJob, train)
    leave()


if __name__ == "__main__":
    main()
