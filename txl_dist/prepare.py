"""Turn text into a dataset: python -m txl_dist.prepare corpus=text corpus.path=books tokenizer=sentencepiece

The text is read up to three times: for its fingerprint, for the vocabulary, for the tokens. This process reads, cuts
and writes; others tokenize. What comes out depends on the text and the settings alone, not on how many those are.
"""

import os
import random
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import BytesTokenizer, PrepareJob, PublishedCorpus, SentencePieceTokenizer, WordTokenizer
from txl_dist.data import tokenizers
from txl_dist.data.index import Index
from txl_dist.data.preparing import corpora, published, shards
from txl_dist.data.preparing.corpora import Piece, Plan
from txl_dist.data.text_size import size_of_documents
from txl_dist.errors import ConfigError, RunError, UserError
from txl_dist.files.atomic import is_empty, lock_of_new_folder, new_folder, sha256_of_json
from txl_dist.tracking.console import PlainConsole

SENTENCEPIECE_BYTES = 16 << 20  # of text to learn pieces from: more costs minutes and gigabytes, and changes little

Shares = tuple[float, float]
Result = TypeVar("Result")


def prepare(job: PrepareJob) -> None:
    """Write the dataset that `job` describes to `job.data.dir`, or find that it is there already.

    Raises:
        UserError: where the text cannot be read or split, or the folder holds something else.
        RunError: where the folder cannot be written, or a process that tokenizes was killed.
    """
    if "://" in job.data.dir:
        raise UserError(f"data.dir={job.data.dir}: is written to a local folder; give one, and copy it from there")
    folder = Path(job.data.dir)
    existing = existing_dataset(folder)
    tokenizer = given_tokenizer(job)
    problems: list[str] = []
    with ExitStack() as stack:
        if existing is None:
            lock = stack.enter_context(lock_of_new_folder("data.dir", folder, "preparing a dataset"))
            existing = existing_dataset(folder)  # another process may have made it while this one waited
        work = stack.enter_context(Work(job.workers))
        if isinstance(job.corpus, PublishedCorpus):
            published.fetch(job.corpus, work.progress)
        sources = corpora.find(job.corpus, problems)
        if problems:
            raise ConfigError(problems)
        files = survey(job, sources, work)
        plan = corpora.plan(job.corpus, files)
        corpus = describe(job, plan, tokenizer)
        if existing is not None:
            check_same(folder, existing, corpus)
            print("Nothing to do: the dataset is there, made of the same text with the same settings.")
        else:
            with new_folder(folder, lock) as partial:
                tokenizer = tokenizer or train_tokenizer(job, plan, work)
                tokenizer.save(partial / "tokenizer")
                splits = write_splits(job, plan, tokenizer, partial, work)
                shards.write_index(partial, corpus, tokenizer, job.data.sample_tokens, job.data.shard_samples, splits)
    show(folder)


def survey(job: PrepareJob, sources: list[corpora.Source], work: "Work") -> list[corpora.File]:
    """Read every file once, and say in how many a byte order mark is left out."""
    characters = not isinstance(job.tokenizer, BytesTokenizer)
    with work.progress("reading", None) as advance:
        files = corpora.survey(sources, advance, characters)
    if marked := sum(file.start > 0 for file in files):
        work.say(f"leaving out the byte order mark at the start of {marked:,} file{'s' * (marked > 1)}")
    return files


# ------------------------------------------------------------------------------------------------------ folders


def existing_dataset(folder: Path) -> Index | None:
    """The dataset in `folder`; None where there is nothing yet."""
    if is_empty(folder):
        return None
    if not (folder / "index.json").exists():
        raise UserError(f"data.dir={folder}: holds something that is no dataset; give another folder")
    return Index.open(str(folder))


def check_same(folder: Path, existing: Index, corpus: dict[str, Any]) -> None:
    """Refuse to go on where `folder` holds another dataset, or shards of it are missing."""
    if existing.corpus.get("fingerprint") != corpus["fingerprint"]:
        old, new = existing.corpus, corpus
        what = [key for key in ("settings", "files", "bytes") if old.get(key) != new[key]]
        raise UserError(
            f"data.dir={folder}: holds another dataset (other {' and '.join(what) or 'text'}); nothing is overwritten: "
            "give another data.dir, or delete the folder"
        )
    if errors := existing.validate():
        raise UserError(f"{errors[0]}: delete {folder} first")


def describe(job: PrepareJob, plan: Plan, given: tokenizers.Tokenizer | None) -> dict[str, Any]:
    """What decides the content of the dataset, as the index tells it, and a fingerprint of all that."""
    tokenizer = asdict(job.tokenizer)
    if isinstance(given, tokenizers.SentencePieceTokenizer):
        tokenizer = {"name": given.kind, "model": given.sha256}
    if isinstance(given, tokenizers.WordTokenizer):
        tokenizer = {"name": given.kind, "vocab": sha256_of_json(given.words)}
    settings: dict[str, Any] = {
        "document": plan.document,
        "split_by": plan.split_by,
        "shares": plan.shares,
        "tokenizer": tokenizer,
        "sample_tokens": job.data.sample_tokens,
        "shard_samples": job.data.shard_samples,
    }
    files = [(file.source.split, file.source.name, file.size, file.sha256) for file, _ in plan.files]
    if plan.vocabulary is not None:
        settings["vocabulary"] = plan.vocabulary.sha256
    return {
        "name": job.corpus.name,
        "files": len(files),
        "bytes": sum(size for _, _, size, _ in files),
        "settings": settings,
        "fingerprint": sha256_of_json([files, settings]),
    }


# --------------------------------------------------------------------------------------------------- tokenizers


def given_tokenizer(job: PrepareJob) -> tokenizers.Tokenizer | None:
    """The tokenizer that needs no training text, if it is such a one."""
    if isinstance(job.tokenizer, SentencePieceTokenizer):
        path = given_file("tokenizer.model", job.tokenizer.model)
        return tokenizers.SentencePieceTokenizer.open(path) if path is not None else None
    if isinstance(job.tokenizer, WordTokenizer):
        path = given_file("tokenizer.vocab", job.tokenizer.vocab)
        return tokenizers.WordTokenizer.open(path) if path is not None else None
    return tokenizers.BytesTokenizer()


def given_file(key: str, path: str | None) -> Path | None:
    if path is not None and not path.strip():
        raise UserError(f"{key}: is empty; give a file, or null to have one made of the training text")
    return None if path is None else Path(os.path.expanduser(path))


def train_tokenizer(job: PrepareJob, plan: Plan, work: "Work") -> tokenizers.Tokenizer:
    """Learn the vocabulary from the training split, and from nothing else."""
    size = plan.size("train")
    pieces = plan.pieces("train")
    if isinstance(job.tokenizer, WordTokenizer):
        counts: Counter[str] = Counter()
        if plan.vocabulary is not None:
            counts = tokenizers.WordTokenizer.read_counts(plan.vocabulary.source.path)
        else:
            for counted in work.map("counting words", partial(count_words, plan.shares), pieces, size):
                counts.update(counted)
        corpora.check_vocabulary(job.corpus, counts)
        return tokenizers.WordTokenizer.train(counts, job.tokenizer.vocab_size, job.tokenizer.min_count)
    assert isinstance(job.tokenizer, SentencePieceTokenizer)
    sample = partial(sample_lines, plan.shares, min(1.0, SENTENCEPIECE_BYTES / size))
    lines = [line for found in work.map("sampling lines", sample, pieces, size) for line in found]
    work.say(
        f"training SentencePiece ({job.tokenizer.type}, {job.tokenizer.vocab_size} pieces) on {len(lines):,} lines"
    )
    return tokenizers.SentencePieceTokenizer.train(lines, job.tokenizer.vocab_size, job.tokenizer.type)


def count_words(shares: Shares, pieces: list[Piece]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for document in (document for piece in pieces for document in corpora.documents(piece, shares)):
        if document.split == "train":
            counts.update(corpora.text(document).split())
    return counts


def sample_lines(shares: Shares, rate: float, pieces: list[Piece]) -> list[str]:
    """Each line of the training split with a chance of `rate`; which ones depends on the pieces alone."""
    found = []
    for piece in pieces:
        chance = random.Random(f"{piece.source.name}:{piece.offset}")
        for document in corpora.documents(piece, shares):
            if document.split == "train":
                found += [line for line in corpora.text(document).split("\n") if line and chance.random() < rate]
    return found


# ------------------------------------------------------------------------------------------------------- tokens


class Encoded(NamedTuple):
    """Tokens [n] of a split, the positions in them at which documents start, and the size of their text.

    characters, words: None where it is not UTF-8.
    """

    tokens: np.ndarray
    starts: list[int]
    bytes: int
    characters: int | None
    words: int | None


def write_splits(job: PrepareJob, plan: Plan, tokenizer: tokenizers.Tokenizer, folder: Path, work: "Work") -> dict:
    """Tokenize everything into `folder`; returns the splits' entries in the index."""
    load_tokenizer.cache_clear()  # one of an earlier call could bear the same path
    writers: dict[str, shards.SplitWriter] = {}
    encode = partial(encode_pieces, folder / "tokenizer", plan.shares)
    with ExitStack() as stack:
        for found in work.map("tokenizing", encode, plan.pieces(), plan.size()):
            for split, encoded in found.items():
                if split not in writers:
                    cut = (job.data.sample_tokens, job.data.shard_samples)
                    writers[split] = stack.enter_context(shards.SplitWriter(folder, split, tokenizer.dtype, *cut))
                writers[split].add(*encoded)
        if not isinstance(job.corpus, PublishedCorpus):
            corpora.check_splits(job.corpus, writers)
        return {split: writers[split].close() for split in corpora.SPLITS if split in writers}


def encode_pieces(tokenizer_folder: Path, shares: Shares, pieces: list[Piece]) -> dict[str, Encoded]:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens: dict[str, list[np.ndarray]] = defaultdict(list)
    starts: dict[str, list[int]] = defaultdict(list)
    texts: dict[str, list[bytes]] = defaultdict(list)
    lengths: Counter[str] = Counter()
    midword: Counter[str] = Counter()
    for document in (document for piece in pieces for document in corpora.documents(piece, shares)):
        split = document.split
        assert split is not None
        try:
            encoded = tokenizer.encode(document.data, document.last)
        except UnicodeDecodeError as error:
            raise corpora.not_utf8(document, error) from error
        if document.first:
            starts[split].append(lengths[split])
        tokens[split].append(encoded)
        texts[split].append(document.data)
        lengths[split] += len(encoded)
        midword[split] += document.midword
    return {
        split: Encoded(np.concatenate(tokens[split]), starts[split], *size_of_documents(texts[split], midword[split]))
        for split in tokens
    }


load_tokenizer = lru_cache(maxsize=1)(tokenizers.load)  # once in each process


# --------------------------------------------------------------------------------------------------------- work


class Work:
    """The processes that work, and the progress that is shown."""

    def __init__(self, workers: int | None):
        self.workers = workers or len(os.sched_getaffinity(0))
        self.log = PlainConsole(stderr=True)
        # Spawned, for a forked child of a process with threads can hang.
        self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=ignore_interrupts)

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def map(
        self, title: str, function: Callable[[list[Piece]], Result], pieces: Iterable[Piece], size: int
    ) -> Iterator[Result]:
        """Results in the order of the pieces, of which a bounded number is under way."""
        with self.progress(title, size) as advance:
            items = batches(pieces, advance)
            if self.workers == 1:
                yield from map(function, items)
                return
            under_way: deque[Future[Result]] = deque()
            try:
                for item in items:
                    under_way.append(self.pool.submit(function, item))
                    if len(under_way) > 2 * self.workers:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            except BrokenProcessPool as error:
                remedy = "start again, with fewer workers=... if memory was lacking"
                raise RunError([f"{title}: one of the {self.workers} processes was killed; {remedy}"]) from error

    @contextmanager
    def progress(self, title: str, size: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar of bytes read; gives the function that advances it."""
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        if not self.log.is_terminal:
            self.say(title if size is None else f"{title}: {size:,} bytes")
        with Progress(*columns, console=self.log, disable=not self.log.is_terminal) as bar:
            task = bar.add_task(title, total=size)
            yield lambda size: bar.advance(task, size)

    def say(self, line: str) -> None:
        self.log.print(line, soft_wrap=True)


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the others


def batches(pieces: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[list[Piece]]:
    """Put small pieces together, up to PIECE_BYTES."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.data) > corpora.PIECE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.data)
        advance(len(piece.data))
    if batch:
        yield batch


def show(folder: Path) -> None:
    index = Index.open(str(folder))
    table = Table("split")
    for column in ("documents", "bytes", "tokens", "shards"):
        table.add_column(column, justify="right")
    for name, split in index.splits.items():
        numbers = (split.documents, split.bytes, split.tokens, len(split.shards))
        table.add_row(name, *(f"{number:,}" for number in numbers))
    PlainConsole().print(table)
    print(f"{folder}: vocabulary {index.vocab_size:,}, fingerprint {index.fingerprint[:12]}")
    program = "torchrun --nproc_per_node=2 -m txl_dist.train"
    print(f"Next: {command_to_paste(program, '+experiment=quickstart', data__dir=folder)}")


def main() -> None:
    from txl_dist.cli import command  # here, for the processes that tokenize need no Hydra

    command("prepare", PrepareJob, prepare)


if __name__ == "__main__":
    main()
