"""The tables of examples of a dataset, whole and damaged; datasets without them are as they always were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.damage import assign, check_messages, cut_to, flip, gone, npy, read, seal
from txl_dist.data.format import ANSWERED, LABELLED, Examples, content_fingerprint
from txl_dist.data.index import Index
from txl_dist.errors import UserError

LENGTHS = np.array([20, 1, 1, 58, 16, 12, 100, 5])  # of the documents of train
LABELS = np.array([(length, number % 3) for number, length in enumerate(LENGTHS)], LABELLED)
ANSWERS = np.array(
    [(1, 0, 0), (1, -1, -1), (1, 0, 0), (50, 3, 49), (9, -1, -1), (9, 8, 8), (9, 0, 8), (4, 1, 2)], ANSWERED
)
ENTRIES = {
    "labels": {"kind": "labels", "labels": ["a", "b", "c"], "pairs": False},
    "scores": {"kind": "scores", "labels": [], "pairs": False},
    "answers": {"kind": "answers", "labels": [], "pairs": True},
}
QUESTION = {"id": "1", "question": "?", "answers": []}
PARAGRAPHS = [{"context": "é\u2028x", "questions": [QUESTION] * 3}, {"context": "x", "questions": [QUESTION] * 5}]


def lines(paragraphs: Any) -> bytes:
    return "".join(json.dumps(paragraph, ensure_ascii=False) + "\n" for paragraph in paragraphs).encode()


def with_examples(copy: Path, kind: str, table: bytes | None = None, paragraphs: bytes = lines(PARAGRAPHS)) -> Path:
    """Make the documents of train examples; valid is left out."""
    content = npy(ANSWERS if kind == "answers" else LABELS) if table is None else table
    (copy / "train" / "examples.npy").write_bytes(content)
    names = ["samples.npy", "documents.npy", "examples.npy"]
    if kind == "answers":
        (copy / "train" / "paragraphs.jsonl").write_bytes(paragraphs)
        names.append("paragraphs.jsonl")

    def change(index):
        index["examples"] = ENTRIES[kind]
        del index["splits"]["valid"]

    seal(copy, change, names)
    return copy


@pytest.mark.parametrize("kind", ENTRIES)
def test_examples_are_read_where_there_are_some(copy, kind):
    assert read(with_examples(copy, kind)) == []
    index = Index.open(str(copy))
    split = index.splits["train"]
    assert index.examples == Examples(**ENTRIES[kind]) and split.examples is not None
    assert split.examples.tolist() == (ANSWERS if kind == "answers" else LABELS).tolist()
    assert isinstance(split.examples, np.memmap) and (split.paragraphs is None) == (kind != "answers")


def test_labels_are_counted(copy):
    index = Index.open(str(with_examples(copy, "labels")))
    assert index.label_counts("train") == {"a": 3, "b": 3, "c": 2}


def test_paragraphs_are_read(copy):
    index = Index.open(str(with_examples(copy, "answers")))
    paragraphs = index.paragraphs("train")
    assert [paragraph.model_dump() for paragraph in paragraphs] == PARAGRAPHS
    assert index.label_counts("train") == {"answered": 6, "not answered": 2}


def test_datasets_without_examples_are_as_they_were_and_all_of_examples_is_in_the_fingerprint(copy, intact):
    without = Index.open(str(intact))
    assert without.examples is None and without.splits["train"].examples is None
    files = {"samples.npy": "a", "documents.npy": "b", "examples.npy": "c", "paragraphs.jsonl": "d"}
    fingerprints = {content_fingerprint({}, {"train": {"files": files, "shards": []}}, None)}
    for entry, change in [
        (ENTRIES["answers"], {}),
        (ENTRIES["scores"], {}),
        (ENTRIES["answers"], {"examples.npy": "e"}),
        (ENTRIES["answers"], {"paragraphs.jsonl": "e"}),
    ]:
        fingerprints.add(content_fingerprint({}, {"train": {"files": files | change, "shards": []}}, entry))
    assert len(fingerprints) == 5
    assert content_fingerprint({}, {"train": {"files": files, "shards": []}}) in fingerprints


@pytest.mark.parametrize("name", ["examples.npy", "paragraphs.jsonl"])
@pytest.mark.parametrize("damage", [cut_to(-1), cut_to(0), flip(40), lambda data: data + b"\n"])
def test_a_damaged_file(copy, name, damage):
    path = with_examples(copy, "answers") / "train" / name
    path.write_bytes(damage(path.read_bytes()))
    check_messages(read(copy), [rf"train/{name}: SHA-256 differs from index.json \(\w{{12}}, not \w{{12}}\); copy it"])


@pytest.mark.parametrize("name", ["examples.npy", "paragraphs.jsonl"])
def test_a_missing_file(copy, other_dataset, name):
    gone(with_examples(copy, "answers") / "train" / name, other_dataset)
    check_messages(read(copy), [f"train/{name}: cannot be read"])


@pytest.mark.parametrize("name", ["examples.npy", "paragraphs.jsonl"])
def test_a_file_that_the_index_does_not_name(copy, name):
    with_examples(copy, "answers")
    seal(copy, lambda index: index["splits"]["train"]["files"].pop(name))
    check_messages(read(copy), [f"index.json: is damaged .*{name}"])


def changed(table: np.ndarray, field: str, value: float, row: int = 3) -> bytes:
    other = table.copy()
    other[field][row] = value
    return npy(other)


TABLES: dict[str, tuple[str, bytes, str]] = {
    "no table": ("labels", b"text", "examples.npy"),
    "objects": ("labels", npy(np.array([{}], object), allow_pickle=True), "examples.npy"),
    "too short": ("labels", npy(LABELS[1:]), "is not the table of its examples"),
    "two dimensions": ("labels", npy(LABELS[:, None]), "is not the table of its examples"),
    "another kind": ("answers", npy(LABELS), "is not the table of its examples"),
    "other names": ("labels", npy(LABELS.astype([("a", "<u4"), ("b", "<f8")])), "is not the table of its examples"),
    "first too long": ("labels", changed(LABELS, "first", 59), "first texts that are longer than their documents"),
    "first empty": (
        "scores",
        changed(LABELS, "first", 0),
        "first texts that are longer than their documents, or",
    ),
    "no class": ("labels", changed(LABELS, "value", 3), "values that are not the numbers of its 3 labels"),
    "negative": ("labels", changed(LABELS, "value", -1), "values that are not the numbers of its 3 labels"),
    "half": ("labels", changed(LABELS, "value", 0.5), "values that are not the numbers of its 3 labels"),
    "nan": ("labels", changed(LABELS, "value", np.nan), "values that are not finite"),
    "infinite": ("scores", changed(LABELS, "value", np.inf), "values that are not finite"),
    "behind the passage": ("answers", changed(ANSWERS, "end", 50), "answers that are not in their passages"),
    "backwards": ("answers", changed(ANSWERS, "end", 2), "answers that are not in their passages"),
    "no end": ("answers", changed(ANSWERS, "end", -1), "answers that are not in their passages"),
    "far before": ("answers", changed(ANSWERS, "start", -2), "answers that are not in their passages"),
}


@pytest.mark.parametrize("kind, content, expected", TABLES.values(), ids=TABLES)
def test_a_sealed_table_that_is_wrong_is_refused_in_one_line(copy, kind, content, expected):
    check_messages(read(with_examples(copy, kind, content)), [f"index.json: .*{expected}"])


HOSTILE = ["x", [], {}, True, 1, 1e999, "\ud800", [[[]]], {"kind": "labels"}, {"kind": "x", "pairs": True}]


@pytest.mark.parametrize("keys", [["examples"], ["examples", "kind"], ["examples", "labels"], ["examples", "pairs"]])
def test_a_sealed_entry_of_other_types_is_refused_in_one_line(copy, keys):
    with_examples(copy, "labels")
    before = (copy / "index.json").read_bytes()
    for value in [*HOSTILE, None, ["a"], ["a", "b", "b"], ["a", 2, "c"], "answers"]:
        if (keys[-1] == "pairs" and value is True) or (keys[-1] == "examples" and value is None):
            continue
        seal(copy, assign(*keys, value=value))
        (error,) = set(read(copy))
        assert "index.json" in error and "\n" not in error and len(error) < 600, (value, error)
        (copy / "index.json").write_bytes(before)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"{", "is damaged"),
        (b"\xff\n", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (lines([{"context": 3, "questions": []}]), r"is damaged \(context=3"),
        (lines(PARAGRAPHS[:1]), "has 3 questions for 8 examples; copy it again"),
    ],
)
def test_sealed_paragraphs_that_are_wrong(copy, content, expected):
    with_examples(copy, "answers", paragraphs=content)
    with pytest.raises(UserError, match=rf"train/paragraphs.jsonl: {expected}"):
        Index.open(str(copy)).paragraphs("train")
