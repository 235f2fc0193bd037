"""Damage the files of a dataset, with or without right checksums, and read it afterwards."""

import functools
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.datasets import STREAM
from txl_dist.data.format import content_fingerprint
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.errors import UserError
from txl_dist.files.atomic import sha256_of_file, sha256_of_json

SAMPLE_BYTES = 2048  # header and content of json, then of tokens.npy, 512 bytes each
TOKENS_START = 1536 + 128  # of the tokens in a sample
SHARD = "train/000001.tar"  # samples 3, 4, 5
SHARD_BYTES = 10240  # three samples, and zeros as tar pads its files
TOKENS_4 = STREAM[64:80]  # of sample 4


def read(folder: Path) -> list[str]:
    """Return the errors of a dataset: of all of it, or sample by sample; check that other samples have their tokens."""
    errors = []
    try:
        index = Index.open(str(folder))
        index.tokenizer()
    except UserError as error:
        return [str(error)]
    reader = SampleReader(index, "train")
    for number in range(reader.split.samples):
        try:
            assert reader.sample(number).tolist() == STREAM[number * 16 : number * 16 + 16].tolist(), number
        except UserError as error:
            errors.append(str(error))
    return errors


def check_messages(errors: list[str], expected: list[str]) -> None:
    """Check that each error matches its pattern, in one line of bounded length."""
    assert len(errors) == len(expected), errors
    for line, pattern in zip(errors, expected, strict=True):
        assert re.search(pattern, line) and "\n" not in line and " object at 0x" not in line, line
        assert len(line) < 400, line


def cut_to(size: int):
    return lambda data: data[:size]


def flip(position: int, bits: int = 1):
    return lambda data: data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def replace(old: bytes, new: bytes):
    def replaced(data: bytes) -> bytes:
        assert data.count(old) == 1, old
        return data.replace(old, new)

    return replaced


def packed(*members: tuple[str, bytes]) -> bytes:
    """Pack a sample as in a shard: a tar file without its end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        size = tar.offset
    return stream.getvalue()[:size]


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def put_instead(*members: tuple[str, bytes], at: int = 1):
    """Put another sample, as long, in the place of the at-th of a shard."""
    sample = packed(*members)
    assert len(sample) <= SAMPLE_BYTES
    start = at * SAMPLE_BYTES
    return lambda data: data[:start] + sample.ljust(SAMPLE_BYTES, b"\0") + data[start + SAMPLE_BYTES :]


def sample_of(data: bytes, at: int) -> bytes:
    return data[at * SAMPLE_BYTES : (at + 1) * SAMPLE_BYTES]


def gone(path: Path, other: Path) -> None:
    path.unlink()


def folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def from_another_dataset(path: Path, other: Path) -> None:
    shutil.copy(other / path.relative_to(path.parents[1]), path)


def unreadable(path: Path, other: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


def read_flipped(intact: Path, tmp_path_factory, name: str, position: int, bit: int) -> tuple[Path, list[str]]:
    copy = Path(shutil.copytree(intact, tmp_path_factory.mktemp("flipped") / "copy"))
    (copy / name).write_bytes(flip(position, 1 << bit)(bytes_of(intact / name)))
    errors = read(copy)
    assert all(name in line and "\n" not in line for line in errors) and len(errors) <= 1, errors
    return copy, errors


@functools.cache
def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def seal(folder: Path, change=lambda index: None, tables=("samples.npy", "documents.npy")) -> None:
    """Change a dataset's index, and make all checksums right again."""
    index = json.loads((folder / "index.json").read_text())
    for name in tables:
        index["splits"]["train"]["files"][name] = sha256_of_file(folder / "train" / name)
    for shard in index["splits"]["train"]["shards"]:
        shard["sha256"] = sha256_of_file(folder / shard["name"])
    change(index)
    if isinstance(index.get("splits"), dict):
        index["fingerprint"] = content_fingerprint(index["tokenizer"]["files"], index["splits"], index.get("examples"))
    index.pop("sha256", None)
    (folder / "index.json").write_text(json.dumps(index | {"sha256": sha256_of_json(index)}))


def assign(*keys, value):
    """Set a value within the index."""

    def change(index):
        for key in keys[:-1]:
            index = index[key]
        index[keys[-1]] = value

    return change


def change_table(path: Path, change) -> None:
    table = np.load(path)
    change(table)
    np.save(path, table)
