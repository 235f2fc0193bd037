"""Bad steps: a loss or gradient that is not finite, or a loss that is a spike; and what training does about them.

    guard.on_bad_step   found                                    what happens
    stop                at the next logged step or checkpoint    the run ends
    rollback            at the next logged step or checkpoint    the run resumes from its last checkpoint, and skips it
    skip                before the update                        the step is skipped

A *skipped* step makes no update: weights and optimizer states stay. It counts as done, and its text as read. The steps
to be skipped stand in RUN_DIR/skipped_steps.json; a start skips them without judging them again, so that it is the same
run. No checkpoint is written while a step is not judged yet, so none holds the weights that a bad step has left.

With fp16 a gradient that is not finite is not an anomaly: DeepSpeed's loss scale is too high then, and it skips the
update itself. There the loss alone is judged.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from txl_dist.checkpoint.format import Checkpoint
from txl_dist.config.schema import GuardConfig
from txl_dist.data.segments import Plan
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine.skipped_steps import SKIPPED_FILE, read_skipped_steps, write_skipped_steps
from txl_dist.errors import UserError, describe_os_error

MAD_TO_STD = 1.4826  # x the median absolute deviation = the standard deviation, of a normal distribution
LANES_SHOWN = 8

LaneLoss = tuple[int, float]


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step whose update training must not keep.

    Attributes:
        step: its number as in the log, from 1.
        why: what is wrong with it.
        lanes: those whose loss is not finite or, where all are finite, the three with the highest; and their losses.
        action: what training does about it.
    """

    step: int
    why: str
    lanes: Sequence[LaneLoss]
    action: Literal["stop", "skip", "rollback"]


class AnomalyDetected(Exception):
    """Raised on all ranks alike where training must stop or roll back because of a bad step."""

    def __init__(self, bad_step: BadStep):
        super().__init__(f"step {bad_step.step}: {bad_step.why}")
        self.bad_step = bad_step


class StepReading(NamedTuple):
    """A step as one rank sees it; the losses are those of its lanes, [micro-batches] of [rows], none without a loss."""

    step: int
    lane_losses: list[Tensor]
    grad_norm: float | Tensor


class AnomalyGuard:
    """Judges the steps of one start of a run. All ranks judge alike, by the losses of all lanes.

    Args:
        lanes: whose losses this rank computes, in the order of its rows.
        num_lanes: of all ranks.
        fp16: whether DeepSpeed scales the loss.

    Attributes:
        losses: of the last guard.window good steps, where guard.spike is given; a checkpoint keeps them.
        skipped: the steps of the run that make no update, each with its reason.
        lane_losses: of the current step, [micro-batches] of [rows]; whoever computes them appends here.
        vetoed: whether the current step makes no update; None until that is known.
        bad_step: the current step, where it was found to be bad and is skipped.
    """

    def __init__(
        self, config: GuardConfig, run_dir: str, group: ProcessGroup, lanes: Sequence[int], num_lanes: int, fp16: bool
    ):
        self.config = config
        self.run_dir = run_dir
        self.group = group
        self.lanes = lanes
        self.num_lanes = num_lanes
        self.fp16 = fp16
        self.skipped = self._read_skipped()
        self.losses: deque[float] = deque(maxlen=config.window)
        self.step = 0
        self.lane_losses: list[Tensor] = []
        self.vetoed: bool | None = None
        self.bad_step: BadStep | None = None
        self._pending: list[StepReading] = []

    def start_step(self, step: int) -> None:
        """Prepare for a step, numbered as in the log, from 1."""
        self.step = step
        self.lane_losses = []
        self.bad_step = None
        self.vetoed = None
        if step in self.skipped:
            self.vetoed = True
        elif self.config.on_bad_step != "skip":
            self.vetoed = False

    def vetoes_update(self, grad_norm: float | Tensor) -> bool:
        """Return whether the current step must make no update; every rank must call it.

        Args:
            grad_norm: of the whole model's gradient, before clipping.
        """
        if self.vetoed is None:
            self.bad_step = self._judge(StepReading(self.step, self.lane_losses, grad_norm))
            self.vetoed = self.bad_step is not None
        return self.vetoed

    def finish_step(self, grad_norm: float | Tensor) -> None:
        """Record that the current step is done; every rank must call it.

        Raises:
            AnomalyDetected: where it is skipped, and guard.max_bad_steps is exceeded.
        """
        if self.config.on_bad_step == "skip":
            self.vetoes_update(grad_norm)  # DeepSpeed does not ask where it has skipped the update itself
            if self.bad_step:
                self._record_skipped(self.bad_step)
        elif not self.vetoed:
            self._pending.append(StepReading(self.step, self.lane_losses, grad_norm))

    def raise_pending(self) -> None:
        """Judge all steps that are not judged yet; every rank must call it.

        Raises:
            AnomalyDetected: for the first bad one.
        """
        readings = self._pending
        self._pending = []
        for reading in readings:
            bad_step = self._judge(reading)
            if bad_step is None:
                continue
            if bad_step.action == "rollback":
                self._record_skipped(bad_step)
            raise AnomalyDetected(bad_step)

    def metrics(self) -> dict[str, int]:
        """Return how many steps have been skipped so far, if any."""
        count = sum(step <= self.step for step in self.skipped)
        return {"train/skipped_steps": count} if count else {}

    def _judge(self, reading: StepReading) -> BadStep | None:
        losses = torch.cat(reading.lane_losses).double() if reading.lane_losses else torch.zeros(0)
        norm = float(reading.grad_norm)
        wrong = not math.isfinite(norm) or norm < 0  # DeepSpeed's -1 is a norm that is not finite
        total, ranks_with_wrong_norm = self.group.sum(losses.sum(), wrong)
        why = self._find_anomaly(total / self.num_lanes, ranks_with_wrong_norm > 0 and not self.fp16)
        if why is None:
            return None
        by_rank = self.group.all_gather(list(zip(self.lanes, losses.tolist(), strict=False)))
        return BadStep(reading.step, why, worst_lanes(by_rank), self.config.on_bad_step)

    def _find_anomaly(self, loss: float, wrong_norm: bool) -> str | None:
        """Return what is wrong with a step; None, and its loss is remembered, where it is good."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if wrong_norm:
            return f"the loss is {loss:.4f}, but the gradient is not finite"
        if self.config.spike is None:
            return None
        if len(self.losses) == self.config.window:
            middle = median(self.losses)
            deviation = MAD_TO_STD * median(abs(past - middle) for past in self.losses)
            spike_threshold = middle + self.config.spike * deviation
            if loss > spike_threshold:
                return (
                    f"the loss is {loss:.4f}, above {spike_threshold:.4f}: the median of the last "
                    f"{self.config.window} steps, {middle:.4f}, plus guard.spike={self.config.spike:g} times their "
                    f"deviation, {deviation:.4f}"
                )
        self.losses.append(loss)
        return None

    def _read_skipped(self) -> dict[int, str]:
        """Return the steps that all ranks skip, as rank 0 reads them; every rank must call it.

        Raises:
            RunError: on every rank, where rank 0 cannot.
        """
        skipped: dict[int, str] = {}
        problems = []
        if self.group.is_rank_zero:
            try:
                skipped = read_skipped_steps(self.run_dir)
            except UserError as error:
                problems.append(str(error))
        self.group.raise_if_any_failed(problems)
        return self.group.broadcast(skipped)

    def _record_skipped(self, bad_step: BadStep) -> None:
        """Add a step to skipped_steps.json; every rank must call it.

        Raises:
            AnomalyDetected: where guard.max_bad_steps of the last guard.window steps is exceeded.
            RunError: on every rank, where rank 0, which writes, cannot.
        """
        window = range(bad_step.step - self.config.window + 1, bad_step.step)
        bad_steps = 1 + sum(step in window for step in self.skipped)
        if bad_steps > self.config.max_bad_steps:
            raise AnomalyDetected(dataclasses.replace(bad_step, action="stop"))
        self.skipped[bad_step.step] = bad_step.why
        problems = []
        if self.group.is_rank_zero:
            try:
                write_skipped_steps(self.run_dir, self.skipped)
            except OSError as error:
                path = Path(self.run_dir, SKIPPED_FILE)
                problems.append(f"{path}: cannot be written: {describe_os_error(error)}")
        self.group.raise_if_any_failed(problems)


def worst_lanes(by_rank: list[list[LaneLoss]]) -> list[LaneLoss]:
    """Return the lanes whose loss is not finite or, where all are finite, the three with the highest."""
    lanes = [lane_loss for lane_losses in by_rank for lane_loss in lane_losses]
    lanes.sort(key=lambda lane_loss: -lane_loss[1])
    not_finite = [(lane, loss) for lane, loss in lanes if not math.isfinite(loss)]
    return not_finite or lanes[:3]


def describe_bad_step(bad_step: BadStep, plan: Plan, config: GuardConfig, latest: Checkpoint | None) -> str:
    """Say what is wrong with a step, in which lanes, what they read there, and what happens now; a line each."""
    lines = [f"step {bad_step.step:,}: {bad_step.why}"]
    for lane, loss in bad_step.lanes[:LANES_SHOWN]:
        lines.append(f"lane {lane}, loss {loss:.4f}: reads {plan.describe(lane, bad_step.step - 1)}")
    not_shown = len(bad_step.lanes) - LANES_SHOWN
    if not_shown > 0:
        lines.append(f"and {not_shown} more lanes")
    lines.append(describe_consequence(bad_step, config, latest))
    return "\n".join(lines)


def describe_consequence(bad_step: BadStep, config: GuardConfig, latest: Checkpoint | None) -> str:
    """Say what happens now that a step is bad."""
    start = f"from step {latest.step:,}" if latest else "from the beginning"
    if bad_step.action != config.on_bad_step:
        return f"More than guard.max_bad_steps={config.max_bad_steps} of the last {config.window} steps were bad."
    if bad_step.action == "skip":
        return "The step is skipped: it makes no update."
    if bad_step.action == "rollback":
        return f"Training resumes {start}, and skips step {bad_step.step:,}: it makes no update."
    return f"The same command resumes {start}; with guard.on_bad_step=skip or rollback it skips such steps."
