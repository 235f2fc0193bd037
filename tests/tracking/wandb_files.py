"""W&B's own offline files, read back."""

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
    """Return the ID, config, history and summary of each start of a run as W&B has them."""
    starts = []
    for path in sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb")):
        start = {"id": None, "config": {}, "history": [], "summary": {}}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                start["id"] = record.run.run_id
                start["config"] |= {item.key: item.value_json for item in record.run.config.update}
            elif kind == "history":
                start["history"].append(values(record.history.item))
            elif kind == "summary":
                start["summary"] |= values(record.summary.update)
        starts.append(start)
    return starts
