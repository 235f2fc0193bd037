"""The files of a corpus: which they are, in which order, and the size and SHA-256 of each.

Nothing here depends on where the files lie, on the machine or on the number of workers: files are taken in sorted
order, under names relative to the path that the user gave.
"""

import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from txl_dist.config.schema import (
    CorpusConfig,
    DuplicationCorpusConfig,
    PathsCorpusConfig,
    PublishedCorpusConfig,
    StdlibCorpusConfig,
)
from txl_dist.data.preparing import paths, published
from txl_dist.data.preparing.text_files import opened, start_of_text

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
NAMED = 3  # of the unreadable files of one path


class SourceFile(NamedTuple):
    """A file of the corpus.

    Attributes:
        name: its path below the one that the user gave.
        split: if the split has files of its own; or VOCABULARY, for the words and counts that a corpus was published
            with.
    """

    path: Path
    name: str
    split: str | None


class SurveyedFile(NamedTuple):
    """A file that has been read once.

    Attributes:
        size, sha256: of its content, decompressed.
        start: where its text begins: behind a byte order mark that is left out.
    """

    source: SourceFile
    size: int
    sha256: str
    start: int = 0


def find(config: CorpusConfig, problems: list[str]) -> list[SourceFile]:
    """List the files of a corpus in their order; problems with the config are appended to `problems`."""
    if isinstance(config, PublishedCorpusConfig):
        return [SourceFile(path, file.base, file.role) for file, path in published.locate(config, problems)]
    if isinstance(config, DuplicationCorpusConfig):
        return []
    if config.valid_share + config.test_share >= 1:
        problems.append("corpus.valid_share + corpus.test_share: leave nothing to train on; choose less than 1")
    if isinstance(config, StdlibCorpusConfig):
        return stdlib()
    sources: dict[Path, SourceFile] = {}
    for key, split, patterns in given_paths(config, problems):
        for pattern in patterns:
            for name, path in match(key, pattern, problems):
                source = sources.setdefault(path.resolve(), SourceFile(path, name, split))
                if source.split != split:
                    problems.append(f"{key}={pattern}: {path} is in corpus.{source.split} as well; give it to one")
    return list(sources.values())


def given_paths(config: PathsCorpusConfig, problems: list[str]) -> list[tuple[str, str | None, list[str]]]:
    """List (key, split, paths) of every path key that was given; which of them fit together is checked."""
    keys: list[tuple[str, str | None, list[str]]] = []
    for split in SPLITS:
        patterns = getattr(config, split)
        if patterns is not None:
            keys.append((f"corpus.{split}", split, patterns))
    given = ", ".join(key for key, _, _ in keys)
    if config.path is not None:
        if given:
            problems.append(f"corpus.path and {given}: give either the one or the other")
        keys.append(("corpus.path", None, config.path))
    elif not given:
        problems.append("corpus.path: is missing; give a file, a folder or a glob (or corpus.train=... of its own)")
    elif config.train is None:
        problems.append(f"corpus.train: is missing, though {given} is given")
    return keys


def match(key: str, pattern: str, problems: list[str]) -> list[tuple[str, Path]]:
    """List the files (name, path) that a path, a folder or a glob, given as `key`, stands for."""
    unreadable: list[str] = []
    files = paths.match(pattern, unreadable)
    lines = sorted({f"{key}={pattern}: {problem.removeprefix(f'{pattern}: ')}" for problem in unreadable})
    if len(lines) > NAMED:
        lines[NAMED - 1] += f" (and {len(lines) - NAMED:,} more likewise)"
    problems += lines[:NAMED]
    return files


def stdlib() -> list[SourceFile]:
    """List the source files of Python's standard library without its tests, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and NOT_STDLIB.isdisjoint(name.parts[:-1]):
            sources.append(SourceFile(path, name.as_posix(), None))
    return sorted(sources, key=lambda source: source.name)


def survey(sources: list[SourceFile], advance: Callable[[int], None], characters: bool = False) -> list[SurveyedFile]:
    """Read every file once, for its size and SHA-256, and leave out the empty ones.

    Args:
        advance: is called with the number of bytes read.
        characters: whether the tokenizer reads characters; then a byte order mark does not belong to the text.

    Raises:
        UserError: if a file cannot be read, or holds something other than text.
    """
    files = []
    for source in sources:
        digest = hashlib.sha256()
        size = 0
        start = 0
        with opened(source.path) as stream:
            while block := stream.read(BLOCK):
                if size == 0:
                    start = start_of_text(source.path, block, characters)
                digest.update(block)
                size += len(block)
                advance(len(block))
        if size > start:
            files.append(SurveyedFile(source, size, digest.hexdigest(), start))
    return files
