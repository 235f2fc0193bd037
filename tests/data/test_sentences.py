"""The table of sentences of an index, whole and damaged; datasets without one are as they always were."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.damage import check_messages, cut_to, dangling, flip, folder, gone, npy, read, replace, seal
from txl_dist.data.format import content_fingerprint
from txl_dist.data.index import Index
from txl_dist.data.preparing.shards import SplitWriter
from txl_dist.data.text_size import TextSize

STARTS = np.array([0, 7, 20, 21, 22, 100, 212], "<u8")  # of 213 tokens
ALL = ("samples.npy", "documents.npy", "sentences.npy")


@pytest.fixture
def with_sentences(copy) -> Path:
    (copy / "train" / "sentences.npy").write_bytes(npy(STARTS))
    seal(copy, tables=ALL)
    return copy


def test_sentences_are_read_where_there_are_some(with_sentences):
    assert read(with_sentences) == []
    splits = Index.open(str(with_sentences)).splits
    assert splits["train"].sentence_starts.tolist() == STARTS.tolist() and splits["valid"].sentence_starts is None


def test_the_fingerprint_of_a_dataset_without_sentences_is_the_one_it_always_had(intact, with_sentences):
    index = json.loads((intact / "index.json").read_text())
    split = {"files": {"samples.npy": "a", "documents.npy": "b"}, "shards": [{"sha256": "0"}, {"sha256": "1"}]}
    # Computed by version 0.1 for these values.
    before = "98520e7fb16cf5a48b07a2dccb9c9412"
    assert content_fingerprint({"tokenizer.json": "c"}, {"train": split})[:32] == before
    assert not (intact / "train" / "sentences.npy").exists()
    assert json.loads((with_sentences / "index.json").read_text())["fingerprint"] != index["fingerprint"]


DAMAGE = {
    "cut": cut_to(-1),
    "cut-in-the-header": cut_to(30),
    "empty": cut_to(0),
    "grown": lambda data: data + b"\0",
    "header": flip(40),
    "first-value": flip(128),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table(with_sentences, damage):
    path = with_sentences / "train" / "sentences.npy"
    path.write_bytes(damage(path.read_bytes()))
    check_messages(
        read(with_sentences), [r"train/sentences.npy: SHA-256 differs from index.json \(\w{12}, not \w{12}\); copy it"]
    )


@pytest.mark.parametrize("damage", [gone, folder, dangling])
def test_something_else_in_the_place_of_the_table(with_sentences, other_dataset, damage):
    damage(with_sentences / "train" / "sentences.npy", other_dataset)
    check_messages(read(with_sentences), ["train/sentences.npy: cannot be read"])


def test_a_table_that_the_index_no_longer_names_is_an_error(with_sentences):
    """The fingerprint names the sentences, so they cannot be left out."""
    path = with_sentences / "index.json"
    path.write_bytes(replace(b'"sentences.npy"', b'"sentencez.npy"')(path.read_bytes()))
    check_messages(read(with_sentences), [r"index.json: is damaged \(its SHA-256"])
    index = json.loads(path.read_text())
    del index["sha256"]
    path.write_text(json.dumps(index))
    check_messages(read(with_sentences), ["index.json: its fingerprint is not that of its shards"])


OTHER_TABLES = {
    "no-table": (b"text", "sentences.npy"),
    "objects": (npy(np.array([{}], object), allow_pickle=True), "sentences.npy"),
    "empty": (npy(STARTS[:0]), "sentences.npy is not the table of its sentences"),
    "signed": (npy(STARTS.astype("<i8")), "sentences.npy is not the table of its sentences"),
    "big-endian": (npy(STARTS.astype(">u8")), "sentences.npy is not the table of its sentences"),
    "two-dimensional": (npy(STARTS[:, None]), "sentences.npy is not the table of its sentences"),
    "no-start": (npy(STARTS[1:]), "sentences.npy has starts that do not ascend from 0 within its 213 tokens"),
    "twice": (npy(STARTS[[0, 1, 1, 2]]), "sentences.npy has starts that do not ascend"),
    "descending": (npy(STARTS[[0, 2, 1]]), "sentences.npy has starts that do not ascend"),
    "behind-the-end": (npy(np.array([0, 213], "<u8")), "sentences.npy has starts that do not ascend"),
    "far-behind": (npy(np.array([0, 2**64 - 1], "<u8")), "sentences.npy has starts that do not ascend"),
}


@pytest.mark.parametrize("content, expected", OTHER_TABLES.values(), ids=OTHER_TABLES)
def test_a_sealed_table_of_another_kind_is_refused_in_one_line(with_sentences, content, expected):
    (with_sentences / "train" / "sentences.npy").write_bytes(content)
    seal(with_sentences, tables=ALL)
    check_messages(read(with_sentences), [f"index.json: .*{expected}"])


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_sentences_without_a_token_are_not_counted_however_the_tokens_come_in(tmp_path, step):
    with SplitWriter(tmp_path, "train", np.dtype("<u2"), 16, 3, sentences=True) as writer:
        for start in range(0, 30, step):
            tokens = np.arange(start, min(start + step, 30), dtype="<u2")
            # Every third token begins a sentence, and so does what comes behind the last one.
            starts = [at - start for at in range(start, start + len(tokens) + 1) if at % 3 == 0]
            writer.add(tokens, [0] if start == 0 else [], TextSize(len(tokens), None, None), starts)
        entry = writer.close()
    assert list(entry["files"]) == list(ALL)
    table = np.load(tmp_path / "train" / "sentences.npy")
    assert table.tolist() == [*range(0, 30, 3)] and table.dtype == "<u8"
