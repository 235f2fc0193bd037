"""The dashboard: one page of HTML that shows what one or several runs have recorded, and needs no network.

    RUN_DIR/metrics.jsonl, RUN_DIR/events.jsonl  ->  dashboard_data  ->  RUN_DIR/dashboard.html

tracking/schema.py says which metrics are drawn in which panel and section. The scripts and styles are in pages/.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from txl_dist.errors import UserError, describe_os_error
from txl_dist.files.atomic import atomic_file
from txl_dist.files.globs import expand_globs
from txl_dist.pages.page import render
from txl_dist.tracking import events, metrics
from txl_dist.tracking.dashboard import history
from txl_dist.tracking.dashboard.panels import MAX_GRIDS, Family, families, panel_curves, panel_grids
from txl_dist.tracking.schema import PANELS, SECTIONS

log = logging.getLogger(__name__)

FILE = "dashboard.html"
STYLES = ["vendor/uPlot.min.css", "dashboard.css"]
SCRIPTS = ["vendor/uPlot.iife.min.js", "chart.js", "heat_map.js", "dashboard.js"]

# Seconds from which on a dashboard is slow to write: then it is written so rarely while training that it takes at most
# this share of the time.
SLOW = 1.0
MAX_SHARE = 0.05


class RecordedRun:
    """What the files of a run hold; a run without them, or of an earlier version, holds less.

    Args:
        warns: whether a warning names each line that cannot be read.

    Attributes:
        lines: of metrics.jsonl.
        families: the curves of its metrics, by the key of the metric in the schema.
    """

    def __init__(self, run_dir: str, warns: bool):
        self.path = run_dir
        self.name = printable(Path(run_dir).resolve().name)
        self.lines = metrics.read_metrics(run_dir, warns)
        self.events = events.read_events(run_dir, warns)
        self.families: dict[str, Family] = families(self.lines)
        times = [record.get("time") for record in chain(self.lines, self.events)]
        self.clock = history.TrainingClock(times, (event["time"] for event in self.starts))

    @property
    def starts(self) -> list[events.Event]:
        """Return the events that are starts."""
        return [event for event in self.events if event["event"] == "start"]

    def describe(self, drawn_rows: Iterable[int]) -> dict[str, Any]:
        """Return what the page says of this run, with the axes of the rows that its curves have."""
        rows = sorted(drawn_rows)
        positions = [history.position(self.lines[row], self.clock) for row in rows]
        last = history.position(self.lines[-1], self.clock) if self.lines else None
        return {
            "name": self.name,
            "path": printable(self.path),
            "rows": rows,
            "axes": {axis: [place[axis] for place in positions] for axis in ("tokens", "step", "seconds")},
            "last": last,
            "max_steps": max_steps(self.starts),
            "state": state(self.events),
            "marks": history.marks(self.events, self.clock),
            "starts": history.starts(self.events, self.clock),
            "samples": history.samples(self.events, self.clock),
        }


def dashboard_data(run_dirs: list[str], warns: bool = False) -> dict[str, Any]:
    """Return what the page shows of some runs, as JSON can hold it: only panels and sections that have data.

    A line or an event that cannot be read is left out.

    Args:
        warns: whether a warning names each of them.

    Raises:
        UserError: if a path where a file of a run should be is not a file.
        OSError: if a file cannot be read.
    """
    runs = [RecordedRun(run_dir, warns) for run_dir in run_dirs]
    name_apart(runs)
    sections = [section for name in SECTIONS if (section := section_data(name, runs))["panels"]]
    panels = list(chain.from_iterable(section["panels"] for section in sections))
    return {
        "title": title(runs),
        "sections": sections,
        "runs": [run.describe(rows_of(number, panels)) for number, run in enumerate(runs)],
        "differences": config_differences(runs),
    }


def name_apart(runs: list[RecordedRun]) -> None:
    """Name runs by their paths where folders of different places have the same name."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        for run in runs:
            run.name = printable(run.path)


def title(runs: list[RecordedRun]) -> str:
    """Return the title of the page."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def section_data(section: str, runs: list[RecordedRun]) -> dict[str, Any]:
    """Return the panels of a section that have data."""
    panels = []
    for panel in PANELS:
        curves: list[dict[str, Any]] = []
        grids: list[dict[str, Any]] = []
        if panel.section == section:
            for number, run in enumerate(runs):
                curves += panel_curves(panel, run.families, number, len(runs) > 1)
                grids += panel_grids(panel, run.families, number, run.lines, max(1, MAX_GRIDS // len(runs)))
        if curves or grids:
            panels.append(
                {"title": panel.title, "unit": panel.unit, "better": panel.better, "curves": curves, "grids": grids}
            )
    return {"title": section, "panels": panels}


def rows_of(run: int, panels: Iterable[dict[str, Any]]) -> set[int]:
    """Return the rows of a run's lines that its curves have."""
    rows: set[int] = set()
    for panel in panels:
        for curve in panel["curves"]:
            if curve["run"] == run:
                rows.update(curve["rows"])
                rows.update(curve["means"]["rows"] if "means" in curve else ())
    return rows


def config_differences(runs: list[RecordedRun]) -> list[dict[str, Any]]:
    """Return the keys in which the configs of the runs' last starts differ, but for their run directories."""
    configs = [history.config_of(run.starts[-1]) if run.starts else {} for run in runs]
    rows = history.differences(configs) if sum(map(bool, configs)) > 1 else []
    return [row for row in rows if row["key"] != "run.dir"]


def max_steps(starts: list[events.Event]) -> int | None:
    """Return the steps that a run is to have, by its last start; None where that is not known."""
    config = history.config_of(starts[-1]) if starts else {}
    steps = config.get("train.max_steps", "")
    return int(steps) if steps.isdecimal() else None


def state(recorded: list[events.Event]) -> str:
    """Return whether a run is under way, or how its last start has ended; empty where that is not known."""
    if not recorded:
        return ""
    last = recorded[-1]
    return str(last.get("reason", "")) if last["event"] == "end" else "under way"


def printable(text: str) -> str:
    """Return a path without the lone surrogates that UTF-8 cannot have."""
    return text.encode(errors="backslashreplace").decode()


# ------------------------------------------------------------------------------------------------------ the page


def dashboard_page(data: dict[str, Any]) -> str:
    """Return the HTML of a dashboard."""
    return render(data["title"], data, STYLES, SCRIPTS)


def write_page(run_dirs: list[str], path: Path, warns: bool = True) -> None:
    """Write the dashboard of some runs to a file, which appears complete.

    Args:
        warns: as for `dashboard_data`.

    Raises:
        UserError, OSError: as `dashboard_data`, and if it cannot be written.
    """
    page = dashboard_page(dashboard_data(run_dirs, warns))
    with atomic_file(path) as temporary:
        temporary.write_text(page, "utf-8")


def write_dashboard(run_dir: str, warns: bool = True) -> Path:
    """Write RUN_DIR/dashboard.html, and return its path.

    Args:
        warns: as for `dashboard_data`.

    Raises:
        UserError, OSError: as `write_page`.
    """
    path = Path(run_dir) / FILE
    write_page([run_dir], path, warns)
    return path


class DashboardFile:
    """Writes RUN_DIR/dashboard.html while training. Where that fails training continues, and one warning says why."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir
        self.due = 0.0
        self.has_warned = False

    def update(self) -> None:
        """Write it, unless it is slow to write and was written not long ago."""
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> None:
        """Write it."""
        began = time.monotonic()
        try:
            write_dashboard(self.run_dir, warns=False)  # the end of the start names damaged lines, once
        except (OSError, UserError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            if not self.has_warned:
                log.warning("the dashboard cannot be written (%s); training continues", reason)
            self.has_warned = True
        seconds = time.monotonic() - began
        if seconds > SLOW:
            self.due = began + seconds / MAX_SHARE


def recorded_runs(patterns: Iterable[str]) -> list[str]:
    """Expand paths and globs to run directories; a glob matches those that have recorded something."""
    return expand_globs(patterns, accepts=lambda path: any(recorded_files(path)))


def recorded_files(run_dir: str) -> Iterator[Path]:
    """Yield the files of a run directory that the dashboard shows."""
    for name in (metrics.FILE, events.FILE):
        path = Path(run_dir) / name
        if path.is_file():
            yield path


def recorded_version(run_dirs: list[str]) -> str:
    """Return a text that is another one as soon as there is more to show of the runs."""
    files = [path for run_dir in run_dirs for path in recorded_files(run_dir)]
    stats = [(str(path), path.stat()) for path in files]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
