"""Long curves with few points, and noisy ones smoothed: what the dashboard and the picture of a run draw."""

from collections.abc import Iterator
from itertools import accumulate
from math import isfinite, nan

SMOOTHING = 0.02  # of a curve's points, on each side: what the picture shows, and the dashboard at first


def thin(values: list[float], limit: int) -> list[int]:
    """Return the positions of at most about `limit` values that keep the shape of a curve.

    Of each of many stretches stay the smallest value, the largest and one that is not finite; so do the first value of
    the curve and the last.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for start, stop in stretches(len(values), limit // 3):
        stretch = values[start:stop]
        finite = [value for value in stretch if isfinite(value)]
        if finite:
            kept.add(start + stretch.index(min(finite)))
            kept.add(start + stretch.index(max(finite)))
        if len(finite) < len(stretch):
            kept.add(next(place for place in range(start, stop) if not isfinite(values[place])))
    return sorted(kept)


def means(values: list[float], limit: int) -> tuple[list[int], list[float]]:
    """Return the middle positions and the means of the same stretches as `thin` has: what a smoothed curve is made of.

    A mean is that of the finite values; NaN where there is none.
    """
    middles = []
    averages = []
    for start, stop in stretches(len(values), limit // 3):
        finite = [value for value in values[start:stop] if isfinite(value)]
        middles.append((start + stop - 1) // 2)
        averages.append(sum(finite) / len(finite) if finite else nan)
    return middles, averages


def stretches(count: int, number: int) -> Iterator[tuple[int, int]]:
    """Cut `count` positions into stretches of equal lengths; yield where each starts and stops."""
    for stretch in range(number):
        yield count * stretch // number, count * (stretch + 1) // number


def smooth(values: list[float], share: float = SMOOTHING) -> list[float]:
    """Return for each value the mean of those around it: so many on each side as `share` of all, twice over.

    At the beginning the window is as wide to the right as to the left, so that a steep start is not flattened. What is
    not finite is left out of the means, and stays. A curve of few points stays as it is. dashboard's chart.js does the
    same.
    """
    width = round(share * len(values))
    return moving_mean(moving_mean(values, width), width) if width else values


def moving_mean(values: list[float], width: int) -> list[float]:
    """Return the mean of each value and those up to `width` before and behind it."""
    sums = [0.0, *accumulate(value if isfinite(value) else 0.0 for value in values)]
    counts = [0, *accumulate(map(isfinite, values))]
    averages = []
    for place, value in enumerate(values):
        reach = min(width, place)
        start = place - reach
        stop = min(place + reach + 1, len(values))
        averages.append((sums[stop] - sums[start]) / (counts[stop] - counts[start]) if isfinite(value) else value)
    return averages
