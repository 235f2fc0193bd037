"""Reads any tokens of a split, each sample checked as it is read."""

import errno
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from txl_dist.data.index import Index
from txl_dist.data.preparing.shards import Shard
from txl_dist.errors import UserError

NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([<>|][uif]\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\), } *\n(.*)",
    re.DOTALL,
)


class DamagedSample(UserError):
    """The bytes of a sample are not those that were written."""


class SampleReader:
    """Reads any span of a split's stream. Threads may share it; the last `cache_samples` samples are kept decoded.

    Args:
        lost: what stands for the tokens of a damaged sample; None: it is an error.

    Attributes:
        damaged: sample -> what is wrong with it. A sample that was found damaged is not read again.
    """

    def __init__(self, index: Index, split: str, cache_samples: int = 4096, lost: int | None = None):
        self.index, self.split, self.lost = index, index.splits[split], lost
        self.damaged: dict[int, str] = {}
        self._cached = lru_cache(maxsize=cache_samples)(self._read)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [length] from position `start` of the stream, read-only; of `index.dtype`, where some are lost int64.

        Raises:
            UserError: where a shard is not what the index says, naming shard and sample.
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
        """The tokens [sample_tokens] (the last sample may be shorter) of one sample, read-only; raises as `tokens`."""
        assert 0 <= number < self.split.samples
        if number not in self.damaged:
            try:
                return self._cached(number)
            except DamagedSample as error:
                if self.lost is None:
                    raise
                self.damaged[number] = str(error)
        return np.broadcast_to(np.array(self.lost, np.int64), self._size(number))

    def _size(self, number: int) -> int:
        return min(self.index.sample_tokens, self.split.tokens - number * self.index.sample_tokens)

    def _read(self, number: int) -> np.ndarray:
        shard = self.split.shards[number // self.index.shard_samples]
        path = self.index.store.local(shard.name, shard.sha256)
        place, remedy = f"{path}: sample {number}", self.index.store.remedy(path)
        try:
            packed = self._packed(path, shard, number)
        except OSError as error:
            # A bad sector is damage; a shard that is not there at all is a mistake, which may be that of all shards.
            kind = DamagedSample if error.errno == errno.EIO else UserError
            raise kind(f"{place}: {error.strerror or error}; {remedy}") from error
        except ValueError as error:
            raise DamagedSample(f"{place}: {error}; {remedy}") from error
        try:
            tokens = unpack(packed, f"{number:09d}")
            self._check(tokens, number)
        except (ValueError, tarfile.HeaderError) as error:
            raise DamagedSample(f"{place}: {error}; {remedy}") from error
        tokens.flags.writeable = False
        return tokens

    def _packed(self, path: Path, shard: Shard, number: int) -> bytes:
        """The bytes of one sample in its tar file."""
        offsets = self.split.sample_table["offset"]
        next_one = number + 1
        last = next_one == self.split.samples or next_one % self.index.shard_samples == 0
        size = path.stat().st_size
        if not path.is_file():  # a pipe would wait for a writer
            raise OSError(errno.EINVAL, "there is something else than a file")
        if size != shard.bytes and self.lost is None:
            raise ValueError(f"the shard has {size:,} bytes, not {shard.bytes:,}")
        with open(path, "rb") as file:
            start = int(offsets[number])
            end = shard.bytes if last else int(offsets[next_one])
            file.seek(start)
            return file.read(max(min(end, size) - start, 0))

    def _check(self, tokens: np.ndarray, number: int) -> None:
        dtype, shape = self.index.dtype, (self._size(number),)
        if tokens.dtype != dtype or tokens.shape != shape:
            raise ValueError(f"{tokens.dtype} {tokens.shape} instead of {dtype} {shape}")
        expected = int(self.split.sample_table["crc32"][number])
        if (found := zlib.crc32(tokens.tobytes())) != expected:
            raise ValueError(
                f"the tokens are not those that were written (their crc32 is {found:08x}, not {expected:08x})"
            )
        if (largest := int(tokens.max())) >= self.index.vocab_size:
            raise ValueError(f"token {largest} is not in the vocabulary of {self.index.vocab_size:,}")


def unpack(packed: bytes, key: str) -> np.ndarray:
    """The tokens in the bytes of one sample, which has this key."""
    found = dict(members(packed))
    if f"{key}.tokens.npy" not in found:
        other = next(iter(found), "").partition(".")[0]
        endings = ", ".join(sorted(name.removeprefix(f"{other}.") for name in found))
        raise ValueError(f"not {key} with its tokens is here, but {other} with {endings}")
    # Not by np.load: it has Python's compiler read the header, which fails in threads at times (CPython 106905),
    # and an intact sample would be taken for a damaged one.
    array = NPY.fullmatch(found[f"{key}.tokens.npy"])
    if not array:
        raise ValueError("its tokens.npy holds no array of numbers")
    tokens = np.frombuffer(array[3], array[1].decode())
    if len(tokens) != int(array[2]):
        raise ValueError(f"its tokens.npy holds {len(tokens)} numbers, not {int(array[2])}")
    return tokens


def members(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of a tar file's part.

    Plain files alone, as they are written here: a sparse or compressed one grows as large as its author wants, and a
    header of another kind tells a size of its own.
    """
    at = 0
    names = set()
    while at < len(packed) and any(header := packed[at : at + tarfile.BLOCKSIZE]):
        if header[257:262] != b"ustar":
            raise ValueError("no sample can be read here")
        member = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        start = at + tarfile.BLOCKSIZE
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= len(packed) - start:
            raise ValueError("no sample can be read here")
        if member.name in names:
            raise ValueError(f"{member.name}: duplicate file name in tar file")
        names.add(member.name)
        yield member.name, packed[start : start + member.size]
        at = start - -member.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    if not names:
        raise ValueError("no sample can be read here")
