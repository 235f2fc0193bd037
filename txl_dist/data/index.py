"""The index of a dataset, opened and checked: its splits, its tokenizer, and where its files are."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from txl_dist.data import tokenizers
from txl_dist.data.format import (
    DOCUMENT_TABLE,
    DOCUMENTS_FILE,
    EXAMPLE_TABLES,
    EXAMPLES_FILE,
    PARAGRAPHS_FILE,
    SAMPLE_TABLE,
    SAMPLES_FILE,
    SENTENCE_TABLE,
    SENTENCES_FILE,
    Examples,
    IndexFile,
    Paragraph,
    Shard,
    SplitEntry,
    content_fingerprint,
)
from txl_dist.data.store import AGAIN, Store
from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, shown

FILE_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


@dataclass(frozen=True, eq=False)
class Split:
    """One stream of tokens.

    Attributes:
        tokens: the length of the stream.
        bytes: the size of the text that it was made of; None if that is not text.
        characters, words: of that text; None if it is not UTF-8, or was prepared before they were counted.
        document_starts: uint64 [documents + 1], the position of each document's first token; the last entry is
            `tokens`. Mapped into memory, not read.
        sample_table: SAMPLE_TABLE [samples]. Mapped into memory, too.
        sentence_starts: uint64 [sentences], the position of each sentence's first token, ascending from 0; every
            document begins with a sentence, and its `<eos>` belongs to its last one. Mapped into memory, too. None if
            the dataset knows no sentences.
        examples: LABELLED or ANSWERED [documents], what is to be said of each document; mapped into memory, too. None
            if documents are not examples.
        paragraphs: the file that `Index.paragraphs` reads; None if examples are not answers.
    """

    tokens: int
    documents: int
    bytes: int | None
    samples: int
    shards: tuple[Shard, ...]
    document_starts: np.ndarray
    sample_table: np.ndarray
    characters: int | None = None
    words: int | None = None
    sentence_starts: np.ndarray | None = None
    examples: np.ndarray | None = None
    paragraphs: Path | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """The content of a dataset.

    Attributes:
        fingerprint: names the content; see `content_fingerprint`.
        corpus: the text and the settings that it was made of.
        tokenizer_files: name -> SHA-256.
        dtype: of the tokens in the shards.
        examples: what the documents are examples of; None if they are none.
    """

    store: Store
    fingerprint: str
    corpus: dict[str, Any]
    tokenizer_files: dict[str, str]
    vocab_size: int
    eos: int
    dtype: np.dtype[Any]
    sample_tokens: int
    shard_samples: int
    splits: dict[str, Split]
    examples: Examples | None = None

    @classmethod
    def open(cls, location: str) -> "Index":
        """Open a dataset in a local folder, or behind a URL prefix that webdataset can open (https://..., gs://...).

        Raises:
            UserError: if there is none, or it is damaged or contradicts itself.
        """
        store = Store(location)
        values = store.read_index()
        path = f"{store.location}/index.json"
        try:
            facts = IndexFile.model_validate(values)
            if facts.fingerprint != content_fingerprint(
                facts.tokenizer.files, values["splits"], values.get("examples")
            ):
                raise UserError(f"{path}: its fingerprint is not that of its shards; {AGAIN}")
            for name in facts.names():
                if not FILE_NAME.fullmatch(name):
                    raise UserError(f"{path}: {shown(name)} is not the name of a file in a dataset; {AGAIN}")
            index = cls(
                store=store,
                fingerprint=facts.fingerprint,
                corpus=facts.corpus,
                tokenizer_files=facts.tokenizer.files,
                vocab_size=facts.tokenizer.vocab_size,
                eos=facts.tokenizer.eos,
                dtype=np.dtype(facts.dtype).newbyteorder("<"),
                sample_tokens=facts.sample_tokens,
                shard_samples=facts.shard_samples,
                splits={name: open_split(store, name, entry, facts.examples) for name, entry in facts.splits.items()},
                examples=facts.examples,
            )
            index.check()
        except PARSE_ERRORS as error:
            raise UserError(f"{path}: is damaged ({describe(error)}); {AGAIN}") from error
        return index

    def check(self) -> None:
        """Raise a UserError if the index contradicts itself."""
        path = f"{self.store.location}/index.json"
        if self.eos >= self.vocab_size:
            raise UserError(f"{path}: eos={self.eos} is not in its vocabulary of {self.vocab_size:,}; {AGAIN}")
        labels = [] if self.examples is None else self.examples.labels
        has_classes = self.examples is not None and self.examples.kind == "labels"
        if len(set(labels)) < len(labels) or has_classes != (len(labels) > 1):
            raise UserError(f"{path}: its examples have the labels {shown(labels)}; {AGAIN}")
        for name, split in self.splits.items():
            problem = self._contradiction(split) or table_problem(split, self.shard_samples)
            if self.examples is not None:
                problem = problem or examples_problem(split, self.examples)
            if problem:
                raise UserError(f"{path}: split {name}: {problem}; {AGAIN}")

    def _contradiction(self, split: Split) -> str | None:
        """Describe the first contradiction among the numbers of a split; None if there is none."""
        for key in ("samples", "tokens", "documents"):
            if sum(getattr(shard, key) for shard in split.shards) != getattr(split, key):
                return f"the {key} of its shards do not add up to {getattr(split, key)}"
        if split.samples != -(-split.tokens // self.sample_tokens):
            return f"{split.tokens} tokens do not make {split.samples} samples of {self.sample_tokens}"
        if any(shard.samples != self.shard_samples for shard in split.shards[:-1]):
            return f"a shard before the last does not have {self.shard_samples} samples"
        if not split.shards or not 0 < split.shards[-1].samples <= self.shard_samples:
            return "its last shard is missing, empty or too long"
        if any(shard.tokens * self.dtype.itemsize > shard.bytes for shard in split.shards):
            return "a shard is too small for its tokens"
        return None

    def validate(self) -> list[str]:
        """Return an error for each shard that is missing or has another size.

        Of a dataset behind a URL only the shards in the cache are looked at.
        """
        errors = []
        for split in self.splits.values():
            for shard in split.shards:
                path = self.store.folder / shard.name
                if path.is_file():
                    size = path.stat().st_size
                    if size != shard.bytes:
                        errors.append(f"{path}: has {size:,} bytes, not {shard.bytes:,}; {self.store.remedy(path)}")
                elif not self.store.is_remote:
                    errors.append(f"{path}: is missing; {self.store.remedy(path)}")
        return errors

    def aligned_length(self, name: str) -> int:
        """Return the length of the documents of a split, if all have one and no `<eos>` stands between them; else 1.

        Lanes begin at multiples of it, so that segments of this length are documents.
        """
        split = self.splits[name]
        if split.bytes is not None or self.tokenizer().ends_documents:
            return 1
        lengths = np.diff(split.document_starts.view(np.int64))
        return int(lengths[0]) if (lengths == lengths[0]).all() else 1

    def paragraphs(self, name: str) -> list[Paragraph]:
        """Read the passages of a split whose examples are answers, with their questions in the order of the examples.

        Raises:
            UserError: if the file is damaged, or has not one question per example.
        """
        split = self.splits[name]
        assert split.paragraphs is not None, "only answers have paragraphs"
        try:
            with open(split.paragraphs, "rb") as lines:
                paragraphs = [Paragraph.model_validate_json(line) for line in lines]
        except (OSError, *PARSE_ERRORS) as error:
            raise UserError(f"{split.paragraphs}: is damaged ({describe(error)}); {AGAIN}") from error
        questions = sum(len(paragraph.questions) for paragraph in paragraphs)
        if questions != split.documents:
            raise UserError(
                f"{split.paragraphs}: has {questions:,} questions for {split.documents:,} examples; {AGAIN}"
            )
        return paragraphs

    def label_counts(self, name: str) -> dict[str, int]:
        """Count the examples of a split with each label, or those that are answered and those that are not."""
        table = self.splits[name].examples
        assert self.examples is not None and table is not None, "only examples have labels"
        assert self.examples.kind != "scores", "scores are not counted"
        if self.examples.kind == "answers":
            answered = int((table["start"] >= 0).sum())
            return {"answered": answered, "not answered": len(table) - answered}
        counts = np.bincount(table["value"].astype(np.int64), minlength=len(self.examples.labels))
        return dict(zip(self.examples.labels, counts.tolist(), strict=True))

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Load the tokenizer.

        Raises:
            UserError: if a file of it is damaged, or its vocabulary is not that of the index.
        """
        for name, sha256 in self.tokenizer_files.items():
            self.store.checked(f"tokenizer/{name}", sha256)
        tokenizer = tokenizers.load(self.store.folder / "tokenizer")
        if (tokenizer.vocab_size, tokenizer.eos) != (self.vocab_size, self.eos):
            raise UserError(
                f"{self.store.location}/index.json: vocab_size={self.vocab_size} and eos={self.eos} are not those of "
                f"its tokenizer, {tokenizer.vocab_size} and {tokenizer.eos}; {AGAIN}"
            )
        return tokenizer


def open_split(store: Store, name: str, entry: SplitEntry, examples: Examples | None) -> Split:
    """Check the files of a split beside its shards, and map its tables into memory."""

    def checked(file: str) -> Path:
        return store.checked(f"{name}/{file}", entry.files[file])

    return Split(
        tokens=entry.tokens,
        documents=entry.documents,
        bytes=entry.bytes,
        samples=entry.samples,
        shards=entry.shards,
        document_starts=open_table(checked(DOCUMENTS_FILE)),
        sample_table=open_table(checked(SAMPLES_FILE)),
        characters=entry.characters,
        words=entry.words,
        sentence_starts=open_table(checked(SENTENCES_FILE)) if SENTENCES_FILE in entry.files else None,
        examples=None if examples is None else open_table(checked(EXAMPLES_FILE)),
        paragraphs=checked(PARAGRAPHS_FILE) if examples is not None and examples.kind == "answers" else None,
    )


def open_table(path: Path) -> np.ndarray:
    """Map a .npy file of numbers into memory.

    Raises:
        ValueError: if it holds anything else; objects are never unpickled.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except PARSE_ERRORS as error:
        raise ValueError(f"{path.name}: {describe(error)}") from error


def table_problem(split: Split, shard_samples: int) -> str | None:
    """Describe how the tables of a split contradict its numbers; None if they do not."""
    table = split.sample_table
    if table.shape != (split.samples,) or table.dtype != SAMPLE_TABLE:
        return f"{SAMPLES_FILE} is not the table of its samples"
    for number, shard in enumerate(split.shards):
        offsets = table["offset"][number * shard_samples :][: shard.samples]
        if offsets[-1] >= shard.bytes or (offsets[1:] <= offsets[:-1]).any():
            return f"{SAMPLES_FILE} has offsets that do not ascend within {shard.name}"
    starts = split.document_starts
    if starts.shape != (split.documents + 1,) or starts.dtype != DOCUMENT_TABLE:
        return f"{DOCUMENTS_FILE} is not the table of its documents"
    if starts[0] != 0 or starts[-1] != split.tokens or (starts[1:] < starts[:-1]).any():
        return f"{DOCUMENTS_FILE} has starts that do not ascend from 0 to {split.tokens}"
    return None if split.sentence_starts is None else sentence_problem(split.sentence_starts, split.tokens)


def sentence_problem(starts: np.ndarray, tokens: int) -> str | None:
    """Describe why an array is not the table of the sentences of a split; None if it is."""
    if starts.ndim != 1 or starts.dtype != SENTENCE_TABLE or len(starts) == 0:
        return f"{SENTENCES_FILE} is not the table of its sentences"
    if starts[0] != 0 or starts[-1] >= tokens or (starts[1:] <= starts[:-1]).any():
        return f"{SENTENCES_FILE} has starts that do not ascend from 0 within its {tokens} tokens"
    return None


def examples_problem(split: Split, entry: Examples) -> str | None:
    """Describe why a split has no table of examples, or one that is not of its documents; None if it is."""
    table = split.examples
    if table is None or table.shape != (split.documents,) or table.dtype != EXAMPLE_TABLES[entry.kind]:
        return f"{EXAMPLES_FILE} is not the table of its examples"
    lengths = np.diff(split.document_starts)
    if (table["first"] < 1).any() or (table["first"] > lengths).any():
        return f"{EXAMPLES_FILE} has first texts that are longer than their documents, or empty"
    if entry.kind == "answers":
        start = table["start"]
        end = table["end"]
        inside = (start >= 0) & (start <= end) & (end < table["first"])
        if not (inside | ((start == -1) & (end == -1))).all():
            return f"{EXAMPLES_FILE} has answers that are not in their passages"
    elif not np.isfinite(table["value"]).all():
        return f"{EXAMPLES_FILE} has values that are not finite"
    elif entry.kind == "labels" and not np.isin(table["value"], np.arange(len(entry.labels))).all():
        return f"{EXAMPLES_FILE} has values that are not the numbers of its {len(entry.labels)} labels"
    return None
