"""Train, or continue, a run: `torchrun --nproc_per_node=N -m txl_dist.train +experiment=quickstart`."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

from txl_dist.cli import command
from txl_dist.config import TrainJob
from txl_dist.data.lanes import LanePlan
from txl_dist.data.segments import NOT_SCORED, Segment, Segments, whole_split
from txl_dist.data.shards import Index, SampleReader
from txl_dist.engine.checkpoint import Checkpoint, newest
from txl_dist.engine.guard import BadStep, in_words
from txl_dist.engine.launch import World, leave, world
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.watchdog import Watchdog
from txl_dist.engine.zero import ZeroEngine
from txl_dist.errors import RunError
from txl_dist.models.flops import training_flops
from txl_dist.standing import standing, write_run
from txl_dist.tracking.meter import Meter
from txl_dist.tracking.profile import Profile, out_of_memory_told
from txl_dist.tracking.result import show_result
from txl_dist.tracking.skipped import Skipped
from txl_dist.tracking.tracker import Tracker


def train(job: TrainJob) -> None:
    """Train from the run's newest whole checkpoint, or from the beginning, to train.max_steps (or train.stop_at)."""
    with Watchdog(job.guard.stall_timeout) as watchdog:
        # The watchdog has more to say than the process group, whose patience ends later.
        ranks, index = world(job.guard.stall_timeout and 2 * job.guard.stall_timeout + 60), Index.open(job.data.dir)
        watchdog.meet(ranks)
        over = False
        while not over:  # it goes back to its newest checkpoint as another start would
            gc.collect()  # the engine of the start before, which refers to itself
            checkpoint, over = standing(job, index, ranks)
            with out_of_memory_told(job, ranks):
                over = over or Training(job, index, checkpoint, ranks, watchdog).run()
    if ranks.first:
        show_result(job)


class Training:
    """One start of a run: from its checkpoint's step to the last one that is asked for."""

    def __init__(self, job: TrainJob, index: Index, checkpoint: Checkpoint | None, ranks: World, watchdog: Watchdog):
        self.job, self.index, self.watchdog = job, index, watchdog
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

    def run(self) -> bool:
        """Whether the run has come to its end; else it is to go back to its newest checkpoint."""
        job, origin = self.job, f"going on from step {self.start:,}" if self.start else "starting"
        with self.tracker, self.engine.saver:
            lanes = f"{job.data.num_lanes} lanes of {job.model.tgt_len} tokens a step"
            self.tracker.screen.say(f"{job.run.dir}: {origin}; {self.engine}, {lanes}")
            try:
                self.loop()
            except BadStep as bad:
                self.engine.saver.wait()
                if bad.action == "stop":
                    raise RunError(self.told(bad).splitlines()) from bad
                self.tracker.screen.say(self.told(bad))
            else:
                if self.engine.step == job.train.max_steps and "test" in self.index.splits:
                    self.log(self.evaluate("test"))
                return True
        self.engine.close()
        return False

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
            self.watchdog.beat(f"step {engine.step}")
            metrics: dict[str, Any] = {}
            if engine.guard.bad:
                self.tracker.screen.say(self.told(engine.guard.bad))
            if self.due(job.tracking.log_every, also=self.stop):
                engine.guard.check()
                metrics |= engine.guard.metrics()
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
                    self.watchdog.beat(f"the checkpoint of step {engine.step}")
            self.tracker.screen.advance(engine.step)

    def due(self, every: int, also: int = 0) -> bool:
        return self.engine.step % every == 0 or self.engine.step == also

    def log(self, metrics: dict[str, Any]) -> None:
        self.tracker.log({"step": self.engine.step, "tokens": self.engine.tokens} | metrics)
        self.engine.world.end_on(self.tracker.problems + self.engine.saver.problems)

    def told(self, bad: BadStep) -> str:
        return in_words(bad, self.plan(), self.job.guard, newest(self.job.run.dir))

    def segments(self) -> Segments:
        data, lanes, mem_len = self.job.data, self.engine.lanes, self.job.model.mem_len
        reader = SampleReader(self.index, "train", lost=NOT_SCORED if data.on_error == "skip_sample" else None)
        return Segments(self.plan(), reader, lanes, self.index.eos, self.start, self.stop, data.workers, mem_len)

    def plan(self) -> LanePlan:
        data, split = self.job.data, self.index.splits["train"]
        return LanePlan(
            split.document_starts,
            data.num_lanes,
            self.job.model.tgt_len,
            seed=self.job.run.seed,
            order=data.order,
            reset_memory=data.reset_memory,
            origin=self.engine.origin,
        )

    def evaluate(self, name: str) -> dict[str, float]:
        """Metrics of a whole split, such as valid/loss, valid/perplexity and valid/bits_per_byte."""
        data, tgt_len = self.job.data, self.job.evaluation.of(self.job.model).tgt_len
        lanes = data.num_lanes, tgt_len, data.reset_memory, self.engine.lanes
        segments = whole_split(self.index, name, *lanes, data.workers)
        watched = self.tracker.screen.watch(segments, f"evaluating {name}", len(segments))
        score = self.engine.evaluate(self.beating(watched, f"a segment of {name}"))
        return {f"{name}/{key}": value for key, value in score.metrics(self.index.splits[name].bytes).items()}

    def beating(self, segments: Iterable[Segment], each: str) -> Iterator[Segment]:
        for segment in segments:
            yield segment
            self.watchdog.beat(each)


def main() -> None:
    command("train", TrainJob, train)
    leave()


if __name__ == "__main__":
    main()
