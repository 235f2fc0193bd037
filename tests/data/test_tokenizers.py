"""Encoded text comes back; pieces add up to the document; vocabularies follow their rules."""

import io
import keyword
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from txl_dist.config.schema import MIN_PIECES
from txl_dist.conversion import vocabularies
from txl_dist.data import tokenizers
from txl_dist.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.errors import UserError

NOUNS = ("sea", "mountain", "forest", "house", "old town")
LINES = [f"    the {kind} of a {noun}, {n}" for n in range(40) for kind in ("one", "sum", "end") for noun in NOUNS]
NASTY = (
    "\u2581 a\u2581\u2581b  \t\n\n \x00 <eos> </s> <unk> <0x41> \r\n日本語 é e\u0301 \U0001f600 \u2028 \x85 \ufeff end "
)


def train_sentencepiece(model_type: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(LINES, 290, model_type)


TOKENIZERS: list[Tokenizer] = [
    BytesTokenizer(),
    WordTokenizer.train(Counter(" ".join(LINES).split()), None, 1),
    train_sentencepiece("unigram"),
    train_sentencepiece("bpe"),
]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "word", "unigram", "bpe"])
lossless = pytest.mark.parametrize("tokenizer", [TOKENIZERS[0], *TOKENIZERS[2:]], ids=["bytes", "unigram", "bpe"])
any_text = st.text(st.one_of(st.sampled_from(" \n\t\u2581a\x00é日"), st.characters(codec="utf-8")))


@lossless
@settings(max_examples=100, deadline=None)
@given(text=any_text)
@example(text=NASTY)
def test_text_comes_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text.encode(), True)
    assert tokenizer.decode(tokens) == text
    assert tokens[-1] == tokenizer.eos and (tokens[:-1] != tokenizer.eos).all()
    assert tokens.dtype == tokenizer.dtype and (tokens < tokenizer.vocab_size).all()


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(lines=st.lists(any_text, min_size=1), data=st.data())
def test_pieces_that_end_at_line_ends_add_up_to_the_document(tokenizer, lines, data):
    document = "\n".join(lines).encode()
    ends = [at + 1 for at, byte in enumerate(document) if byte == ord("\n")]
    cuts = sorted(data.draw(st.sets(st.sampled_from(ends)))) if ends else []
    pieces = [document[start:end] for start, end in zip([0, *cuts], [*cuts, len(document)], strict=True)]
    tokens = [tokenizer.encode(piece, False) for piece in pieces[:-1]] + [tokenizer.encode(pieces[-1], True)]
    assert np.concatenate(tokens).tolist() == tokenizer.encode(document, True).tolist()


@every_tokenizer
def test_saved_tokenizers_come_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    text = "\n".join(LINES).encode()
    assert (again.kind, again.vocab_size, again.eos) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos)
    assert again.encode(text, True).tolist() == tokenizer.encode(text, True).tolist()


@lossless
def test_characters_come_out_whole_from_the_incremental_decoder(tokenizer):
    decoder = tokenizer.decoder()
    tokens = tokenizer.encode("é日\U0001f600".encode(), False)
    out = [decoder.feed(int(token)) for token in tokens]
    assert [text for text in out if text not in ("", " ")] == ["é", "日", "\U0001f600"] and decoder.end() == ""
    for token in tokens[:-1]:
        decoder.feed(int(token))
    assert decoder.feed(tokenizer.eos) == "\ufffd"
    assert decoder.feed(int(tokens[0])) == "" and decoder.end() == "\ufffd"


def test_bytes_need_no_text():
    data = bytes(range(256))
    assert TOKENIZERS[0].encode(data, True).tolist() == [*range(256), 256]
    with pytest.raises(UnicodeDecodeError):
        TOKENIZERS[1].encode(data, True)


def test_words_are_counted_lines_end_and_unknown_words_are_marked():
    tokenizer = WordTokenizer.train(Counter(["b", "b", "a", "a", "c", "d", "d", "d", "<unk>", "<eos>"]), None, 1)
    assert tokenizer.words == ["<eos>", "d", "b", "a", "c", "<unk>"]
    assert tokenizer.encode(b" d x\n\n<unk> <eos> a\tb ", True).tolist() == [1, 5, 0, 0, 5, 5, 3, 2, 0]
    assert tokenizer.encode(b"a\n", True).tolist() == [3, 0]
    assert tokenizer.encode(b"a\nb", False).tolist() == [3, 0, 2]  # a line that is too long for one piece
    assert tokenizer.decode([1, 5, 0, 0, 3, 2, 0]) == "d <unk>\n\na b\n"
    counts = Counter(["b", "b", "a", "a", "c", "d", "d", "d"])
    for number in (0, 1):  # the text has no <unk>, or one that is too rare
        assert WordTokenizer.train(counts + Counter({"<unk>": number}), 4, 1).words == ["<eos>", "<unk>", "d", "b"]
        assert WordTokenizer.train(counts + Counter({"<unk>": number}), None, 2).words == [
            "<eos>",
            "<unk>",
            "d",
            "b",
            "a",
        ]


@pytest.mark.parametrize(
    "text, message", [("a 1\nb\n", "line 2 is not"), ("a 1\nb x\n", "line 2"), ("a 1\n", "no <S>")]
)
def test_another_file_than_the_published_vocabulary_is_refused(tmp_path, text, message):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(UserError, match=f"words.txt: .*{message}"):
        WordTokenizer.read_counts(tmp_path / "words.txt")


def test_more_than_65536_words_are_stored_in_four_bytes():
    words = [f"w{number}" for number in range(65534)]
    assert WordTokenizer(["<eos>", "<unk>", *words]).dtype == np.uint16
    assert WordTokenizer(["<eos>", "<unk>", *words, "more"]).dtype == np.uint32


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepiece_training_is_reproducible_and_its_limits_are_named(model_type):
    assert train_sentencepiece(model_type).model == train_sentencepiece(model_type).model
    assert len(train_sentencepiece(model_type).encode(b"    ", False)) < 4  # indentation has pieces of its own
    lines = [*LINES, *keyword.kwlist]
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=100000: .* choose (\d+) or less") as error:
        SentencePieceTokenizer.train(lines, 100000, model_type)
    works = int(str(error.value).split(" choose ")[1].split()[0])
    assert SentencePieceTokenizer.train(lines, works, model_type).vocab_size == works >= MIN_PIECES
    with pytest.raises(UserError, match=r"vocab_size=300: too few .* choose \d+ or more"):
        SentencePieceTokenizer.train([*LINES, "".join(chr(0x4E00 + n) for n in range(300))], 300, model_type)


def test_a_given_model_is_used_as_it_is(tmp_path: Path):
    path = tmp_path / "given.model"
    for eos in (2, -1):
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(LINES), model_writer=file, vocab_size=36, eos_id=eos, minloglevel=3
            )
        if eos == 2:
            tokenizer = SentencePieceTokenizer.open(path)
            assert (tokenizer.eos, tokenizer.vocab_size) == (2, 36)
            assert tokenizer.encode(b"the sea\nthe sea", True).tolist() == [
                *tokenizer.encode(b"the sea\n", False),
                *tokenizer.encode(b"the sea", True),
            ]
            assert tokenizer.decode(tokenizer.encode("the sea 日".encode(), True)).split()[:2] == ["the", "sea"]
        else:
            with pytest.raises(UserError, match="no end-of-text token"):
                SentencePieceTokenizer.open(path)
    path.write_bytes(b"no model")
    for wrong in (path, tmp_path / "missing.model"):
        with pytest.raises(UserError, match=f"{wrong.name}: cannot be read"):
            SentencePieceTokenizer.open(wrong)


def test_models_that_are_damaged_are_refused_with_their_key(tmp_path):
    path = tmp_path / "given.model"
    model = TOKENIZERS[3].model
    damaged = {
        "empty": b"",
        "cut off": model[: len(model) // 2],
        "not a byte": model.replace(b"<0x41>", b"<0x4\xff>"),
        "not text": model.replace(b"<eos>", b"<\xffos>"),
    }
    for content in damaged.values():
        assert content != model
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer.model=.*given.model: cannot be read as a SentencePiece model"):
            SentencePieceTokenizer.open(path)
        TOKENIZERS[3].save(tmp_path / "saved")
        (tmp_path / "saved" / "sentencepiece.model").write_bytes(content)
        with pytest.raises(UserError, match="holds no tokenizer that can be read"):
            tokenizers.load(tmp_path / "saved")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("text", [["hello"], [], [""], ["   "], ["\r"]])
def test_a_text_too_short_for_sentencepiece_is_refused_with_a_remedy(text, model_type):
    for vocab_size in (300, 8000):
        with pytest.raises(UserError, match="too short for 300 pieces, the least .* or use tokenizer=bytes"):
            SentencePieceTokenizer.train(text, vocab_size, model_type)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_a_vocabulary_may_have_the_line_ends_and_the_mark_of_windows(tmp_path, ends, mark, last):
    path = tmp_path / "vocab.txt"
    path.write_bytes((mark + ends.join(["<eos>", "<unk>", "wörd"]) + ends * last).encode())
    assert WordTokenizer.open(path).words == ["<eos>", "<unk>", "wörd"]
    assert vocabularies.load(path).words == ["<eos>", "<unk>", "wörd"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<eos>\n<unk>\nold town\n", "line 3 is not one word, but 'old town'"),
        (b"<eos>\n\n<unk>\n", "line 2 is not one word, but ''"),
        (b"<eos>\r<unk>\rword\r", "line 1 is not one word"),
        ("<eos>\n<unk>\n".encode("utf-16"), "convert it .iconv."),
        (b"a\nb\n", "it has no <eos>, it has no <unk>"),
    ],
)
def test_mistakes_in_a_vocabulary_are_named_with_their_line(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"vocab.txt: .*{message}"):
        WordTokenizer.open(tmp_path / "vocab.txt")


@lossless
@settings(max_examples=100, deadline=None)
@given(text=any_text)
@example(text=NASTY)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer, text):
    token_bytes = tokenizer.token_bytes()
    assert token_bytes is not None and len(token_bytes) == tokenizer.vocab_size
    assert b"".join(token_bytes[token] for token in tokenizer.encode(text.encode(), True)) == text.encode()


KEEPS_ALL: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
LOSSY: list[dict[str, Any]] = [
    {"byte_fallback": False},
    {"normalization_rule_name": "nmt_nfkc"},
    {"normalization_rule_name": "nfkc_cf"},
    {"add_dummy_prefix": True},
    {"remove_extra_whitespaces": True},
    {"model_type": "word"},
]


@pytest.mark.parametrize(
    "options", [{}, {"user_defined_symbols": ["\n", "a b"]}, {"model_type": "char"}, *LOSSY], ids=str
)
def test_a_given_model_has_token_bytes_only_where_it_changes_nothing(options):
    model = io.BytesIO()
    settings = {"vocab_size": 330, "hard_vocab_limit": False, "minloglevel": 3, **KEEPS_ALL, **options}
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(LINES), model_writer=model, **settings)
    tokenizer = SentencePieceTokenizer(model.getvalue())
    token_bytes = tokenizer.token_bytes()
    assert (token_bytes is None) == (options in LOSSY)
    if token_bytes is not None:
        text = (NASTY + "a b Å ﬁ" + "  x  ").encode()
        assert b"".join(token_bytes[token] for token in tokenizer.encode(text, True)) == text


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizers.load(tmp_path)
    TOKENIZERS[1].save(tmp_path)
    (tmp_path / "vocab.txt").write_text("<eos>\n<unk>\na\n")
    with pytest.raises(UserError, match="3 tokens, not"):
        tokenizers.load(tmp_path)
