"""Writes a dataset: the shards and tables of each split as its tokens come in, and at last the index.

`data/format.py` describes the files.
"""

import contextlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from txl_dist import __version__
from txl_dist.data import tokenizers
from txl_dist.data.format import (
    DOCUMENT_TABLE,
    DOCUMENTS_FILE,
    EXAMPLE_TABLES,
    EXAMPLES_FILE,
    FORMAT,
    PARAGRAPHS_FILE,
    SAMPLE_TABLE,
    SAMPLES_FILE,
    SENTENCE_TABLE,
    SENTENCES_FILE,
    Examples,
    Shard,
    content_fingerprint,
)
from txl_dist.data.text_size import TextSize
from txl_dist.files.atomic import sha256_of_file, sha256_of_json


class NpyWriter:
    """A one-dimensional .npy file that grows, so that no table has to fit into memory."""

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self.dtype = dtype
        self.length = 0
        self.stream = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that it keeps its size when the length grows.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)

    def append(self, values: ArrayLike) -> None:
        """Append values [n]."""
        array = np.asarray(values, self.dtype)
        self.stream.write(array.tobytes())
        self.length += len(array)

    def close(self) -> None:
        """Write the header again, with the final length, and close the file."""
        self.stream.seek(0)
        self._write_header()
        self.stream.close()


class SplitWriter:
    """Writes one split: takes tokens as they come, and cuts them into samples and shards.

    Args:
        dtype: of the tokens.
        sample_tokens: tokens in a sample.
        shard_samples: samples in a shard.
        sentences: whether a table of the sentences is written.
        examples: what documents are examples of; None: they are none.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype[Any],
        sample_tokens: int,
        shard_samples: int,
        sentences: bool = False,
        examples: Examples | None = None,
    ):
        self.folder = folder
        self.split = split
        self.sample_tokens = sample_tokens
        self.shard_samples = shard_samples
        (folder / split).mkdir()
        self.sample_table = NpyWriter(folder / split / SAMPLES_FILE, SAMPLE_TABLE)
        self.documents = NpyWriter(folder / split / DOCUMENTS_FILE, DOCUMENT_TABLE)
        self.sentences = NpyWriter(folder / split / SENTENCES_FILE, SENTENCE_TABLE) if sentences else None
        self.examples: NpyWriter | None = None
        self.paragraphs: BinaryIO | None = None
        if examples is not None:
            self.examples = NpyWriter(folder / split / EXAMPLES_FILE, EXAMPLE_TABLES[examples.kind])
            if examples.kind == "answers":
                self.paragraphs = open(folder / split / PARAGRAPHS_FILE, "wb")  # noqa: SIM115
        self.tokens = 0  # added so far
        self.size = TextSize(0, 0, 0)  # of their text
        self.rest = np.empty(0, dtype)  # tokens that are not in a sample yet
        self.starts = np.empty(0, np.int64)  # of documents that are not in a sample yet
        self.sentence_starts = np.empty(0, np.int64)  # of sentences whose first token has not come yet
        self.document = -1  # the last document of the samples so far
        self.document_start = 0
        self.tar: Any = None
        self.shards: list[Shard] = []
        self.shard = (0, 0, 0)  # samples, tokens and documents of the shard that is being written

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files that `close` has not; a full disk is reported by the error that ended the writing."""
        tables = (self.sample_table, self.documents, self.sentences, self.examples)
        for file in (self.tar, self.paragraphs, *(table.stream for table in tables if table is not None)):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def add(
        self,
        tokens: np.ndarray,
        starts: list[int],
        size: TextSize,
        sentences: Sequence[int] = (),
        examples: np.ndarray | None = None,
        paragraphs: bytes = b"",
    ) -> None:
        """Append tokens [n].

        Args:
            starts: the positions in `tokens` at which documents start; one without a token is not counted.
            size: of the text that the tokens were made of.
            sentences: the positions in `tokens` at which sentences start; one without a token is not counted.
            examples: the rows of the documents that start in `tokens`, where documents are examples.
            paragraphs: lines of paragraphs.jsonl.
        """
        if self.sentences is not None:
            self._add_sentences(self.sentences, np.array(sentences, np.int64) + self.tokens, self.tokens + len(tokens))
        positions = np.array(starts, np.int64) + self.tokens
        self.starts = np.unique(np.concatenate([self.starts, positions]))
        self.rest = np.concatenate([self.rest, tokens])
        self.tokens += len(tokens)
        self.size = self.size.plus(size)
        if self.examples is not None and examples is not None:
            self.examples.append(examples)
        if self.paragraphs is not None:
            self.paragraphs.write(paragraphs)
        while len(self.rest) >= self.sample_tokens:
            self._write_sample(self.rest[: self.sample_tokens])
            self.rest = self.rest[self.sample_tokens :]

    def close(self) -> dict[str, Any]:
        """Write the last sample and the tables; return the split's entry in index.json."""
        if len(self.rest):
            self._write_sample(self.rest)
        self._close_shard()
        documents = self.documents.length
        self.documents.append([self.tokens])
        tables = {SAMPLES_FILE: self.sample_table, DOCUMENTS_FILE: self.documents}
        if self.sentences is not None:
            tables[SENTENCES_FILE] = self.sentences
        if self.examples is not None:
            assert self.examples.length == documents, "every document is one example"
            tables[EXAMPLES_FILE] = self.examples
        for table in tables.values():
            table.close()
        names = list(tables)
        if self.paragraphs is not None:
            self.paragraphs.close()
            names.append(PARAGRAPHS_FILE)
        return {
            "tokens": self.tokens,
            "documents": documents,
            "bytes": self.size.bytes,
            "characters": self.size.characters,
            "words": self.size.words,
            "samples": self.sample_table.length,
            "files": {name: sha256_of_file(self.folder / self.split / name) for name in names},
            "shards": [shard._asdict() for shard in self.shards],
        }

    def _add_sentences(self, table: NpyWriter, positions: np.ndarray, tokens: int) -> None:
        """Append the starts among some ascending positions that are before `tokens`; keep the others."""
        starts = np.unique(np.concatenate([self.sentence_starts, positions]))
        complete = int(np.searchsorted(starts, tokens))
        table.append(starts[:complete])
        self.sentence_starts = starts[complete:]

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

        samples, shard_tokens, documents = self.shard
        self.shard = (samples + 1, shard_tokens + len(tokens), documents + len(inside))
        self.starts = self.starts[len(inside) :]
        self.document += len(inside)
        if len(inside):
            self.document_start = int(inside[-1])

    def _open_shard(self) -> None:
        from webdataset import TarWriter  # imports torch, which the processes that tokenize do not need

        self._close_shard()
        name = f"{self.split}/{len(self.shards):06d}.tar"
        # An integer time: for a float, tarfile writes every member a second header.
        self.tar = TarWriter(str(self.folder / name), encoder=False, mtime=0, user="txl_dist", group="txl_dist")

    def _close_shard(self) -> None:
        if self.tar is None:
            return
        self.tar.close()
        name = f"{self.split}/{len(self.shards):06d}.tar"
        path = self.folder / name
        self.shards.append(Shard(name, *self.shard, path.stat().st_size, sha256_of_file(path)))
        self.tar = None
        self.shard = (0, 0, 0)


def write_index(
    folder: Path,
    corpus: dict[str, Any],
    tokenizer: tokenizers.Tokenizer,
    sample_tokens: int,
    shard_samples: int,
    splits: Mapping[str, dict[str, Any]],
    examples: Examples | None = None,
) -> None:
    """Write index.json of a folder that holds the tokenizer and the shards.

    Args:
        corpus: the text and the settings that the dataset is made of.
        splits: what each split's `SplitWriter.close` returned.
        examples: what documents are examples of.
    """
    entry = None if examples is None else examples.model_dump()
    files = {path.name: sha256_of_file(path) for path in sorted((folder / "tokenizer").iterdir())}
    index = {
        **FORMAT,
        "written_by": {"txl_dist": __version__},
        "fingerprint": content_fingerprint(files, splits, entry),
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
    if entry is not None:
        index["examples"] = entry
    index["sha256"] = sha256_of_json(index)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
