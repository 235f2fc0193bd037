"""W&B's own offline files, read back."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(path):
    """Yield the records of a .wandb file: after 7 bytes, log blocks of 32 KiB as LevelDB writes them."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no header fits any more: padding
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or its last piece
            yield Record.FromString(record)
            record = b""


def values(items):
    return {item.key or item.nested_key[0]: item.value_json for item in items}


def read_starts(run_dir):
    """Return what W&B has of each start of a run: its ID, config, history, summary, and records of other kinds.

    Of metrics what is defined of each, by key or glob.
    """
    starts = []
    for path in sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb")):
        start = {"id": None, "config": {}, "history": [], "summary": {}, "metric": {}, "alert": [], "artifact": []}
        start["exit"] = start["run"] = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                start["id"] = record.run.run_id
                start["run"] = record.run
            if kind in ("run", "config"):
                updates = record.run.config.update if kind == "run" else record.config.update
                start["config"] |= {item.key: item.value_json for item in updates}
            elif kind == "history":
                start["history"].append(values(record.history.item))
            elif kind == "summary":
                start["summary"] |= values(record.summary.update)
            elif kind == "metric":
                start["metric"][record.metric.name or record.metric.glob_name] = record.metric
            elif kind in ("alert", "artifact"):
                start[kind].append(getattr(record, kind))
            elif kind == "exit":
                start["exit"] = record.exit.exit_code
        starts.append(start)
    return starts


def read_samples(start):
    """Return the rows that W&B shows of the table of samples of one start: of all increments."""
    artifacts = [artifact for artifact in start["artifact"] if artifact.type == "wandb-run-incremental-table"]
    paths = [content.local_path for artifact in artifacts for content in artifact.manifest.contents]
    return [row for path in paths for row in json.loads(Path(path).read_text())["data"]]
