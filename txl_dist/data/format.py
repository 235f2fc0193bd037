"""The format of a dataset on disk: WebDataset shards, and an index that finds any token of a split without scanning.

    index.json                  written last: the facts of the dataset, with the SHA-256 of everything, itself included
    tokenizer/                  see `tokenizers`
    train/000000.tar ...        the split's stream of tokens in samples of `sample_tokens` (the last may be shorter)
    train/samples.npy           of each sample: byte offset in its shard, CRC-32 of its tokens
    train/documents.npy         where in the stream each document starts, and as last entry the stream's length
    train/sentences.npy         where each sentence starts; only where lines are sentences
    train/examples.npy          of each document, which is an example then: the tokens of its first text, and what is to
                                be said of it; only where there are examples
    train/paragraphs.jsonl      the passages with their questions and answers as text; only where examples are answers

Token p is in sample p // sample_tokens, sample k in shard k // shard_samples. A sample is `tokens.npy` and, for other
readers, `json`: the document it starts in, the token's offset in that document, and where documents start within it.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, StrictBool

from txl_dist.files.atomic import sha256_of_json
from txl_dist.files.parsing import Sha256, Size, Version

FORMAT = {"format": "txl_dist dataset", "version": 1}

SAMPLES_FILE = "samples.npy"
DOCUMENTS_FILE = "documents.npy"
SENTENCES_FILE = "sentences.npy"
EXAMPLES_FILE = "examples.npy"
PARAGRAPHS_FILE = "paragraphs.jsonl"
SAMPLE_TABLE = np.dtype([("offset", "<u8"), ("crc32", "<u4")])  # the rows of samples.npy
DOCUMENT_TABLE = np.dtype("<u8")  # the rows of documents.npy
SENTENCE_TABLE = np.dtype("<u8")  # the rows of sentences.npy
# The rows of examples.npy: the tokens of the first text, and the number of the class or the score ...
LABELLED = np.dtype([("first", "<u4"), ("value", "<f8")])
# ... or the first and the last token of the answer in the passage, which is the first text; -1 where there is none.
ANSWERED = np.dtype([("first", "<u4"), ("start", "<i4"), ("end", "<i4")])
EXAMPLE_TABLES = {"labels": LABELLED, "scores": LABELLED, "answers": ANSWERED}


class Shard(NamedTuple):
    """One tar file of a split.

    Attributes:
        name: its path relative to the dataset.
        documents: how many documents start in it.
        bytes: the size of the file.
    """

    name: str
    samples: Size
    tokens: Size
    documents: Size
    bytes: Size
    sha256: Sha256


class TokenizerEntry(BaseModel):
    """The tokenizer in index.json; `files` maps each name to its SHA-256."""

    vocab_size: Annotated[Size, Field(ge=1, le=1 << 32)]
    eos: Size
    files: dict[str, Sha256]


class SplitEntry(BaseModel):
    """One split in index.json; `files` maps the names of its tables to their SHA-256. bytes: null without a text."""

    tokens: Size
    documents: Size
    bytes: Size | None
    characters: Size | None = None
    words: Size | None = None
    samples: Size
    files: dict[str, Sha256]
    shards: tuple[Shard, ...]


class Examples(BaseModel):
    """What the documents of a dataset are examples of, in index.json.

    A document is the tokens of a text, or of a pair of texts one after the other, without `<eos>`.

    Attributes:
        kind: a class, a number, or the part of a passage that answers a question.
        labels: the names of the classes in the order of their numbers.
        pairs: whether there is a second text; of answers it is the question.
    """

    kind: Literal["labels", "scores", "answers"]
    labels: list[str] = []
    pairs: StrictBool


class Question(BaseModel):
    """A question about a paragraph, and all answers that count as right; none where the paragraph has none."""

    id: str
    question: str
    answers: list[str]


class Paragraph(BaseModel):
    """A line of paragraphs.jsonl: a passage, and its questions in the order of their examples."""

    context: str
    questions: list[Question]


class IndexFile(BaseModel):
    """The schema of index.json."""

    written_by: dict[Literal["txl_dist"], Version] = {}  # early datasets of 0.1.0 do not record it
    fingerprint: Sha256
    corpus: dict[str, Any]
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    sample_tokens: Annotated[Size, Field(ge=1)]
    shard_samples: Annotated[Size, Field(ge=1)]
    splits: dict[str, SplitEntry]
    examples: Examples | None = None

    def names(self) -> Iterator[str]:
        """Yield every name that becomes a path: an index may come from anybody."""
        yield from (f"tokenizer/{name}" for name in self.tokenizer.files)
        for name, split in self.splits.items():
            yield name
            yield from (shard.name for shard in split.shards)


def content_fingerprint(
    tokenizer_files: Mapping[str, str], splits: Mapping[str, Any], examples: Mapping[str, Any] | None = None
) -> str:
    """Return the SHA-256 that names the content of a dataset: its tokenizer's files, shards, sentences and examples.

    Args:
        tokenizer_files: name -> SHA-256.
        splits: the entries of index.json, as JSON values.
        examples: likewise.
    """
    shards = {split: [shard["sha256"] for shard in facts["shards"]] for split, facts in splits.items()}
    content: dict[str, Any] = {"tokenizer": tokenizer_files, "shards": shards}
    tables = {split: facts["files"].get(SENTENCES_FILE) for split, facts in splits.items()}
    sentences = {split: sha256 for split, sha256 in tables.items() if sha256 is not None}
    if sentences:  # datasets without them keep the fingerprint that they always had
        content["sentences"] = sentences
    if examples is not None:
        names = (EXAMPLES_FILE, PARAGRAPHS_FILE)
        tables = {split: [facts["files"].get(name) for name in names] for split, facts in splits.items()}
        content["examples"] = {"entry": examples, "tables": tables}
    return sha256_of_json(content)
