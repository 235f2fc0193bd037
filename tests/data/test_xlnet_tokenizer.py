"""XLNet's tokenizer: the authors' tokens on real text, its special pieces, and what is refused."""

import io
import json
import keyword
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_tokenizers import LINES, NASTY, TOKENIZERS, any_text
from txl_dist.config.schema import MIN_XLNET_PIECES
from txl_dist.data import tokenizers
from txl_dist.data.tokenizers import XLNetTokenizer
from txl_dist.data.tokenizers.xlnet import SPECIALS
from txl_dist.errors import UserError

TEXTS = Path(__file__).resolve().parents[2] / "../shared/data"
SPIECE = TEXTS / "xlnet" / "spiece.model"
needs_spiece = pytest.mark.skipif(not SPIECE.exists(), reason=f"the published vocabulary is not at {SPIECE}")
WORDS = [*LINES, *keyword.kwlist]
TRAINED = XLNetTokenizer.train(WORDS, 80, lower=False)


@pytest.fixture(scope="module")
def published() -> XLNetTokenizer:
    return XLNetTokenizer.open(SPIECE)


def text_of(name: str) -> str:
    path = TEXTS / name
    if not path.exists():
        pytest.skip(f"the text is not at {path}")
    return path.read_text()


def authors_tokens(pieces: sentencepiece.SentencePieceProcessor, line: str, lower: bool = False) -> list[int]:
    """Encode a line by the rules of the authors' prepro_utils.py, written out anew."""
    text = " ".join(line.strip().split()).replace("``", '"').replace("''", '"')
    text = "".join(char for char in unicodedata.normalize("NFKD", text) if unicodedata.combining(char) == 0)
    names: list[str] = []
    for piece in pieces.EncodeAsPieces(text.lower() if lower else text):
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            parts = pieces.EncodeAsPieces(piece[:-1].replace("\u2581", ""))
            if piece[0] != "\u2581" and parts[0][0] == "\u2581":
                parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
            names += [*parts, piece[-1]]
        else:
            names.append(piece)
    return [pieces.PieceToId(name) for name in names]


REAL = [
    "wikitext-2/valid.txt",
    "gutenberg/145.txt",
    "ptb/ptb.valid.txt",
    "shakespeare/input.txt",
    "squad2/dev.json",
]  # the last in one line


@needs_spiece
@pytest.mark.parametrize("name, lower", [*((name, False) for name in REAL), ("wikitext-2/valid.txt", True)])
def test_every_token_of_real_texts_is_the_authors(name, lower):
    text = text_of(name)
    tokenizer = XLNetTokenizer.open(SPIECE, lower)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SPIECE))
    expected = [token for line in text.split("\n") for token in authors_tokens(pieces, line, lower)]
    assert len(expected) > 50_000
    assert tokenizer.encode(text.encode(), True).tolist() == [*expected, 7]


@needs_spiece
@pytest.mark.parametrize("name", REAL[:4])
def test_every_line_has_the_tokens_of_hugging_face(published, name):
    transformers = pytest.importorskip("transformers")
    slow = transformers.XLNetTokenizer(str(SPIECE))
    # There "<unk>" and the like in a text are special pieces; here, and in the authors' code, they are text.
    lines = [line.strip() for line in text_of(name).split("\n") if line.strip() and "<" not in line][:2000]
    assert len(lines) > 500
    for line in lines:
        assert published.encode(line.encode(), False).tolist() == slow.encode(line, add_special_tokens=False), line


def names_of(tokenizer: XLNetTokenizer, text: str) -> list[str]:
    names: list[str] = tokenizer.pieces.id_to_piece(tokenizer.encode(text.encode(), False).tolist())
    return names


@needs_spiece
@pytest.mark.parametrize(
    "text, names",
    [
        ("in 2005, he", ["▁in", "▁2005", ",", "▁he"]),
        ("1,000, 25, 9,", ["▁1,000", ",", "▁25", ",", "▁9", ","]),
        ("  a \t house\r\n\n \u3000 \nis\x85here\n", ["▁a", "▁house", "▁is", "▁here"]),
        ("``she''", ["▁", '"', "she", '"']),
        ("café Ångström", ["▁cafe", "▁An", "g", "strom"]),
        ("e\u0301t\u00e9 ﬁne", ["▁", "ete", "▁fine"]),
        ("a <sep> b", ["▁a", "▁<", "s", "ep", ">", "▁", "b"]),
        ("end.<eop>", ["▁end", ".", "<eop>"]),
        ("日本", ["▁", "<unk>"]),
        ("", []),
        (" \n\n\t\n", []),
    ],
)
def test_the_rules_one_by_one(published, text, names):
    assert names_of(published, text) == names


def test_special_pieces_written_in_a_text_are_text():
    written = " ".join(SPECIALS) + " x"
    for tokenizer in [TRAINED, *([XLNetTokenizer.open(SPIECE)] if SPIECE.exists() else [])]:
        tokens = tokenizer.encode(written.encode(), False)
        assert set(tokens.tolist()) & set(SPECIALS.values()) <= {SPECIALS["<unk>"], SPECIALS["<eop>"]}
        assert tokens.tolist().count(SPECIALS["<eop>"]) == 1


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(any_text, min_size=1), data=st.data())
def test_pieces_that_end_at_line_ends_add_up_to_the_document(lines, data):
    document = "\n".join([*lines, NASTY]).encode()
    ends = [at + 1 for at, byte in enumerate(document) if byte == ord("\n")]
    cuts = sorted(data.draw(st.sets(st.sampled_from(ends))))
    pieces = [document[start:end] for start, end in zip([0, *cuts], [*cuts, len(document)], strict=True)]
    tokens = [TRAINED.encode(piece, False) for piece in pieces[:-1]] + [TRAINED.encode(pieces[-1], True)]
    whole = TRAINED.encode(document, True)
    assert np.concatenate(tokens).tolist() == whole.tolist()
    assert whole[-1] == TRAINED.eos and (whole[:-1] != TRAINED.eos).all() and (whole < TRAINED.vocab_size).all()
    assert whole.dtype == TRAINED.dtype


def test_a_trained_vocabulary_has_the_special_pieces_and_is_reproducible():
    assert TRAINED.model == XLNetTokenizer.train(WORDS, 80, lower=False).model
    assert (TRAINED.vocab_size, TRAINED.eos) == (80, 7)
    assert TRAINED.specials == SPECIALS == {name: TRAINED.pieces.piece_to_id(name) for name in SPECIALS}
    assert list(SPECIALS) == ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    assert list(SPECIALS.values()) == [*range(9)]
    assert all(TRAINED.pieces.is_control(token) for token in range(1, 8)) and TRAINED.pieces.is_unknown(0)
    assert TRAINED.decode(TRAINED.encode(b"the sum of a forest\n", True)) == " the sum of a forest"


def test_training_normalises_the_text_and_lower_cases_it_where_wanted():
    lines = [*WORDS, *(f"``Das GRÖSSE  HÀUS''  {number}" for number in range(100))]
    for lower in (False, True):
        tokenizer = XLNetTokenizer.train(lines, 70, lower)
        letters = "".join(tokenizer.pieces.id_to_piece([*range(70)]))
        assert ("G" in letters) == (not lower) and not set("Ö`\u0308") & set(letters)
        text = tokenizer.decode(tokenizer.encode("  GRÖSSE \t  HAS".encode(), True))
        assert text == (" grosse has" if lower else " GROSSE HAS")


def test_limits_of_training_are_named():
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=32000: .* choose (\d+) or less") as error:
        XLNetTokenizer.train(WORDS, 32000, lower=False)
    works = int(str(error.value).split(" choose ")[1].split()[0])
    assert XLNetTokenizer.train(WORDS, works, lower=False).vocab_size == works
    for text in (["hello"], [], ["  "], ["\u0301"]):
        with pytest.raises(UserError, match=f"tokenizer=xlnet: .* too short for {MIN_XLNET_PIECES} pieces"):
            XLNetTokenizer.train(text, 32000, lower=False)


@pytest.mark.parametrize("lower", [False, True])
def test_a_saved_tokenizer_comes_back(tmp_path, lower):
    tokenizer = XLNetTokenizer(TRAINED.model, lower)
    tokenizer.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "spiece.model"}
    again = tokenizers.load(tmp_path)
    assert isinstance(again, XLNetTokenizer)
    assert (again.kind, again.vocab_size, again.eos, again.lower, again.sha256) == (
        "xlnet",
        80,
        7,
        lower,
        tokenizer.sha256,
    )
    text = f"The Sea\n{NASTY}".encode()
    assert again.encode(text, True).tolist() == tokenizer.encode(text, True).tolist()


def saved(folder: Path) -> dict[str, Any]:
    TRAINED.save(folder)
    facts: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return facts


@pytest.mark.parametrize("lower", [None, 1, "false"])
def test_a_damaged_tokenizer_is_refused(tmp_path, lower):
    facts = saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts | {"lower": lower}))
    with pytest.raises(UserError, match="holds no tokenizer that can be read .*lower is .*, not true or false"):
        tokenizers.load(tmp_path)
    del facts["lower"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds no tokenizer that can be read .*lower"):
        tokenizers.load(tmp_path)
    saved(tmp_path)
    for content in (b"", TRAINED.model[:300], TOKENIZERS[2].model):  # type: ignore[attr-defined]
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(UserError, match="holds no tokenizer that can be read") as error:
            tokenizers.load(tmp_path)
        assert "\n" not in str(error.value)


OTHER = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "it has no <cls>, it has no <sep>, it has no <pad>, it has no <mask>, it has no <eod>, it has no <eop>"),
        ({"control_symbols": OTHER}, "spiece.model: is not a vocabulary of XLNet: it has no <eop>;"),
        ({"control_symbols": OTHER[1:], "user_defined_symbols": ["<eop>"]}, "no <cls>, <sep> is piece 3, not 4, <pad>"),
        ({"control_symbols": OTHER, "user_defined_symbols": ["<eop>"], "bos_id": 2, "eos_id": 1}, "<s> is piece 2"),
        ({"user_defined_symbols": [*OTHER, "<eop>"]}, "<cls> is not a control symbol, so a text could hold it, <sep>"),
    ],
    ids=["none", "no <eop>", "moved", "swapped", "in the text"],
)
def test_a_vocabulary_without_the_special_pieces_is_refused_by_name(tmp_path, options, message):
    model = io.BytesIO()
    options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(LINES), model_writer=model, **options)
    path = tmp_path / "spiece.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"tokenizer.model=.*spiece.model: .*; give an XLNet model's") as error:
        XLNetTokenizer.open(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "given.model").write_bytes(b"no model")
    for name in ("given.model", "missing.model"):
        with pytest.raises(UserError, match=rf"tokenizer.model=.*{name}: cannot be read as a SentencePiece model"):
            XLNetTokenizer.open(tmp_path / name)


@needs_spiece
def test_words_start_as_in_the_authors_code(published):
    starts = published.word_starts()
    assert starts.dtype == bool and starts.shape == (32000,)
    marks = set(list('!"#$%&"()*+,-./:;?@[\\]^_`{|}~'))
    names = published.pieces.id_to_piece([*range(32000)])
    assert starts.tolist() == [name.startswith("▁") or name.startswith("<") or name in marks for name in names]
    tokens = published.encode(b"The housekeeper's unbelievable (sea-side) story, she said.", False)
    words = [names[token] for token in tokens if starts[token]]
    assert words[:2] == ["▁The", "▁house"] and {",", ".", "(", "-", ")"} <= set(words) and "keeper" not in words


def test_word_starts_of_the_other_tokenizers():
    text = b"    the old town, 7\nx"
    for tokenizer in TOKENIZERS:
        starts = tokenizer.word_starts()
        assert starts.shape == (tokenizer.vocab_size,) and starts.dtype == bool and starts[tokenizer.eos]
        assert tokenizer.specials == {}
        tokens = tokenizer.encode(text, False)
        texts = [tokenizer.decode([token]) for token in tokens]
        words = "".join("|" * bool(starts[token]) + text for token, text in zip(tokens, texts, strict=True))
        if tokenizer.kind == "word":
            assert starts.all()
        else:
            assert "| old| town|,| " in words and "|\nx" in words and "the" in words, words
