"""Bad steps: a loss or a gradient that is not finite, or a loss that is a spike; and what training does about one.

    guard.on_bad_step   is known                                 what happens
    stop                at the next logged step or checkpoint    the run ends
    rollback            at the next logged step or checkpoint    the run goes back to its last checkpoint, then past it
    skip                before the update                        the step is passed

A step that is *passed* has no update: weights and optimizer states stay. It counts as done, and its text as read. Which
steps are passed stands in RUN_DIR/passed_steps.json; a start passes those without asking again, so that it is the same
run. No checkpoint is written while a step is unread, so none holds the weights that a bad step has left.

With fp16 a gradient that is not finite is nothing bad: DeepSpeed's loss scale is too high then, and it passes the step
itself. There the loss alone is judged.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from txl_dist.checkpoint.format import Checkpoint
from txl_dist.config.schema import SCHEMA, GuardConfig, PositiveInt
from txl_dist.data.lanes import LanePlan
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import UserError, describe_os_error
from txl_dist.files.atomic import atomic_file

PASSED_FILE = "passed_steps.json"
NORMAL = 1.4826  # x the median absolute deviation = the standard deviation, of a normal distribution


@dataclass(config=SCHEMA, frozen=True)
class PassedStep:
    """An entry of RUN_DIR/passed_steps.json. step: as the log numbers it, from 1."""

    step: PositiveInt
    why: str


def read_passed_steps(run_dir: str) -> dict[int, str]:
    """Read which steps of a run are passed, and why; none where the file is not there.

    Raises:
        UserError: where it cannot be read, or has another shape.
    """
    path = Path(run_dir) / PASSED_FILE
    remedy = 'write it as [{"step": 1200, "why": "bad text"}, ...], or remove it to pass no step'
    try:
        if not path.exists():
            return {}
        if not path.is_file():
            raise UserError(f"{path}: is not a file; {remedy}")
        entries = TypeAdapter(list[PassedStep]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{describe_os_error(error, path)}; {remedy}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"])
        raise UserError(f"{path}: {place and f'at {place}: '}{problem['msg']}; {remedy}") from error
    twice = [step for step, count in Counter(entry.step for entry in entries).items() if count > 1]
    if twice:
        raise UserError(f"{path}: step {twice[0]} stands there twice; {remedy}")
    return {entry.step: entry.why for entry in entries}


class BadStep(Exception):
    """A step with which training does not go on; raised on all ranks alike.

    Attributes:
        step: as the log numbers it, from 1.
        lanes: those whose loss is not finite or, where all are, the three with the highest; and their losses.
        action: stop, skip or rollback.
    """

    def __init__(self, step: int, why: str, lanes: list[tuple[int, float]], action: str):
        super().__init__(why)
        self.step, self.lanes, self.action = step, lanes, action


class Reading(NamedTuple):
    """A step as one rank sees it. losses: of its lanes, [micro-batches] of [rows]; empty where it computes none."""

    step: int
    losses: list[Tensor]
    norm: float | Tensor


class AnomalyGuard:
    """Judges the steps of one start of a run; all ranks judge alike, by the losses of all lanes.

    Args:
        lanes: whose losses this rank computes, in the order of its rows.
        num_lanes: of all ranks.

    Attributes:
        losses: of the last guard.window sound steps, where there is a guard.spike.
        passed: step -> why.
        bad: the step that was passed just now, if it was.
    """

    def __init__(
        self, config: GuardConfig, run_dir: str, group: ProcessGroup, lanes: Sequence[int], num_lanes: int, fp16: bool
    ):
        self.config, self.group, self.fp16 = config, group, fp16
        self.lanes, self.num_lanes = lanes, num_lanes
        self.path = Path(run_dir) / PASSED_FILE
        self.passed = group.broadcast(read_passed_steps(run_dir) if group.is_rank_zero else {})
        self.losses: deque[float] = deque(maxlen=config.window)
        self.unread: list[Reading] = []

    def begin(self, step: int) -> None:
        """A step begins, numbered from 1. What it finds in `lane_losses` at its update are all losses of its lanes."""
        self.step = step
        self.bad: BadStep | None = None
        self.lane_losses: list[Tensor] = []
        self.refused: bool | None = None
        if step in self.passed:
            self.refused = True
        elif self.config.on_bad_step != "skip":
            self.refused = False

    def refuses(self, norm: float | Tensor) -> bool:
        """Whether this step's update is not to be made; every rank asks, when the whole gradient's norm is known."""
        if self.refused is None:
            self.bad = self._judge(Reading(self.step, self.lane_losses, norm))
            self.refused = self.bad is not None
        return self.refused

    def end(self, norm: float | Tensor) -> None:
        """A step is done.

        Raises:
            BadStep: where it is passed, and is one too many.
        """
        if self.config.on_bad_step == "skip":
            self.refuses(norm)  # DeepSpeed does not ask where it has passed the step itself
            if self.bad:
                self._pass(self.bad)
        elif not self.refused:
            self.unread.append(Reading(self.step, self.lane_losses, norm))

    def check(self) -> None:
        """Read all steps that are still unread; every rank must call it.

        Raises:
            BadStep: for the first bad one.
        """
        readings, self.unread = self.unread, []
        for reading in readings:
            if bad := self._judge(reading):
                if bad.action == "rollback":
                    self._pass(bad)
                raise bad

    def metrics(self) -> dict[str, int]:
        """How many steps have been passed so far, if any."""
        count = sum(each <= self.step for each in self.passed)
        return {"train/skipped_steps": count} if count else {}

    def _judge(self, reading: Reading) -> BadStep | None:
        losses = torch.cat(reading.losses).double() if reading.losses else torch.zeros(0)
        norm = float(reading.norm)
        total, wrong = self.group.sum(losses.sum(), not (math.isfinite(norm) and norm >= 0))  # -1 is DeepSpeed's nan
        why = self._why(total / self.num_lanes, wrong > 0 and not self.fp16)
        if why is None:
            return None
        gathered: list[list[tuple[int, float]]] = [[] for _ in range(self.group.size)]
        dist.all_gather_object(gathered, list(zip(self.lanes, losses.tolist(), strict=False)))
        lanes = sorted((each for part in gathered for each in part), key=lambda each: -each[1])
        worst = [each for each in lanes if not math.isfinite(each[1])] or lanes[:3]
        return BadStep(reading.step, why, worst, self.config.on_bad_step)

    def _why(self, loss: float, wrong_norm: bool) -> str | None:
        """What is bad about a step; None where nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if wrong_norm:
            return f"the loss is {loss:.4f}, but the gradient is not finite"
        if self.config.spike is None:
            return None
        if len(self.losses) == self.config.window:
            middle = median(self.losses)
            deviation = NORMAL * median(abs(each - middle) for each in self.losses)
            if loss > (limit := middle + self.config.spike * deviation):
                return (
                    f"the loss is {loss:.4f}, above {limit:.4f}: the median of the last {self.config.window} steps, "
                    f"{middle:.4f}, and guard.spike={self.config.spike:g} times their deviation, {deviation:.4f}"
                )
        self.losses.append(loss)
        return None

    def _pass(self, bad: BadStep) -> None:
        """Write down that a step is passed; raises it where it is one too many.

        Raises:
            RunError: on every rank, where the first one, which writes, cannot.
        """
        recent = sum(bad.step - self.config.window < step < bad.step for step in self.passed) + 1
        if recent > self.config.max_bad_steps:
            bad.action = "stop"
            raise bad
        self.passed[bad.step] = str(bad)
        problems = []
        if self.group.is_rank_zero:
            try:
                self._write_passed_steps()
            except OSError as error:
                problems.append(f"{self.path}: cannot be written: {describe_os_error(error)}")
        self.group.raise_if_any_failed(problems)

    def _write_passed_steps(self) -> None:
        lines = [json.dumps({"step": step, "why": why}) for step, why in sorted(self.passed.items())]
        with atomic_file(self.path) as temporary:
            temporary.write_text("[" + ",\n ".join(lines) + "]\n")


def in_words(bad: BadStep, plan: LanePlan, config: GuardConfig, latest: Checkpoint | None) -> str:
    """What is bad about a step, in which lanes, what they read, and what happens now."""
    lanes = []
    for lane, loss in bad.lanes[:8]:
        spans = plan.spans(lane, bad.step - 1)
        begin, end = spans[0].position, spans[-1].position + spans[-1].length - 1
        first, last = (int(np.searchsorted(plan.starts, each, side="right")) - 1 for each in (begin, end))
        reads = f"document {first:,} of train from its token {begin - int(plan.starts[first]):,} on"
        lanes.append(f"lane {lane}, loss {loss:.4f}: reads {reads}{f', to document {last:,}' * (last != first)}")
    if more := len(bad.lanes) - len(lanes):
        lanes.append(f"and {more} more lanes")
    goes_on = f"from step {latest.step:,}" if latest else "from the beginning"
    now = {
        "skip": "The step is passed without an update.",
        "rollback": f"Training goes on {goes_on}, and passes step {bad.step:,} without an update.",
        "stop": f"Another start goes on {goes_on}; with guard.on_bad_step=skip or rollback it passes such steps.",
    }[bad.action]
    if bad.action != config.on_bad_step:
        now = f"More than guard.max_bad_steps={config.max_bad_steps} of the last {config.window} steps were bad."
    return "\n".join([f"step {bad.step:,}: {bad}", *lanes, now])
