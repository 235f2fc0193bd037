"""What a user wants to know something of: texts, pairs of texts, or questions about passages, as lines or as JSON."""

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from txl_dist.errors import UserError
from txl_dist.files.parsing import shown

InputFormat = Literal["auto", "lines", "json"]


class Input(NamedTuple):
    """An example without a label.

    Attributes:
        texts: one or two; of a question the passage, then the question.
        id: that a question has in its file, else its number, from 0.
    """

    texts: tuple[str, ...]
    id: str


def read_inputs(data: bytes, where: str, form: InputFormat, keys: tuple[str, ...]) -> list[Input]:
    """Read examples.

    Args:
        data: the content of a file, or of standard input.
        where: its name, for messages.
        keys: those of the texts in JSON: text, with pairs text_pair; or context and question.

    Raises:
        UserError: naming the line, where it is not what it should be, or a text is empty.
    """
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{where}: line {line:,}: is not UTF-8 ({error.reason}); convert it (iconv)") from error
    is_json = text.lstrip().startswith("{") if form == "auto" else form == "json"
    inputs: list[Input] = []
    for place, texts, name in json_records(text, where, keys) if is_json else line_records(text, where, keys):
        for key, value in zip(keys, texts, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{place}: its {key} is {shown(value)}, not a text; mend it, or leave it out")
        inputs.append(Input(tuple(" ".join(value.splitlines()) for value in texts), name or str(len(inputs))))
    return inputs


Record = tuple[str, tuple[Any, ...], str | None]  # its place, for messages; its texts; its id, where it has one


def line_records(text: str, where: str, keys: tuple[str, ...]) -> Iterator[Record]:
    """Yield the lines that are not blank; texts of a pair have a tab between them."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where}: line {number:,}"
        texts = tuple(line.rstrip("\r").split("\t")) if len(keys) > 1 else (line.rstrip("\r"),)
        if len(texts) != len(keys):
            raise UserError(f"{place}: has {len(texts)} columns with tabs between, not {len(keys)}: {', '.join(keys)}")
        yield place, texts, None


def json_records(text: str, where: str, keys: tuple[str, ...]) -> Iterator[Record]:
    """Yield the objects of JSON lines, or the questions of a file of SQuAD."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "data" in whole:
        yield from squad_records(whole, where)
        return
    for number, line in [(1, text)] if isinstance(whole, dict) else lines:
        place = f"{where}: line {number:,}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{place}: is not JSON ({error}); give an object with {', '.join(keys)} per line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: is {shown(record)}, not an object with {', '.join(keys)}")
        missing = [key for key in keys if key not in record]
        if missing:
            raise UserError(f"{place}: has no {' and no '.join(missing)}; give an object with {', '.join(keys)}")
        yield place, tuple(record[key] for key in keys), None if record.get("id") is None else str(record["id"])


def squad_records(squad: dict[str, Any], where: str) -> Iterator[Record]:
    """Yield the questions of a file of SQuAD; their answers, if it has some, are not read."""
    try:
        for article in squad["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    place = f"{where}: question {shown(question['id'])}"
                    yield place, (paragraph["context"], question["question"]), str(question["id"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: is not a file of SQuAD ({type(error).__name__}: {error})") from error
