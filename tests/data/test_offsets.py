"""Every token says which characters it was made of, and is the token that `encode` gives."""

import keyword
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.test_tokenizers import LINES, NASTY, TOKENIZERS
from txl_dist.data.tokenizers import IdsTokenizer, SentencePieceTokenizer, Tokenizer, XLNetTokenizer
from txl_dist.data.tokenizers.xlnet import normalise, normalise_with_offsets

TEXTS = Path(__file__).resolve().parents[2] / "../shared/data"
SPIECE = TEXTS / "xlnet" / "spiece.model"
WORDS = [*LINES, *keyword.kwlist]
ALL: dict[str, Tokenizer] = {
    **dict(zip(["bytes", "word", "unigram", "bpe"], TOKENIZERS, strict=True)),
    "xlnet": XLNetTokenizer.train(WORDS, 80, lower=False),
    "xlnet-lower": XLNetTokenizer.train(WORDS, 80, lower=True),
}
if SPIECE.exists():
    ALL["published"] = XLNetTokenizer.open(SPIECE)
    ALL["given"] = SentencePieceTokenizer(SPIECE.read_bytes())  # has a normalisation of its own, and no bytes
every_tokenizer = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
any_text = st.text(
    st.one_of(st.sampled_from(" \n\t\r\u2581a1,`'\x00é\u0301日\u3000İΣ¨ﬁ"), st.characters(codec="utf-8"))
)


def checked_offsets(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Return the spans of the tokens of a text, after checking what holds for all tokenizers."""
    tokens, spans = tokenizer.encode_with_offsets(text)
    assert tokens.tolist() == tokenizer.encode(text.encode(), end=False).tolist() and tokens.dtype == tokenizer.dtype
    assert spans.shape == (len(tokens), 2) and spans.dtype == np.int64
    assert (spans >= 0).all() and (spans <= len(text)).all() and (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:] >= spans[:-1]).all()
    return spans.tolist()


@every_tokenizer
@given(text=any_text)
@example(text=NASTY)
@example(text="")
def test_the_tokens_are_those_of_encode_and_lose_only_what_is_blank_or_a_mark(tokenizer, text):
    covered = {position for begin, end in checked_offsets(tokenizer, text) for position in range(begin, end)}
    lost = [text[position] for position in set(range(len(text))) - covered]
    exact = tokenizer.token_bytes() is not None
    assert not lost or not exact, lost
    if tokenizer.kind == "word":
        assert all(character.isspace() for character in lost)


@every_tokenizer
@pytest.mark.parametrize("name", ["wikitext-2/valid.txt", "gutenberg/145.txt", "squad2/dev.json"])
def test_real_texts(tokenizer, name):
    path = TEXTS / name
    if not path.exists():
        pytest.skip(f"the text is not at {path}")
    assert len(checked_offsets(tokenizer, path.read_text()[:60_000])) > 4_000


TEXT = "In 2005, the  sea\nof ``café'' 日本: 12,"
SPANS = {
    "word": "In|2005,|the|sea|\n|of|``café''|日本:|12,",
    "bytes": "|".join(character for character in TEXT for _ in character.encode()),
    "published": "In| 2005|,| the|  sea|of| |``|ca|fe\u0301|''| |日本|:| 12|,",
}


@pytest.mark.parametrize("name", SPANS)
def test_each_token_has_its_characters(name):
    if name not in ALL:
        pytest.skip(f"the published vocabulary is not at {SPIECE}")
    text = TEXT.replace("é", "e\u0301") if name == "published" else TEXT
    assert [text[begin:end] for begin, end in checked_offsets(ALL[name], text)] == SPANS[name].split("|")


@pytest.mark.parametrize("name", ["unigram", "bpe"])
def test_the_pieces_of_a_model_that_loses_nothing_are_the_text(name):
    spans = checked_offsets(ALL[name], NASTY)
    parts = [text for (begin, _), text in zip(spans, (NASTY[begin:end] for begin, end in spans), strict=True)]
    unique = [part for number, part in enumerate(parts) if number == 0 or spans[number] != spans[number - 1]]
    assert "".join(unique) == NASTY
    for token, (begin, end) in zip(ALL[name].encode(NASTY.encode(), False), spans, strict=True):
        text = ALL[name].decode([int(token)])
        assert text in (NASTY[begin:end], "\ufffd") and (text != "\ufffd" or end == begin + 1)


@pytest.mark.parametrize("lower", [False, True])
@given(text=any_text)
def test_normalise_with_offsets_is_normalise(lower, text):
    line = text.replace("\n", " ")
    normal, origins = normalise_with_offsets(line, lower)
    assert normal == normalise(line, lower) and len(origins) == len(normal)
    for character, (begin, end) in zip(normal, origins, strict=True):
        source = line[begin:end]
        assert (character == " " and source[0].isspace()) or source in ("``", "''") or len(source) >= 1
        if character.isascii() and character.isalpha():
            assert character.lower() in unicodedata.normalize("NFKD", source).lower()


def test_no_character_has_another_length_in_lower_case_once_it_is_normalised():
    for code in range(0x110000):
        character = chr(code)
        if not 0xD800 <= code < 0xE000 and len(character.lower()) != 1:
            normal, origins = normalise_with_offsets(f"a{character}", True)
            assert len(normal) == len(origins)


def test_numbers_that_are_tokens_have_no_text():
    with pytest.raises(NotImplementedError):
        IdsTokenizer(5, True).encode_with_offsets("1 2")
