"""What has happened in a run, as the dashboard shows it: its starts, marks on the time axis, and samples."""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from txl_dist.tracking.events import Event

MAX_SAMPLES = 30  # of the newest evaluations; events.jsonl has all
MAX_DEPTH = 4  # of a config's sections; what is deeper is one value

Config = dict[str, str]  # dotted key -> JSON of its value


class TrainingClock:
    """Tells how long a run had trained at a moment: the time between two starts does not count.

    The time of a start ends with the last that is known of it, so a start that was killed has an end, too.

    Args:
        times: of all lines and events, in seconds since 1970.
        starts: of the events `start`; where the first is missing, it is the first time.
    """

    def __init__(self, times: Iterable[Any], starts: Iterable[Any]):
        known = sorted(time for time in times if is_time(time))
        self.begins = sorted(time for time in starts if is_time(time))
        if known and (not self.begins or known[0] < self.begins[0]):
            self.begins.insert(0, known[0])
        self.ends = [known[bisect_right(known, limit) - 1] for limit in self.limits(known)]
        self.before = [0.0]  # seconds of training before each start
        for begin, end in zip(self.begins, self.ends, strict=True):
            self.before.append(self.before[-1] + max(0.0, end - begin))

    def limits(self, known: list[float]) -> Iterator[float]:
        """Yield up to when the times of each start reach: just before the next one, or to the last."""
        for following in self.begins[1:]:
            yield math.nextafter(following, 0)
        yield from known[-1:]

    def seconds(self, time: Any) -> float | None:
        """Return the seconds of training up to a time; None where it is not known."""
        if not is_time(time) or not self.begins:
            return None
        start = max(0, bisect_right(self.begins, time) - 1)
        within = min(time, self.ends[start]) - self.begins[start]
        return round(self.before[start] + max(0.0, within), 1)


def is_time(value: Any) -> bool:
    """Return whether a value can be seconds since 1970."""
    return type(value) in (int, float) and 0 < value < 1e11


def position(record: dict[str, Any], clock: TrainingClock) -> dict[str, Any]:
    """Return where a line or an event stands on each axis of the dashboard."""
    return {
        "tokens": record["tokens"],
        "step": record["step"],
        "seconds": clock.seconds(record.get("time")),
    }


def marks(events: list[Event], clock: TrainingClock) -> list[dict[str, Any]]:
    """Return what is marked on the axes, and listed: all events but samples."""
    return [
        {"kind": event["event"], "text": describe(event), "time": clock_time(event), **position(event, clock)}
        for event in events
        if event["event"] != "samples"
    ]


def clock_time(event: Event) -> float | None:
    """Return an event's seconds since 1970; None where they cannot be that."""
    return event["time"] if is_time(event["time"]) else None


def describe(event: Event) -> str:
    """Say what an event is, in a few words."""
    kind = event["event"]
    if kind == "start":
        return join(event.get("origin"), event.get("split"))
    if kind == "checkpoint":
        loss = event.get("valid_loss")
        return f"validation loss {loss:.4f}" if type(loss) is float and math.isfinite(loss) else "not evaluated"
    if kind == "bad_step":
        return join(event.get("why"), event.get("action"))
    return join(event.get("reason"), event.get("detail"))


def join(*texts: Any) -> str:
    """Join the texts that there are."""
    return ": ".join(str(text) for text in texts if text)


def samples(events: list[Event], clock: TrainingClock) -> list[dict[str, Any]]:
    """Return the samples of the newest evaluations, newest first."""
    sampled = [event for event in events if event["event"] == "samples"]
    return [{**position(event, clock), "samples": list(texts(event))} for event in reversed(sampled[-MAX_SAMPLES:])]


def texts(event: Event) -> Iterator[dict[str, str]]:
    """Yield the prompt and the text of each sample that is one."""
    found = event.get("samples")
    for sample in found if isinstance(found, list) else []:
        if isinstance(sample, dict):
            yield {"prompt": str(sample.get("prompt", "")), "text": str(sample.get("text", ""))}


def starts(events: list[Event], clock: TrainingClock) -> list[dict[str, Any]]:
    """Describe each start: where, how split, with what, and what differs from the start before.

    The config stands where it differs from that of the start before, else None.
    """
    described: list[dict[str, Any]] = []
    before: Config | None = None
    for event in events:
        if event["event"] == "start":
            config = config_of(event)
            described.append(
                {
                    **{key: str(event.get(key, "")) for key in ("origin", "split", "host")},
                    **position(event, clock),
                    "time": clock_time(event),
                    "versions": flatten(event.get("versions")),
                    "config": None if config == before else config,
                    "changes": differences([before, config]) if before is not None else [],
                    "end": None,
                }
            )
            before = config
        elif event["event"] == "end" and described:
            described[-1]["end"] = describe(event)
    return described


def config_of(event: Event) -> Config:
    """Return the config of a start."""
    return flatten(event.get("config"))


def flatten(section: Any, prefix: str = "", depth: int = 0) -> Config:
    """Return the values of nested sections by dotted key; none for what is not a section."""
    flat: Config = {}
    for key, value in section.items() if isinstance(section, dict) else ():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and depth < MAX_DEPTH:
            flat |= flatten(value, f"{name}.", depth + 1)
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def differences(configs: list[Config]) -> list[dict[str, Any]]:
    """Return the keys in which configs differ, each with its values; None where a config does not have the key."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [{"key": key, "values": [config.get(key) for config in configs]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]
