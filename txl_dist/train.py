"""Train, or continue, a run: `torchrun --nproc_per_node=N -m txl_dist.train +experiment=quickstart`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from txl_dist.cli import command
from txl_dist.config import TrainJob
from txl_dist.data.lanes import LanePlan
from txl_dist.data.segments import Segments, whole_split
from txl_dist.data.shards import Index, SampleReader
from txl_dist.engine.checkpoint import Checkpoint, newest
from txl_dist.engine.launch import World, leave, world
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.errors import ConfigError
from txl_dist.models.flops import training_flops
from txl_dist.tracking.meter import Meter
from txl_dist.tracking.profile import Profile
from txl_dist.tracking.result import is_tested, show_result
from txl_dist.tracking.tracker import Tracker


def train(job: TrainJob) -> None:
    """Train from the run's newest checkpoint, or from the beginning, to train.max_steps (or train.stop_at)."""
    ranks, index = world(), Index.open(job.data.dir)
    checkpoint = sound_checkpoint(job, index, ranks)
    if not is_tested(job):
        Training(job, index, checkpoint, ranks).run()
    if ranks.first:
        show_result(job)


class Training:
    """One start of a run: from its checkpoint's step to the last one that is asked for."""

    def __init__(self, job: TrainJob, index: Index, checkpoint: Checkpoint | None, ranks: World):
        self.job, self.index = job, index
        if ranks.first:
            write_run(job, index)
        engine = PipelineEngine if job.engine.pipeline_stages > 1 else ZeroEngine
        self.engine = engine(job, index.vocab_size, ranks, checkpoint)
        self.start = self.engine.step
        self.stop = min(job.train.stop_at or job.train.max_steps, job.train.max_steps)
        self.tracker = Tracker(job, self.start, self.stop, ranks.first)

    def run(self) -> None:
        job, origin = self.job, f"going on from step {self.start:,}" if self.start else "starting"
        with self.tracker:
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
        for segment in segments:
            with profile.step(engine.step + 1):
                loss = engine.train_step(segment)
            metrics: dict[str, Any] = {}
            if self.due(job.tracking.log_every, also=self.stop):
                metrics |= {"train/loss": engine.mean(loss)}
                metrics |= {"train/lr": engine.learning_rate, "train/grad_norm": engine.grad_norm}
                metrics |= meter.read(engine.step)
            with meter.paused():
                if self.due(job.train.eval_every, also=job.train.max_steps) and "valid" in self.index.splits:
                    metrics |= self.evaluate("valid")
                if metrics:
                    self.log(metrics)
                if self.due(job.train.checkpoint_every, also=self.stop):
                    engine.save({"fingerprint": self.index.fingerprint, "vocab_size": self.index.vocab_size})
            self.tracker.screen.advance(engine.step)

    def due(self, every: int, also: int = 0) -> bool:
        return self.engine.step % every == 0 or self.engine.step == also

    def log(self, metrics: dict[str, Any]) -> None:
        self.tracker.log({"step": self.engine.step, "tokens": self.engine.tokens} | metrics)

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
        reader = SampleReader(self.index, "train")
        return Segments(plan, reader, self.engine.lanes, self.index.eos, self.start, self.stop, data.workers)

    def evaluate(self, name: str) -> dict[str, float]:
        """Metrics of a whole split, such as valid/loss, valid/perplexity and valid/bits_per_byte."""
        data, tgt_len = self.job.data, self.job.evaluation.of(self.job.model).tgt_len
        lanes = data.num_lanes, tgt_len, data.reset_memory, self.engine.lanes
        segments = whole_split(self.index, name, *lanes, data.workers)
        score = self.engine.evaluate(self.tracker.screen.watch(segments, f"evaluating {name}", len(segments)))
        return {f"{name}/{key}": value for key, value in score.metrics(self.index.splits[name].bytes).items()}


def sound_checkpoint(job: TrainJob, index: Index, ranks: World) -> Checkpoint | None:
    """The run's newest checkpoint, whole and of this data; its files are read once, by the first rank, for all.

    Raises:
        ConfigError: on every rank, where it is damaged or of other data.
    """
    checkpoint, problems = newest(job.run.dir), []
    if checkpoint and ranks.first:
        if checkpoint.data["fingerprint"] != index.fingerprint:
            problems.append(
                f"data.dir={job.data.dir}: is not what the run in {job.run.dir} was started with "
                f"(fingerprint {index.fingerprint[:12]}, not {checkpoint.data['fingerprint'][:12]}); "
                "give that data, or another run.dir for another run"
            )
        problems += checkpoint.damages()
    if problems := ranks.gather(problems):
        raise ConfigError(problems)
    return checkpoint


def write_run(job: TrainJob, index: Index) -> None:
    """Put beside the checkpoints what a run directory needs to stand alone: its config and its tokenizer."""
    run_dir = Path(job.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / ".config.partial"
    OmegaConf.save(OmegaConf.create(asdict(job)), partial)
    os.replace(partial, run_dir / "config.yaml")
    index.tokenizer().save(run_dir / "tokenizer")


def main() -> None:
    command("train", TrainJob, train)
    leave()


if __name__ == "__main__":
    main()
