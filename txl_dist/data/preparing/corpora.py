"""Where the text comes from: which files, which documents in them, and which split each document belongs to.

    find -> survey -> plan -> Plan.pieces

Nothing here depends on where the files lie, on the machine or on the number of workers: files are taken in sorted order
under names relative to what the user gave, and a document's split depends on those names (or on positions) alone.
"""

import hashlib
import io
import sysconfig
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from txl_dist.config.schema import CorpusConfig, PublishedCorpus, StdlibCorpus, TextCorpus
from txl_dist.data.preparing import paths, published
from txl_dist.data.preparing.published import PUBLISHED, VOCABULARY, Corpus
from txl_dist.data.preparing.text_files import opened, start_of_text
from txl_dist.data.tokenizers import EOS
from txl_dist.errors import UserError

SPLITS = ("train", "valid", "test")
PIECE_BYTES = 1 << 20
ENOUGH_DOCUMENTS = 20  # from here on split_by=auto cuts between documents
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SPACES = tuple(chr(code).encode() for code in range(0x3001) if chr(code).isspace())  # all that str.split knows
NAMED = 3  # of the unreadable files of one path


class Source(NamedTuple):
    """A file: where it lies, its name below what the user gave, and its split where the split has files of its own.

    In place of a split stands VOCABULARY, where a corpus was published with its words and their counts.
    """

    path: Path
    name: str
    split: str | None


class File(NamedTuple):
    """A file that has been read once: `size` and `sha256` are those of its content, decompressed.

    start: where its text begins: behind a byte order mark, where that is left out.
    """

    source: Source
    size: int
    sha256: str
    start: int = 0


class Part(NamedTuple):
    """The bytes [start, end) of a file's text; with no split, each of its lines has its own (`split_of_line`)."""

    split: str | None
    start: int
    end: int


class Piece(NamedTuple):
    """Consecutive bytes of one document, or, where `line` is given, of consecutive lines that are documents.

    offset: of the first byte in the file's text. first, last: whether the document begins, and ends, in this piece.
    line: the number of the first line, from 0. midword: whether the piece before ends within the word that this one
    begins with.
    """

    source: Source
    split: str | None
    offset: int
    data: bytes
    first: bool
    last: bool
    line: int | None
    midword: bool


# --------------------------------------------------------------------------------------------------------- find


def find(config: CorpusConfig, problems: list[str]) -> list[Source]:
    """List the files of a corpus in their order; what is wrong with the config is appended to `problems`."""
    if isinstance(config, PublishedCorpus):
        return [Source(path, text.base, text.role) for text, path in published.locate(config, problems)]
    if config.valid_share + config.test_share >= 1:
        problems.append("corpus.valid_share + corpus.test_share: leave nothing to train on; choose less than 1")
    if isinstance(config, StdlibCorpus):
        return stdlib()

    given = {split: values for split in SPLITS if (values := getattr(config, split)) is not None}
    if config.path is not None and given:
        problems.append(f"corpus.path and corpus.{', corpus.'.join(given)}: give either the one or the other")
    elif config.path is None and not given:
        problems.append("corpus.path: is missing; give a file, a folder or a glob (or corpus.train=... of its own)")
    elif config.path is None and "train" not in given:
        problems.append(f"corpus.train: is missing, though corpus.{', corpus.'.join(given)} is given")
    pools: dict[str, tuple[str | None, str | list[str]]] = {f"corpus.{split}": (split, given[split]) for split in given}
    if config.path is not None:
        pools["corpus.path"] = (None, config.path)

    found: dict[Path, Source] = {}
    for key, (split, values) in pools.items():
        for pattern in ([values] if isinstance(values, str) else values) or [""]:
            for name, path in match(key, pattern, problems):
                source = found.setdefault(path.resolve(), Source(path, name, split))
                if source.split != split:
                    problems.append(f"{key}={pattern}: {path} is in corpus.{source.split} as well; give it to one")
    return list(found.values())


def match(key: str, pattern: str, problems: list[str]) -> list[tuple[str, Path]]:
    """List the files (name, path) that a path, a folder or a glob, given as `key`, stands for."""
    if not pattern.strip():
        problems.append(f"{key}: is empty; give a file, a folder or a glob")
        return []
    wrong: list[str] = []
    files = paths.match(pattern, wrong)
    lines = sorted({f"{key}={pattern}: {problem.removeprefix(f'{pattern}: ')}" for problem in wrong})
    if len(lines) > NAMED:
        lines[NAMED - 1] += f" (and {len(lines) - NAMED:,} more likewise)"
    problems += lines[:NAMED]
    return files


def stdlib() -> list[Source]:
    """List the source files of Python's standard library without its tests, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and NOT_STDLIB.isdisjoint(name.parts[:-1]):
            found.append(Source(path, name.as_posix(), None))
    return sorted(found, key=lambda source: source.name)


# --------------------------------------------------------------------------------------------------------- read


def survey(sources: list[Source], advance: Callable[[int], None], characters: bool = False) -> list[File]:
    """Read every file once, for its size and sha256, and leave out the empty ones.

    Args:
        advance: is called with the bytes read.
        characters: whether a tokenizer reads characters: then a byte order mark is no part of a text.

    Raises:
        UserError: where a file cannot be read, or holds something other than text.
    """
    files = []
    for source in sources:
        digest = hashlib.sha256()
        size = start = 0
        with opened(source.path) as stream:
            while block := stream.read(PIECE_BYTES):
                start = start if size else start_of_text(source.path, block, characters)
                digest.update(block)
                size += len(block)
                advance(len(block))
        if size > start:
            files.append(File(source, size, digest.hexdigest(), start))
    return files


def cut(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Cut the next `size` bytes into pieces of at most PIECE_BYTES, at line ends.

    A longer line is cut before white space, and one without it between two UTF-8 characters. Fewer bytes come where
    the stream ends earlier.
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
    """Where to end a piece: a position in 1..len(data)."""
    end = data.rfind(b"\n") + 1
    if end == 0:
        end = max(0, *map(data.rfind, SPACES))
    if end == 0:
        end = next((at for at in range(len(data) - 1, 0, -1) if data[at] & 0xC0 != 0x80), 0)
    return end or len(data)


def line_ends(file: File, targets: list[int]) -> list[int]:
    """For each ascending position in the text of `file` the first line end at or after it (the text's end, if none)."""
    found: list[int] = []
    at = 0
    with opened(file.source.path) as stream:
        while len(found) < len(targets) and (block := stream.read(PIECE_BYTES)):
            # A position right behind a "\n" is a line end itself, so the search begins one byte earlier.
            while len(found) < len(targets):
                newline = block.find(b"\n", max(targets[len(found)] - 1 - at, 0))
                if newline < 0:
                    break
                found.append(at + newline + 1)
            at += len(block)
    return found + [file.size] * (len(targets) - len(found))


# --------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What to read: every file's parts, in order. `shares` (of valid and test) decide where a part has no split.

    vocabulary: the file of words and their counts that the corpus was published with.
    """

    files: list[tuple[File, list[Part]]]
    document: Literal["file", "line"]
    split_by: Literal["given", "document", "position"]
    shares: tuple[float, float]
    vocabulary: File | None = None

    def size(self, split: str | None = None) -> int:
        """Bytes of text in all pieces, or in those that may hold text of `split`."""
        parts = [part for _, parts in self.files for part in parts if split is None or part.split in (None, split)]
        return sum(part.end - part.start for part in parts)

    def pieces(self, split: str | None = None) -> Iterator[Piece]:
        """All pieces in the order of the files and their text, or those that may hold text of `split`.

        Raises:
            UserError: where a file cannot be read, or has become shorter since the survey.
        """
        for file, parts in self.files:
            if split is None or any(part.split in (None, split) for part in parts):
                yield from (piece for piece in self._read(file, parts) if split is None or piece.split in (None, split))

    def _read(self, file: File, parts: list[Part]) -> Iterator[Piece]:
        line = 0 if self.document == "line" else None
        with opened(file.source.path) as stream:
            stream.read(file.start)
            for part in parts:
                at, first = part.start, True
                before = b""
                for data in cut(stream, part.end - part.start):
                    whole_lines = line is not None and data.endswith(b"\n")
                    last = whole_lines or at + len(data) == part.end
                    midword = before != b"" and not before.endswith(SPACES) and not data.startswith(SPACES)
                    yield Piece(file.source, part.split, at, data, first, last, line, midword)
                    at += len(data)
                    first = whole_lines
                    before = data
                    if line is not None:
                        line += data.count(b"\n")
                if at != part.end:
                    raise UserError(f"{file.source.path}: became shorter while it was read; start again")


def plan(config: CorpusConfig, files: list[File]) -> Plan:
    """Decide which bytes of which file belong to which split.

    Raises:
        UserError: where a split would be empty.
    """
    if isinstance(config, PublishedCorpus):
        return published_plan(PUBLISHED[config.name], files)
    shares = (config.valid_share, config.test_share)
    document: Literal["file", "line"] = "file"
    split_by: Literal["given", "auto", "document", "position"] = "document"
    if isinstance(config, TextCorpus):
        document, split_by = config.document, config.split_by
    if any(file.source.split for file in files):
        split_by, shares = "given", (0.0, 0.0)
    if split_by == "auto":
        split_by = "document" if document == "line" or len(files) >= ENOUGH_DOCUMENTS else "position"
    if not files:
        check_splits(config, [], split_by)

    if split_by == "given":
        parts = [[Part(file.source.split, file.start, file.size)] for file in files]
    elif split_by == "position":
        parts = [parts_by_position(file, shares) for file in files]
    elif document == "line":
        parts = [[Part(None, file.start, file.size)] for file in files]
    else:
        splits = splits_by_quota([file.source.name for file in files], shares)
        parts = [[Part(split, file.start, file.size)] for file, split in zip(files, splits, strict=True)]
    found = {part.split for some in parts for part in some}
    if None not in found:
        check_splits(config, found, split_by)
    return Plan(list(zip(files, parts, strict=True)), document, split_by, shares)


def published_plan(corpus: Corpus, files: list[File]) -> Plan:
    """The splits that everyone uses: files of their own, or one file cut at the same bytes."""
    vocabulary = next((file for file in files if file.source.split == VOCABULARY), None)
    texts = [file for file in files if file is not vocabulary]
    if corpus.cuts:
        parts = [parts_at(file, corpus.cuts) for file in texts]
    else:
        parts = [[Part(file.source.split, file.start, file.size)] for file in texts]
    split_by: Literal["given", "position"] = "position" if corpus.cuts else "given"
    return Plan(list(zip(texts, parts, strict=True)), corpus.document, split_by, (0.0, 0.0), vocabulary)


def check_splits(config: TextCorpus | StdlibCorpus, found: Collection[str | None], split_by: str = "document") -> None:
    """Refuse a split that was wanted and got no text."""
    given = [split for split in SPLITS if getattr(config, split, None) is not None]
    wanted = given or ["train", *(split for split in SPLITS[1:] if getattr(config, f"{split}_share") > 0)]
    lacking = [split for split in wanted if split not in found]
    if given and lacking:
        raise UserError(f"corpus.{', corpus.'.join(lacking)}: the files are empty; give others")
    if not found:
        raise UserError("corpus.path: the files are empty; give others")
    if lacking:
        reason = ""
        if split_by == "position":
            reason = f"each file is cut at line ends (\\n), and none has one {where_cut(config, lacking)}: "
        shares = " ".join(f"corpus.{split}_share=0" for split in lacking if split != "train") or "other shares"
        raise UserError(f"corpus: no text falls to {' and '.join(lacking)}; {reason}give more text, or {shares}")


def where_cut(config: TextCorpus | StdlibCorpus, lacking: list[str]) -> str:
    """Describe where line ends would give these splits, valid or test or both, a text of their own."""
    ends = {"valid": 100 * (1 - config.test_share), "test": 100.0}
    start = ends[lacking[0]] - 100 * getattr(config, f"{lacking[0]}_share")
    end = ends[lacking[-1]]
    return f"after its first {start:.3g} %" if end == 100 else f"between {start:.3g} and {end:.3g} % of it"


def check_vocabulary(config: CorpusConfig, counts: Collection[str]) -> None:
    """Refuse a text whose words, `<eos>` included, are not as many as those of the corpus it passes for."""
    expected = PUBLISHED[config.name].vocab_size if isinstance(config, PublishedCorpus) else None
    size = len({*counts, EOS})
    if expected not in (None, size):
        raise UserError(
            f"corpus={config.name}: the text has {size:,} different words, but must have {expected:,}: it is another; "
            "give the published files, or prepare it as corpus=text"
        )


def splits_by_quota(names: list[str], shares: tuple[float, float]) -> list[str]:
    """The split of each document: in the order of their hashes the first are valid, the next test, the rest train."""
    valid, test = (max(1, round(share * len(names))) if share else 0 for share in shares)
    if valid + test >= len(names):
        raise UserError(
            f"corpus: {len(names)} documents are too few to split between them: {valid} would be valid, {test} test "
            "and none train; use corpus.split_by=position, or set corpus.valid_share and corpus.test_share to 0"
        )
    order = sorted(range(len(names)), key=lambda index: (name_hash(names[index]), index))
    splits = ["train"] * len(names)
    for rank, index in enumerate(order[: valid + test]):
        splits[index] = "valid" if rank < valid else "test"
    return splits


def parts_by_position(file: File, shares: tuple[float, float]) -> list[Part]:
    """Train, then valid, then test, cut at line ends."""
    valid, test = shares
    return parts_at(file, line_ends(file, [round(file.size * (1 - valid - test)), round(file.size * (1 - test))]))


def parts_at(file: File, cuts: Sequence[int]) -> list[Part]:
    """Train, then valid, then test, cut before these bytes."""
    starts, ends = [file.start, *cuts], [*cuts, file.size]
    return [Part(*part) for part in zip(SPLITS, starts, ends, strict=True) if part[1] < part[2]]


def split_of_line(name: str, line: int, shares: tuple[float, float]) -> str:
    """The split of the line with this number (from 0) of the file with this name."""
    place = name_hash(f"{name}:{line}") / 2**64
    valid, test = shares
    return "valid" if place < valid else "test" if place < valid + test else "train"


def text(piece: Piece) -> str:
    try:
        return piece.data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(piece, error) from error


def not_utf8(piece: Piece, error: UnicodeDecodeError) -> UserError:
    place = f"{piece.source.path}: byte {piece.offset + error.start:,} of the text"
    return UserError(f"{place} is not UTF-8 ({error.reason}); convert the file (iconv), or use tokenizer=bytes")


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def documents(piece: Piece, shares: tuple[float, float]) -> Iterator[Piece]:
    """Resolve a piece into pieces of single documents, each with its split."""
    if piece.line is None:
        yield piece
        return
    at, first, midword = piece.offset, piece.first, piece.midword
    for number, data in enumerate(io.BytesIO(piece.data), piece.line):
        split = piece.split or split_of_line(piece.source.name, number, shares)
        yield Piece(piece.source, split, at, data, first, data.endswith(b"\n") or piece.last, number, midword)
        at, first, midword = at + len(data), True, False
