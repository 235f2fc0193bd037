"""A dataset holds the documents that were added, however they came in, and WebDataset can read it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.datasets import SAMPLE_TOKENS, SHARD_SAMPLES, STREAM, TRAIN, random_documents, write
from txl_dist.data.index import Index
from txl_dist.data.preparing import shards
from txl_dist.data.preparing.shards import SplitWriter
from txl_dist.data.samples import SampleReader
from txl_dist.data.text_size import TextSize
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.errors import UserError


def test_the_index_holds_the_sizes_of_splits_and_shards(intact):
    index = Index.open(str(intact))
    train, valid = index.splits["train"], index.splits["valid"]
    assert (index.vocab_size, index.eos) == (257, 256)
    assert (index.sample_tokens, index.shard_samples) == (SAMPLE_TOKENS, SHARD_SAMPLES)
    assert index.tokenizer().decode(b"text") == "text"
    assert (train.tokens, train.documents, train.bytes, train.samples) == (213, 8, 213, 14)
    assert train.document_starts.tolist() == [0, 20, 21, 22, 80, 96, 108, 208, 213]
    assert [(shard.name, shard.samples, shard.tokens, shard.documents) for shard in train.shards] == [
        ("train/000000.tar", 3, 48, 4),
        ("train/000001.tar", 3, 48, 1),
        ("train/000002.tar", 3, 48, 2),
        ("train/000003.tar", 3, 48, 0),
        ("train/000004.tar", 2, 21, 1),
    ]
    assert [(shard.samples, shard.tokens) for shard in valid.shards] == [(3, 48)]


def test_the_shards_can_be_read_by_webdataset_and_say_where_they_are(intact):
    from webdataset import WebDataset

    urls = [str(path) for path in sorted((intact / "train").glob("*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(14)]
    assert np.concatenate([sample["tokens.npy"] for sample in samples]).tolist() == STREAM.tolist()
    starts = np.cumsum([0, *map(len, TRAIN)])[:-1]
    for number, sample in enumerate(samples):
        facts = sample["json"]
        position = number * SAMPLE_TOKENS
        assert facts["position"] == position
        assert facts["documents"] == [
            start - position for start in starts if position <= start < position + SAMPLE_TOKENS
        ]
        assert starts[facts["document"]] + facts["offset"] == position
        assert facts["document"] == np.searchsorted(starts, position, "right") - 1


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), step=st.integers(1, 90))
def test_the_dataset_does_not_depend_on_how_the_tokens_come(tmp_path_factory, lengths, step):
    documents = random_documents(lengths)
    folders = [write(tmp_path_factory.mktemp("same"), {"train": documents}, step=size) for size in (step, 1000)]
    contents = [{path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert contents[0] == contents[1]
    index = Index.open(str(folders[0]))
    assert SampleReader(index, "train").tokens(0, sum(lengths)).tolist() == np.concatenate(documents).tolist()
    assert index.splits["train"].document_starts.tolist() == np.cumsum([0, *lengths]).tolist()


def test_a_document_without_tokens_is_not_counted(tmp_path):
    tokenizer = BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    writer = SplitWriter(tmp_path, "train", tokenizer.dtype, SAMPLE_TOKENS, SHARD_SAMPLES)
    nothing = np.empty(0, tokenizer.dtype)
    writer.add(nothing, [0], TextSize(0, 0, 0))
    writer.add(STREAM[:20], [0, 0, 7, 7, 20], TextSize(20, 20, 1))  # one of them at the end, and the next begins there
    writer.add(STREAM[20 : SAMPLE_TOKENS * SHARD_SAMPLES], [0], TextSize(28, 28, 1))
    writer.add(nothing, [0, 0], TextSize(0, 0, 0))
    shards.write_index(tmp_path, {}, tokenizer, SAMPLE_TOKENS, SHARD_SAMPLES, {"train": writer.close()})
    split = Index.open(str(tmp_path)).splits["train"]
    assert split.document_starts.tolist() == [0, 7, 20, 48] and split.documents == 3


def test_the_sizes_of_a_text_are_kept_where_all_of_them_are_known(tmp_path):
    tokenizer = BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    splits = {}
    for split, words in (("train", [2, 3]), ("valid", [2, None])):
        writer = SplitWriter(tmp_path, split, tokenizer.dtype, SAMPLE_TOKENS, SHARD_SAMPLES)
        for count in words:
            writer.add(STREAM[:10], [0], TextSize(10, 9, count))
        splits[split] = writer.close()
    shards.write_index(tmp_path, {}, tokenizer, SAMPLE_TOKENS, SHARD_SAMPLES, splits)
    loaded = Index.open(str(tmp_path)).splits
    assert [(split.bytes, split.characters, split.words) for split in loaded.values()] == [(20, 18, 5), (20, 18, None)]
    facts = json.loads((tmp_path / "index.json").read_text())
    for wrong in ("5", -1, 1.5, True):
        facts["splits"]["train"]["words"] = wrong
        (tmp_path / "index.json").write_text(json.dumps(facts | {"sha256": None}))
        with pytest.raises(UserError, match=r"splits.train.words="):
            Index.open(str(tmp_path))
