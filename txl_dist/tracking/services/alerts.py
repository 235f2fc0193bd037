"""The alerts of a run: the events that somebody who does not look at it wants to hear of."""

from typing import Literal, NamedTuple

from txl_dist.tracking.events import Event

ENDS: dict[str, tuple[str, "Level"]] = {
    "ended": ("Training has ended", "INFO"),
    "preempted": ("Training was preempted", "WARN"),
    "rolled back": ("Training goes back to its last checkpoint", "WARN"),
    "failed": ("Training has failed", "ERROR"),
}

Level = Literal["INFO", "WARN", "ERROR"]


class Alert(NamedTuple):
    """A title, a line of text, and how bad it is."""

    title: str
    text: str
    level: Level


def alert_of(event: Event) -> Alert | None:
    """Return the alert of a bad step or of the end of a start; None of any other event."""
    step = f"step {event['step']:,}"
    if event["event"] == "bad_step":
        return Alert("Bad step", f"{step}: {event['why']} ({event['action']})", "WARN")
    if event["event"] == "end":
        title, level = ENDS[event["reason"]]
        return Alert(title, f"{step}: {event['detail']}" if event["detail"] else step, level)
    return None
