"""A dataset on disk: WebDataset shards, and an index that finds any token of a split without scanning.

    index.json                  written last: what there is, with sha256 of everything, itself included
    tokenizer/                  see `tokenizers`
    train/000000.tar ...        the split's stream of tokens in samples of `sample_tokens` (the last may be shorter)
    train/samples.npy           of each sample: byte offset in its shard, crc32 of its tokens
    train/documents.npy         where in the stream each document starts, and as last entry the stream's length

Token p is in sample p // sample_tokens, sample k in shard k // shard_samples. A sample is `tokens.npy` and, for other
readers, `json`: the document it starts in, the token's offset in that document, and where documents start within it.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args, get_type_hints
from urllib.parse import urlsplit

import numpy as np

from txl_dist.config import PublishedCorpus
from txl_dist.data import tokenizers
from txl_dist.errors import UserError

FORMAT = {"format": "txl_dist dataset", "version": 1}
SAMPLE_TABLE = np.dtype([("offset", "<u8"), ("crc32", "<u4")])
SIDE_FILES = ("samples.npy", "documents.npy")
NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([<>|][uif]\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\), } *\n(.*)",
    re.DOTALL,
)
PAUSES = (1, 2, 4)  # seconds between the attempts to fetch a file


class DamagedSample(UserError):
    """The bytes of a sample are not those that were written."""


def sha256_of(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return sha256_of(stream)


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Shard(NamedTuple):
    """name: relative to the dataset. documents: those that start in it. bytes: the size of the file."""

    name: str
    samples: int
    tokens: int
    documents: int
    bytes: int
    sha256: str


# -------------------------------------------------------------------------------------------------------- write


class NpyWriter:
    """A one-dimensional .npy file that grows, so that no table has to fit into memory."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype = dtype
        self.length = 0
        self.stream = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that it keeps its size when the length grows.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)

    def append(self, values: Any) -> None:
        array = np.asarray(values, self.dtype)
        self.stream.write(array.tobytes())
        self.length += len(array)

    def close(self) -> None:
        self.stream.seek(0)
        self._write_header()
        self.stream.close()


class SplitWriter:
    """Writes one split: tokens go in as they come, samples, shards and tables come out."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, sample_tokens: int, shard_samples: int):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.sample_tokens, self.shard_samples = sample_tokens, shard_samples
        (folder / split).mkdir()
        self.sample_table = NpyWriter(folder / split / SIDE_FILES[0], SAMPLE_TABLE)
        self.documents = NpyWriter(folder / split / SIDE_FILES[1], np.dtype("<u8"))
        self.tokens = 0  # that went in
        self.bytes = 0  # of text that went in
        self.rest = np.empty(0, dtype)  # tokens that are in no sample yet
        self.starts = np.empty(0, np.int64)  # of documents that are in no sample yet
        self.document, self.document_start = -1, 0  # the one that the next sample goes on with
        self.tar: Any = None
        self.shards: list[Shard] = []
        self.shard = (0, 0, 0)  # samples, tokens, documents of the one being written

    def add(self, tokens: np.ndarray, starts: list[int], size: int) -> None:
        """Append tokens [n]; `starts` are the positions in them at which documents start, `size` their text's bytes."""
        positions = np.array(starts, np.int64) + self.tokens
        self.documents.append(positions)
        self.starts = np.concatenate([self.starts, positions])
        self.rest = np.concatenate([self.rest, tokens])
        self.tokens += len(tokens)
        self.bytes += size
        while len(self.rest) >= self.sample_tokens:
            self._write_sample(self.rest[: self.sample_tokens])
            self.rest = self.rest[self.sample_tokens :]

    def close(self) -> dict[str, Any]:
        """Write what is left, and return the split's entry in the index."""
        if len(self.rest):
            self._write_sample(self.rest)
        self._close_shard()
        documents = self.documents.length
        self.documents.append([self.tokens])
        self.documents.close()
        self.sample_table.close()
        return {
            "tokens": self.tokens,
            "documents": documents,
            "bytes": self.bytes,
            "samples": self.sample_table.length,
            "files": {name: sha256_of_file(self.folder / self.split / name) for name in SIDE_FILES},
            "shards": [shard._asdict() for shard in self.shards],
        }

    def _write_sample(self, tokens: np.ndarray) -> None:
        number = self.sample_table.length
        if number % self.shard_samples == 0:
            self._open_shard()
        position = number * self.sample_tokens
        inside = self.starts[: np.searchsorted(self.starts, position + len(tokens))]
        begins = position in inside[:1]
        facts = {
            "document": self.document + begins,
            "documents": (inside - position).tolist(),
            "offset": 0 if begins else position - self.document_start,
            "position": position,
        }
        array = io.BytesIO()
        np.save(array, tokens, allow_pickle=False)
        self.sample_table.append(np.array([(self.tar.tarstream.offset, zlib.crc32(tokens.tobytes()))], SAMPLE_TABLE))
        sample = {"json": json.dumps(facts, sort_keys=True).encode(), "tokens.npy": array.getvalue()}
        self.tar.write({"__key__": f"{number:09d}", **sample})

        samples, count, documents = self.shard
        self.shard = (samples + 1, count + len(tokens), documents + len(inside))
        self.starts = self.starts[len(inside) :]
        self.document += len(inside)
        if len(inside):
            self.document_start = int(inside[-1])

    def _open_shard(self) -> None:
        from webdataset import TarWriter  # imports torch, which the processes that tokenize do not need

        self._close_shard()
        name = f"{self.split}/{len(self.shards):06d}.tar"
        # An integer time, for tarfile gives every member a second header to hold a float.
        self.tar = TarWriter(str(self.folder / name), encoder=False, mtime=0, user="txl_dist", group="txl_dist")

    def _close_shard(self) -> None:
        if self.tar is None:
            return
        self.tar.close()
        name = f"{self.split}/{len(self.shards):06d}.tar"
        path = self.folder / name
        self.shards.append(Shard(name, *self.shard, path.stat().st_size, sha256_of_file(path)))
        self.tar, self.shard = None, (0, 0, 0)


def write_index(
    folder: Path,
    corpus: dict[str, Any],
    tokenizer: tokenizers.Tokenizer,
    sample_tokens: int,
    shard_samples: int,
    splits: Mapping[str, dict[str, Any]],
) -> None:
    """Write index.json over what lies in `folder`: what `Tokenizer.save` and the splits' `SplitWriter.close` left."""
    files = {path.name: sha256_of_file(path) for path in sorted((folder / "tokenizer").iterdir())}
    index = {
        **FORMAT,
        "fingerprint": content_fingerprint(files, splits),
        "corpus": corpus,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "files": files,
        },
        "dtype": tokenizer.dtype.name,
        "sample_tokens": sample_tokens,
        "shard_samples": shard_samples,
        "splits": splits,
    }
    index["sha256"] = sha256_of_json(index)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def content_fingerprint(tokenizer_files: Mapping[str, str], splits: Mapping[str, Any]) -> str:
    shards = {split: [shard["sha256"] for shard in facts["shards"]] for split, facts in splits.items()}
    return sha256_of_json({"tokenizer": tokenizer_files, "shards": shards})


# --------------------------------------------------------------------------------------------------------- open


def how_to_prepare(location: str) -> str:
    """The command that makes a dataset; prepare's own names are CORPUS-TOKENIZER, each corpus with its tokenizer."""
    corpus = Path(location).name.rpartition("-")[0]
    known = ("stdlib", *get_args(get_type_hints(PublishedCorpus)["name"]))
    chosen = f"corpus={corpus} " if corpus in known else ""
    return f"python -m txl_dist.prepare {chosen}data.dir={location}"


class Store:
    """Where a dataset's files are: in a local folder, or behind a URL prefix.

    What is fetched from a URL is kept below $XDG_CACHE_HOME (or ~/.cache) in txl_dist/<fingerprint of the dataset>.

    Raises:
        UserError: where a URL is a command, or holds a secret.
    """

    def __init__(self, location: str):
        self.remote = re.match(r"[A-Za-z0-9+.-]+://", location) is not None
        if self.remote:
            check_url(location)
        self.location = location.rstrip("/") or "/"
        self.folder = Path(location).expanduser()  # of a remote dataset: its cache, once the fingerprint is known

    def remedy(self, path: Path) -> str:
        return f"delete {path}, it is fetched again" if self.remote else "copy it again, or prepare it again"

    def read_index(self) -> dict[str, Any]:
        where = f"{self.location}/index.json"
        data = io.BytesIO()
        try:
            if self.remote:
                self._fetch("index.json", data)
            else:
                data.write((self.folder / "index.json").read_bytes())
        except OSError as error:
            raise UserError(
                f"{self.location}: no dataset can be read here ({error.strerror or error}); "
                f"prepare one: {how_to_prepare(self.location)}"
            ) from error
        try:
            index = json.loads(data.getvalue())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is damaged ({error}); copy it again, or prepare it again") from error
        if not isinstance(index, dict) or any(index.get(key) != value for key, value in FORMAT.items()):
            raise UserError(f"{where}: is not the index of a {FORMAT['format']}, version {FORMAT['version']}")
        written = index.pop("sha256", None)  # indexes of earlier versions have none
        if written is not None and (found := sha256_of_json(index)) != written:
            raise UserError(
                f"{where}: is damaged (its content has the sha256 {found[:12]}, not {str(written)[:12]} as written); "
                "copy it again, or prepare it again"
            )
        if self.remote:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self.folder = cache / "txl_dist" / re.sub(r"\W", "", str(index.get("fingerprint")))
        return index

    def local(self, name: str, sha256: str) -> Path:
        """The local path of a file of the dataset; a remote one is fetched, and checked, where it is not here yet."""
        path = self.folder / name
        if not self.remote or path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # One process of a machine fetches, the others wait for it.
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_name(path.name + ".partial")
                try:
                    with open(partial, "w+b") as file:
                        self._fetch(name, file, sha256)
                except OSError as error:
                    raise UserError(f"{self.location}/{name}: cannot be fetched: {error}") from error
                partial.replace(path)
        return path

    def checked(self, name: str, sha256: str) -> Path:
        """As `local`, but the sha256 is checked every time."""
        path = self.local(name, sha256)
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self.remedy(path)}") from error
        if found != sha256:
            raise UserError(f"{path}: {not_the_one(found, sha256)}; {self.remedy(path)}")
        return path

    def _fetch(self, name: str, file: BinaryIO, sha256: str | None = None) -> None:
        """Fetch a file, which has this sha256; what fails is tried again, for networks and servers fail at times."""
        from webdataset import gopen

        for pause in (*PAUSES, None):
            try:
                file.seek(0)
                file.truncate()
                with gopen(f"{self.location}/{name}") as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                file.seek(0)
                if sha256 is None or (found := sha256_of(file)) == sha256:
                    return
                raise OSError(f"what came {not_the_one(found, sha256)}")
            except ValueError as error:  # webdataset knows no such scheme
                raise OSError(str(error)) from error
            except OSError as error:
                if pause is None:
                    ended = re.search(r": exit (\d+) \(read\)", str(error))  # after the whole command
                    raise OSError(f"what fetches it ended with code {ended[1]}" if ended else str(error)) from error
                time.sleep(pause)


def check_url(url: str) -> None:
    """Refuse what webdataset would run in a shell, for a run's config may be anybody's; and secrets, for what names the
    data goes into configs, checkpoints and logs."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: is no URL ({error})") from error
    if parts.scheme == "pipe":
        raise UserError(f"{url}: is a command, and none is run from a config; give a folder or a URL")
    if parts.query or parts.fragment:
        shown, what = parts._replace(query="", fragment=""), "holds more than a place (? or #)"
    elif parts.password is not None or (parts.username and parts.scheme in ("http", "https")):
        shown, what = parts, "holds a user name or a password"
    else:
        return
    shown = shown._replace(netloc=parts.netloc.rpartition("@")[2])
    raise UserError(
        f"{shown.geturl()}: the URL that was given {what}, and would be kept in configs, checkpoints and logs; "
        "give the folder's URL alone, and what proves who you are to curl, which fetches: a line `netrc` in ~/.curlrc "
        'and the password in ~/.netrc, or a line `header = "Authorization: ..."` in ~/.curlrc'
    )


def not_the_one(found: str, sha256: str) -> str:
    return f"is not the one in the index (its sha256 is {found[:12]}, not {sha256[:12]})"


@dataclass(frozen=True, eq=False)
class Split:
    """One stream of tokens. Lengths are in tokens, but `bytes`: of the text that it was made of.

    document_starts: uint64 [documents + 1], where each document starts; the last entry is `tokens`.
    sample_table: SAMPLE_TABLE [samples]. Both are mapped into memory, not read.
    """

    tokens: int
    documents: int
    bytes: int
    samples: int
    shards: tuple[Shard, ...]
    document_starts: np.ndarray
    sample_table: np.ndarray


@dataclass(frozen=True, eq=False)
class Index:
    """What there is in a dataset. `fingerprint` names its content, `corpus` tells what it was made of."""

    store: Store
    fingerprint: str
    corpus: dict[str, Any]
    tokenizer_files: dict[str, str]  # name -> sha256
    vocab_size: int
    eos: int
    dtype: np.dtype
    sample_tokens: int
    shard_samples: int
    splits: dict[str, Split]

    @classmethod
    def open(cls, location: str) -> "Index":
        """Open a dataset in a local folder, or behind a URL prefix that webdataset can open (https://..., gs://...).

        Raises:
            UserError: where there is none, or what is there is damaged or does not fit together.
        """
        store = Store(location)
        facts = store.read_index()
        where, again = f"{store.location}/index.json", "copy it again, or prepare it again"
        try:
            if facts["fingerprint"] != content_fingerprint(facts["tokenizer"]["files"], facts["splits"]):
                raise UserError(f"{where}: its fingerprint is not that of its shards; {again}")
            if strange := [name for name in names(facts) if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name)]:
                raise UserError(f"{where}: {strange[0]!r} is no name of a file in a dataset; {again}")
            index = cls(
                store=store,
                fingerprint=facts["fingerprint"],
                corpus=facts["corpus"],
                tokenizer_files=facts["tokenizer"]["files"],
                vocab_size=facts["tokenizer"]["vocab_size"],
                eos=facts["tokenizer"]["eos"],
                dtype=np.dtype(facts["dtype"]).newbyteorder("<"),
                sample_tokens=facts["sample_tokens"],
                shard_samples=facts["shard_samples"],
                splits={name: open_split(store, name, split) for name, split in facts["splits"].items()},
            )
            for name, split in index.splits.items():
                if wrong := index.contradiction(split):
                    raise UserError(f"{where}: split {name}: {wrong}; {again}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: is damaged ({type(error).__name__}: {error}); {again}") from error
        return index

    def damages(self) -> list[str]:
        """Shards that are missing or have another size; of those behind a URL only the fetched ones are looked at."""
        found = []
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            path = self.store.folder / shard.name
            if not (path.is_file() or self.store.remote):
                found.append(f"{path}: is missing; {self.store.remedy(path)}")
            elif path.exists() and (size := path.stat().st_size) != shard.bytes:
                found.append(f"{path}: has {size:,} bytes, not {shard.bytes:,}; {self.store.remedy(path)}")
        return found

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Load the tokenizer; its files are checked."""
        for name, sha256 in self.tokenizer_files.items():
            self.store.checked(f"tokenizer/{name}", sha256)
        return tokenizers.load(self.store.folder / "tokenizer")

    def contradiction(self, split: Split) -> str | None:
        """What in a split does not fit together, if anything."""
        for key in ("samples", "tokens", "documents"):
            if sum(getattr(shard, key) for shard in split.shards) != getattr(split, key):
                return f"the {key} of its shards do not add up to {getattr(split, key)}"
        if split.samples != -(-split.tokens // self.sample_tokens):
            return f"{split.tokens} tokens do not make {split.samples} samples of {self.sample_tokens}"
        if any(shard.samples != self.shard_samples for shard in split.shards[:-1]):
            return f"a shard other than the last has not {self.shard_samples} samples"
        if not split.shards or not 0 < split.shards[-1].samples <= self.shard_samples:
            return "its last shard is missing, empty or too long"
        if split.sample_table.shape != (split.samples,) or split.sample_table.dtype != SAMPLE_TABLE:
            return "samples.npy is not the table of its samples"
        if split.document_starts.shape != (split.documents + 1,) or split.document_starts[-1] != split.tokens:
            return "documents.npy is not the table of its documents"
        return None


def names(facts: dict[str, Any]) -> Iterator[str]:
    """All names of files that an index tells. They become paths, and an index may be anybody's."""
    yield from (f"tokenizer/{name}" for name in facts["tokenizer"]["files"])
    for split, told in facts["splits"].items():
        yield split
        yield from (shard["name"] for shard in told["shards"])


def open_split(store: Store, name: str, facts: dict[str, Any]) -> Split:
    sample_table, document_starts = (
        np.load(store.checked(f"{name}/{file}", facts["files"][file]), mmap_mode="r", allow_pickle=False)
        for file in SIDE_FILES
    )
    return Split(
        tokens=facts["tokens"],
        documents=facts["documents"],
        bytes=facts["bytes"],
        samples=facts["samples"],
        shards=tuple(Shard(**shard) for shard in facts["shards"]),
        document_starts=document_starts,
        sample_table=sample_table,
    )


# --------------------------------------------------------------------------------------------------------- read


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
        return np.full(self._size(number), self.lost, np.int64)

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
            # Without the bytes that follow, in which the tar reader would look for the next sample.
            tokens = unpack(shard.name, io.BytesIO(packed), f"{number:09d}")
            self._check(tokens, number)
        except (ValueError, EOFError, LookupError, OverflowError, tarfile.TarError) as error:
            reason = str(error.args[0] if error.args else type(error).__name__).partition(" @ ")[0].partition("\n")[0]
            raise DamagedSample(f"{place}: {reason}; {remedy}") from error
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
            file.seek(int(offsets[number]))
            return file.read((shard.bytes if last else int(offsets[next_one])) - file.tell())

    def _check(self, tokens: np.ndarray, number: int) -> None:
        dtype, shape = self.index.dtype, (self._size(number),)
        if tokens.dtype != dtype or tokens.shape != shape:
            raise ValueError(f"{tokens.dtype} {tokens.shape} instead of {dtype} {shape}")
        expected = int(self.split.sample_table["crc32"][number])
        if (found := zlib.crc32(tokens.tobytes())) != expected:
            raise ValueError(
                f"the tokens are not those that were written (their crc32 is {found:08x}, not {expected:08x})"
            )


def unpack(url: str, stream: BinaryIO, key: str) -> np.ndarray:
    """Let webdataset read the first sample of a tar stream; where a header is damaged it ends without a word."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    start = stream.read(tarfile.BLOCKSIZE)
    stream.seek(0)
    if start[257:262] != b"ustar":  # it would be taken for a compressed tar, which grows as large as its author wants
        raise ValueError("no sample can be read here")
    sample = next(group_by_keys(tar_file_expander([{"url": url, "stream": stream}])), None)
    if sample is None:
        raise ValueError("no sample can be read here")
    if sample["__key__"] != key or "tokens.npy" not in sample:
        members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise ValueError(f"not {key} with its tokens is here, but {sample['__key__']} with {members}")
    # Not by np.load: it has Python's compiler read the header, which fails in threads at times (CPython 106905),
    # and an intact sample would be taken for a damaged one.
    array = NPY.fullmatch(sample["tokens.npy"])
    if not array:
        raise ValueError("its tokens.npy holds no array of numbers")
    tokens = np.frombuffer(array[3], array[1].decode())
    if len(tokens) != int(array[2]):
        raise ValueError(f"its tokens.npy holds {len(tokens)} numbers, not {int(array[2])}")
    return tokens
