"""Labelled examples: texts or pairs of texts with a class or a score, and questions with answers in a passage.

    survey -> LabelledPlan.examples -> encode_examples

It stands beside `corpora`, `splitting` and `tokenizing`, which do the same with text: here a document is an example,
and its split is that of its row or article. `example_files` and `squad` know the kinds of files.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from txl_dist.config.schema import ExamplesCorpusConfig, LabelledCorpusConfig, SquadCorpusConfig
from txl_dist.data.format import EXAMPLE_TABLES, Examples, Paragraph, Question
from txl_dist.data.preparing import corpora, example_files, splitting, squad
from txl_dist.data.preparing.corpora import SPLITS, SourceFile, SurveyedFile
from txl_dist.data.preparing.example_files import Row
from txl_dist.data.preparing.splitting import Piece, Shares, may_hold, split_of_document
from txl_dist.data.preparing.squad import Answer, Passage
from txl_dist.data.preparing.tokenizing import Encoded, load_tokenizer
from txl_dist.data.text_size import count_text
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.parsing import shown

NAMED = 10  # of the problems


@dataclass(frozen=True)
class LabelledPlan:
    """The examples to read, with their splits; used as a `splitting.Plan` is.

    Attributes:
        files: each with its split; None: each of its rows or articles has its own.
        shares: of valid and test, for files without a split.
        entry: what they are examples of; the labels are those of the training split.
        articles: the split of each article (name of its file, number), where files of passages have none.
    """

    config: LabelledCorpusConfig
    files: list[tuple[SurveyedFile, str | None]]
    split_by: Literal["given", "document", "article"]
    shares: Shares
    entry: Examples
    articles: dict[tuple[str, int], str]
    document = "example"
    vocabulary = None

    def size(self, split: str | None = None) -> int:
        """Count the bytes of the files that `pieces(split)` reads."""
        return sum(file.size for file, _ in self.files if may_hold(file.source, split))

    def pieces(self, split: str | None = None) -> Iterator[Piece]:
        """Yield the texts of each row or passage as lines, for a tokenizer to learn from; or those of `split`."""
        for example in self.examples(split):
            yield Piece(example.source, example.split, example.number, example.data, True, True, None, False, False)

    def examples(self, split: str | None = None) -> Iterator[Row | Passage]:
        """Yield all rows or passages in the order of the files, each with its split; or those of `split`.

        Raises:
            UserError: if a file cannot be read, or has changed since the survey.
        """
        for file, _ in self.files:
            if may_hold(file.source, split):
                problems: list[str] = []
                for example in read(self.config, file, problems):
                    of_example = self.split_of(example)
                    if problems or of_example is None:
                        raise changed(file.source)
                    if split in (None, of_example):
                        yield example._replace(split=of_example)

    def split_of(self, example: Row | Passage) -> str | None:
        """Return the split of a row or a passage; None if there was no such article when the files were looked at."""
        if example.source.split:
            return example.source.split
        if isinstance(example, Passage):
            return self.articles.get((example.source.name, example.article))
        return split_of_document(example.source.name, example.number, self.shares)

    @property
    def corpus_settings(self) -> dict[str, Any]:
        """Return what decides how the files are read."""
        values = asdict(self.config)
        return {key: values[key] for key in ("format", "columns", *example_files.KEYS, "kind") if key in values}


def read(config: LabelledCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Row] | Iterator[Passage]:
    """Yield the rows or passages of a file; what is wrong with them is appended to `problems`."""
    if isinstance(config, SquadCorpusConfig):
        return squad.read_passages(file, problems)
    return example_files.read_rows(config, file, problems)


def changed(source: SourceFile) -> UserError:
    """Make the error of a file that is another one than at the survey."""
    return UserError(f"{source.path}: changed while it was read; start again")


# ------------------------------------------------------------------------------------------------------- survey


def survey(config: LabelledCorpusConfig, advance: Callable[[int], None]) -> LabelledPlan:
    """Find the files, read each for its size and SHA-256, check every example, and decide the splits and labels.

    Args:
        advance: is called with the number of bytes read.

    Raises:
        ConfigError: with all problems of the examples.
        UserError: if a split would be empty.
    """
    problems: list[str] = []
    sources = corpora.find(config, problems)
    raise_all(problems)
    files = corpora.survey(sources, advance, characters=True)
    if any(source.split for source in sources):
        return survey_of(config, files, (0.0, 0.0))
    return survey_of(config, files, (config.valid_share, config.test_share))


def survey_of(config: LabelledCorpusConfig, files: list[SurveyedFile], shares: Shares) -> LabelledPlan:
    """Check every example of some files, and decide their splits."""
    given = [(file, file.source.split) for file in files]
    is_given = any(split for _, split in given)
    if isinstance(config, SquadCorpusConfig):
        articles = survey_passages(config, files, shares)
        entry = Examples(kind="answers", pairs=True)
        return LabelledPlan(config, given, "given" if is_given else "article", shares, entry, articles)
    labels = survey_rows(config, files, shares)
    entry = Examples(kind=config.kind, labels=labels, pairs=config.text_pair is not None)
    return LabelledPlan(config, given, "given" if is_given else "document", shares, entry, {})


def survey_rows(config: ExamplesCorpusConfig, files: list[SurveyedFile], shares: Shares) -> list[str]:
    """Check every row; return the names of the classes in their order, none if labels are scores."""
    problems: list[str] = []
    labels: dict[str, dict[str, str]] = defaultdict(dict)  # of each split, and where each stands first
    for row in read_all(config, files, problems):
        assert isinstance(row, Row)
        split = row.source.split or split_of_document(row.source.name, row.number, shares)
        label = row.label if config.kind == "labels" else ""
        labels[split].setdefault(label, row.place)
    if not problems:
        splitting.check_splits(config, labels)
    if config.kind == "scores":
        raise_all(problems)
        return []
    raise_all([*problems, *unseen_labels(labels)])
    if len(labels["train"]) == 1:
        (label,) = labels["train"]
        raise UserError(
            f"corpus.label={config.label}: all examples of train have the label {label!r:.80}; give examples of "
            "another class, or corpus.kind=scores for numbers"
        )
    are_numbers = all(map(example_files.is_score, labels["train"]))
    return sorted(labels["train"], key=lambda label: (float(label) if are_numbers else 0.0, label))


def unseen_labels(labels: dict[str, dict[str, str]]) -> Iterator[str]:
    """Describe each label of valid and test that no example of train has."""
    known = labels["train"]
    for split in SPLITS[1:] if known else ():
        for label, place in labels[split].items():
            if label not in known:
                yield f"{place}: the label {label!r:.80} is not one of train; mend it, or give examples of it to train"


def survey_passages(config: SquadCorpusConfig, files: list[SurveyedFile], shares: Shares) -> dict[tuple[str, int], str]:
    """Check every passage; return the split of each article, none if their files have splits."""
    problems: list[str] = []
    places: dict[str, str] = {}  # of each question, by its id
    articles: dict[tuple[str, int], str] = {}
    given: set[str] = set()
    for passage in read_all(config, files, problems):
        assert isinstance(passage, Passage)
        if passage.source.split:
            given.add(passage.source.split)
        else:
            articles[passage.source.name, passage.article] = "train"
        for question in passage.questions:
            place = passage.place(question)
            if question.id in places:
                problems.append(f"{place}: has the id of another, in {places[question.id]}; give each its own")
            places[question.id] = place
    raise_all(problems)
    if articles:
        names = [f"{name}:{number}" for name, number in articles]
        splits = splitting.splits_by_quota(names, shares, "give more articles,")
        articles = dict(zip(articles, splits, strict=True))
    splitting.check_splits(config, given | set(articles.values()))
    return articles


def read_all(config: LabelledCorpusConfig, files: list[SurveyedFile], problems: list[str]) -> Iterator[Row | Passage]:
    """Yield the rows or passages of all files; a file that cannot be read on is appended to `problems`, too."""
    for file in files:
        try:
            yield from read(config, file, problems)
        except UserError as error:
            problems.append(str(error))


def raise_all(problems: list[str]) -> None:
    """Raise a ConfigError with the first problems, if there are some, and how many there are more."""
    more = len(problems) - NAMED
    if problems:
        raise ConfigError(problems[:NAMED] + ([f"(and {more:,} more likewise)"] if more > 0 else []))


# ----------------------------------------------------------------------------- in the processes of a WorkerPool


class EncodedExample(NamedTuple):
    """The tokens [n] of an example, its row in examples.npy, and its texts."""

    tokens: np.ndarray
    row: tuple[float, ...]
    texts: list[bytes]


def encode_examples(tokenizer_folder: Path, entry: Examples, examples: list[Row | Passage]) -> dict[str, Encoded]:
    """Turn some rows or passages into tokens; return those of each split that they belong to.

    Raises:
        UserError: naming file and place, if a text or an answer has no token.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    numbers = {label: number for number, label in enumerate(entry.labels)}
    encoded: dict[str, list[EncodedExample]] = defaultdict(list)
    paragraphs: dict[str, list[bytes]] = defaultdict(list)
    for example in examples:
        assert example.split is not None
        if isinstance(example, Passage):
            encoded[example.split] += encode_passage(tokenizer, example)
            paragraphs[example.split].append(paragraph_line(example))
        else:
            encoded[example.split].append(encode_row(tokenizer, entry, numbers, example))
    table = EXAMPLE_TABLES[entry.kind]
    return {split: join(encoded[split], table, b"".join(paragraphs[split])) for split in encoded}


def join(examples: list[EncodedExample], table: np.dtype[Any], paragraphs: bytes) -> Encoded:
    """Put examples of a split together, each a document."""
    lengths = [len(example.tokens) for example in examples]
    return Encoded(
        tokens=np.concatenate([example.tokens for example in examples]),
        starts=list(itertools.accumulate(lengths[:-1], initial=0)),
        size=count_text([text for example in examples for text in example.texts]),
        sentences=[],
        examples=np.array([example.row for example in examples], table),
        paragraphs=paragraphs,
    )


def encode_row(tokenizer: Tokenizer, entry: Examples, numbers: dict[str, int], row: Row) -> EncodedExample:
    """Encode a text or a pair of texts, with the number of its label or its score."""
    if entry.kind == "labels" and row.label not in numbers:
        raise changed(row.source)
    value = numbers[row.label] if entry.kind == "labels" else float(row.label)
    parts = [encode_text(tokenizer, text, row.place) for text in row.texts]
    return EncodedExample(np.concatenate(parts), (len(parts[0]), value), [text.encode() for text in row.texts])


def encode_text(tokenizer: Tokenizer, text: str, place: str) -> np.ndarray:
    """Return the tokens [n] of a text; raise a UserError if there are none."""
    tokens = tokenizer.encode(text.encode(), end=False)
    if len(tokens) == 0:
        raise UserError(f"{place}: the text {shown(text)} has no token of tokenizer={tokenizer.kind}; leave it out")
    return tokens


def encode_passage(tokenizer: Tokenizer, passage: Passage) -> Iterator[EncodedExample]:
    """Encode each question of a passage behind the passage, with the first and last token of its first answer."""
    encode_text(tokenizer, passage.context, squad.place(passage.source, passage.title))
    tokens, offsets = tokenizer.encode_with_offsets(passage.context)
    for question in passage.questions:
        place = passage.place(question)
        asked = encode_text(tokenizer, question.question, place)
        first = -1
        last = -1
        if question.answers:
            answer = question.answers[0]
            span = answer_tokens(offsets, answer)
            if span is None:
                raise UserError(
                    f"{place}: the answer {shown(answer.text)} has no token of tokenizer={tokenizer.kind}; leave it out"
                )
            first, last = span
        texts = [passage.context.encode(), question.question.encode()]
        yield EncodedExample(np.concatenate([tokens, asked]), (len(tokens), first, last), texts)


def answer_tokens(offsets: np.ndarray, answer: Answer) -> tuple[int, int] | None:
    """Return the first and the last token of a passage that overlap an answer, without the white space around it.

    Args:
        offsets: int64 [n, 2] of the passage's tokens, as `Tokenizer.encode_with_offsets` gives them.
    """
    begin = answer.answer_start + len(answer.text) - len(answer.text.lstrip())
    end = answer.answer_start + len(answer.text.rstrip())
    overlapping = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
    return (int(overlapping[0]), int(overlapping[-1])) if len(overlapping) else None


def paragraph_line(passage: Passage) -> bytes:
    """Return a line of paragraphs.jsonl."""
    questions = [
        Question(id=question.id, question=question.question, answers=[answer.text for answer in question.answers])
        for question in passage.questions
    ]
    return Paragraph(context=passage.context, questions=questions).model_dump_json().encode() + b"\n"
