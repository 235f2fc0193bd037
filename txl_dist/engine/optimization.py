"""Optimizers by name, and learning rates as pure functions of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from txl_dist.config import OptimizerConfig, ScheduleConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    beta1, beta2 = config.betas
    options: dict[str, Any] = {"lr": config.lr, "betas": (beta1, beta2), "eps": config.eps}
    options["weight_decay"] = config.weight_decay
    if config.name == "lamb":
        from pytorch_optimizer import Lamb

        return Lamb(parameters, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(parameters, **options)


def learning_rate(step: int, schedule: ScheduleConfig, peak: float, max_steps: int) -> float:
    """The learning rate of optimizer step `step` (the first is 0): linear warm-up to `peak`, then the schedule's shape.

    cosine and linear run from the end of the warm-up to min_lr at max_steps; inverse_sqrt is
    peak * sqrt(warmup / step) (Vaswani et al. 2017, section 5.3), never below min_lr.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, max_steps - warmup)
    if schedule.name == "cosine":
        return schedule.min_lr + (peak - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
    if schedule.name == "linear":
        return schedule.min_lr + (peak - schedule.min_lr) * (1 - done)
    if schedule.name == "inverse_sqrt":
        return max(schedule.min_lr, peak * math.sqrt(max(1, warmup) / (step + 1)))
    return peak
