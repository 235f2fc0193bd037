"""Text is split and cut into pieces in the same way everywhere, and none of it is lost."""

import gzip
import sys
from codecs import BOM_UTF8
from itertools import groupby

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.preparing.test_corpora import made, text_corpus
from txl_dist.config.schema import StdlibCorpusConfig, TextCorpusConfig
from txl_dist.data.preparing import corpora, splitting
from txl_dist.errors import UserError

BOOK = "".join(f"line {number} of a book\n" for number in range(1000)).encode()


def planned(config: TextCorpusConfig | StdlibCorpusConfig) -> splitting.Plan:
    problems: list[str] = []
    sources = corpora.find(config, problems)
    assert not problems
    return splitting.plan(config, corpora.survey(sources, lambda size: None))


def documents(plan: splitting.Plan) -> list[tuple[str, str, bytes]]:
    """Put the documents (split, name, text) together again from the pieces."""
    joined: list[list] = []
    finished = True
    for piece in (document for some in plan.pieces() for document in splitting.documents(some, plan.shares)):
        assert piece.first == finished
        if piece.first:
            joined.append([piece.split, piece.source.name, b""])
        joined[-1][2] += piece.data
        finished = piece.last
    assert finished
    return [(split, name, text) for split, name, text in joined]


def test_files_are_split_by_quota_and_stay_where_they_are_when_moved(tmp_path):
    files = {f"{number}.txt": f"document {number}\n".encode() for number in range(40)}
    one = documents(planned(text_corpus(path=str(made(tmp_path / "one", files)))))
    other = documents(planned(text_corpus(path=str(made(tmp_path / "or" / "other", files)))))
    assert one == other
    assert [name for _, name, _ in one] == sorted(files) and {name: text for _, name, text in one} == files
    assert [sum(split == wanted for split, _, _ in one) for wanted in corpora.SPLITS] == [34, 2, 4]
    fewer = dict(list(files.items())[:-5])  # a hash, not the order, decides: most documents stay in their split
    remaining = documents(planned(text_corpus(path=str(made(tmp_path / "fewer", fewer)))))
    assert len({*one} & {*remaining}) >= len(fewer) - 2
    assert "train" in {split for split, _, _ in one[:6]}


def test_a_few_files_are_cut_by_position_at_line_ends(tmp_path):
    made(tmp_path, {"a.txt": BOOK, "b.txt": BOOK[:-1]})
    split_documents = documents(planned(text_corpus(path=str(tmp_path))))
    assert [(split, name) for split, name, _ in split_documents] == [
        (split, name) for name in ("a.txt", "b.txt") for split in corpora.SPLITS
    ]
    for name, content in (("a.txt", BOOK), ("b.txt", BOOK[:-1])):
        train, valid, test = (text for _, file, text in split_documents if file == name)
        assert train + valid + test == content and train.endswith(b"\n") and valid.endswith(b"\n")
        assert abs(len(train) - 0.85 * len(content)) < 30 and abs(len(valid) - 0.05 * len(content)) < 60


def test_line_ends_are_found_at_or_after_every_position(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "PIECE_BYTES", 5)
    text = b"one\n\ntwo\nthree three\nx"
    made(tmp_path, {"a": text})
    file = corpora.SurveyedFile(corpora.SourceFile(tmp_path / "a", "a", None), len(text), "")
    ends = [0, 4, 5, 9, 21, 22]
    for first in range(1, len(text) + 1):
        wanted = {at: min(end for end in ends if end >= at) for at in range(1, len(text) + 1)}
        assert splitting.line_ends(file, [first, len(text)]) == [wanted[first], len(text)]


def test_lines_are_split_by_their_hash_each_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "PIECE_BYTES", 100)
    plan = planned(text_corpus(path=str(made(tmp_path, {"a.txt": BOOK + b"no end"})), document="line"))
    split_documents = documents(plan)
    assert [text for _, _, text in split_documents] == [*BOOK.splitlines(keepends=True), b"no end"]
    lines = [line for piece in plan.pieces() for line in splitting.documents(piece, plan.shares)]
    assert all(BOOK[line.offset :].startswith(line.data) for line in lines[:-1])
    counts = [sum(split == wanted for split, _, _ in split_documents) for wanted in corpora.SPLITS]
    assert 800 < counts[0] < 900 and 25 < counts[1] < 75 and 70 < counts[2] < 130
    monkeypatch.setattr(splitting, "PIECE_BYTES", 1 << 20)
    assert documents(plan) == split_documents


def test_a_line_longer_than_a_piece_stays_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "PIECE_BYTES", 16)
    text = "short\n" + "a long line of words " * 9 + "\n" + "ä日" * 30 + "\nend"
    for document in ("line", "file"):
        plan = planned(text_corpus(train=str(made(tmp_path, {"a.txt": text.encode()})), document=document))
        wanted = text.splitlines(keepends=True) if document == "line" else [text]
        assert [data.decode() for _, _, data in documents(plan)] == wanted
        pieces = list(plan.pieces())
        assert all(len(piece.data) <= 16 and piece.data.decode() for piece in pieces)
        assert [piece.offset for piece in pieces] == [sum(len(p.data) for p in pieces[:n]) for n in range(len(pieces))]


def test_given_splits_take_all_of_their_files_and_the_others_are_absent(tmp_path):
    made(tmp_path, {"t/1": b"1\n", "t/2": b"2\n", "t/empty": b"", "v": b"3\n"})
    plan = planned(text_corpus(train=str(tmp_path / "t"), valid=str(tmp_path / "v")))
    assert [file.source.name for file, _ in plan.files] == ["1", "2", "v"]  # the empty one is left out
    split_documents = documents(plan)
    assert split_documents == [("train", "1", b"1\n"), ("train", "2", b"2\n"), ("valid", "v", b"3\n")]


@pytest.mark.parametrize(
    "share, splits", [((0, 0), ["train"]), ((0.1, 0), ["train", "valid"]), ((0, 0.1), ["train", "test"])]
)
@pytest.mark.parametrize("split_by", ["document", "position"])
def test_a_share_of_zero_leaves_a_split_absent(tmp_path, share, splits, split_by):
    made(tmp_path, {f"{number}": BOOK for number in range(10)})
    config = text_corpus(path=str(tmp_path), split_by=split_by, valid_share=share[0], test_share=share[1])
    split_documents = documents(planned(config))
    assert {split for split, _, _ in split_documents} == set(splits)
    assert b"".join(text for _, _, text in split_documents) == BOOK * 10


@pytest.mark.parametrize(
    "files, values, message",
    [
        ({"a": b"1\n", "b": b"2\n"}, {"split_by": "document"}, "too few to split .* corpus.split_by=position"),
        ({"a": b"one line"}, {}, "no text falls to valid and test; .* corpus.valid_share=0 corpus.test_share=0"),
        ({"a": b"word " * 9999}, {}, r"cut at line ends \(\\n\), and none has one after its first 85 %"),
        ({"a": b"a line\r" * 9999}, {}, r"cut at line ends \(\\n\), and none has one after its first 85 %"),
        ({"a": b"a\n" * 89 + b"x" * 22}, {"valid_share": 0}, "to test; each file .* after its first 90 %"),
        ({"a": b"a\n" * 40 + b"x" * 12 + b"\nab cdef\n"}, {}, "to valid; each file .* between 85 and 90 % of it"),
        ({"a": b""}, {"split_by": "document"}, "corpus.path: the files are empty"),
        ({"a": b""}, {"document": "line"}, "corpus.path: the files are empty"),
        ({"a": b"", "b": b""}, {}, "corpus.path: the files are empty; give others"),
    ],
)
def test_a_split_without_text_is_refused_with_a_remedy(tmp_path, files, values, message):
    with pytest.raises(UserError, match=message):
        planned(text_corpus(path=str(made(tmp_path, files)), **values))


def test_gz_and_zst_hold_the_same_text(tmp_path):
    packed = {
        "a.gz": gzip.compress(BOOK[:5000]) + gzip.compress(BOOK[5000:]),
        "b.zst": zstandard.compress(BOOK[:5000]) + zstandard.compress(BOOK[5000:]),
        "c": BOOK,
    }
    split_documents = documents(planned(text_corpus(path=str(made(tmp_path, packed)))))
    for _, texts in groupby(split_documents, key=lambda document: document[1]):
        assert b"".join(text for _, _, text in texts) == BOOK
    assert [(split, text) for split, name, text in split_documents if name == "a.gz"] == [
        (split, text) for split, name, text in split_documents if name == "c"
    ]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: data[: len(data) // 2], lambda data: b"text" + data]
)
def test_damaged_archives_are_named_with_the_position(tmp_path, suffix, pack, damage):
    made(tmp_path, {f"a{suffix}": damage(pack(BOOK))})
    with pytest.raises(UserError, match=rf"a{suffix}: is damaged at about byte [\d,]+ of"):
        planned(text_corpus(train=str(tmp_path)))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    plan = planned(text_corpus(train=str(made(tmp_path, {"a": BOOK}))))
    (tmp_path / "a").write_bytes(BOOK[:100])
    with pytest.raises(UserError, match="a: became shorter"):
        documents(plan)


SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]


def test_a_long_line_is_cut_before_any_white_space_that_separates_words(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "PIECE_BYTES", 64)
    words = [f"word{number}" for number in range(300)]
    for space in [space for space in SPACES if space != "\n"]:
        made(tmp_path, {"a.txt": space.join(words).encode()})
        pieces = list(planned(text_corpus(train=str(tmp_path))).pieces())
        assert [word for piece in pieces for word in piece.data.decode().split()] == words
        assert not any(piece.midword for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "bc", "é", "日", "\n", " ", "\t", "\u2003", "\x85", "\r\n"]), max_size=80),
    document=st.sampled_from(["file", "line"]),
    size=st.integers(4, 30),
)
def test_the_pieces_of_a_text_hold_its_words_once(tmp_path_factory, parts, document, size):
    text = "start" + "".join(parts)
    folder = made(tmp_path_factory.mktemp("text"), {"a.txt": text.encode()})
    plan = planned(text_corpus(train=str(folder), document=document))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "PIECE_BYTES", size)
        pieces = [line for piece in plan.pieces() for line in splitting.documents(piece, plan.shares)]
    assert b"".join(piece.data for piece in pieces) == text.encode()
    words = sum(len(piece.data.decode().split()) - piece.midword for piece in pieces)
    assert words == len(text.split())


def test_a_byte_order_mark_is_left_out_where_characters_are_read(tmp_path):
    files = {"a.txt": BOM_UTF8 + b"one\ntwo\n", "b.txt": b"three\n", "c.txt": BOM_UTF8, "d.txt": BOM_UTF8 + b"\n"}
    made(tmp_path, {**files, "e.gz": gzip.compress(BOM_UTF8 + b"five\n")})
    sources = corpora.find(text_corpus(train=str(tmp_path)), [])
    for document, texts in [("file", [b"one\ntwo\n", b"three\n", b"\n", b"five\n"]), ("line", None)]:
        config = text_corpus(train=str(tmp_path), document=document)
        plan = splitting.plan(config, corpora.survey(sources, lambda size: None, characters=True))
        document_texts = [text for _, _, text in documents(plan)]
        assert document_texts == (texts or [b"one\n", b"two\n", b"three\n", b"\n", b"five\n"])
        assert next(plan.pieces()).offset == 3
        plan = splitting.plan(config, corpora.survey(sources, lambda size: None))  # bytes are kept as they are
        assert b"".join(text for _, _, text in documents(plan)).count(BOM_UTF8) == 4
    config = text_corpus(path=str(made(tmp_path / "book", {"a.txt": BOM_UTF8 + BOOK})))
    files = corpora.survey(corpora.find(config, []), lambda size: None, characters=True)
    assert b"".join(text for _, _, text in documents(splitting.plan(config, files))) == BOOK  # cut by position
