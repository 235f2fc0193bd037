"""Labelled texts in, a dataset out: every example with its label, in the split of its row; problems name their line."""

import gzip
import json
import keyword
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txl_dist.config.checks import columns_are_named, tokenizer_fits_corpus
from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    ExamplesCorpusConfig,
    IdsTokenizerConfig,
    PrepareJob,
    SentencePieceTokenizerConfig,
    WordTokenizerConfig,
    XLNetTokenizerConfig,
)
from txl_dist.data.format import LABELLED
from txl_dist.data.index import Index
from txl_dist.data.preparing import examples, splitting
from txl_dist.data.preparing.splitting import split_of_document
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.errors import UserError
from txl_dist.prepare import prepare

SPLITS = ("train", "valid", "test")
BYTES = BytesTokenizerConfig("bytes")
SST2 = Path(__file__).resolve().parents[3] / "../shared/data/sst2"


def examples_corpus(**values: Any) -> ExamplesCorpusConfig:
    defaults: dict[str, Any] = dict.fromkeys(("path", *SPLITS, "columns", "text_pair"))
    defaults |= {"format": "auto", "text": "sentence", "label": "label", "kind": "labels"}
    return ExamplesCorpusConfig(name="examples", **{**defaults, "valid_share": 0.0, "test_share": 0.0, **values})


def prepared(folder: Path, tokenizer: Any = BYTES, workers: int = 1, sample: int = 64, **corpus: Any) -> Index:
    cut = DatasetConfig(str(folder), sample_tokens=sample, shard_samples=8)
    prepare(PrepareJob(examples_corpus(**corpus), tokenizer, cut, workers))
    return Index.open(str(folder))


def read(index: Index, split: str) -> list[tuple[Any, ...]]:
    """Return the examples of a split: the text, or both, and the label or score."""
    facts = index.splits[split]
    assert index.examples is not None and facts.examples is not None and facts.examples.dtype == LABELLED
    tokens = SampleReader(index, split).tokens(0, facts.tokens)
    tokenizer = index.tokenizer()
    found: list[tuple[Any, ...]] = []
    for document, row in zip(np.split(tokens, facts.document_starts[1:-1].astype(int)), facts.examples, strict=True):
        assert tokenizer.eos not in document
        parts = np.split(document, [row["first"]]) if index.examples.pairs else [document]
        assert index.examples.pairs or row["first"] == len(document)
        value = float(row["value"])
        label = index.examples.labels[int(value)] if index.examples.kind == "labels" else value
        found.append((*(tokenizer.decode(part) for part in parts), label))
    return found


def problems_of(tmp_path: Path, **corpus: Any) -> list[str]:
    """Return the lines of the error, after checking that nothing was written."""
    with pytest.raises(UserError) as caught:
        prepared(tmp_path / "data", **corpus)
    assert not (tmp_path / "data").exists()
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def write(tmp_path: Path, **files: str) -> None:
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_text(content, newline="")


# ------------------------------------------------------------------------------------------------------ formats

ROWS = [('a "good" film', "yes"), ("bad,  very bad", "no"), ("so so", "yes")]
FILES = {
    "a.tsv": 'id\tsentence\tlabel\r\n1\ta "good" film\tyes\r\n\r\n2\tbad,  very bad\tno\r\n3\tso so\tyes',
    "a.csv": 'label,sentence\nyes,"a ""good"" film"\n\nno,"bad,  very bad"\nyes,so so\n',
    "a.json": "".join(json.dumps({"sentence": text, "label": label, "id": [1]}) + "\n\n" for text, label in ROWS),
    "a.txt": 'yes a "good" film\nno bad,  very bad\n\nyes so so\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compress", [False, True])
def test_every_format_gives_its_examples(tmp_path, name, compress):
    path = tmp_path / (f"{name}.gz" if compress else name)
    data = b"\xef\xbb\xbf" + FILES[name].encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    options = {"format": "label_text"} if name == "a.txt" else {}
    index = prepared(tmp_path / "data", train=[str(path)], **options)
    assert read(index, "train") == ROWS
    assert index.examples is not None and index.examples.labels == ["no", "yes"] and not index.examples.pairs
    assert index.label_counts("train") == {"no": 1, "yes": 2}
    split = index.splits["train"]
    assert (split.documents, split.bytes) == (3, sum(len(text) for text, _ in ROWS))


def test_pairs_scores_and_columns_by_name(tmp_path):
    write(tmp_path, a_csv='0.5,"first\r\ntext",the second\n-2e3,x,y z\n')
    columns = {"columns": ["score", "one", "two"], "text": "one", "text_pair": "two", "label": "score"}
    index = prepared(tmp_path / "data", train=[str(tmp_path / "a.csv")], kind="scores", **columns)
    assert index.examples is not None and (index.examples.labels, index.examples.pairs) == ([], True)
    assert read(index, "train") == [("first  text", "the second", 0.5), ("x", "y z", -2000.0)]


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path):
    write(tmp_path, a_json="".join(json.dumps({"sentence": "x", "label": n}) + "\n" for n in (10, 2, -1, 2.5, 10)))
    index = prepared(tmp_path / "data", train=[str(tmp_path / "a.json")])
    assert index.examples is not None and index.examples.labels == ["-1", "2", "2.5", "10"]
    write(tmp_path, a_json="".join(json.dumps({"sentence": "x", "label": n}) + "\n" for n in ("10", "2", "b", True)))
    index = prepared(tmp_path / "other", train=[str(tmp_path / "a.json")])
    assert index.examples is not None and index.examples.labels == ["10", "2", "b", "true"]


# ------------------------------------------------------------------------------------------------------- splits


def test_the_split_of_an_example_is_its_file_and_number_alone(tmp_path, monkeypatch):
    rows = [(f"text {number}", str(number % 2)) for number in range(200)]
    content = {}
    for place, workers in (("one", 1), ("two", 2)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.tsv").write_text("sentence\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows))
        shares = {"valid_share": 0.2, "test_share": 0.1}
        index = prepared(tmp_path / f"{place}-data", workers=workers, path=[str(tmp_path / place)], **shares)
        expected: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
        for number, row in enumerate(rows):
            expected[split_of_document("a.tsv", number, (0.2, 0.1))].append(row)
        assert {split: read(index, split) for split in SPLITS} == expected
        files = (path for path in (tmp_path / f"{place}-data").rglob("*") if path.is_file())
        content[place] = {path.name: path.read_bytes() for path in files}
        monkeypatch.setattr(splitting, "PIECE_BYTES", 100)
    assert content["one"] == content["two"]


# --------------------------------------------------------------------------------------------------- tokenizers

WORDS = "".join(f"{n % 3}\tthe {word} number {n} is good\n" for n, word in enumerate(keyword.kwlist * 2))
OPTIONS: dict[str, Any] = {"columns": ["label", "sentence"]}
TRAINED = {
    "word": (WordTokenizerConfig("word", None, 1, None), "vocab.txt"),
    "sentencepiece": (SentencePieceTokenizerConfig("sentencepiece", 305, "bpe", None), "sentencepiece.model"),
    "xlnet": (XLNetTokenizerConfig("xlnet", 64, True, None), "spiece.model"),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_tokenizer_that_is_given_again_is_the_same_files(tmp_path, kind):
    """So a dataset can be made with the tokenizer of a pretrained run, whose files `run.init_from` compares."""
    write(tmp_path, train_tsv=WORDS, valid_tsv="1\tunseen words\n")
    config, file = TRAINED[kind]
    paths = {split: [str(tmp_path / f"{split}.tsv")] for split in ("train", "valid")}
    index = prepared(tmp_path / "data", config, **paths, **OPTIONS)
    assert kind != "word" or "unseen" not in (tmp_path / "data" / "tokenizer" / file).read_text().split()
    given = str(tmp_path / "data" / "tokenizer" / file)
    key = "vocab" if kind == "word" else "model"
    other = prepared(tmp_path / "other", type(config)(**{**vars(config), key: given}), **paths, **OPTIONS)
    assert other.tokenizer_files == index.tokenizer_files and other.fingerprint == index.fingerprint


def test_a_line_break_ends_no_example_and_is_no_eos(tmp_path):
    write(tmp_path, a_csv='sentence,label\n"one\ntwo",a\nthree,b\n')
    index = prepared(tmp_path / "data", WordTokenizerConfig("word", None, 1, None), train=[str(tmp_path / "a.csv")])
    assert read(index, "train") == [("one two", "a"), ("three", "b")] and index.splits["train"].tokens == 3


# ----------------------------------------------------------------------------------------------------- problems

BAD = {
    "short row": ("a.tsv", "sentence\tlabel\nx\ta\ny\n", r"a.tsv: line 3: has 1 column, not 2 as line 1 has"),
    "long row": ("a.csv", 'sentence,label\n"x\ny",a\nz,b,c\n', r"a.csv: line 4: has 3 columns, not 2 as line 1"),
    "empty text": ("a.tsv", "sentence\tlabel\n  \ta\nx\tb\n", r"a.tsv: line 2: 'sentence' \(corpus.text\) is an empty"),
    "empty label": ("a.tsv", "sentence\tlabel\nx\t\ny\tb\n", r"a.tsv: line 2: 'label' \(corpus.label\) is an empty"),
    "no column": ("a.tsv", "text\tlabel\nx\ta\n", r"line 1: has no 'sentence' \(corpus.text\), but 'text', 'label'; "),
    "no label": ("a.tsv", "sentence\tx\nx\ta\n", r"line 1: has no 'label' \(corpus.label\), .* the name of one; where"),
    "twice": ("a.tsv", "sentence\tlabel\tlabel\nx\ta\tb\n", r"line 1: has the column 'label' \(corpus.label\) twice"),
    "quote": (
        "a.csv",
        'sentence,label\nx,a\n"y,b\nz,c\n',
        r"a.csv: line 3: is not CSV \(unexpected end of data\);",
    ),
    "not UTF-8": ("a.tsv", "sentence\tlabel\nx\ta\n\udcff\tb\n", r"a.tsv: line 3: is not UTF-8 \(invalid start byte\)"),
    "one class": (
        "a.tsv",
        "sentence\tlabel\nx\ta\ny\ta\n",
        r"^corpus.label=label: all examples of train have the",
    ),
    "header only": ("a.tsv", "sentence\tlabel\n", r"^corpus.train: the files are empty; give others"),
    "no JSON": ("a.json", '{"sentence": "x", "label": 1}\n{"sent\n', r"a.json: line 2: is not JSON \(.*one object per"),
    "no object": ("a.jsonl", "[1]\n", r"a.jsonl: line 1: is not an object, but \[1\]"),
    "no key": ("a.jsonl", '{"label": 1}\n', r"a.jsonl: line 1: has no 'sentence' \(corpus.text\), but 'label'"),
    "no text": ("a.jsonl", '{"sentence": 3, "label": 1}\n', r"line 1: 'sentence' \(corpus.text\) is 3, not a text"),
    "null": ("a.jsonl", '{"sentence": "x", "label": null}\n', r"'label' \(corpus.label\) is None, not a text or a num"),
    "surrogate": ("a.jsonl", '{"sentence": "\\ud800", "label": 1}\n', r"line 1: 'sentence' .* half of a surrogate"),
    "label": ("a.jsonl", '{"sentence": "x", "label": "\\ud800"}\n', r"line 1: 'label' .* half of a surrogate"),
    "name": ("a.txt", "1 x\n", r"a.txt: its name says no format of examples; give corpus.format=tsv"),
}


@pytest.mark.parametrize("name, content, expected", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    (line,) = problems_of(tmp_path, train=[str(tmp_path / name)])
    assert re.search(expected, line), line


def test_a_missing_pair_column_and_scores_that_are_none(tmp_path):
    write(tmp_path, a_tsv="sentence\tlabel\nx\t1\n", b_json='{"sentence": "x", "pair": "", "label": 1}\n')
    (line,) = problems_of(tmp_path, train=[str(tmp_path / "a.tsv")], text_pair="pair")
    assert line.startswith("a.tsv: line 1: has no 'pair' (corpus.text_pair), but 'sentence', 'label'")
    (line,) = problems_of(tmp_path, train=[str(tmp_path / "b.json")], text_pair="pair")
    assert line == "b.json: line 1: 'pair' (corpus.text_pair) is an empty text; mend it, or leave it out"
    write(tmp_path, a_tsv="sentence\tlabel\nx\t1\ny\tnan\nz\tgood\n")
    lines = problems_of(tmp_path, train=[str(tmp_path / "a.tsv")], kind="scores")
    assert [line.split("; ")[0] for line in lines] == [
        "a.tsv: line 3: 'label' (corpus.label) is 'nan', not a finite number",
        "a.tsv: line 4: 'label' (corpus.label) is 'good', not a finite number",
    ]


def test_a_label_that_train_lacks_and_files_without_labels(tmp_path):
    write(tmp_path, train_tsv="sentence\tlabel\nx\ta\n\tb\n", valid_tsv="sentence\tlabel\nx\ta\ny\tc\nz\tc\n")
    write(tmp_path, test_tsv="index\tsentence\n1\tx\n")
    lines = problems_of(tmp_path, **{split: [str(tmp_path / f"{split}.tsv")] for split in SPLITS})
    assert lines == [
        "train.tsv: line 3: 'sentence' (corpus.text) is an empty text; mend it, or leave it out",
        "test.tsv: line 1: has no 'label' (corpus.label), but 'index', 'sentence'; the examples are not labelled, and "
        "cannot be scored: leave out corpus.test, or label them; where the first line is no header, give "
        "corpus.columns",
        "valid.tsv: line 3: the label 'c' is not one of train; mend it, or give examples of it to train",
    ]


def test_ten_problems_are_named_and_the_others_counted(tmp_path):
    write(tmp_path, a_tsv="sentence\tlabel\n" + "\ta\n" * 25)
    lines = problems_of(tmp_path, train=[str(tmp_path / "a.tsv")])
    assert len(lines) == 11 and lines[9].startswith("a.tsv: line 11: ") and lines[10] == "(and 15 more likewise)"


def test_a_text_without_a_token_is_named(tmp_path):
    write(tmp_path, train_tsv=WORDS, valid_tsv="1\t\u0301\n")
    paths = {split: [str(tmp_path / f"{split}.tsv")] for split in ("train", "valid")}
    with pytest.raises(UserError, match=r"valid.tsv: line 1: the text '\u0301' has no token of tokenizer=xlnet"):
        prepared(tmp_path / "data", TRAINED["xlnet"][0], **paths, **OPTIONS)
    assert not (tmp_path / "data").exists()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"columns": ["text", "label"]}, r"corpus.text=sentence: is not among corpus.columns"),
    ({"columns": ["sentence", "label", "label"]}, "names a column twice"),
    ({"columns": ["sentence", "label"], "format": "jsonl"}, "corpus.columns: is for tsv and csv"),
    ({"text_pair": "other", "format": "label_text"}, "corpus.text_pair=other: corpus.format=label_text has one text"),
    ({"text_pair": "sentence"}, "corpus.text=sentence, corpus.text_pair=sentence, .*: name one column twice"),
]


@pytest.mark.parametrize("values, expected", CONFIGS)
def test_keys_that_do_not_fit_together(values, expected):
    (problem,) = columns_are_named(examples_corpus(**values))
    assert re.search(expected, problem), problem
    assert not list(columns_are_named(examples_corpus(columns=["label", "sentence"])))


def test_numbers_are_no_tokens_of_texts():
    (problem,) = tokenizer_fits_corpus(examples_corpus(), IdsTokenizerConfig("ids", 5, None))
    assert "corpus=examples is text" in problem


def test_another_file_is_another_dataset_and_the_same_one_is_there(tmp_path, capsys):
    write(tmp_path, a_tsv="sentence\tlabel\nx\ta\ny\tb\n")
    prepared(tmp_path / "data", train=[str(tmp_path / "a.tsv")])
    out = capsys.readouterr().out
    assert "examples" in out and "bytes" not in out and "Next: torchrun --nproc_per_node=2 -m txl_dist.train" in out
    assert f"+experiment=sst2 data.dir={tmp_path}/data" in out
    prepared(tmp_path / "data", train=[str(tmp_path / "a.tsv")])
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another dataset"):
        prepared(tmp_path / "data", train=[str(tmp_path / "a.tsv")], kind="labels", format="tsv")


@pytest.mark.parametrize("content", ["sentence\tlabel\nx\ta\n\tb\n", "sentence\tlabel\nx\ta\ny\tc\n"])
def test_a_file_that_has_changed_since_it_was_looked_at(tmp_path, content):
    write(tmp_path, a_tsv="sentence\tlabel\nx\ta\ny\tb\n")
    BytesTokenizer().save(tmp_path / "tokenizer")
    plan = examples.survey(examples_corpus(train=[str(tmp_path / "a.tsv")]), lambda size: None)
    write(tmp_path, a_tsv=content)
    with pytest.raises(UserError, match=r"a.tsv: changed while it was read; start again"):
        examples.encode_examples(tmp_path / "tokenizer", plan.entry, list(plan.examples()))


@pytest.mark.skipif(not SST2.exists(), reason=f"the sentences are not at {SST2}")
def test_sst2(tmp_path):
    paths = {split: [str(SST2 / f"{name}.txt")] for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True)}
    index = prepared(tmp_path / "data", sample=8192, format="label_text", **paths)
    assert [index.splits[split].documents for split in SPLITS] == [6920, 872, 1821]
    assert index.label_counts("valid") == {"0": 428, "1": 444}
    assert read(index, "valid")[0] == ("one long string of cliches .", "0")
