"""Split the text of a corpus into train, valid and test, and cut it into pieces of bounded size.

    plan -> Plan.pieces -> documents

A document's split depends on the names of the files or on positions in them alone: not on where the files lie, on the
machine or on the number of workers.
"""

import hashlib
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple, Protocol

from txl_dist.config.schema import PathsCorpusConfig, PublishedCorpusConfig, StdlibCorpusConfig, TextCorpusConfig
from txl_dist.data.preparing.corpora import SPLITS, SourceFile, SurveyedFile
from txl_dist.data.preparing.published import PUBLISHED, VOCABULARY, Corpus
from txl_dist.data.preparing.text_files import opened
from txl_dist.errors import UserError

PIECE_BYTES = 1 << 20
ENOUGH_DOCUMENTS = 20  # from here on split_by=auto cuts between documents
SPACES = tuple(chr(code).encode() for code in range(0x3001) if chr(code).isspace())  # all that str.split knows
BLANK = re.compile(b"(?:%s)*" % b"|".join(SPACES))

Shares = tuple[float, float]  # of valid and test
Document = Literal["file", "line", "blank_line"]  # what a document is; blank_line: the lines up to a blank one


class TextRange(NamedTuple):
    """The bytes [start, end) of a file's text; without a split, each document in them has its own."""

    split: str | None
    start: int
    end: int


class Piece(NamedTuple):
    """Consecutive bytes of one document, or of consecutive lines that are documents.

    Attributes:
        split: None if each line has its own.
        offset: of the first byte in the file's text.
        first, last: whether the document begins, and ends, in this piece.
        line: the number of the first line, from 0, if lines are documents.
        midword: whether the piece before ends within the word that this one begins with.
        midline: whether it ends within the line that this one begins with.
    """

    source: SourceFile
    split: str | None
    offset: int
    data: bytes
    first: bool
    last: bool
    line: int | None
    midword: bool
    midline: bool


# --------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """The text to read, with its splits.

    Attributes:
        files: each file with the ranges of its text, in order.
        shares: of valid and test, for ranges without a split.
        vocabulary: the file of words and their counts that the corpus was published with.
    """

    files: list[tuple[SurveyedFile, list[TextRange]]]
    document: Document
    split_by: Literal["given", "document", "position"]
    shares: Shares
    vocabulary: SurveyedFile | None = None

    def size(self, split: str | None = None) -> int:
        """Count the bytes of text in `pieces(split)`."""
        size = 0
        for _, ranges in self.files:
            size += sum(part.end - part.start for part in ranges if may_hold(part, split))
        return size

    def pieces(self, split: str | None = None) -> Iterator[Piece]:
        """Yield all pieces in the order of the files and their text, or those that may hold text of `split`.

        Raises:
            UserError: if a file cannot be read, or has become shorter since the survey.
        """
        for file, ranges in self.files:
            if any(may_hold(part, split) for part in ranges):
                yield from (piece for piece in self._read(file, ranges) if may_hold(piece, split))

    def _read(self, file: SurveyedFile, ranges: list[TextRange]) -> Iterator[Piece]:
        line = 0 if self.document == "line" else None
        document = 0
        with opened(file.source.path) as stream:
            stream.read(file.start)
            for part in ranges:
                offset = part.start
                first = True
                before = b""
                for data, ends in self._parts(stream, part.end - part.start):
                    split = part.split
                    if split is None and line is None:
                        split = split_of_document(file.source.name, document, self.shares)
                    last = ends or offset + len(data) == part.end
                    midword = before != b"" and not before.endswith(SPACES) and not data.startswith(SPACES)
                    midline = before != b"" and not before.endswith(b"\n")
                    yield Piece(file.source, split, offset, data, first, last, line, midword, midline)
                    offset += len(data)
                    first = last
                    before = data
                    document += last
                    if line is not None:
                        line += data.count(b"\n")
                if offset != part.end:
                    raise UserError(f"{file.source.path}: became shorter while it was read; start again")

    def _parts(self, stream: IO[bytes], size: int) -> Iterator[tuple[bytes, bool]]:
        """Cut the next `size` bytes; yield each part, and whether a document is known to end with it."""
        parts = cut(stream, size)
        if self.document == "blank_line":
            yield from cut_at_blank_lines(parts)
            return
        for data in parts:
            yield data, self.document == "line" and data.endswith(b"\n")


class HasSplit(Protocol):
    """A part of a corpus, with its split; None: each document in it has its own."""

    @property
    def split(self) -> str | None: ...


def may_hold(text: HasSplit, split: str | None) -> bool:
    """Return whether some text may hold text of `split`; None: of any."""
    return split is None or text.split in (None, split)


def plan(config: TextCorpusConfig | StdlibCorpusConfig | PublishedCorpusConfig, files: list[SurveyedFile]) -> Plan:
    """Decide which bytes of which file belong to which split.

    Raises:
        UserError: if a split would be empty.
    """
    if isinstance(config, PublishedCorpusConfig):
        return published_plan(PUBLISHED[config.name], files)
    document: Document = "file"
    split_by: Literal["given", "auto", "document", "position"] = "document"
    shares = (config.valid_share, config.test_share)
    if isinstance(config, TextCorpusConfig):
        document = config.document
        split_by = config.split_by
    if any(file.source.split for file in files):
        split_by = "given"
        shares = (0.0, 0.0)
    if split_by == "auto":
        split_by = "document" if document != "file" or len(files) >= ENOUGH_DOCUMENTS else "position"
    if not files:
        check_splits(config, [], split_by)

    if split_by == "given":
        ranges = [[TextRange(file.source.split, file.start, file.size)] for file in files]
    elif split_by == "position":
        ranges = [ranges_by_position(file, shares) for file in files]
    elif document != "file":
        ranges = [[TextRange(None, file.start, file.size)] for file in files]
    else:
        splits = splits_by_quota([file.source.name for file in files], shares)
        ranges = [[TextRange(split, file.start, file.size)] for file, split in zip(files, splits, strict=True)]
    filled = {part.split for file_ranges in ranges for part in file_ranges}
    if None not in filled:
        check_splits(config, filled, split_by)
    return Plan(list(zip(files, ranges, strict=True)), document, split_by, shares)


def published_plan(corpus: Corpus, files: list[SurveyedFile]) -> Plan:
    """Take the splits that everyone uses: files of their own, or one file cut at the same bytes."""
    vocabulary = next((file for file in files if file.source.split == VOCABULARY), None)
    texts = [file for file in files if file is not vocabulary]
    split_by: Literal["given", "position"]
    if corpus.cuts:
        split_by = "position"
        ranges = [ranges_between(file, corpus.cuts) for file in texts]
    else:
        split_by = "given"
        ranges = [[TextRange(file.source.split, file.start, file.size)] for file in texts]
    return Plan(list(zip(texts, ranges, strict=True)), corpus.document, split_by, (0.0, 0.0), vocabulary)


def check_splits(
    config: PathsCorpusConfig | StdlibCorpusConfig, filled: Collection[str | None], split_by: str = "document"
) -> None:
    """Raise a UserError if a split that was wanted got no text."""
    given = [split for split in SPLITS if getattr(config, split, None) is not None]
    wanted = given or ["train", *(split for split in SPLITS[1:] if getattr(config, f"{split}_share") > 0)]
    lacking = [split for split in wanted if split not in filled]
    if given and lacking:
        raise UserError(f"corpus.{', corpus.'.join(lacking)}: the files are empty; give others")
    if not filled:
        raise UserError("corpus.path: the files are empty; give others")
    if lacking:
        reason = ""
        if split_by == "position":
            reason = f"each file is cut at line ends (\\n), and none has one {where_to_cut(config, lacking)}: "
        shares = " ".join(f"corpus.{split}_share=0" for split in lacking if split != "train") or "other shares"
        raise UserError(f"corpus: no text falls to {' and '.join(lacking)}; {reason}give more text, or {shares}")


def where_to_cut(config: PathsCorpusConfig | StdlibCorpusConfig, lacking: list[str]) -> str:
    """Describe where line ends would give these splits, valid or test or both, a text of their own."""
    ends = {"valid": 100 * (1 - config.test_share), "test": 100.0}
    start = ends[lacking[0]] - 100 * getattr(config, f"{lacking[0]}_share")
    end = ends[lacking[-1]]
    return f"after its first {start:.3g} %" if end == 100 else f"between {start:.3g} and {end:.3g} % of it"


# ------------------------------------------------------------------------------------------------------- splits


def splits_by_quota(names: list[str], shares: Shares, remedy: str = "use corpus.split_by=position,") -> list[str]:
    """Return the split of each document: by the order of their hashes the first are valid, the next test.

    Args:
        remedy: what helps where they are too few.
    """
    valid, test = (max(1, round(share * len(names))) if share else 0 for share in shares)
    if valid + test >= len(names):
        raise UserError(
            f"corpus: {len(names)} documents are too few to split between them: {valid} would be valid, {test} test "
            f"and none train; {remedy} or set corpus.valid_share and corpus.test_share to 0"
        )
    order = sorted(range(len(names)), key=lambda index: (name_hash(names[index]), index))
    splits = ["train"] * len(names)
    for rank, index in enumerate(order[: valid + test]):
        splits[index] = "valid" if rank < valid else "test"
    return splits


def ranges_by_position(file: SurveyedFile, shares: Shares) -> list[TextRange]:
    """Cut a file into train, valid and test, in this order, at line ends."""
    valid, test = shares
    cuts = line_ends(file, [round(file.size * (1 - valid - test)), round(file.size * (1 - test))])
    return ranges_between(file, cuts)


def ranges_between(file: SurveyedFile, cuts: Sequence[int]) -> list[TextRange]:
    """Cut a file into train, valid and test, in this order, before these bytes; leave out what is empty."""
    starts = [file.start, *cuts]
    ends = [*cuts, file.size]
    ranges = [TextRange(*part) for part in zip(SPLITS, starts, ends, strict=True)]
    return [part for part in ranges if part.start < part.end]


def split_of_document(name: str, number: int, shares: Shares) -> str:
    """Return the split of the document with this number (from 0) in the file with this name, which holds many."""
    fraction = name_hash(f"{name}:{number}") / 2**64
    valid, test = shares
    if fraction < valid:
        return "valid"
    return "test" if fraction < valid + test else "train"


def name_hash(name: str) -> int:
    """Return a hash of 64 bits that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


# ------------------------------------------------------------------------------------------------------- pieces


def cut(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Cut the next `size` bytes into pieces of at most PIECE_BYTES, at line ends.

    A longer line is cut before white space, and one without it between two UTF-8 characters. Fewer bytes come if the
    stream ends earlier.
    """
    rest = b""
    while size:
        block = stream.read(min(PIECE_BYTES - len(rest), size))
        if not block:
            return
        size -= len(block)
        data = rest + block
        end = boundary(data) if size else len(data)
        yield data[:end]
        rest = data[end:]


def boundary(data: bytes) -> int:
    """Return where to end a piece: a position in 1..len(data)."""
    end = data.rfind(b"\n") + 1
    if end == 0:
        end = max(0, *map(data.rfind, SPACES))
    if end == 0:
        # Bytes 0b10xxxxxx continue a character.
        end = next((at for at in range(len(data) - 1, 0, -1) if data[at] & 0xC0 != 0x80), 0)
    return end or len(data)


def cut_at_blank_lines(parts: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Cut parts of a text after the blank lines that end a document; yield each, and whether a document ends with it.

    The blank lines belong to the document before them, those at the beginning of the text to the first one: so no byte
    of the text is lost. Parts end at line ends, or within a line that is too long.
    """
    held: list[bytes] = []  # lines that are not yielded yet: whether they end a document shows the line after them
    has_text = False
    is_blank = False
    starts_line = True
    for part in parts:
        for number, line in enumerate(io.BytesIO(part)):
            was_blank = is_blank
            is_blank = (starts_line or was_blank) and BLANK.fullmatch(line) is not None
            starts_line = line.endswith(b"\n")
            begins = has_text and was_blank and not is_blank
            if held and (begins or number == 0):
                yield b"".join(held), begins
                held = []
            held.append(line)
            has_text = has_text or not is_blank
    if held:
        yield b"".join(held), True


def line_ends(file: SurveyedFile, targets: list[int]) -> list[int]:
    """Return the first line end at or after each of some ascending positions in a file's text (else the text's end)."""
    ends: list[int] = []
    offset = 0
    with opened(file.source.path) as stream:
        while len(ends) < len(targets):
            block = stream.read(PIECE_BYTES)
            if not block:
                break
            # A position right behind a "\n" is a line end itself, so the search begins one byte earlier.
            while len(ends) < len(targets):
                newline = block.find(b"\n", max(targets[len(ends)] - 1 - offset, 0))
                if newline < 0:
                    break
                ends.append(offset + newline + 1)
            offset += len(block)
    return ends + [file.size] * (len(targets) - len(ends))


def documents(piece: Piece, shares: Shares) -> Iterator[Piece]:
    """Resolve a piece into pieces of single documents, each with its split."""
    if piece.line is None:
        yield piece
        return
    offset = piece.offset
    first = piece.first
    midword = piece.midword
    midline = piece.midline
    for number, data in enumerate(io.BytesIO(piece.data), piece.line):
        split = piece.split or split_of_document(piece.source.name, number, shares)
        last = data.endswith(b"\n") or piece.last
        yield Piece(piece.source, split, offset, data, first, last, number, midword, midline)
        offset += len(data)
        first = True
        midword = False
        midline = False


def text(piece: Piece) -> str:
    """Decode a piece.

    Raises:
        UserError: if it is not UTF-8, naming file and byte.
    """
    try:
        return piece.data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(piece, error) from error


def not_utf8(piece: Piece, error: UnicodeDecodeError) -> UserError:
    """Make the error of a piece that cannot be decoded."""
    location = f"{piece.source.path}: byte {piece.offset + error.start:,} of the text"
    return UserError(f"{location} is not UTF-8 ({error.reason}); convert the file (iconv), or use tokenizer=bytes")
