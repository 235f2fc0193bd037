"""Any damage to the index, the tables or the tokenizer is an error of one line that names the file."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.damage import (
    bytes_of,
    check_messages,
    cut_to,
    dangling,
    flip,
    folder,
    from_another_dataset,
    gone,
    read,
    read_flipped,
    replace,
    unreadable,
)
from txl_dist.data.index import Index

TABLES = {
    "cut": cut_to(-1),
    "cut-in-the-header": cut_to(30),
    "empty": cut_to(0),
    "grown": lambda data: data + b"\0",
    "magic": flip(0),
    "header": flip(40),
    "first-value": flip(128),
    "last-value": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("name", ["train/samples.npy", "train/documents.npy", "valid/samples.npy"])
@pytest.mark.parametrize("damage", TABLES.values(), ids=TABLES)
def test_damaged_tables(copy, name, damage):
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    expected = rf"{name}: SHA-256 differs from index.json \(\w{{12}}, not \w{{12}}\); copy it again"
    check_messages(read(copy), [expected])


@pytest.mark.parametrize("name", ["train/samples.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [gone, folder, dangling, unreadable])
def test_something_else_in_the_place_of_a_table(copy, other_dataset, name, damage):
    damage(copy / name, other_dataset)
    check_messages(read(copy), [f"{name}: cannot be read"])


def test_files_of_another_dataset(copy, other_dataset):
    from_another_dataset(copy / "train/samples.npy", other_dataset)
    check_messages(read(copy), ["train/samples.npy: SHA-256 differs from index.json"])
    shutil.copy(other_dataset / "index.json", copy)
    shutil.copy(other_dataset / "train/documents.npy", copy / "train")
    expected = [f"train/00000{number // 3}.tar: sample {number}: the tokens are not those" for number in range(14)]
    check_messages(read(copy), expected)


@pytest.mark.parametrize("damage", [cut_to(0), cut_to(20), flip(5), lambda data: data.replace(b"bytes", b"words")])
def test_a_damaged_tokenizer(copy, damage):
    path = copy / "tokenizer/tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    check_messages(read(copy), [r"tokenizer/tokenizer.json: SHA-256 differs from index.json \("])


INDEXES = {
    "empty": (cut_to(0), "index.json: is damaged"),
    "cut": (cut_to(700), "index.json: is damaged"),
    "cut-at-the-end": (cut_to(-2), "index.json: is damaged"),
    "no-text": (flip(30, 0x80), "index.json: is damaged"),
    "deep": (lambda data: b"[" * 100_000, "index.json: is damaged"),
    "other-json": (lambda data: b"[]", "index.json: is not the index of a txl_dist dataset, version 1"),
    "other-version": (replace(b'"version": 1', b'"version": 3'), "index.json: is not the index of"),
    **{
        f"{key}": (
            replace(old, new),
            r"index.json: is damaged \(its SHA-256 is \w{12}, not \w{12}\)",
        )
        for key, old, new in [
            ("vocab_size", b'"vocab_size": 257', b'"vocab_size": 259'),
            ("eos", b'"eos": 256', b'"eos": 257'),
            ("bytes", b'"bytes": 213', b'"bytes": 217'),
            ("dtype", b'"dtype": "uint16"', b'"dtype": "uint17"'),
            ("sample_tokens", b'"sample_tokens": 16', b'"sample_tokens": 17'),
            ("key", b'"shard_samples"', b'"shard_sbmples"'),
            ("corpus", b'"of a test"', b'"of a tesu"'),
        ]
    },
}


@pytest.mark.parametrize("damage, expected", INDEXES.values(), ids=INDEXES)
def test_a_damaged_index(copy, damage, expected):
    path = copy / "index.json"
    path.write_bytes(damage(path.read_bytes()))
    check_messages(read(copy), [expected])


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_index_is_found_or_means_nothing(intact, tmp_path_factory, position, bit):
    before = Index.open(str(intact))
    copy, errors = read_flipped(
        intact, tmp_path_factory, "index.json", position % len(bytes_of(intact / "index.json")), bit
    )
    if not errors:
        after = Index.open(str(copy))
        assert (after.vocab_size, after.eos, after.corpus) == (before.vocab_size, before.eos, before.corpus)
        for name, split in before.splits.items():
            assert (after.splits[name].bytes, after.splits[name].shards) == (split.bytes, split.shards)
