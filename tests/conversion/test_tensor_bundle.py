"""TensorFlow's checkpoints are read without it; damage of every kind is one line, and asks for no memory."""

import struct

import numpy as np
import pytest
import torch

from tests.conversion import xlnet_models
from tests.conversion.xlnet_models import field, masked, table, varint, write_bundle
from txl_dist.conversion.xlnet import crc32c as crc
from txl_dist.conversion.xlnet import tensor_bundle
from txl_dist.conversion.xlnet.tensor_bundle import TensorBundle
from txl_dist.errors import UserError

RNG = np.random.default_rng(1)
TENSORS = {f"layer_{i}/{name}": RNG.normal(size=(3, i + 1)).astype(np.float32) for i in range(9) for name in "abc"}
TENSORS |= {"half": np.ones(5, np.float16), "double": np.arange(3.0), "scalar": np.array(2.5, np.float32)}
TENSORS |= {"empty": np.ones((0, 4), np.float32)}


def message_of(prefix, names=None):
    with pytest.raises(UserError) as caught:
        bundle = TensorBundle(prefix)
        bundle.read(list(bundle.entries) if names is None else names)
    message = str(caught.value)
    assert str(prefix) in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_are_those_that_were_written(shards, tmp_path):
    write_bundle(tmp_path / "a.ckpt", TENSORS, shards)
    bundle = TensorBundle(tmp_path / "a.ckpt")
    tensors = bundle.read(list(bundle.entries))
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        expected = torch.from_numpy(np.array(value))
        assert tensors[name].dtype == expected.dtype and torch.equal(tensors[name], expected)
    (tmp_path / f"a.ckpt.data-{shards - 1:05d}-of-{shards:05d}").unlink()
    assert "is missing" in message_of(tmp_path / "a.ckpt")


@pytest.mark.parametrize("length", [0, 1, 31, 4 * crc.LANES + 5, 6 * crc.LANES])
def test_crc32c(length):
    assert crc.crc32c(b"123456789") == 0xE3069283
    data = RNG.bytes(length)
    assert crc.crc32c(data) == xlnet_models.crc32c(data)
    assert crc.unmask(masked(data)) == crc.crc32c(data)


def test_a_large_buffer_is_read_in_pieces(monkeypatch):
    data = RNG.bytes(5000)
    monkeypatch.setattr(crc, "PIECE", 1024)
    monkeypatch.setattr(crc, "LANES", 64)
    assert crc.crc32c(data) == xlnet_models.crc32c(data)


@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_every_flipped_byte_is_noticed(part, tmp_path):
    """But for those that nothing reads: the block without use, and what fills up the footer."""
    few = {name: TENSORS[name] for name in ("half", "layer_1/a", "scalar")}
    write_bundle(tmp_path / "a", few)
    path = tmp_path / f"a.{part}"
    content = path.read_bytes()
    footer = content[-48:]
    unused = set()
    if part == "index":
        offset, position = read_varint(footer, 0)
        size, position = read_varint(footer, position)
        _, end = read_varint(footer, read_varint(footer, position)[1])
        start = len(content) - 48
        unused = {*range(offset, offset + size + 5), *range(start, start + position), *range(start + end, start + 40)}
    for place in set(range(len(content))) - unused:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        message_of(tmp_path / "a")


def read_varint(content, position):
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 127) << shift
        shift += 7
        position += 1
        if byte < 128:
            return value, position


def test_files_that_are_cut_off_are_named(tmp_path):
    write_bundle(tmp_path / "a", TENSORS)
    for part, word in (("index", "cut off"), ("data-00000-of-00001", "is cut off")):
        path = tmp_path / f"a.{part}"
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 60, 1, 0):
            path.write_bytes(content[:length])
            message = message_of(tmp_path / "a")
            assert path.name in message or "larger than its data files" in message
            assert word in message or "only" in message or "larger than its data files" in message
        path.write_bytes(content)
    (tmp_path / "a.index").unlink()
    assert "a.index: cannot be read" in message_of(tmp_path / "a")


def test_a_compressed_index_is_refused(tmp_path):
    write_bundle(tmp_path / "a", TENSORS, compression=1)
    assert "is compressed (type 1)" in message_of(tmp_path / "a")


@pytest.mark.parametrize(
    "change, message",
    [
        (field(2, field(2, field(1, 1 << 61))), "has 60 bytes, not"),
        (field(2, b"".join([field(2, field(1, 1 << 61))] * 6)), "has 60 bytes, not"),
        (field(2, b"".join([field(2, field(1, 1))] * 9)), "cannot have the shape"),
        (field(1, 3), "type 3, which is not one of floats"),
        (field(1, 7), "type 7"),
        (field(3, 4), "lies in data file 4 of 1"),
        (field(4, 1 << 40), "is cut off"),
        (field(5, 1 << 50), "larger than its data files"),
        (field(5, 8), "has 8 bytes, not 60"),
        (field(7, b"\n\2\10\1"), "in slices"),
        (field(1, b"xx"), "a number is stored as something else"),
        (field(2, 5), "a message is stored as a number"),
        (varint(9 << 3 | 3), "unknown type 3"),
        (varint(9 << 3 | 2) + varint(1 << 40), "a message is cut off"),
        (b"\xff" * 12, "too many digits"),
    ],
)
def test_an_entry_that_lies_is_refused(change, message, tmp_path):
    write_bundle(tmp_path / "a", TENSORS, edit_entry=lambda name, entry: entry + change * (name == "layer_4/b"))
    assert message in message_of(tmp_path / "a")


def test_many_names_of_the_same_bytes_are_no_large_model(tmp_path):
    def same_place(name, entry):
        return entry + field(4, 0) + field(5, 36) + varint(6 << 3 | 5) + struct.pack("<I", 0)

    tensors = {f"{number:05d}": np.ones(9, np.float32) for number in range(300)}
    write_bundle(tmp_path / "a", tensors, edit_entry=same_place)
    (tmp_path / "a.data-00000-of-00001").write_bytes(bytes(36))
    assert "larger than its data files" in message_of(tmp_path / "a")


@pytest.mark.parametrize(
    "entries, message",
    [
        ([(b"", field(1, 1)), (b"b", b""), (b"a", b"")], "ascending order"),
        ([(b"", field(1, 1)), (b"a", b""), (b"a", b"")], "ascending order"),
        ([(b"", field(1, 1 << 30))], "data files"),
        ([(b"", field(1, 1) + field(2, 1))], "big-endian"),
        ([(b"a", b"")], "cannot have 0 data files"),
        ([(b"", field(1, 1)), (b"x" * 2000, b"")], "does not fit"),
        ([(b"", field(1, 1)), (b"\xff", b"")], "UnicodeDecodeError"),
    ],
)
def test_a_table_that_is_no_index_is_refused(entries, message, tmp_path):
    (tmp_path / "a.index").write_bytes(table(entries))
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"")
    assert message in message_of(tmp_path / "a", [])


def test_a_huge_index_is_not_read(tmp_path):
    with open(tmp_path / "a.index", "wb") as file:
        file.truncate(1 << 40)
    assert "bytes; an index has" in message_of(tmp_path / "a")


def test_damage_that_no_crc_shows_is_refused_or_read(tmp_path, monkeypatch):
    """As where somebody has made the CRCs right again."""
    monkeypatch.setattr(tensor_bundle, "crc32c", lambda data: 0)
    monkeypatch.setattr(tensor_bundle, "unmask", lambda stored: 0)
    write_bundle(tmp_path / "a", TENSORS)
    content = (tmp_path / "a.index").read_bytes()
    refused = 0
    for _ in range(3000):
        damaged = bytearray(content)
        for place in RNG.integers(len(content), size=RNG.integers(1, 4)):
            damaged[place] = RNG.choice([0, 1, 0x7F, 0x80, 0xFF, damaged[place] ^ 1 << RNG.integers(8)])
        if RNG.random() < 0.2:
            del damaged[: RNG.integers(1, 9)]
        (tmp_path / "a.index").write_bytes(damaged)
        try:
            bundle = TensorBundle(tmp_path / "a")
            bundle.read(list(bundle.entries))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
    assert refused > 1000
