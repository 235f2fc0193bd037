"""Make the tokenizer of a dataset, and turn pieces of text into tokens.

The functions that take pieces run in the processes of a WorkerPool. Those start in a moment because this module
imports neither torch nor Hydra.
"""

import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from txl_dist.config.schema import (
    CorpusConfig,
    IdsTokenizerConfig,
    PublishedCorpusConfig,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    WordTokenizerConfig,
    XLNetTokenizerConfig,
)
from txl_dist.data import tokenizers
from txl_dist.data.preparing import published, splitting
from txl_dist.data.preparing.corpora import SurveyedFile
from txl_dist.data.preparing.splitting import Piece, Plan, Shares
from txl_dist.data.preparing.workers import WorkerPool
from txl_dist.data.text_size import TextSize, count_text
from txl_dist.data.tokenizers import (
    BytesTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    XLNetTokenizer,
)

SENTENCEPIECE_BYTES = 16 << 20  # of text to learn pieces from: more costs minutes and gigabytes, and changes little

load_tokenizer = lru_cache(maxsize=1)(tokenizers.load)  # once in each process


def given_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Return the tokenizer if it needs nothing of the corpus; else None."""
    if isinstance(config, IdsTokenizerConfig):
        return None
    if isinstance(config, SentencePieceTokenizerConfig):
        return None if config.model is None else SentencePieceTokenizer.open(Path(config.model))
    if isinstance(config, XLNetTokenizerConfig):
        return None if config.model is None else XLNetTokenizer.open(Path(config.model), config.lower)
    if isinstance(config, WordTokenizerConfig):
        return None if config.vocab is None else WordTokenizer.open(Path(config.vocab))
    return BytesTokenizer()


class TextPlan(Protocol):
    """What a tokenizer is trained on: a `splitting.Plan`, or another plan whose documents are text."""

    @property
    def shares(self) -> Shares: ...
    @property
    def vocabulary(self) -> SurveyedFile | None: ...
    def size(self, split: str | None = None) -> int: ...
    def pieces(self, split: str | None = None) -> Iterator[Piece]: ...


def train_tokenizer(config: TokenizerConfig, corpus: CorpusConfig, plan: TextPlan, workers: WorkerPool) -> Tokenizer:
    """Learn the vocabulary from the training split, and from nothing else."""
    if isinstance(config, WordTokenizerConfig):
        counts = count_all_words(plan, workers)
        if isinstance(corpus, PublishedCorpusConfig):
            published.check_vocabulary(corpus, counts)
        return WordTokenizer.train(counts, config.vocab_size, config.min_count)
    assert isinstance(config, (SentencePieceTokenizerConfig, XLNetTokenizerConfig))
    size = plan.size("train")
    sample = partial(sample_lines, plan.shares, min(1.0, SENTENCEPIECE_BYTES / size))
    lines: list[str] = []
    for sampled in workers.map("sampling lines", sample, plan.pieces("train"), size):
        lines += sampled
    kind = "unigram" if isinstance(config, XLNetTokenizerConfig) else config.type
    workers.say(f"training SentencePiece ({kind}, {config.vocab_size} pieces) on {len(lines):,} lines")
    if isinstance(config, XLNetTokenizerConfig):
        return XLNetTokenizer.train(lines, config.vocab_size, config.lower)
    return SentencePieceTokenizer.train(lines, config.vocab_size, config.type)


def count_all_words(plan: TextPlan, workers: WorkerPool) -> Counter[str]:
    """Count the words of the training split, or read the counts that the corpus was published with."""
    if plan.vocabulary is not None:
        return WordTokenizer.read_counts(plan.vocabulary.source.path)
    counts: Counter[str] = Counter()
    count = partial(count_words, plan.shares)
    for counted in workers.map("counting words", count, plan.pieces("train"), plan.size("train")):
        counts.update(counted)
    return counts


def count_words(shares: Shares, pieces: list[Piece]) -> Counter[str]:
    """Count the words of the training split in some pieces."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        for document in splitting.documents(piece, shares):
            if document.split == "train":
                counts.update(splitting.text(document).split())
    return counts


def sample_lines(shares: Shares, rate: float, pieces: list[Piece]) -> list[str]:
    """Draw each line of the training split with a probability of `rate`; the draw depends on the pieces alone."""
    lines = []
    for piece in pieces:
        rng = random.Random(f"{piece.source.name}:{piece.offset}")
        for document in splitting.documents(piece, shares):
            if document.split == "train":
                lines += [line for line in splitting.text(document).split("\n") if line and rng.random() < rate]
    return lines


class Encoded(NamedTuple):
    """Tokens [n] of a split, and what `SplitWriter.add` takes beside them.

    Attributes:
        starts, sentences: the positions in them at which documents and sentences start.
        size: of their text.
        examples: the rows of the documents, where those are examples.
        paragraphs: lines of paragraphs.jsonl.
    """

    tokens: np.ndarray
    starts: list[int]
    size: TextSize
    sentences: list[int]
    examples: np.ndarray | None = None
    paragraphs: bytes = b""


def has_sentences(plan: Plan, tokenizer: Tokenizer) -> bool:
    """Return whether each line of the text is a sentence, whose start the dataset keeps."""
    return plan.document == "blank_line" or tokenizer.lines_are_sentences


def encode_pieces(tokenizer_folder: Path, shares: Shares, sentences: bool, pieces: list[Piece]) -> dict[str, Encoded]:
    """Tokenize some pieces; return the tokens of each split that they hold text of.

    Args:
        sentences: whether lines are sentences.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens: dict[str, list[np.ndarray]] = defaultdict(list)
    starts: dict[str, list[int]] = defaultdict(list)
    sentence_starts: dict[str, list[int]] = defaultdict(list)
    texts: dict[str, list[bytes]] = defaultdict(list)
    lengths: Counter[str] = Counter()
    midword: Counter[str] = Counter()
    for piece in pieces:
        for document in splitting.documents(piece, shares):
            split = document.split
            assert split is not None
            if document.first:
                starts[split].append(lengths[split])
            for part in split_into_lines(document) if sentences else [document]:
                try:
                    encoded = tokenizer.encode(part.data, part.last)
                except UnicodeDecodeError as error:
                    raise splitting.not_utf8(part, error) from error
                if sentences and (part.first or begins_sentence(part, encoded)):
                    sentence_starts[split].append(lengths[split])
                tokens[split].append(encoded)
                lengths[split] += len(encoded)
            texts[split].append(document.data)
            midword[split] += document.midword
    return {
        split: Encoded(
            np.concatenate(tokens[split]),
            starts[split],
            count_text(texts[split], midword[split]),
            sentence_starts[split],
        )
        for split in tokens
    }


def split_into_lines(document: Piece) -> Iterator[Piece]:
    """Cut a piece of a document into its lines, each again a piece of the document."""
    lines = io.BytesIO(document.data).readlines()
    offset = document.offset
    for number, line in enumerate(lines):
        is_first = number == 0
        is_last = number == len(lines) - 1
        yield document._replace(
            offset=offset,
            data=line,
            first=document.first and is_first,
            last=document.last and is_last,
            midline=document.midline and is_first,
        )
        offset += len(line)


def begins_sentence(line: Piece, tokens: np.ndarray) -> bool:
    """Return whether a line, with these tokens [n], is a further sentence of its document.

    The rest of a line that was cut is none, nor is a blank line: its tokens, `<eos>` among them, belong to the
    sentence before. Nor is a line without a token but the `<eos>` of the document.
    """
    return len(tokens) > line.last and not line.midline and splitting.BLANK.fullmatch(line.data) is None
