"""Make a dataset: find and split the text, make the tokenizer, tokenize, and write shards and index.

The text is read up to three times: for its fingerprint, for the vocabulary, for the tokens. This process reads, cuts
and writes; others tokenize. The dataset depends on the text and the settings alone, not on the number of processes.
Sequences that are not text, and labelled examples, go the same way by plans of their own (`sequences`, `examples`).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DuplicationCorpusConfig,
    ExamplesCorpusConfig,
    FilesCorpusConfig,
    IdsTokenizerConfig,
    PrepareJob,
    PublishedCorpusConfig,
    SquadCorpusConfig,
    TokensCorpusConfig,
)
from txl_dist.data.index import Index
from txl_dist.data.preparing import corpora, examples, published, sequences, shards, splitting
from txl_dist.data.preparing.examples import LabelledPlan, encode_examples
from txl_dist.data.preparing.sequences import SequencePlan, encode_sequences
from txl_dist.data.preparing.splitting import Plan
from txl_dist.data.preparing.tokenizing import (
    Encoded,
    encode_pieces,
    given_tokenizer,
    has_sentences,
    load_tokenizer,
    train_tokenizer,
)
from txl_dist.data.preparing.workers import WorkerPool
from txl_dist.data.tokenizers import SentencePieceTokenizer, Tokenizer, WordTokenizer, XLNetTokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import is_empty, lock_of_new_folder, new_folder, sha256_of_json

AnyPlan = Plan | SequencePlan | LabelledPlan


def make_dataset(job: PrepareJob) -> bool:
    """Write the dataset that `job` describes to `job.data.dir`; return False if it is there already.

    Raises:
        UserError: if the text cannot be read or split, or the folder holds something else.
        RunError: if the folder cannot be written, or a process that tokenizes was killed.
    """
    if "://" in job.data.dir:
        raise UserError(f"data.dir={job.data.dir}: is written to a local folder; give one, and copy it from there")
    folder = Path(job.data.dir)
    existing = existing_dataset(folder)
    tokenizer = given_tokenizer(job.tokenizer)
    if existing is None:
        with lock_of_new_folder("data.dir", folder, "preparing a dataset") as lock:
            existing = existing_dataset(folder)  # another process may have made it while this one waited
            if existing is None:
                with WorkerPool(job.workers) as workers:
                    plan, corpus = survey(job, tokenizer, workers)
                    with new_folder(folder, lock) as partial_folder:
                        write_dataset(job, plan, corpus, tokenizer, partial_folder, workers)
                return True
    with WorkerPool(job.workers) as workers:
        _, corpus = survey(job, tokenizer, workers)
    check_same(folder, existing, corpus)
    return False


def existing_dataset(folder: Path) -> Index | None:
    """Open the dataset in `folder`; return None if there is nothing yet."""
    if is_empty(folder):
        return None
    if not (folder / "index.json").exists():
        raise UserError(f"data.dir={folder}: holds something that is not a dataset; give another folder")
    return Index.open(str(folder))


def check_same(folder: Path, existing: Index, corpus: dict[str, Any]) -> None:
    """Raise a UserError if `folder` holds another dataset, or shards of it are missing."""
    if existing.corpus.get("fingerprint") != corpus["fingerprint"]:
        differing = [key for key in ("settings", "files", "bytes") if existing.corpus.get(key) != corpus[key]]
        raise UserError(
            f"data.dir={folder}: holds another dataset (other {' and '.join(differing) or 'text'}); nothing is "
            "overwritten: give another data.dir, or delete the folder"
        )
    errors = existing.validate()
    if errors:
        raise UserError(f"{errors[0]}: delete {folder} first")


def survey(job: PrepareJob, tokenizer: Tokenizer | None, workers: WorkerPool) -> tuple[AnyPlan, dict[str, Any]]:
    """Find the text, downloaded if need be, and read it once; return how it is split, and its description.

    Args:
        tokenizer: if it needs nothing of the corpus.
    """
    found: AnyPlan
    if isinstance(job.corpus, TokensCorpusConfig | FilesCorpusConfig | DuplicationCorpusConfig):
        with workers.progress("reading", None) as advance:
            found = sequences.survey(job.corpus, advance)
        return found, describe(job, found, tokenizer)
    if isinstance(job.corpus, ExamplesCorpusConfig | SquadCorpusConfig):
        with workers.progress("reading", None) as advance:
            found = examples.survey(job.corpus, advance)
        return found, describe(job, found, tokenizer)
    if isinstance(job.corpus, PublishedCorpusConfig):
        published.fetch(job.corpus, workers.progress)
    problems: list[str] = []
    sources = corpora.find(job.corpus, problems)
    if problems:
        raise ConfigError(problems)
    characters = not isinstance(job.tokenizer, BytesTokenizerConfig)
    with workers.progress("reading", None) as advance:
        files = corpora.survey(sources, advance, characters)
    marked = sum(file.start > 0 for file in files)
    if marked:
        workers.say(f"leaving out the byte order mark at the start of {marked:,} file{'s' * (marked > 1)}")
    plan = splitting.plan(job.corpus, files)
    return plan, describe(job, plan, tokenizer)


def describe(job: PrepareJob, plan: AnyPlan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the text and the settings that decide the content of the dataset, and a fingerprint of them."""
    tokenizer_settings = asdict(job.tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer_settings = {"name": tokenizer.kind, "model": tokenizer.sha256}
    if isinstance(tokenizer, XLNetTokenizer):
        tokenizer_settings = {"name": tokenizer.kind, "model": tokenizer.sha256, "lower": tokenizer.lower}
    if isinstance(tokenizer, WordTokenizer):
        tokenizer_settings = {"name": tokenizer.kind, "vocab": sha256_of_json(tokenizer.words)}
    if isinstance(plan, SequencePlan):
        assert isinstance(job.tokenizer, IdsTokenizerConfig)
        tokenizer_settings = plan.tokenizer_settings(job.tokenizer)
    settings: dict[str, Any] = {
        "document": plan.document,
        "split_by": plan.split_by,
        "shares": plan.shares,
        "tokenizer": tokenizer_settings,
        "sample_tokens": job.data.sample_tokens,
        "shard_samples": job.data.shard_samples,
    }
    if plan.vocabulary is not None:
        settings["vocabulary"] = plan.vocabulary.sha256
    if isinstance(plan, SequencePlan | LabelledPlan):
        settings["corpus"] = plan.corpus_settings
    files = [(file.source.split, file.source.name, file.size, file.sha256) for file, _ in plan.files]
    return {
        "name": job.corpus.name,
        "files": len(files),
        "bytes": sum(file.size for file, _ in plan.files),
        "settings": settings,
        "fingerprint": sha256_of_json([files, settings]),
    }


def write_dataset(
    job: PrepareJob,
    plan: AnyPlan,
    corpus: dict[str, Any],
    tokenizer: Tokenizer | None,
    folder: Path,
    workers: WorkerPool,
) -> None:
    """Write tokenizer, shards and index into an empty folder; train the tokenizer if none is given."""
    if isinstance(plan, SequencePlan):
        assert isinstance(job.tokenizer, IdsTokenizerConfig)
        tokenizer = plan.make_tokenizer(job.tokenizer, workers)
    elif tokenizer is None:
        tokenizer = train_tokenizer(job.tokenizer, job.corpus, plan, workers)
    tokenizer.save(folder / "tokenizer")
    splits = write_splits(job, plan, tokenizer, folder, workers)
    entry = plan.entry if isinstance(plan, LabelledPlan) else None
    shards.write_index(folder, corpus, tokenizer, job.data.sample_tokens, job.data.shard_samples, splits, entry)


def write_splits(
    job: PrepareJob, plan: AnyPlan, tokenizer: Tokenizer, folder: Path, workers: WorkerPool
) -> dict[str, dict[str, Any]]:
    """Tokenize all text into the shards of its splits; return the splits' entries in index.json."""
    load_tokenizer.cache_clear()  # a tokenizer of an earlier call could have the same path
    sentences = isinstance(plan, Plan) and has_sentences(plan, tokenizer)
    entry = plan.entry if isinstance(plan, LabelledPlan) else None
    cut = (tokenizer.dtype, job.data.sample_tokens, job.data.shard_samples)
    writers: dict[str, shards.SplitWriter] = {}
    with ExitStack() as stack:
        for batch in tokenize(plan, folder / "tokenizer", sentences, workers):
            for split, encoded in batch.items():
                if split not in writers:
                    writer = shards.SplitWriter(folder, split, *cut, sentences, entry)
                    writers[split] = stack.enter_context(writer)
                writers[split].add(*encoded)
        if not isinstance(job.corpus, PublishedCorpusConfig | DuplicationCorpusConfig):
            splitting.check_splits(job.corpus, writers)
        return {split: writers[split].close() for split in corpora.SPLITS if split in writers}


def tokenize(
    plan: AnyPlan, tokenizer_folder: Path, sentences: bool, workers: WorkerPool
) -> Iterator[dict[str, Encoded]]:
    """Yield the tokens of all splits, batch by batch, in the order of the corpus."""
    if isinstance(plan, SequencePlan):
        encode_ids = partial(encode_sequences, tokenizer_folder, plan.shares, plan.config)
        return workers.map("tokenizing", encode_ids, plan.pieces(), plan.size())
    if isinstance(plan, LabelledPlan):
        encode_labelled = partial(encode_examples, tokenizer_folder, plan.entry)
        return workers.map("tokenizing", encode_labelled, plan.examples(), plan.size())
    encode = partial(encode_pieces, tokenizer_folder, plan.shares, sentences)
    return workers.map("tokenizing", encode, plan.pieces(), plan.size())
