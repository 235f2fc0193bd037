"""Reads any tokens of a split, and checks each sample as it is read."""

import errno
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from txl_dist.data.format import Shard
from txl_dist.data.index import Index
from txl_dist.errors import UserError

NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([<>|][uif]\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\), } *\n(.*)",
    re.DOTALL,
)
UNREADABLE = "no sample can be read here"


class DamagedSample(UserError):
    """The bytes of a sample are not those that were written."""


class SampleReader:
    """Reads any span of a split's stream; threads may share it.

    Args:
        cache_samples: how many samples are kept decoded, the latest ones.
        fill_value: stands for the tokens of a damaged sample; None: a damaged sample is an error.

    Attributes:
        damaged: sample -> what is wrong with it. A sample that was found damaged is not read again.
    """

    def __init__(self, index: Index, split: str, cache_samples: int = 4096, fill_value: int | None = None):
        self.index = index
        self.split = index.splits[split]
        self.fill_value = fill_value
        self.damaged: dict[int, str] = {}
        self._cached = lru_cache(maxsize=cache_samples)(self._read)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Return tokens [length] from position `start` of the stream, read-only.

        They are of `index.dtype`, or int64 if some are filled in.

        Raises:
            DamagedSample: naming shard and sample, if a sample is damaged and there is no `fill_value`.
            UserError: if a shard cannot be read at all.
        """
        end = start + length
        assert 0 <= start <= end <= self.split.tokens, f"span [{start}, {end}) of {self.split.tokens} tokens"
        size = self.index.sample_tokens
        parts = [
            self.sample(number)[max(start - number * size, 0) : end - number * size]
            for number in range(start // size, -(-end // size))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.index.dtype), *parts])

    def sample(self, number: int) -> np.ndarray:
        """Return the tokens [sample_tokens] of one sample, read-only; the last sample may be shorter.

        Raises:
            DamagedSample, UserError: as `tokens`.
        """
        assert 0 <= number < self.split.samples
        if number not in self.damaged:
            try:
                return self._cached(number)
            except DamagedSample as error:
                if self.fill_value is None:
                    raise
                self.damaged[number] = str(error)
        # Takes no memory: an index may claim any number of tokens for a sample that cannot be read.
        return np.broadcast_to(np.array(self.fill_value, np.int64), self._size(number))

    def _size(self, number: int) -> int:
        return min(self.index.sample_tokens, self.split.tokens - number * self.index.sample_tokens)

    def _read(self, number: int) -> np.ndarray:
        shard = self.split.shards[number // self.index.shard_samples]
        path = self.index.store.local(shard.name, shard.sha256)
        sample = f"{path}: sample {number}"
        remedy = self.index.store.remedy(path)
        try:
            packed = self._packed(path, shard, number)
            tokens = unpack(packed, f"{number:09d}")
            self._check(tokens, number)
        except OSError as error:
            # A bad sector is damage; a shard that is not there at all is a mistake, which may be that of all shards.
            kind = DamagedSample if error.errno == errno.EIO else UserError
            raise kind(f"{sample}: {error.strerror or error}; {remedy}") from error
        except (ValueError, tarfile.HeaderError) as error:
            raise DamagedSample(f"{sample}: {error}; {remedy}") from error
        tokens.flags.writeable = False
        return tokens

    def _packed(self, path: Path, shard: Shard, number: int) -> bytes:
        """Return the bytes of one sample in its tar file."""
        offsets = self.split.sample_table["offset"]
        following = number + 1
        is_last = following == self.split.samples or following % self.index.shard_samples == 0
        size = path.stat().st_size
        if not path.is_file():  # opening a pipe would wait for a writer
            raise OSError(errno.EINVAL, "is not a regular file")
        if size != shard.bytes and self.fill_value is None:
            raise ValueError(f"the shard has {size:,} bytes, not {shard.bytes:,}")
        with open(path, "rb") as file:
            start = int(offsets[number])
            end = shard.bytes if is_last else int(offsets[following])
            file.seek(start)
            return file.read(max(min(end, size) - start, 0))

    def _check(self, tokens: np.ndarray, number: int) -> None:
        dtype = self.index.dtype
        shape = (self._size(number),)
        if tokens.dtype != dtype or tokens.shape != shape:
            raise ValueError(f"{tokens.dtype} {tokens.shape} instead of {dtype} {shape}")
        expected = int(self.split.sample_table["crc32"][number])
        actual = zlib.crc32(tokens.tobytes())
        if actual != expected:
            raise ValueError(
                f"the tokens are not those that were written (their crc32 is {actual:08x}, not {expected:08x})"
            )
        largest = int(tokens.max())
        if largest >= self.index.vocab_size:
            raise ValueError(f"token {largest} is not in the vocabulary of {self.index.vocab_size:,}")


def unpack(packed: bytes, key: str) -> np.ndarray:
    """Return the tokens in the bytes of one sample, whose key is `key`.

    Raises:
        ValueError, tarfile.HeaderError: if they are those of another sample, or damaged.
    """
    contents = dict(members(packed))
    if f"{key}.tokens.npy" not in contents:
        other = next(iter(contents), "").partition(".")[0]
        endings = ", ".join(sorted(name.removeprefix(f"{other}.") for name in contents))
        raise ValueError(f"expected {key} with its tokens here, but there is {other} with {endings}")
    # Not by np.load: it has Python's compiler read the header, which fails in threads at times (CPython 106905),
    # and an intact sample would be taken for a damaged one.
    array = NPY.fullmatch(contents[f"{key}.tokens.npy"])
    if not array:
        raise ValueError("its tokens.npy does not hold an array of numbers")
    tokens = np.frombuffer(array[3], array[1].decode())
    if len(tokens) != int(array[2]):
        raise ValueError(f"its tokens.npy holds {len(tokens)} numbers, not {int(array[2])}")
    return tokens


def members(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of a part of a tar file.

    Only plain files, as they are written here: a sparse or compressed member grows as large as its author wants, and
    headers of other kinds carry a size of their own.

    Raises:
        ValueError: if there is anything else.
    """
    position = 0
    names = set()
    while position < len(packed):
        start = position + tarfile.BLOCKSIZE
        header = packed[position:start]
        if not any(header):  # a block of zeros ends a tar file
            break
        if header[257:262] != b"ustar":
            raise ValueError(UNREADABLE)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= len(packed) - start:
            raise ValueError(UNREADABLE)
        if member.name in names:
            raise ValueError(f"{member.name}: duplicate file name in tar file")
        names.add(member.name)
        yield member.name, packed[start : start + member.size]
        position = start - -member.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE  # the size is rounded up to blocks
    if not names:
        raise ValueError(UNREADABLE)
