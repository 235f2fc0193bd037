"""Tokens come out as they went in, from any position; whatever is damaged is named with shard and sample."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.damage import flip
from tests.data.datasets import STREAM, TRAIN, write
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.errors import UserError


def test_every_span_of_the_stream_is_read_back(intact):
    reader = SampleReader(Index.open(str(intact)), "train", cache_samples=4)
    for start in range(len(STREAM) + 1):
        for length in range(min(40, len(STREAM) - start) + 1):
            tokens = reader.tokens(start, length)
            assert tokens.dtype == np.uint16 and tokens.tolist() == STREAM[start : start + length].tolist()
    assert reader.tokens(0, len(STREAM)).tolist() == STREAM.tolist()
    assert not reader.sample(0).flags.writeable


def test_threads_may_share_a_reader(intact):
    reader = SampleReader(Index.open(str(intact)), "train", cache_samples=2)
    spans = [(start, 20) for start in range(0, 195, 3)] * 5
    with ThreadPoolExecutor(8) as pool:
        for (start, length), tokens in zip(spans, pool.map(lambda span: reader.tokens(*span), spans), strict=True):
            assert tokens.tolist() == STREAM[start : start + length].tolist()


def read_all(folder: Path) -> None:
    reader = SampleReader(Index.open(str(folder)), "train")
    for number in range(reader.split.samples):
        reader.sample(number)


def test_every_flipped_byte_of_a_sample_is_found(copy):
    """In headers, padding that tar ignores excepted; none gives other tokens."""
    path = copy / "train" / "000001.tar"
    original = path.read_bytes()
    with tarfile.open(path) as tar:
        tokens = [member for member in tar if member.name.endswith(".npy")]
        positions = [member.offset_data + member.size - at for member in tokens for at in (1, 2, 31, 32)]  # tokens
        header = (0, 5, 100, 124, 148)  # name, mode, size, checksum
        positions += [member.offset + at for member in tokens for at in header]
        positions += [member.offset_data + 1 for member in tokens]  # the .npy header
    for position in positions:
        path.write_bytes(flip(position)(original))
        with pytest.raises(UserError, match=r"000001.tar: sample [345]: .*(copy|prepare) it again"):
            read_all(copy)
    path.write_bytes(original)
    read_all(copy)


def test_truncated_swapped_and_missing_shards_are_found(copy):
    first, second = copy / "train" / "000001.tar", copy / "train" / "000002.tar"
    original = first.read_bytes()
    other = second.read_bytes()
    assert len(original) == len(other)
    for size in (0, 512, 2048, 4096):  # at boundaries of the tar, where its readers end silently
        first.write_bytes(original[:size])
        with pytest.raises(
            UserError, match=rf"000001.tar: sample 3: the shard has {size:,} bytes, not {len(original):,}"
        ):
            read_all(copy)
        first.write_bytes(original[:size] + bytes(len(original) - size))
        with pytest.raises(UserError, match=r"000001.tar: sample [345]: "):
            read_all(copy)
    first.write_bytes(other)
    with pytest.raises(UserError, match=r"000001.tar: sample 3: .*000000006"):
        read_all(copy)
    first.unlink()
    with pytest.raises(UserError, match=r"000001.tar: sample 3: No such file"):
        read_all(copy)


def test_tokens_of_another_position_are_found(copy):
    """A shard written again with two documents swapped, or shifted by a token: as a tar it is perfect."""
    path = copy / "train" / "000000.tar"
    for wrong in (np.roll(STREAM, 1), np.concatenate([TRAIN[1], TRAIN[0], *TRAIN[2:]])):
        other = write(copy / f"other{len(list(copy.iterdir()))}", {"train": [wrong]})
        data = (other / "train" / "000000.tar").read_bytes()
        path.write_bytes(data.ljust(path.stat().st_size, b"\0"))
        with pytest.raises(UserError, match=r"000000.tar: sample 0: .*"):
            read_all(copy)


def test_samples_that_are_filled_in_take_no_memory(copy):
    """An index may claim any number of tokens for a sample that cannot be read."""
    index = Index.open(str(copy))
    reader = SampleReader(index, "train", fill_value=-1)
    reader.damaged[3] = "damaged"
    assert reader.sample(3).strides == (0,) and reader.tokens(40, 20).tolist()[8:] == [-1] * 12
