"""A dataset on disk: WebDataset shards, and an index that finds any token of a split without scanning.

    index.json                  written last: what there is, with sha256 of everything
    tokenizer/                  see `tokenizers`
    train/000000.tar ...        the split's stream of tokens in samples of `sample_tokens` (the last may be shorter)
    train/samples.npy           of each sample: byte offset in its shard, crc32 of its tokens
    train/documents.npy         where in the stream each document starts, and as last entry the stream's length

Token p is in sample p // sample_tokens, sample k in shard k // shard_samples. A sample is `tokens.npy` and, for other
readers, `json`: the document it starts in, the token's offset in that document, and where documents start within it.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args, get_type_hints

import numpy as np

from txl_dist.config import PublishedCorpus
from txl_dist.data import tokenizers
from txl_dist.errors import UserError

FORMAT = {"format": "txl_dist dataset", "version": 1}
SAMPLE_TABLE = np.dtype([("offset", "<u8"), ("crc32", "<u4")])
SIDE_FILES = ("samples.npy", "documents.npy")


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
    """

    def __init__(self, location: str):
        self.location = location.rstrip("/") or "/"
        self.remote = re.match(r"[A-Za-z0-9+.-]+://", location) is not None
        self.folder = Path(location).expanduser()  # of a remote dataset: its cache, once the fingerprint is known

    @property
    def remedy(self) -> str:
        return f"delete {self.folder}, it is fetched again" if self.remote else "copy it again, or prepare it again"

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
        except ValueError as error:
            raise UserError(f"{where}: is damaged ({error}); copy it again, or prepare it again") from error
        if not isinstance(index, dict) or any(index.get(key) != value for key, value in FORMAT.items()):
            raise UserError(f"{where}: is not the index of a {FORMAT['format']}, version {FORMAT['version']}")
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
                    with open(partial, "wb") as file:
                        self._fetch(name, file)
                except OSError as error:
                    raise UserError(f"{self.location}/{name}: cannot be fetched ({error})") from error
                if sha256_of_file(partial) != sha256:
                    raise UserError(f"{self.location}/{name}: is not the one in the index (sha256 differs)")
                partial.replace(path)
        return path

    def checked(self, name: str, sha256: str) -> Path:
        """As `local`, but the sha256 is checked every time."""
        path = self.local(name, sha256)
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self.remedy}") from error
        if found != sha256:
            raise UserError(f"{path}: is not the one in the index (sha256 differs); {self.remedy}")
        return path

    def _fetch(self, name: str, file: BinaryIO) -> None:
        from webdataset import gopen

        try:
            with gopen(f"{self.location}/{name}") as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
        except ValueError as error:  # webdataset knows no such scheme
            raise OSError(str(error)) from error


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
        where = f"{store.location}/index.json"
        try:
            if facts["fingerprint"] != content_fingerprint(facts["tokenizer"]["files"], facts["splits"]):
                raise UserError(f"{where}: its fingerprint is not that of its shards; {store.remedy}")
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
                    raise UserError(f"{where}: split {name}: {wrong}; {store.remedy}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: is damaged ({type(error).__name__}: {error}); {store.remedy}") from error
        return index

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
    """Reads any span of a split's stream. Threads may share it; the last `cache_samples` samples are kept decoded."""

    def __init__(self, index: Index, split: str, cache_samples: int = 4096):
        self.index, self.split = index, index.splits[split]
        self._cached = lru_cache(maxsize=cache_samples)(self._read)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [length] from position `start` of the stream, read-only, of `index.dtype`.

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
        return self._cached(number)

    def _read(self, number: int) -> np.ndarray:
        shard = self.split.shards[number // self.index.shard_samples]
        path = self.index.store.local(shard.name, shard.sha256)
        try:
            # Without the bytes that follow, in which the tar reader would look for the next sample.
            stream = io.BytesIO(self._packed(path, shard, number))
            tokens = unpack(shard.name, stream, f"{number:09d}")
            self._check(tokens, number)
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
            raise UserError(f"{path}: sample {number}: {reason}; {self.index.store.remedy}") from error
        tokens.flags.writeable = False
        return tokens

    def _packed(self, path: Path, shard: Shard, number: int) -> bytes:
        """The bytes of one sample in its tar file."""
        offsets = self.split.sample_table["offset"]
        next_one = number + 1
        last = next_one == self.split.samples or next_one % self.index.shard_samples == 0
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                raise ValueError(f"the shard has {size:,} bytes, not {shard.bytes:,}")
            file.seek(int(offsets[number]))
            return file.read((shard.bytes if last else int(offsets[next_one])) - file.tell())

    def _check(self, tokens: np.ndarray, number: int) -> None:
        dtype, size = self.index.dtype, self.index.sample_tokens
        shape = (min(size, self.split.tokens - number * size),)
        if tokens.dtype != dtype or tokens.shape != shape:
            raise ValueError(f"{tokens.dtype} {tokens.shape} instead of {dtype} {shape}")
        if zlib.crc32(tokens.tobytes()) != self.split.sample_table["crc32"][number]:
            raise ValueError("the tokens are not those that were written (crc32 differs)")


def unpack(url: str, stream: BinaryIO, key: str) -> np.ndarray:
    """Let webdataset read the first sample of a tar stream; where a header is damaged it ends without a word."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    sample = next(group_by_keys(tar_file_expander([{"url": url, "stream": stream}])), None)
    if sample is None:
        raise ValueError("no sample can be read here")
    if sample["__key__"] != key or "tokens.npy" not in sample:
        raise ValueError(f"not {key} with its tokens is here, but {sample['__key__']} with {', '.join(sorted(sample))}")
    return np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
