"""Write and read events.jsonl: what has happened in a run beside its numbers, a JSON object per line.

    {"event": "start", "time": 1790000000.0, "step": 500, "tokens": 512000, "config": {...}, ...}

Kinds, with what each has beside event, time (seconds since 1970), step and tokens:

    start       origin, split, host, versions, config: where it resumes, how the work is split, and with what
    checkpoint  path, valid_loss (null where not evaluated): a checkpoint is being written
    bad_step    why, action: stop, skip or rollback
    samples     samples: a list of {"prompt": ..., "text": ...}, continuations of tracking.prompts
    end         reason: ended, preempted, rolled back or failed; detail: why, or empty
"""

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

from txl_dist.tracking.json_lines import append_line, cut, lines_backwards

log = logging.getLogger(__name__)

FILE = "events.jsonl"
KINDS = ("start", "checkpoint", "bad_step", "samples", "end")

Event = dict[str, Any]
EndReason = Literal["ended", "preempted", "rolled back", "failed"]


class EventsFile:
    """Appends to RUN_DIR/events.jsonl. What earlier starts have written stays, but for an incomplete last line."""

    def __init__(self, run_dir: str):
        self.path = Path(run_dir) / FILE
        cut(self.path, next((end for end, _ in lines_backwards(self.path, read_line)), 0))

    def append(self, event: Event) -> None:
        """Append an event.

        Raises:
            OSError: if it cannot be written; it names the file.
        """
        append_line(self.path, event)


def make_event(kind: str, step: int, tokens: int, **facts: Any) -> Event:
    """Return an event that happens now."""
    assert kind in KINDS, kind
    return {"event": kind, "time": round(time.time(), 3), "step": step, "tokens": tokens, **facts}


def read_line(line: bytes) -> Event | None:
    """Return the event of a line; None if it is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or event.get("event") not in KINDS:
        return None
    numbers = [type(event.get(key)) for key in ("step", "tokens", "time")]
    return event if numbers[:2] == [int, int] and numbers[2] in (int, float) else None


def read_events(run_dir: str, warns: bool = True) -> list[Event]:
    """Return the events of a run in their order: all starts, and of the others those that were not done again.

    A start that resumes from a step does those after it again. A line that cannot be read is left out.

    Args:
        warns: whether a warning names each of these.
    """
    path = Path(run_dir) / FILE
    lines = [line for _, line in lines_backwards(path, read_line)][::-1]
    events: list[Event] = []
    for number, event in enumerate(lines, 1):
        if event is None:
            if warns:
                log.warning("%s: line %d cannot be read, and is left out", path, number)
            continue
        if event["event"] == "start":
            events = [past for past in events if past["event"] == "start" or past["step"] <= event["step"]]
        events.append(event)
    return events
