"""Documents that are not text but numbers: from files of numbers, images, sounds or any bytes, or drawn.

    survey -> SequencePlan.pieces -> encode_sequences

It stands beside `corpora`, `splitting` and `tokenizing`, which do the same with text: here a document is no bytes that
could be cut at line ends. `sequence_files` knows the kinds of files.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from txl_dist.config.schema import (
    DuplicationCorpusConfig,
    FilesCorpusConfig,
    IdsCorpusConfig,
    IdsTokenizerConfig,
    TokensCorpusConfig,
    ids_of,
)
from txl_dist.config.types import INT32_MAX
from txl_dist.data.preparing import corpora, sequence_files, splitting
from txl_dist.data.preparing.corpora import SPLITS, SourceFile, SurveyedFile
from txl_dist.data.preparing.sequence_files import SequencePiece, describe_place, documents
from txl_dist.data.preparing.splitting import ENOUGH_DOCUMENTS, Shares, may_hold, split_of_document
from txl_dist.data.preparing.tokenizing import Encoded, load_tokenizer
from txl_dist.data.preparing.workers import WorkerPool
from txl_dist.data.text_size import TextSize
from txl_dist.data.tokenizers import IdsTokenizer, Picture, Sound
from txl_dist.errors import ConfigError, UserError

NOT_TEXT = TextSize(None, None, None)
NAMED = 10  # of the files that cannot be read
SYMBOLS = 127  # of a duplicated word


@dataclass(frozen=True)
class SequencePlan:
    """The sequences to read, with their splits; used as a `splitting.Plan` is.

    Attributes:
        files: each with its split; None: each of its documents has its own.
        shares: of valid and test, for files without a split.
        content: what documents are, where they are not mere numbers.
    """

    config: IdsCorpusConfig
    files: list[tuple[SurveyedFile, str | None]]
    split_by: Literal["given", "document"]
    shares: Shares
    content: Picture | Sound | None
    document = "sequence"
    vocabulary = None

    def size(self, split: str | None = None) -> int:
        """Count the bytes of what `pieces(split)` reads."""
        if isinstance(self.config, DuplicationCorpusConfig):
            item = sequence_files.DRAWN.itemsize * self.config.length
            return sum(item * count for name, count in drawn_counts(self.config) if split in (None, name))
        return sum(file.size for file, of_file in self.files if split is None or of_file in (None, split))

    def pieces(self, split: str | None = None) -> Iterator[SequencePiece]:
        """Yield all pieces in the order of the files, or those that may hold documents of `split`.

        Raises:
            UserError: if a file cannot be read, or has changed since the survey.
        """
        if isinstance(self.config, DuplicationCorpusConfig):
            yield from (piece for piece in drawn_pieces(self.config) if may_hold(piece, split))
            return
        for file, of_file in self.files:
            if split is None or of_file in (None, split):
                for piece in sequence_files.read(self.config, file.source, file.size):
                    yield piece._replace(split=of_file)

    @property
    def corpus_settings(self) -> dict[str, Any]:
        """Return what decides how the files are read, or what is drawn."""
        if isinstance(self.config, DuplicationCorpusConfig):
            return asdict(self.config)
        if isinstance(self.config, TokensCorpusConfig):
            return {"key": self.config.key}
        return {"read": self.config.read} | (self.content._asdict() if self.content else {})

    def tokenizer_settings(self, config: IdsTokenizerConfig) -> dict[str, Any]:
        """Return the tokenizer's settings, with what the corpus decides of them."""
        are_alike = isinstance(self.content, Picture) or isinstance(self.config, DuplicationCorpusConfig)
        end = not are_alike if config.end is None else config.end
        return {"name": config.name, "vocab_size": config.vocab_size or ids_of(self.config), "end": end}

    def make_tokenizer(self, config: IdsTokenizerConfig, workers: WorkerPool) -> IdsTokenizer:
        """Make the tokenizer; where nobody says how many numbers there are, by the largest of the training split.

        Raises:
            UserError: if a number of the training split is negative, or does not fit into 32 bits.
        """
        settings = self.tokenizer_settings(config)
        size = settings["vocab_size"]
        if size is None:
            find = partial(largest_number, self.shares, self.config)
            found = workers.map("looking for the largest number", find, self.pieces("train"), self.size("train"))
            size = 1 + max(found, default=0)
        return IdsTokenizer(size, settings["end"], self.content)


# ------------------------------------------------------------------------------------------------------- survey


def survey(config: IdsCorpusConfig, advance: Callable[[int], None]) -> SequencePlan:
    """Find the files, read each once for its size and SHA-256, look at what they are, and decide their splits.

    Args:
        advance: is called with the number of bytes read.

    Raises:
        ConfigError: with all files that are not what they should be.
        UserError: if a split would be empty.
    """
    if isinstance(config, DuplicationCorpusConfig):
        return SequencePlan(config, [], "given", (0.0, 0.0), None)
    problems: list[str] = []
    sources = corpora.find(config, problems)
    if problems:
        raise ConfigError(problems)
    files: list[SurveyedFile] = []
    rates: dict[Path, int] = {}
    for source in sources:
        try:
            file, rate = sequence_files.look_at(config, source, advance)
        except UserError as error:
            problems.append(str(error))
            continue
        if file.size:
            files.append(file)
        if rate is not None:
            rates[source.path] = rate
    content: Picture | Sound | None = None
    if isinstance(config, FilesCorpusConfig) and config.read == "image" and config.size:
        height, width = config.size
        content = Picture(height, width, config.channels)
    elif rates and isinstance(config, FilesCorpusConfig):
        content = Sound(config.rate or next(iter(rates.values())))
        problems += [
            f"{path}: has {rate:,} samples per second, not {content.rate:,}; resample it, or leave it out"
            for path, rate in rates.items()
            if rate != content.rate
        ]
    if problems:
        more = len(problems) - NAMED
        raise ConfigError(problems[:NAMED] + ([f"(and {more:,} more files likewise)"] if more > 0 else []))
    return plan(config, files, content)


def plan(
    config: TokensCorpusConfig | FilesCorpusConfig, files: list[SurveyedFile], content: Picture | Sound | None
) -> SequencePlan:
    """Decide which file, or document, belongs to which split.

    Raises:
        UserError: if a split would be empty.
    """
    if any(file.source.split for file in files) or not files:
        given = [(file, file.source.split) for file in files]
        splitting.check_splits(config, {split for _, split in given})
        return SequencePlan(config, given, "given", (0.0, 0.0), content)
    shares = (config.valid_share, config.test_share)
    splits: list[str | None] = [None] * len(files)
    if isinstance(config, FilesCorpusConfig) or len(files) >= ENOUGH_DOCUMENTS:
        splits[:] = splitting.splits_by_quota([file.source.name for file in files], shares, "give more files,")
        splitting.check_splits(config, set(splits))
    return SequencePlan(config, list(zip(files, splits, strict=True)), "document", shares, content)


# -------------------------------------------------------------------------------------------------- duplication


def drawn_counts(config: DuplicationCorpusConfig) -> list[tuple[str, int]]:
    """Return how many sequences each split has."""
    return list(zip(SPLITS, (config.num_train, config.num_valid, config.num_test), strict=True))


def drawn_pieces(config: DuplicationCorpusConfig) -> Iterator[SequencePiece]:
    """Yield the sequences 0w0w of all splits."""
    for split, count in drawn_counts(config):
        source = SourceFile(Path(config.name), config.name, split)
        for number in range(count):
            data = draw(config, split, number).tobytes()
            yield SequencePiece(source, split, number, 0, data, sequence_files.DRAWN.str, first=True, last=True)


def draw(config: DuplicationCorpusConfig, split: str, number: int) -> np.ndarray:
    """Return the sequence 0w0w [length] with a number in a split, a function of these and the seed alone."""
    rng = np.random.default_rng((config.seed, SPLITS.index(split), number))
    half = np.zeros(config.length // 2, sequence_files.DRAWN)
    half[1:] = rng.integers(1, SYMBOLS + 1, len(half) - 1)
    return np.tile(half, 2)


# ----------------------------------------------------------------------------- in the processes of a WorkerPool


def largest_number(shares: Shares, config: IdsCorpusConfig, pieces: list[SequencePiece]) -> int:
    """Return the largest number of the training split in some pieces; 0 if there is none."""
    largest = 0
    for piece in pieces:
        for number, ids in documents(piece, config):
            if len(ids) and split_of(piece, number, shares) == "train":
                check_range(piece, number, ids, INT32_MAX - 1)
                largest = max(largest, int(ids.max()))
    return largest


def encode_sequences(
    tokenizer_folder: Path, shares: Shares, config: IdsCorpusConfig, pieces: list[SequencePiece]
) -> dict[str, Encoded]:
    """Turn some pieces into tokens; return those of each split that they hold documents of.

    Raises:
        UserError: naming file and place, if a number is not one of the vocabulary.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    assert isinstance(tokenizer, IdsTokenizer)
    tokens: dict[str, list[np.ndarray]] = defaultdict(list)
    starts: dict[str, list[int]] = defaultdict(list)
    lengths: Counter[str] = Counter()
    for piece in pieces:
        for number, ids in documents(piece, config):
            if len(ids) == 0:
                continue
            split = split_of(piece, number, shares)
            check_range(piece, number, ids, tokenizer.eos)
            if piece.first:
                starts[split].append(lengths[split])
            encoded = np.full(len(ids) + (piece.last and tokenizer.ends_documents), tokenizer.eos, tokenizer.dtype)
            encoded[: len(ids)] = ids
            tokens[split].append(encoded)
            lengths[split] += len(encoded)
    return {split: Encoded(np.concatenate(tokens[split]), starts[split], NOT_TEXT, []) for split in tokens}


def split_of(piece: SequencePiece, number: int, shares: Shares) -> str:
    """Return the split of a document."""
    return piece.split or split_of_document(piece.source.name, number, shares)


def check_range(piece: SequencePiece, number: int, ids: np.ndarray, size: int) -> None:
    """Raise a UserError that names the first number [n] of a document that is not one of 0 to size - 1."""
    if ids.min() >= 0 and ids.max() < size:
        return
    position = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
    wrong = int(ids[position])
    place = f"{piece.source.path}: {describe_place(piece, number)}, number {piece.place + position + 1:,}"
    if wrong < 0:
        raise UserError(f"{place}: {wrong} is negative, and no token; numbers begin with 0")
    remedy = f"give tokenizer.vocab_size={wrong + 1} or more" if wrong < INT32_MAX - 1 else "give smaller numbers"
    raise UserError(f"{place}: {wrong} is larger than {size - 1}, the last token; {remedy}")
