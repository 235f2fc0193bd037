"""A saved view of a run in W&B's project, with the sections and panels of tracking/schema.py."""

import re
from pathlib import Path
from typing import Any

from txl_dist.files.atomic import atomic_file
from txl_dist.tracking.schema import PANELS, SECTIONS, Panel

FILE = "wandb_view"  # in the run directory: the address of the view, which is made once


def make_view(run_dir: str, entity: str, project: str, name: str) -> str | None:
    """Save the view, unless it was made before, and return its address; None if it was.

    W&B draws a panel when some run has its metrics: so one view shows every run of the project.

    Raises:
        ImportError: without the package wandb-workspaces.
        Exception: whatever it raises, or W&B's server.
    """
    path = Path(run_dir) / FILE
    if path.exists():
        return None
    from wandb_workspaces import workspaces

    view = workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[build_section(section) for section in SECTIONS],
        settings=workspaces.WorkspaceSettings(x_axis="tokens"),
    )
    url: str = view.save().url
    with atomic_file(path) as temporary:
        temporary.write_text(url + "\n", "utf-8")
    return url


def build_section(section: str) -> Any:
    """Return a section of the view."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import WeavePanelSummaryTable

    panels = [build_panel(panel) for panel in PANELS if panel.section == section]
    if section == "Samples":
        panels.append(WeavePanelSummaryTable(table_name="samples"))
    return workspaces.Section(name=section, panels=panels, is_open=True)


def build_panel(panel: Panel) -> Any:
    """Return a line plot over tokens; the members of a family are found by a regular expression."""
    from wandb_workspaces.reports.v2 import LinePlot

    keys: list[Any] = [metric.key for metric in panel.metrics]
    if any(metric.is_family for metric in panel.metrics):
        return LinePlot(title=panel.title, x="tokens", metric_regex=regex(keys), title_y=panel.unit or None)
    return LinePlot(title=panel.title, x="tokens", y=keys, title_y=panel.unit or None)


def regex(keys: list[str]) -> str:
    """Return a regular expression that matches metrics and the members of families, in JavaScript and Go, too."""
    patterns = [re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(key)) for key in keys]
    return f"^({'|'.join(patterns)})$"
