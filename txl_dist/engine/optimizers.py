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
    scales = lr_scales(config, list(names))
    groups: dict[float, list[nn.Parameter]] = {scale: [] for scale in scales.values()}
    for name, parameter in parameters.items():
        groups[scales[name]].append(parameter)
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


def lr_scales(config: OptimizerConfig, names: list[str]) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter of a model.

    It is that of the first pattern of lr_scale that occurs in its name, 1 where none does, times layer_decay for each
    layer above its own (Yang et al. 2019, table 8): of n layers, counted from 0, layer l has layer_decay^(n - 1 - l),
    the embedding below them layer_decay^n, and what stands behind them 1.
    """
    depths = layer_depths(names)
    scales = {}
    for name in names:
        scale = next((scale for pattern, scale in config.lr_scale.items() if re.search(pattern, name)), 1.0)
        scales[name] = scale * config.layer_decay ** depths[name]
    return scales


def layer_depths(names: list[str]) -> dict[str, int]:
    """Return how many layers stand above that of each parameter of a model; none above what is no layer's."""
    layer_of = {name: int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    n_layer = 1 + max(layer_of.values(), default=-1)
    depths = {name: n_layer - 1 - layer for name, layer in layer_of.items()}
    return {name: depths.get(name, n_layer if name.startswith("embedding") else 0) for name in names}


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
