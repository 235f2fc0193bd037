"""Lines are sentences where a blank line ends a document, and for XLNet; the dataset keeps where they start."""

import json
import keyword
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.test_prepare import TOKENIZERS, content, text_job, texts
from txl_dist.config.schema import XLNetTokenizerConfig
from txl_dist.data.index import Index
from txl_dist.data.preparing import splitting
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import XLNetTokenizer
from txl_dist.prepare import prepare

REPO = Path(__file__).resolve().parents[3]
KEYWORDS = " ".join(keyword.kwlist)
BOOK = (
    "\n \nThe first sentence.\nA second one, of 1805, here.\n\n\nAnother document.\n \t\nThe third\u0301 document\n"
    f"has  two\u2003lines.\r\n\u3000\n{KEYWORDS}\n"
)
DOCUMENTS = [  # of BOOK, with their sentences as XLNet's tokenizer gives them back
    ["The first sentence.", "A second one, of 1805, here."],
    ["Another document."],
    ["The third document", "has two lines."],
    [KEYWORDS],
]


@pytest.fixture(autouse=True)
def xlnet(monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "xlnet", XLNetTokenizerConfig("xlnet", 64, False, None))


def sentences_of(folder: Path, split: str = "train") -> list[list[str]]:
    """Decode the sentences of each document."""
    index = Index.open(str(folder))
    tokenizer = index.tokenizer()
    reader = SampleReader(index, split)
    entry = index.splits[split]
    assert entry.sentence_starts is not None and entry.sentence_starts.dtype == "<u8"
    starts = [*entry.sentence_starts.tolist(), entry.tokens]
    documents: list[list[str]] = []
    for start, end in pairwise(starts):
        if start in entry.document_starts:
            documents.append([])
        documents[-1].append(tokenizer.decode(reader.tokens(start, end - start)))
    assert len(documents) == entry.documents
    return documents


@pytest.mark.parametrize("number", [1, 2])
def test_sentences_and_documents_come_from_the_command_line_into_the_index(tmp_path, number):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(BOOK * 5)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "txl_dist.prepare", "corpus=text", "tokenizer=xlnet", f"workers={number}"]
    given = ["tokenizer.vocab_size=64", "corpus.document=blank_line", f"corpus.train={tmp_path}/train.txt"]
    rest = [f"corpus.valid={tmp_path}/valid.txt", f"data.dir={tmp_path}/data"]
    done = subprocess.run([*command, *given, *rest], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        assert sentences_of(tmp_path / "data", split) == [[f" {text}" for text in texts] for texts in DOCUMENTS] * 5
    index = Index.open(str(tmp_path / "data"))
    tokenizer = index.tokenizer()
    assert isinstance(tokenizer, XLNetTokenizer) and (index.eos, index.vocab_size) == (7, 64)
    assert index.splits["train"].bytes == len(BOOK.encode()) * 5
    reader = SampleReader(index, "train")
    ends = index.splits["train"].document_starts[1:].tolist()
    assert all(reader.tokens(end - 1, 1)[0] == 7 for end in ends)  # <eod>, at the end of the last sentence


@pytest.mark.parametrize("tokenizer", ["bytes", "word", "unigram"])
def test_other_tokenizers_have_sentences_where_blank_lines_end_documents(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(BOOK * 40)
    prepare(text_job(tmp_path / "data", tokenizer, train=str(tmp_path / "a.txt"), document="blank_line"))
    documents = sentences_of(tmp_path / "data")
    joined = ["".join(sentences) for sentences in documents]
    if tokenizer == "word":
        assert joined[0] == "\n\nThe first sentence.\nA second one, of 1805, here.\n\n\n"
    else:
        assert "".join(joined) == BOOK * 40
    # The blank lines at the beginning are a sentence of their own where they have tokens.
    assert [len(sentences) for sentences in documents] == [3, 1, 2, *[1, 2, 1, 2] * 39, 1]
    assert documents[2] == documents[6] and documents[2][0] == "The third\u0301 document\n"


def test_lines_are_sentences_for_xlnet_whatever_a_document_is(tmp_path):
    (tmp_path / "a.txt").write_text(BOOK * 40)
    for document in ("file", "line"):
        prepare(text_job(tmp_path / document, "xlnet", train=str(tmp_path / "a.txt"), document=document))
    [sentences] = sentences_of(tmp_path / "file")
    assert sentences == [f" {text}" for texts in DOCUMENTS for text in texts] * 40
    lines = sentences_of(tmp_path / "line")
    assert all(len(document) == 1 for document in lines) and len(lines) == (BOOK * 40).count("\n")
    assert [document[0] for document in lines if document[0]] == sentences


def test_a_line_whose_only_token_is_the_end_of_the_document_is_no_sentence(tmp_path):
    (tmp_path / "a.txt").write_text(f"{BOOK * 5}\u0301\n\nThe first\n\u0301")  # accents alone have no tokens
    prepare(text_job(tmp_path / "data", "xlnet", train=str(tmp_path / "a.txt"), document="blank_line"))
    documents = sentences_of(tmp_path / "data")
    assert documents[-2:] == [[f" {KEYWORDS}"], [" The first"]] and len(documents) == 21


@pytest.mark.parametrize("tokenizer", ["bytes", "word"])
@pytest.mark.parametrize("document", ["file", "line"])
def test_other_datasets_have_no_sentences(tmp_path, tokenizer, document):
    (tmp_path / "a.txt").write_text(BOOK)
    prepare(text_job(tmp_path / "data", tokenizer, train=str(tmp_path / "a.txt"), document=document))
    assert Index.open(str(tmp_path / "data")).splits["train"].sentence_starts is None
    assert not list((tmp_path / "data").rglob("sentences.npy"))


@pytest.mark.parametrize("tokenizer", ["bytes", "xlnet"])
@pytest.mark.parametrize("document", ["file", "line", "blank_line"])
def test_sentences_do_not_depend_on_pieces_or_workers(tmp_path, monkeypatch, tokenizer, document):
    tokenizer_of_lines = XLNetTokenizer.train([*BOOK.split("\n"), *KEYWORDS.split()], 64, lower=False)
    tokenizer_of_lines.save(tmp_path / "given")  # given, because a line that is cut is learned from as two
    config = XLNetTokenizerConfig("xlnet", 64, False, str(tmp_path / "given" / "spiece.model"))
    monkeypatch.setitem(TOKENIZERS, "xlnet", config)
    folder = texts(tmp_path / "text")
    (folder / "long.txt").write_text(f"{BOOK}{'many words in one line ' * 40}\n\n{BOOK}")
    job: dict[str, Any] = {"path": str(folder), "document": document, "split_by": "document"}
    prepare(text_job(tmp_path / "one", tokenizer, **job))
    for number, workers in ((61, 1), (100, 2)):
        monkeypatch.setattr(splitting, "PIECE_BYTES", number)
        prepare(text_job(tmp_path / str(number), tokenizer, workers, **job))
        assert content(tmp_path / "one") == content(tmp_path / str(number))
    assert ("train/sentences.npy" in content(tmp_path / "one")) == (tokenizer == "xlnet" or document == "blank_line")


def test_documents_between_blank_lines_go_to_splits_each_as_a_whole(tmp_path):
    documents = [f"document {number}\nits second line\n\n" for number in range(300)]
    (tmp_path / "a.txt").write_text("".join(documents))
    prepare(text_job(tmp_path / "data", path=str(tmp_path / "a.txt"), document="blank_line"))
    index = Index.open(str(tmp_path / "data"))
    found: dict[str, list[str]] = {}
    for split in index.splits:
        found[split] = ["".join(sentences) for sentences in sentences_of(tmp_path / "data", split)]
    assert sorted(text for texts in found.values() for text in texts) == sorted(documents)
    assert 10 < len(found["valid"]) < 60 and 10 < len(found["test"]) < 60
    assert found["train"] == [text for text in documents if text in set(found["train"])]


def test_the_fingerprint_names_the_sentences(tmp_path):
    """The same tokens and other sentences are another dataset: a run reads other segments from it."""
    fingerprints = {}
    for name, text in {"one": "the sea and the house\n", "two": "the sea\nand the house\n"}.items():
        (tmp_path / f"{name}.txt").write_text(BOOK * 20)
        (tmp_path / f"{name}.valid").write_text(text)
        job = {"train": str(tmp_path / f"{name}.txt"), "valid": str(tmp_path / f"{name}.valid")}
        prepare(text_job(tmp_path / name, "xlnet", **job, document="blank_line"))
        index = json.loads((tmp_path / name / "index.json").read_text())
        fingerprints[name] = (index["fingerprint"], [shard["sha256"] for shard in index["splits"]["valid"]["shards"]])
    assert fingerprints["one"][1] == fingerprints["two"][1]
    assert fingerprints["one"][0] != fingerprints["two"][0]


@given(
    lines=st.lists(st.sampled_from(["a", "b c", "", " ", "\t", "\u2003", "d\r", "\r"]), max_size=20),
    cuts=st.sets(st.integers(1, 20)),
    ended=st.booleans(),
)
@example(lines=["", "a", "", "", "b"], cuts={3}, ended=False)
@example(lines=["", "a", "", "", "b"], cuts={4}, ended=True)
def test_documents_end_behind_their_blank_lines_wherever_the_text_is_cut(lines, cuts, ended):
    whole = [f"{line}\n" for line in lines]
    if whole and lines[-1] and not ended:
        whole[-1] = lines[-1]
    blank = [line.isspace() for line in whole]
    starts = [at for at in range(1, len(lines)) if blank[at - 1] and not blank[at] and not all(blank[:at])]
    expected = ["".join(whole[start:end]) for start, end in pairwise([0, *starts, len(lines)])] if lines else []

    ends = [0, *sorted(cut for cut in cuts if cut < len(lines)), len(lines)]
    parts = ["".join(whole[start:end]).encode() for start, end in pairwise(ends)]
    documents = [""]
    for part, last in splitting.cut_at_blank_lines(parts):
        documents[-1] += part.decode()
        documents += [""] * last
    assert documents == [*expected, ""]


def test_a_long_line_of_spaces_is_one_blank_line_and_a_long_line_no_document():
    parts = [b"one\n", b"     ", b"   \n", b"two   ", b"    ", b"  \n", b"three\n"]
    assert list(splitting.cut_at_blank_lines(parts)) == [
        (b"one\n", False),
        (b"     ", False),
        (b"   \n", True),
        (b"two   ", False),
        (b"    ", False),
        (b"  \n", False),
        (b"three\n", True),
    ]
