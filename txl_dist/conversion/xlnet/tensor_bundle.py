"""Read TensorFlow checkpoints of version 2 (tensor bundles) without TensorFlow, and without executing anything.

    PREFIX.index                   a LevelDB table: name -> BundleEntryProto; "" -> BundleHeaderProto
    PREFIX.data-00000-of-00002     the tensors' bytes

A table ends with a footer, which points to a block, which points to the blocks that hold the entries. A key in a block
is what it shares with the key before, and a rest. Each block and each tensor has a CRC-32C, and all are compared.
Nothing larger than the files is made.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txl_dist.conversion.xlnet.crc32c import crc32c, unmask
from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, shown

INDEX = ".index"
MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes
TRAILER = 5  # bytes behind a block: how it is compressed, and its CRC
MAX_INDEX = 1 << 26  # bytes; the large model's, with its optimizer, is 100 kB
MAX_NAME = 1000
MAX_DIM = 8

# TensorFlow's numbers of the types that weights have, as numpy and torch know them.
DTYPES = {
    1: ("<f4", torch.float32),
    2: ("<f8", torch.float64),
    14: ("<i2", torch.bfloat16),
    19: ("<f2", torch.float16),
}


class Damaged(ValueError):
    """A file of a bundle is not as it was written; the text says where."""


def find(path: Path) -> Path | None:
    """Find the bundle that a path names: its prefix, one of its files, or a folder that holds one.

    Returns:
        The prefix; None where there is none.

    Raises:
        UserError: where a folder holds several, and none is named xlnet_model.ckpt.
    """
    if path.is_dir():
        known = path / "xlnet_model.ckpt"
        if with_suffix(known, INDEX).is_file():
            return known
        prefixes = sorted(found.with_suffix("") for found in path.glob(f"*{INDEX}") if found.is_file())
        if len(prefixes) > 1:
            names = shown([prefix.name for prefix in prefixes])
            raise UserError(f"from={path}: holds several TensorFlow checkpoints ({names}); give one, without .index")
        return prefixes[0] if prefixes else None
    prefix = path.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name))
    return prefix if with_suffix(prefix, INDEX).is_file() else None


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return the path of a bundle's file; a prefix may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is.

    Attributes:
        dtype: TensorFlow's number of it.
        shard: number of the data file.
        offset, size: in it, in bytes.
        crc: of its bytes.
        sliced: whether it is stored in parts, under other names.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int | None
    sliced: bool


class TensorBundle:
    """A checkpoint of TensorFlow.

    Args:
        prefix: the path without `.index`.

    Attributes:
        entries: of all its tensors, by name.
        num_shards: how many data files it has.

    Raises:
        UserError: where its index is damaged, or data files are missing.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.entries: dict[str, Entry] = {}
        self.num_shards = 0
        path = with_suffix(prefix, INDEX)
        try:
            self._read_index(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except PARSE_ERRORS as error:
            why = str(error) if isinstance(error, Damaged) else describe(error)
            raise UserError(f"{path}: is damaged, or not an index of a TensorFlow checkpoint: {why}") from error
        missing = [path for path in self.shards if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: is missing; a TensorFlow checkpoint is its index and all its data files")

    def _read_index(self, path: Path) -> None:
        if path.stat().st_size > MAX_INDEX:
            raise Damaged(f"it has {path.stat().st_size:,} bytes; an index has {MAX_INDEX:,} at most")
        for name, value in entries_of_table(path.read_bytes()):
            if name:
                self.entries[name.decode()] = parse_entry(value)
            else:
                header = dict(protobuf_fields(value))
                self.num_shards = integer(header.get(1, 0))
                if header.get(2, 0) != 0:
                    raise Damaged("it was written on a big-endian machine")
        if not 1 <= self.num_shards <= 1 << 16:
            raise Damaged(f"it cannot have {self.num_shards:,} data files")

    @cached_property
    def shards(self) -> list[Path]:
        """Return the data files."""
        count = self.num_shards
        return [with_suffix(self.prefix, f".data-{number:05d}-of-{count:05d}") for number in range(count)]

    @cached_property
    def sizes(self) -> list[int]:
        """Return the sizes of the data files, in bytes."""
        return [path.stat().st_size for path in self.shards]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by name, each as it is stored.

        Raises:
            UserError: where one is missing, is not of floats, or is damaged; or they overlap.
        """
        if sum(self.entries[name].size for name in names) > sum(self.sizes):
            raise UserError(f"{self.prefix}{INDEX}: is damaged: its tensors are larger than its data files")
        try:
            return {name: self._read_tensor(name) for name in names}
        except OSError as error:
            raise UserError(f"{error.filename or self.prefix}: cannot be read: {error.strerror or error}") from error

    def _read_tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        index = with_suffix(self.prefix, INDEX)
        if entry.sliced:
            raise UserError(f"{index}: {name} is stored in slices, of a partitioned variable, which cannot be read")
        if entry.dtype not in DTYPES:
            raise UserError(f"{index}: {name} has TensorFlow's type {entry.dtype}, which is not one of floats")
        stored, dtype = DTYPES[entry.dtype]
        expected = prod(entry.shape) * np.dtype(stored).itemsize
        if entry.size != expected:
            shape = list(entry.shape)
            raise UserError(f"{index}: is damaged: {name} of shape {shape} has {entry.size:,} bytes, not {expected:,}")
        if entry.shard >= self.num_shards:
            raise UserError(f"{index}: is damaged: {name} lies in data file {entry.shard} of {self.num_shards}")
        path = self.shards[entry.shard]
        size = self.sizes[entry.shard]
        if entry.offset + entry.size > size:
            end = entry.offset + entry.size
            raise UserError(f"{path}: is cut off: it has {size:,} bytes, but {name} ends at byte {end:,}")
        content = np.empty(entry.size, np.uint8)
        with open(path, "rb") as file:
            file.seek(entry.offset)
            if entry.size and file.readinto(content.data) != entry.size:
                raise UserError(f"{path}: is cut off in {name}")
        if entry.crc is not None and crc32c(content.data) != entry.crc:
            raise UserError(f"{path}: is damaged: the CRC of {name} is not the one that the index has")
        return torch.from_numpy(content.view(stored)).view(dtype).reshape(entry.shape)


# ------------------------------------------------------------------------------------------- LevelDB's tables


def entries_of_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries (key, value) of a table, in ascending order of their keys.

    Raises:
        Damaged: where something is not as it was written.
    """
    if len(table) < FOOTER:
        raise Damaged(f"it has only {len(table)} bytes")
    footer = table[-FOOTER:]
    (magic,) = struct.unpack("<Q", footer[-8:])
    if magic != MAGIC:
        raise Damaged("its last 8 bytes are not those that end a table; it is cut off, or something else")
    position = 0
    numbers = []
    for _ in range(4):  # two handles: of a block without use, and of the block that points to the others
        number, position = varint(footer, position)
        numbers.append(number)
    last = None
    for _, handle in entries_of_block(table, *numbers[2:]):
        offset, position = varint(handle, 0)
        size, _ = varint(handle, position)
        for key, value in entries_of_block(table, offset, size):
            if last is not None and key <= last:
                raise Damaged(f"its names are not in ascending order at {shown(key)}")
            yield key, value
            last = key


def entries_of_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries (key, value) of a block, whose CRC is compared first."""
    end = offset + size
    if size < 4 or end + TRAILER > len(table) - FOOTER:
        raise Damaged(f"a block at byte {offset:,} would have {size:,} bytes; it is cut off")
    (stored,) = struct.unpack_from("<I", table, end + 1)
    if crc32c(table[offset : end + 1]) != unmask(stored):
        raise Damaged(f"the CRC of the block at byte {offset:,} is not the stored one")
    if table[end] != 0:
        raise Damaged(f"the block at byte {offset:,} is compressed (type {table[end]}), which cannot be read")
    block = table[offset:end]
    (restarts,) = struct.unpack("<I", block[-4:])
    entries_end = size - 4 - 4 * restarts
    if entries_end < 0:
        raise Damaged(f"the block at byte {offset:,} has no room for its {restarts:,} restarts")
    position = 0
    key = b""
    while position < entries_end:
        shared, position = varint(block, position)
        rest, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or shared + rest > MAX_NAME or position + rest + length > entries_end:
            raise Damaged(f"the block at byte {offset:,} holds an entry that does not fit into it")
        key = key[:shared] + block[position : position + rest]
        position += rest
        yield key, block[position : position + length]
        position += length


# -------------------------------------------------------------------------------------------- protocol buffers


def parse_entry(message: bytes) -> Entry:
    """Parse a BundleEntryProto."""
    values: dict[int, Any] = {}
    shape: list[int] = []
    sliced = False
    for number, value in protobuf_fields(message):
        if number == 2:
            shape += [
                integer(dict(protobuf_fields(dim)).get(1, 0)) for field, dim in protobuf_fields(value) if field == 2
            ]
        sliced = sliced or number == 7
        values[number] = value
    if len(shape) > MAX_DIM or any(size >= 1 << 62 for size in shape):
        raise Damaged(f"a tensor cannot have the shape {shown(shape)}")
    dtype, shard, offset, size = (integer(values.get(number, 0)) for number in (1, 3, 4, 5))
    crc = unmask(struct.unpack("<I", values[6])[0]) if 6 in values else None
    return Entry(dtype, tuple(shape), shard, offset, size, crc, sliced)


def integer(value: Any) -> int:
    """Return a field's value if it is a number.

    Raises:
        Damaged: where it is something else.
    """
    if not isinstance(value, int):
        raise Damaged("a number is stored as something else")
    return value


def protobuf_fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yield the fields (number, value) of a message in wire format: numbers, or bytes."""
    if not isinstance(message, bytes):
        raise Damaged("a message is stored as a number")
    position = 0
    while position < len(message):
        key, position = varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = varint(message, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Damaged(f"a field has the unknown type {kind}")
        if position + length > len(message):
            raise Damaged("a message is cut off")
        yield key >> 3, message[position : position + length]
        position += length


def varint(content: bytes, position: int) -> tuple[int, int]:
    """Read a number of 7 bits per byte, the lowest first; return it, and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(content):
            raise Damaged("a number is cut off")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise Damaged("a number has too many digits")
