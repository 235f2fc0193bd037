"""Losses are divided by the size of the text itself, or by nothing if that is not known."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    PrepareJob,
    SentencePieceTokenizerConfig,
    TextCorpusConfig,
    WordTokenizerConfig,
)
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.data.text_size import TextSize, size_of_text
from txl_dist.prepare import prepare

DOCUMENTS = [f"    été of  {name},\tthe sea\r\n\n and {name} again\n" for name in ("Ann", "Bob", "日本")]


def dataset(folder: Path, tokenizer: Any, documents: list[str]) -> Index:
    for number, document in enumerate(documents):
        (folder / "text").mkdir(parents=True, exist_ok=True)
        (folder / "text" / f"{number}.txt").write_bytes(document.encode())
    corpus = TextCorpusConfig("text", None, [str(folder / "text")], None, None, "file", "auto", 0, 0)
    prepare(PrepareJob(corpus, tokenizer, DatasetConfig(str(folder / "data"), 16, 8), 1))
    return Index.open(str(folder / "data"))


def without_counts(index: Index) -> Index:
    """The dataset as it was before characters and words were counted."""
    path = index.store.folder / "index.json"
    facts = json.loads(path.read_text())
    del facts["sha256"], facts["splits"]["train"]["characters"], facts["splits"]["train"]["words"]
    path.write_text(json.dumps(facts))
    return Index.open(str(path.parent))


def counted(documents: list[str]) -> TextSize:
    words = sum(len(text.split()) + text.count("\n") for text in documents)
    return TextSize(sum(len(text.encode()) for text in documents), sum(map(len, documents)), words)


def given_model(folder: Path) -> SentencePieceTokenizerConfig:
    """One made by SentencePiece's defaults: it loses line ends and runs of spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(DOCUMENTS * 20), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=3
    )
    (folder / "given.model").write_bytes(model.getvalue())
    return SentencePieceTokenizerConfig("sentencepiece", 8000, "bpe", str(folder / "given.model"))


def tokenizer_of(name: str, folder: Path) -> Any:
    if name == "given":
        return given_model(folder)
    return {
        "bytes": BytesTokenizerConfig("bytes"),
        "word": WordTokenizerConfig("word", 4, 1, None),
        "trained": SentencePieceTokenizerConfig("sentencepiece", 300, "bpe", None),
    }[name]


@pytest.mark.parametrize("name", ["bytes", "word", "trained", "given"])
@pytest.mark.parametrize("end", ["", "last words"])
def test_a_split_has_the_size_of_its_text_whatever_the_tokens(tmp_path, name, end):
    documents = [text + end for text in DOCUMENTS] * (5 if name == "trained" else 1)
    index = dataset(tmp_path, tokenizer_of(name, tmp_path), documents)
    total = index.splits["train"].tokens
    assert size_of_text(index, "train", total) == counted(documents)
    old = size_of_text(without_counts(index), "train", total)
    assert old == (counted(documents) if name in ("bytes", "trained") else TextSize(old.bytes, None, None))
    assert old.bytes == counted(documents).bytes


def test_parts_are_counted_exactly_where_tokens_give_the_text_back(tmp_path):
    for name in ("bytes", "trained"):
        index = dataset(tmp_path / name, tokenizer_of(name, tmp_path), DOCUMENTS * 5)
        token_bytes = index.tokenizer().token_bytes()
        assert token_bytes is not None
        stream = SampleReader(index, "train").tokens(0, index.splits["train"].tokens).tolist()
        for tokens in range(1, len(stream), 7):
            documents = [[]]
            for token in stream[:tokens]:
                documents[-1].append(token_bytes[token])
                documents += [[]] * (token == index.eos)
            data = [b"".join(pieces) for pieces in documents]
            texts = [piece.decode(errors="replace") for piece in data]
            wanted = counted(texts)._replace(bytes=sum(map(len, data)))
            assert size_of_text(index, "train", tokens) == wanted


def test_parts_of_words_have_no_known_bytes_and_those_of_a_model_that_loses_text_no_size(tmp_path):
    index = dataset(tmp_path, tokenizer_of("word", tmp_path), DOCUMENTS)
    for tokens in range(1, index.splits["train"].tokens):
        assert size_of_text(index, "train", tokens) == TextSize(None, None, tokens)
    index = dataset(tmp_path / "given", given_model(tmp_path), DOCUMENTS)
    assert size_of_text(index, "train", 20) == TextSize(None, None, None)


def test_words_of_a_part_do_not_count_the_token_behind_a_line_without_end(tmp_path):
    for name, documents in [("none", ["a b\nc"] * 3), ("some", ["a b\nc", "a b\n"])]:
        index = dataset(tmp_path / name, tokenizer_of("word", tmp_path), documents)
        word_counts = [size_of_text(index, "train", tokens).words for tokens in range(1, 8)]
        assert word_counts == [1, 2, 3, 4, *([4, 5, 6] if name == "none" else [None, None, None])]


def test_text_that_is_not_utf8_has_only_bytes(tmp_path):
    (tmp_path / "text").mkdir(parents=True)
    (tmp_path / "text" / "latin.txt").write_bytes(b"caf\xe9 au lait\n" * 9)
    index = dataset(tmp_path, BytesTokenizerConfig("bytes"), [])
    for variant in (index, without_counts(index)):
        assert size_of_text(variant, "train", 118) == TextSize(117, None, None)
        assert size_of_text(variant, "train", 30) == TextSize(30, None, None)
        assert size_of_text(variant, "train", 3) == TextSize(3, 3, 1)
