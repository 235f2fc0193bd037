"""Learning rates by hand."""

import pytest

from txl_dist.config import ScheduleConfig
from txl_dist.engine.optimization import learning_rate


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
