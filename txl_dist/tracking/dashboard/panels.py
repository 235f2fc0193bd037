"""The curves and heat maps of the dashboard, made of the lines of metrics.jsonl by tracking/schema.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from txl_dist.tracking.dashboard.thinning import means, thin
from txl_dist.tracking.schema import Metric, Panel, find_metric

MAX_POINTS = 1500  # of a curve
MAX_MEMBER_POINTS = 400  # of a curve that is one of a family
MAX_GRIDS = 40  # steps at which heat maps are there, of all runs together

Line = dict[str, Any]


@dataclass
class Curve:
    """The values of one metric: the row of each in its run's lines, and the value there."""

    key: str
    rows: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class Family:
    """The curves of one metric of the schema, in the order of their keys."""

    metric: Metric
    curves: list[Curve] = field(default_factory=list)

    def words(self, curve: Curve) -> dict[str, str]:
        """Return what distinguishes a curve from the others."""
        return self.metric.match(curve.key) or {}

    @property
    def is_of_heads(self) -> bool:
        """Return whether there is a curve for each head: too many for a chart, so they become heat maps."""
        return "{head}" in self.metric.key

    def label(self, curve: Curve) -> str:
        """Return the label of a curve."""
        return self.metric.label.format(**self.words(curve))

    def averages(self) -> Iterator[tuple[str, Curve]]:
        """Yield labelled means over the heads: of each layer or, where there are distances, of each distance."""
        words_of_group = [word for word in self.words(self.curves[0]) if word != "head"]
        word = words_of_group[-1]
        groups: dict[str, list[Curve]] = {}
        for curve in self.curves:
            groups.setdefault(self.words(curve)[word], []).append(curve)
        for name, members in groups.items():
            yield f"{word} {name}", mean_curve(f"{self.metric.key} {word} {name}", members)


def families(lines: list[Line]) -> dict[str, Family]:
    """Return the families of all metrics that are in some line, by their key in the schema."""
    curves: dict[str, Curve] = {}
    for row, line in enumerate(lines):
        for key, value in line.items():
            curve = curves.get(key)
            if curve is None:
                curve = curves[key] = Curve(key)
            curve.rows.append(row)
            curve.values.append(value)
    found: dict[str, Family] = {}
    for key in sorted(curves, key=natural_order):
        metric = find_metric(key)
        if metric is not None:
            found.setdefault(metric.key, Family(metric)).curves.append(curves[key])
    return found


def natural_order(key: str) -> list[str | int]:
    """Return a key to sort by, with which layer.2 stands before layer.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", key)]


def mean_curve(key: str, members: list[Curve]) -> Curve:
    """Return the mean of curves, in the rows in which any of them has a value."""
    totals: dict[int, list[float]] = {}
    for member in members:
        for row, value in zip(member.rows, member.values, strict=True):
            totals.setdefault(row, []).append(value)
    rows = sorted(totals)
    return Curve(key, rows, [sum(totals[row]) / len(totals[row]) for row in rows])


# ------------------------------------------------------------------------------------------------------- curves


def panel_curves(panel: Panel, found: dict[str, Family], run: int, several: bool) -> Iterator[dict[str, Any]]:
    """Yield the curves of a run in a panel, as the page draws them.

    Args:
        run: the number of the run.
        several: whether other runs are drawn beside it: then a family is one curve, its mean, or left out where the
            panel has another curve that stands for it.
    """
    present = [found[metric.key] for metric in panel.metrics if metric.key in found]
    for family in present:
        if not family.metric.is_family:
            yield drawn(family.curves[0], family.label(family.curves[0]), family, run, MAX_POINTS)
        elif several:
            if not family.is_of_heads and len(present) == 1:
                yield drawn(mean_curve(family.metric.key, family.curves), "mean", family, run, MAX_POINTS)
        else:
            yield from member_curves(family, run)


def member_curves(family: Family, run: int) -> Iterator[dict[str, Any]]:
    """Yield the curves of a family, or of its means over heads; each knows its place, from 0 to 1, for its colour."""
    if family.is_of_heads:
        labelled = list(family.averages())
    else:
        labelled = [(family.label(curve), curve) for curve in family.curves]
    for number, (label, curve) in enumerate(labelled):
        place = number / max(1, len(labelled) - 1)
        yield drawn(curve, label, family, run, MAX_MEMBER_POINTS) | {"place": round(place, 3)}


def drawn(curve: Curve, label: str, family: Family, run: int, limit: int) -> dict[str, Any]:
    """Return a curve with as many points as are drawn, and the means of a long one, of which it is smoothed."""
    described: dict[str, Any] = {
        "run": run,
        "key": curve.key,
        "metric": family.metric.key,
        "label": label,
        "meaning": family.metric.meaning,
    }
    places = thin(curve.values, limit)
    described["rows"] = [curve.rows[place] for place in places]
    described["values"] = [rounded(curve.values[place]) for place in places]
    if len(curve.values) > limit:
        middles, averages = means(curve.values, limit)
        described["means"] = {
            "rows": [curve.rows[place] for place in middles],
            "values": [rounded(value) for value in averages],
        }
    return described


def rounded(value: float, digits: int = 6) -> float | None:
    """Return a number with as many digits as are shown; None, which JSON has, for one that is not finite."""
    return float(f"{value:.{digits}g}") if isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- heat maps


def panel_grids(
    panel: Panel, found: dict[str, Family], run: int, lines: list[Line], limit: int
) -> Iterator[dict[str, Any]]:
    """Yield the heat maps of a run in a panel: its heads at each of at most `limit` logged steps, the last one too."""
    for metric in panel.metrics:
        if metric.key in found and found[metric.key].is_of_heads:
            yield heat_map(found[metric.key], run, lines, limit)


def heat_map(family: Family, run: int, lines: list[Line], limit: int) -> dict[str, Any]:
    """Return blocks of cells, and the values of each block, row by row, at each step.

    Heads of layers are one block, layers x heads; where there are distances, too, each layer is a block, heads x
    distances.
    """
    logged = sorted({row for curve in family.curves for row in curve.rows})
    shown = evenly(logged, limit)
    *outer, row_word, column_word = family.words(family.curves[0])
    blocks: dict[str, list[Curve]] = {}
    for curve in family.curves:
        words = family.words(curve)
        blocks.setdefault(" ".join(f"{word} {words[word]}" for word in outer), []).append(curve)
    return {
        "run": run,
        "metric": family.metric.key,
        "meaning": family.metric.meaning,
        "column": column_word,
        "steps": [{"step": lines[row]["step"], "tokens": lines[row]["tokens"]} for row in shown],
        "blocks": [
            {"title": title, **block_of(family, curves, row_word, column_word, shown)}
            for title, curves in blocks.items()
        ],
    }


def block_of(family: Family, curves: list[Curve], row_word: str, column_word: str, shown: list[int]) -> dict[str, Any]:
    """Return the labels of a block, and its values at the rows that are shown: None for a cell without."""
    cells = {}
    for curve in curves:
        words = family.words(curve)
        cells[words[row_word], words[column_word]] = dict(zip(curve.rows, curve.values, strict=True))
    labels = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))

    def value(label: str, column: str, at: int) -> float | None:
        return rounded(cells.get((label, column), {}).get(at, nan), 3)

    return {
        "rows": [f"{row_word} {label}" for label in labels],
        "columns": columns,
        "values": [[[value(label, column, at) for column in columns] for label in labels] for at in shown],
    }


def evenly(items: list[int], limit: int) -> list[int]:
    """Return at most `limit` of some items, evenly spread, the last one among them."""
    count = len(items)
    if count <= limit:
        return items
    return [items[count - 1 - (limit - 1 - number) * (count - 1) // max(1, limit - 1)] for number in range(limit)]
