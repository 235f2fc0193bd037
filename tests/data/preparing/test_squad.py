"""Questions about passages in, a dataset out: the tokens of each answer are its characters; wrong ones are named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    PrepareJob,
    SentencePieceTokenizerConfig,
    SquadCorpusConfig,
    WordTokenizerConfig,
    XLNetTokenizerConfig,
)
from txl_dist.data.format import ANSWERED, Examples
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.errors import UserError
from txl_dist.prepare import prepare

SPLITS = ("train", "valid", "test")
SQUAD2 = Path(__file__).resolve().parents[3] / "../shared/data/squad2/dev.json"
TOKENIZERS: dict[str, Any] = {
    "bytes": BytesTokenizerConfig("bytes"),
    "word": WordTokenizerConfig("word", None, 1, None),
    "sentencepiece": SentencePieceTokenizerConfig("sentencepiece", 310, "bpe", None),
    "xlnet": XLNetTokenizerConfig("xlnet", 64, False, None),
}


def squad_corpus(**values: Any) -> SquadCorpusConfig:
    defaults: dict[str, Any] = dict.fromkeys(("path", *SPLITS)) | {"valid_share": 0.0, "test_share": 0.0}
    return SquadCorpusConfig(name="squad", **{**defaults, **values})


def prepared(
    folder: Path, tokenizer: Any = TOKENIZERS["bytes"], workers: int = 1, sample: int = 64, **corpus: Any
) -> Index:
    cut = DatasetConfig(str(folder), sample_tokens=sample, shard_samples=8)
    prepare(PrepareJob(squad_corpus(**corpus), tokenizer, cut, workers))
    return Index.open(str(folder))


CONTEXT = "Café  Wörld\nopened in 2005, by «Ada»; the    quick brown fox jumped over 12 lazy dogs."


def question(number: int, text: str | None, start: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a question whose answer, if any, is the first `text` of CONTEXT."""
    answers = [] if text is None else [{"text": text, "answer_start": CONTEXT.find(text) if start is None else start}]
    return {"id": f"q{number}", "question": f"what\nis {number}?", "answers": answers, **more}


def article(*questions: dict[str, Any], title: str = "An article", context: str = CONTEXT) -> dict[str, Any]:
    return {"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}


def write(path: Path, *articles: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": "x", "data": list(articles)}))
    return path


ANSWERS = ["Café", "Wörld\nopened", "2005", "2005, by", "Ada", "«Ada»", " fox ", "k br", CONTEXT, "dogs."]
# The words of CONTEXT that each answer overlaps.
WORDS = ["Café", "Wörld opened", "2005,", "2005, by", "«Ada»;", "«Ada»;", "fox", "quick brown", None, "dogs."]


def check_answers(index: Index, name: str) -> int:
    """Check every example of a split against its text; return how many are answered."""
    split = index.splits[name]
    assert split.examples is not None and split.examples.dtype == ANSWERED
    tokenizer = index.tokenizer()
    tokens = SampleReader(index, name).tokens(0, split.tokens)
    documents = iter(zip(np.split(tokens, split.document_starts[1:-1].astype(int)), split.examples, strict=True))
    answered = 0
    for paragraph in index.paragraphs(name):
        passage, offsets = tokenizer.encode_with_offsets(paragraph.context)
        for asked in paragraph.questions:
            document, row = next(documents)
            assert document[: row["first"]].tolist() == passage.tolist()
            assert document[row["first"] :].tolist() == tokenizer.encode(asked.question.encode(), False).tolist()
            if not asked.answers:
                assert (row["start"], row["end"]) == (-1, -1)
                continue
            first = offsets[row["start"]]
            last = offsets[row["end"]]
            text = paragraph.context[first[0] : last[1]]
            answer = asked.answers[0].strip()
            assert answer in text and (tokenizer.kind != "bytes" or answer == text)
            assert answer not in paragraph.context[first[1] : last[1]]
            assert answer not in paragraph.context[first[0] : last[0]]
            answered += 1
    assert next(documents, None) is None
    return answered


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_answers_are_their_tokens(tmp_path, tokenizer):
    asked = [question(number, text) for number, text in enumerate(ANSWERS)]
    asked.append(question(20, None, is_impossible=True))
    more = article(question(30, None), context=" ".join(f"w{number} {chr(97 + number)}é" for number in range(26)))
    path = write(tmp_path / "train.json", article(*asked), {"title": "none", "paragraphs": []}, more)
    index = prepared(tmp_path / "data", TOKENIZERS[tokenizer], train=[str(path)])
    assert index.examples == Examples(kind="answers", labels=[], pairs=True)
    assert check_answers(index, "train") == len(ANSWERS)
    assert index.label_counts("train") == {"answered": len(ANSWERS), "not answered": 2}
    first = index.paragraphs("train")[0]
    assert first.context == CONTEXT.replace("\n", " ") and first.questions[1].answers == ["Wörld opened"]
    if tokenizer == "word":
        rows = index.splits["train"].examples[: len(ANSWERS)]
        words = CONTEXT.split()
        spans = [" ".join(words[row["start"] : row["end"] + 1]) for row in rows]
        assert spans == [expected or " ".join(words) for expected in WORDS]


def test_articles_stay_together_and_nothing_depends_on_workers(tmp_path):
    articles = [
        article(
            *(question(10 * number + n, "fox") for n in range(3)), title=f"t{number}", context=f"{CONTEXT} {number}"
        )
        for number in range(12)
    ]
    path = write(tmp_path / "all.json", *articles)
    for name, workers in (("one", 1), ("two", 2)):
        index = prepared(tmp_path / name, workers=workers, path=[str(path)], valid_share=0.2, test_share=0.05)
        assert [index.splits[split].documents for split in SPLITS] == [27, 6, 3]
        found = [paragraph.context for split in SPLITS for paragraph in index.paragraphs(split)]
        assert sorted(found) == sorted(one["paragraphs"][0]["context"].replace("\n", " ") for one in articles)
    assert (tmp_path / "one" / "index.json").read_bytes() == (tmp_path / "two" / "index.json").read_bytes()


def test_the_last_line_suggests_the_recipe(tmp_path, capsys):
    prepared(tmp_path / "data", train=[str(write(tmp_path / "a.json", article(question(1, "fox"))))])
    assert f"+experiment=squad2 data.dir={tmp_path}/data" in capsys.readouterr().out


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "elsewhere": (
        [question(1, "fox", 3)],
        "question 'q1': the answer 'fox' is not at character 3 of its passage, but at character 57; correct its "
        "answer_start",
    ),
    "often": (
        [question(1, "o", 0)],
        "the answer 'o' is not at character 0 of its passage, but elsewhere 5 times; ",
    ),
    "nowhere": ([question(1, "cat", 0)], "the answer 'cat' is not at character 0 of its passage, nor elsewhere in it"),
    "behind": ([question(1, "fox", 999)], "the answer 'fox' is not at character 999 of its passage, but at"),
    "second": (
        [{**question(1, "fox"), "answers": [*question(1, "fox")["answers"], {"text": "Ada", "answer_start": 1}]}],
        "the answer 'Ada' is not at character 1 of its passage",
    ),
    "blank": ([question(1, " ")], "the answer ' ' is an empty text"),
    "no question": (
        [{**question(1, "fox"), "question": " \n"}],
        "article 'An article', question 'q1': is an empty",
    ),
    "twice": ([question(1, "fox"), question(1, "Ada")], "question 'q1': has the id of another, in a.json: article 'An"),
    "contradiction": ([question(1, "fox", is_impossible=True)], "is_impossible is true, but it has answers"),
    "no answer": ([question(1, None, is_impossible=False)], "has no answer, but is_impossible is false"),
    "structure": (
        [{"id": "q1", "answers": []}],
        "a.json: is not the JSON of SQuAD (data.0.paragraphs.0.qas.0.question=",
    ),
    "start": (
        [question(1, "fox", -1)],
        "SQuAD (data.0.paragraphs.0.qas.0.answers.0.answer_start=-1",
    ),
}


@pytest.mark.parametrize("questions, expected", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, questions, expected):
    path = write(tmp_path / "a.json", article(*questions))
    with pytest.raises(UserError) as caught:
        prepared(tmp_path / "data", train=[str(path)])
    (line,) = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert line.startswith("a.json: ") and expected in line, line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"data": [', r"is not the JSON of SQuAD \(.*EOF"),
        (b"\xff", "is not the JSON of SQuAD"),
        (b'{"data": []}', r"corpus.train: the files are empty"),
        (
            json.dumps({"data": [article(question(1, None), context=" ")]}).encode(),
            "article 'An article': a passage is an empty text",
        ),
    ],
)
def test_other_files(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        prepared(tmp_path / "data", train=[str(tmp_path / "a.json")])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "context, text, expected",
    [
        ("\u0301 b", "\u0301", "question 'q1': the answer '\u0301' has no token of tokenizer=xlnet"),
        ("\u0301", None, "the text '\u0301' has no token of tokenizer=xlnet"),
    ],
)
def test_what_has_no_token_is_named(tmp_path, context, text, expected):
    train = write(tmp_path / "a.json", article(*(question(number, None) for number in range(20, 30))))
    answers = [] if text is None else [{"text": text, "answer_start": 0}]
    valid = write(tmp_path / "b.json", article({"id": "q1", "question": "what?", "answers": answers}, context=context))
    with pytest.raises(UserError, match=rf"b.json: .*{expected}"):
        prepared(tmp_path / "data", TOKENIZERS["xlnet"], train=[str(train)], valid=[str(valid)])
    assert not (tmp_path / "data").exists()


def test_too_few_articles_to_split(tmp_path):
    path = write(tmp_path / "a.json", article(question(1, "fox")))
    with pytest.raises(UserError, match=r"corpus: 1 documents are too few to split .* give more articles, or set"):
        prepared(tmp_path / "data", path=[str(path)], valid_share=0.1)


@pytest.mark.skipif(not SQUAD2.exists(), reason=f"the questions are not at {SQUAD2}")
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_squad2(tmp_path, tokenizer):
    config = TOKENIZERS[tokenizer]
    config = replace(config, vocab_size=1000) if tokenizer in ("sentencepiece", "xlnet") else config
    shares = {"valid_share": 0.05, "test_share": 0.05}
    index = prepared(tmp_path / "data", config, sample=1 << 16, path=[str(SQUAD2)], **shares)
    assert sum(split.documents for split in index.splits.values()) == 6078
    assert sum(check_answers(index, split) for split in SPLITS) == 2910
