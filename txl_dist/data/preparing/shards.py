"""A dataset on disk: WebDataset shards, and an index that finds any token of a split without scanning.

    index.json                  written last: what there is, with sha256 of everything, itself included
    tokenizer/                  see `tokenizers`
    train/000000.tar ...        the split's stream of tokens in samples of `sample_tokens` (the last may be shorter)
    train/samples.npy           of each sample: byte offset in its shard, crc32 of its tokens
    train/documents.npy         where in the stream each document starts, and as last entry the stream's length

Token p is in sample p // sample_tokens, sample k in shard k // shard_samples. A sample is `tokens.npy` and, for other
readers, `json`: the document it starts in, the token's offset in that document, and where documents start within it.
"""

import contextlib
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from txl_dist import __version__
from txl_dist.data import tokenizers
from txl_dist.files.atomic import sha256_of_file, sha256_of_json
from txl_dist.files.parsing import Sha256, Size

FORMAT = {"format": "txl_dist dataset", "version": 1}
SAMPLE_TABLE = np.dtype([("offset", "<u8"), ("crc32", "<u4")])
DOCUMENT_TABLE = np.dtype("<u8")
SIDE_FILES = ("samples.npy", "documents.npy")


class Shard(NamedTuple):
    """name: relative to the dataset. documents: those that start in it. bytes: the size of the file."""

    name: str
    samples: Size
    tokens: Size
    documents: Size
    bytes: Size
    sha256: Sha256


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
        self.documents = NpyWriter(folder / split / SIDE_FILES[1], DOCUMENT_TABLE)
        self.tokens = 0  # that went in
        self.bytes = 0  # of text that went in
        self.characters: int | None = 0
        self.words: int | None = 0
        self.rest = np.empty(0, dtype)  # tokens that are in no sample yet
        self.starts = np.empty(0, np.int64)  # of documents that are in no sample yet
        self.document, self.document_start = -1, 0  # the one that the next sample goes on with
        self.tar: Any = None
        self.shards: list[Shard] = []
        self.shard = (0, 0, 0)  # samples, tokens, documents of the one being written

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        """Close what `close` has not, without a word about a disk that is full: what ends the writing says so."""
        for file in (self.tar, self.sample_table.stream, self.documents.stream):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def add(
        self,
        tokens: np.ndarray,
        starts: list[int],
        size: int,
        characters: int | None = None,
        words: int | None = None,
    ) -> None:
        """Append tokens [n] made of a text of `size` bytes.

        Args:
            starts: the positions in `tokens` at which documents start; one without a token is no document.
            characters, words: of the text; None: not known, and so not of the split either.
        """
        positions = np.array(starts, np.int64) + self.tokens
        self.starts = np.unique(np.concatenate([self.starts, positions]))
        self.rest = np.concatenate([self.rest, tokens])
        self.tokens += len(tokens)
        self.bytes += size
        self.characters = add_known(self.characters, characters)
        self.words = add_known(self.words, words)
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
            "characters": self.characters,
            "words": self.words,
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
        self.documents.append(inside)
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


def add_known(total: int | None, count: int | None) -> int | None:
    return None if total is None or count is None else total + count


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
        "written_by": {"txl_dist": __version__},
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
