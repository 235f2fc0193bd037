"""The kinds of files that hold labelled texts: tables (TSV, CSV), JSON lines, and a label before each text.

`squad` reads questions about passages.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from math import isfinite
from typing import NamedTuple

from txl_dist.config.schema import ExamplesCorpusConfig
from txl_dist.data.preparing.corpora import SourceFile, SurveyedFile
from txl_dist.data.preparing.text_files import opened
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe, shown

SUFFIXES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}
KEYS = ("text", "text_pair", "label")  # of the config: the columns that are read
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_BREAKS = str.maketrans("\r\n", "  ")

Record = tuple[int, dict[str, str]]  # the number of its first line, from 1; its columns that are read


class Row(NamedTuple):
    """A text, or a pair of texts, with its label.

    Attributes:
        split: None as long as it is not decided.
        number: of the row in its file, from 0.
        line: the number of the first line of its record, from 1.
    """

    source: SourceFile
    split: str | None
    number: int
    line: int
    texts: tuple[str, ...]
    label: str

    @property
    def place(self) -> str:
        """Name the row for a message."""
        return place(self.source, self.line)

    @property
    def data(self) -> bytes:
        """Return the texts as lines."""
        return "\n".join(self.texts).encode()


def place(source: SourceFile, line: int) -> str:
    """Name a line of a file for a message."""
    return f"{source.path}: line {line:,}"


def read_rows(config: ExamplesCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Row]:
    """Yield the examples of a file; what is wrong with single records is appended to `problems`.

    Raises:
        UserError: if the file cannot be read, or read on, as what it is.
    """
    names = [name for name in (config.text, config.text_pair) if name is not None]
    records = READERS[format_of(config, file.source)](config, file, problems)
    for number, (line, record) in enumerate(records):
        texts = tuple(record[name].translate(LINE_BREAKS) for name in names)
        label = record[config.label].translate(LINE_BREAKS).strip()
        row = Row(file.source, file.source.split, number, line, texts, label)
        problems += problems_of(config, row)
        yield row


def problems_of(config: ExamplesCorpusConfig, row: Row) -> Iterator[str]:
    """Describe what is wrong with the values of a row."""
    texts = [*zip(KEYS, row.texts, strict=False), ("label", row.label)]
    for key, text in texts:
        where = f"{row.place}: {getattr(config, key)!r} (corpus.{key})"
        problem = problem_of_text(text)
        if problem:
            yield f"{where} {problem}"
        elif key == "label" and config.kind == "scores" and not is_score(text):
            yield f"{where} is {shown(text)}, not a finite number; mend it, or give corpus.kind=labels"


def problem_of_text(text: str) -> str | None:
    """Describe why a text cannot be encoded; None if it can."""
    if not text.strip():
        return "is an empty text; mend it, or leave it out"
    if SURROGATE.search(text):
        return "has half of a surrogate pair, which is no character; write it as UTF-8"
    return None


def is_score(label: str) -> bool:
    """Return whether a label is a finite number."""
    try:
        return isfinite(float(label))
    except ValueError:
        return False


def format_of(config: ExamplesCorpusConfig, source: SourceFile) -> str:
    """Return the format of a file, by its name where the config leaves it open.

    Raises:
        UserError: if its name does not say it.
    """
    if config.format != "auto":
        return config.format
    suffixes = [suffix for suffix in source.path.suffixes if suffix.lower() not in (".gz", ".zst")]
    kind = SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    if kind is None:
        raise UserError(
            f"{source.path}: its name says no format of examples; give corpus.format=tsv, csv, jsonl or label_text"
        )
    return kind


def decoded_lines(file: SurveyedFile) -> Iterator[str]:
    """Yield the lines of a file with their ends, without a byte order mark.

    Raises:
        UserError: if the file cannot be read, or a line is not UTF-8.
    """
    with opened(file.source.path) as stream:
        stream.read(file.start)
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                where = place(file.source, number)
                raise UserError(f"{where}: is not UTF-8 ({error.reason}); convert the file (iconv)") from error


# ------------------------------------------------------------------------------------------------------ formats


def read_tsv(config: ExamplesCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file of tab-separated lines, in which quotes are text, as in GLUE."""
    lines = enumerate(decoded_lines(file), 1)
    rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in lines if line.strip("\r\n"))
    return records(config, file.source, rows, problems)


def read_csv(config: ExamplesCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file of comma-separated values, whose quoted ones may have line breaks."""
    return records(config, file.source, csv_rows(file), problems)


def csv_rows(file: SurveyedFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, each with the number of its first line.

    Raises:
        UserError: naming the line where the row begins that is not CSV.
    """
    reader = csv.reader(decoded_lines(file), strict=True)
    line = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{place(file.source, line)}: is not CSV ({error}); look for a quote that is not closed from here on"
            ) from error
        if values:
            yield line, values
        line = reader.line_num + 1


def records(
    config: ExamplesCorpusConfig, source: SourceFile, rows: Iterator[tuple[int, list[str]]], problems: list[str]
) -> Iterator[Record]:
    """Yield the rows of a table, with the names of their columns; the first has those where the config has not.

    Raises:
        UserError: if a column that is to be read is missing.
    """
    columns = config.columns
    from_where = "as corpus.columns has"
    for line, values in rows:
        if columns is None:
            columns = values
            from_where = f"as line {line:,} has, its header"
            check_header(config, source, line, columns)
        elif len(values) != len(columns):
            has = f"{len(values):,} column{'s' * (len(values) != 1)}"
            problems.append(f"{place(source, line)}: has {has}, not {len(columns):,} {from_where}")
        else:
            yield line, dict(zip(columns, values, strict=True))


def check_header(config: ExamplesCorpusConfig, source: SourceFile, line: int, columns: list[str]) -> None:
    """Raise a UserError if a header lacks a column that is to be read, or has one of them twice."""
    for key in KEYS:
        name = getattr(config, key)
        if name is None or columns.count(name) == 1:
            continue
        where = place(source, line)
        if name in columns:
            raise UserError(f"{where}: has the column {name!r} (corpus.{key}) twice; rename one")
        problem = lacking(source, key, name, columns)
        raise UserError(f"{where}: {problem}; where the first line is no header, give corpus.columns")


def lacking(source: SourceFile, key: str, name: str, names: list[str]) -> str:
    """Describe a record without the column that `key` of the config names, with what helps."""
    if key == "label" and source.split in ("valid", "test"):
        remedy = f"the examples are not labelled, and cannot be scored: leave out corpus.{source.split}, or label them"
    else:
        remedy = f"give corpus.{key} the name of one"
    return f"has no {name!r} (corpus.{key}), but {', '.join(map(repr, names))[:200]}; {remedy}"


def read_json_lines(config: ExamplesCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file with one JSON object per line."""
    for line, text in enumerate(decoded_lines(file), 1):
        if text.isspace():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.append(f"{place(file.source, line)}: is not JSON ({describe(error)}); give one object per line")
            continue
        found = list(problems_of_object(config, file.source, value))
        problems += [f"{place(file.source, line)}: {problem}" for problem in found]
        if not found:
            names = [getattr(config, key) for key in KEYS if getattr(config, key) is not None]
            yield line, {name: as_text(value[name]) for name in names}


def problems_of_object(config: ExamplesCorpusConfig, source: SourceFile, value: object) -> Iterator[str]:
    """Describe why a JSON value is not an example."""
    if not isinstance(value, dict):
        yield f"is not an object, but {shown(value)}"
        return
    for key in KEYS:
        name = getattr(config, key)
        if name is None:
            continue
        if name not in value:
            yield lacking(source, key, name, list(value))
        elif not isinstance(value[name], (str, int, float) if key == "label" else str):
            right = "a text or a number" if key == "label" else "a text"
            yield f"{name!r} (corpus.{key}) is {shown(value[name])}, not {right}"


def as_text(value: str | int | float) -> str:
    """Return a text as it is, and a number, true or false as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_label_text(config: ExamplesCorpusConfig, file: SurveyedFile, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file in which each line is a label, a space and a text."""
    for number, line in enumerate(decoded_lines(file), 1):
        if not line.isspace():
            label, _, text = line.rstrip("\r\n").partition(" ")
            yield number, {config.label: label, config.text: text}


Reader = Callable[[ExamplesCorpusConfig, SurveyedFile, list[str]], Iterator[Record]]
READERS: dict[str, Reader] = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_json_lines,
    "label_text": read_label_text,
}
