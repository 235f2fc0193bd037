"""An index that is damaged, contradicts itself or does not fit its files is refused with the file's name."""

import functools
import json
import re
from pathlib import Path

import pytest

from txl_dist.data.index import Index
from txl_dist.errors import UserError


def increment(path: Path, *keys: str | int):
    """Add one to a number deep in index.json, which has no SHA-256 of its own, as in earlier versions."""
    index = json.loads(path.read_text())
    del index["sha256"]
    container = functools.reduce(lambda value, key: value[key], keys[:-1], index)
    container[keys[-1]] += 1
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "keys, expected",
    [
        (("version",), "is not the index of a txl_dist dataset, version 1"),
        (("sample_tokens",), "split train: 213 tokens do not make 14 samples of 17"),
        (("shard_samples",), "before the last does not have 4 samples"),
        (("splits", "train", "tokens"), "tokens of its shards do not add up to 214"),
        (("splits", "train", "samples"), "samples of its shards do not add up"),
        (("splits", "train", "shards", 1, "documents"), "documents of its shards do not add up"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copy, keys, expected):
    increment(copy / "index.json", *keys)
    with pytest.raises(UserError, match=f"index.json.*{expected}"):
        Index.open(str(copy))


def test_damaged_files_beside_the_shards_are_named(copy):
    for name in ("train/samples.npy", "valid/documents.npy"):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: SHA-256 differs from index.json"):
            Index.open(str(copy))
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            Index.open(str(copy))
        (copy / name).write_bytes(data)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: SHA-256 differs"):
        Index.open(str(copy)).tokenizer()
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace(Index.open(str(copy)).splits["train"].shards[2].sha256, "0" * 64))
    with pytest.raises(UserError, match=r"index.json: is damaged \(its SHA-256 is \w{12}, not \w{12}\)"):
        Index.open(str(copy))
    without = re.sub(r',\s*"sha256": "\w+"\s*}\s*$', "}", (copy / "index.json").read_text())
    (copy / "index.json").write_text(without)
    with pytest.raises(UserError, match=r"fingerprint is not that of its shards"):
        Index.open(str(copy))
    (copy / "index.json").write_text(text[:-10])
    with pytest.raises(UserError, match=r"index.json: is damaged"):
        Index.open(str(copy))
    with pytest.raises(UserError, match=r"no dataset can be read here .* -m txl_dist.prepare data.dir="):
        Index.open(str(copy / "nothing"))
