"""Optimizers by name, and learning rates as pure functions of the step."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from txl_dist.config.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(
    config: OptimizerConfig, parameters: dict[str, nn.Parameter], names: Iterable[str]
) -> torch.optim.Optimizer:
    """Build the optimizer of a part of a model, with one group of parameters for each `lr_scale` of the whole model.

    Every part has every group, in the same order: DeepSpeed's ZeRO 1 reduces over the pipeline's stages once per group,
    and would wait for ever for a stage that has fewer. A group without a parameter in this part holds a zero that gets
    no gradient, because DeepSpeed drops empty groups.

    Args:
        parameters: of this part, by name.
        names: of all parameters of the whole model.
    """
    groups: dict[float, list[nn.Parameter]] = {lr_scale(name, config.lr_scale): [] for name in names}
    for name, parameter in parameters.items():
        groups[lr_scale(name, config.lr_scale)].append(parameter)
    scaled = []
    for scale, members in groups.items():
        scaled.append({"params": members or [nn.Parameter(torch.zeros(1))], "lr_scale": scale})
    beta1, beta2 = config.betas
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (beta1, beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "lamb":
        from pytorch_optimizer import Lamb

        return Lamb(scaled, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(scaled, fused=True, **options)


def lr_scale(name: str, scales: dict[str, float]) -> float:
    """Return the factor of the first pattern that occurs in a parameter's name, 1 where none does."""
    return next((scale for pattern, scale in scales.items() if re.search(pattern, name)), 1.0)


def keep_average(optimizer: torch.optim.Optimizer, steps: Callable[[], int]) -> None:
    """Have an optimizer keep the mean of the weights as its state "average" (Polyak & Juditsky 1992).

    Under ZeRO it sees flat shares of the parameters, and averages those.

    Args:
        steps: returns how many steps are averaged, the current one included; below 1 the average is the weights.
    """

    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if "average" not in state:
                    state["average"] = parameter.detach().clone()
                state["average"].lerp_(parameter.detach(), 1 / max(1, steps()))

    optimizer.register_step_post_hook(average)


def learning_rate(step: int, schedule: ScheduleConfig, peak: float, max_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up to `peak`, then the schedule's shape.

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
