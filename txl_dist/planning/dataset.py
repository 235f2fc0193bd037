"""What a plan has to know of the data: from the dataset where it is there, else from its name or the keys."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from txl_dist.config.schema import PlanJob
from txl_dist.data.index import Index
from txl_dist.errors import ConfigError, UserError

# Vocabulary and tokens of the training split (docs/corpora.md), by the names that datasets have by default; null where
# it depends on the version of the text.
PUBLISHED: dict[str, tuple[int, int | None]] = {
    "ptb-word": (10_000, 929_589),
    "wikitext2-word": (33_278, 2_088_628),
    "wikitext103-word": (267_735, 103_227_021),
    "lm1b-word": (793_471, None),
    ".*-bytes": (257, None),
    "(enwik8|text8)-bytes": (257, 90_000_000),
    ".*-sentencepiece": (2_048, None),
    ".*-xlnet": (32_000, None),
    "files-ids": (257, None),
    "duplication-ids": (129, 10_240_000),
}


@dataclass(frozen=True)
class Dataset:
    """vocab_size: of the tokenizer. epoch_tokens: of the training split; None: not known. source: who says so."""

    vocab_size: int
    epoch_tokens: int | None
    source: str


def find_dataset(job: PlanJob) -> Dataset:
    """Return what is known of a job's data.

    Raises:
        ConfigError: where the vocabulary is not known, or the model does not fit it.
    """
    published = [facts for name, facts in PUBLISHED.items() if re.fullmatch(name, PurePosixPath(job.data.dir).name)]
    known: tuple[int | None, int | None] = published[-1] if published else (None, None)
    source = "as published"
    try:
        index = Index.open(job.data.dir)
        known = index.vocab_size, index.splits["train"].tokens if "train" in index.splits else None
        source = "of the dataset"
    except UserError:  # it is not there yet, or not here
        pass
    vocab_size = job.vocab_size or known[0]
    if vocab_size is None:
        missing = f"vocab_size: is missing, and there is no dataset in data.dir={job.data.dir} to take it from"
        raise ConfigError([f"{missing}; give vocab_size=..."])
    problems = [f"{problem} (vocab_size)" for problem in job.model.vocabulary_problems(vocab_size)]
    if problems:
        raise ConfigError(problems)
    return Dataset(vocab_size, job.epoch_tokens or known[1], "given" if job.vocab_size else source)
