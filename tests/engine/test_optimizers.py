"""Learning rates by hand, and by name; averages of weights."""

import pytest
import torch
from torch import nn

from txl_dist.config.schema import OptimizerConfig, ScheduleConfig
from txl_dist.engine.optimizers import build_optimizer, keep_average, learning_rate, lr_scales


def rates(name, steps, warmup=10, min_lr=0.1):
    return [learning_rate(step, ScheduleConfig(name, warmup, min_lr), 1.0, 110) for step in steps]


def test_warm_up_is_linear_and_ends_at_the_peak():
    for name in ("cosine", "linear", "inverse_sqrt", "constant"):
        assert rates(name, range(10)) == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cosine", [1.0, 0.55, 0.1]),
        ("linear", [1.0, 0.55, 0.1]),
        ("constant", [1.0, 1.0, 1.0]),
        ("inverse_sqrt", [(10 / 11) ** 0.5, (10 / 61) ** 0.5, (10 / 111) ** 0.5]),
    ],
)
def test_shape_after_the_warm_up(name, expected):
    assert rates(name, [10, 60, 110]) == pytest.approx(expected)


def test_inverse_sqrt_stays_above_its_floor():
    assert rates("inverse_sqrt", [100_000]) == [0.1]


def test_parameters_have_the_scale_of_the_first_pattern_that_matches():
    config = OptimizerConfig("adam", 1.0, [0.9, 0.999], 1e-8, 0.0, 0.0, {"bias$": 0.1, "^a": 0.5}, None)
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a.weight", "a.bias", "b.weight", "b.bias")}
    groups = build_optimizer(config, parameters, parameters).param_groups
    scales = {}
    for group in groups:
        group_parameters = set(group["params"])
        scales |= {name: group["lr_scale"] for name, parameter in parameters.items() if parameter in group_parameters}
    assert scales == {"a.weight": 0.5, "a.bias": 0.1, "b.weight": 1.0, "b.bias": 0.1}


def test_every_part_has_the_groups_of_the_whole_model():
    """In the same order, and none is empty: DeepSpeed drops those, and fails on a parameter without elements."""
    config = OptimizerConfig("adam", 1.0, [0.9, 0.999], 1e-8, 0.0, 0.0, {"bias$": 0.1, "^a": 0.5, "^z": 9.0}, None)
    names = ["a.weight", "b.weight", "b.bias", "c.weight"]
    for part in ([], names[:1], names[1:3], names[3:], names):
        parameters = {name: nn.Parameter(torch.ones(2)) for name in part}
        groups = build_optimizer(config, parameters, names).param_groups
        assert [group["lr_scale"] for group in groups] == [0.5, 1.0, 0.1]
        own = set(parameters.values())
        assert all(group["params"] for group in groups)
        stand_ins = [parameter for group in groups for parameter in group["params"] if parameter not in own]
        assert all(parameter.tolist() == [0.0] for parameter in stand_ins)


def test_the_average_is_the_mean_of_the_weights_after_the_steps_that_count():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    config = OptimizerConfig("adam", 0.5, [0.9, 0.999], 1e-8, 0.0, 0.0, {}, 3)
    optimizer = build_optimizer(config, {"w": parameter}, ["w"])
    done = 0
    weights = []
    keep_average(optimizer, lambda: done - 2)
    for done in range(1, 6):  # noqa: B007 - the average looks at it
        parameter.grad = torch.tensor([1.0, -done])
        optimizer.step()
        weights.append(parameter.detach().clone())
        expected = torch.stack(weights[2:]).mean(0) if done > 2 else weights[-1]
        torch.testing.assert_close(optimizer.state[parameter]["average"], expected)


def test_each_lower_layer_has_a_smaller_rate():
    """Yang et al. 2019, table 8: of n layers the m-th has the rate of the last, times the decay to the power n - m."""
    config = OptimizerConfig("adam", 1.0, [0.9, 0.999], 1e-8, 0.0, 0.0, {"bias$": 0.1}, None, layer_decay=0.5)
    names = ["embedding.table", "layers.0.a.weight", "layers.1.a.bias", "layers.11.a.weight", "task_head.out.weight"]
    scales = lr_scales(config, [*names, *(f"layers.{number}.b" for number in range(12))])
    assert [scales[name] for name in names] == [0.5**12, 0.5**11, 0.1 * 0.5**10, 1.0, 1.0]
