"""A file is read by its content: plain, gzip or zstd; any other kind is refused, and text never is."""

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from tests.data.preparing.test_corpora import made, text_corpus
from tests.data.preparing.test_splitting import BOOK, documents, planned
from txl_dist.data.preparing import corpora
from txl_dist.errors import UserError


def zipped(text: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("book.txt", text)
    return out.getvalue()


def tarred(text: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("book.txt")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return out.getvalue()


KINDS = {
    "bzip2": bz2.compress(BOOK),
    "xz": lzma.compress(BOOK),
    "lzma": lzma.compress(BOOK, lzma.FORMAT_ALONE),
    "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7" + BOOK,
    "zip": zipped(BOOK),
    "tar": tarred(BOOK),
    "7z": b"7z\xbc\xaf\x27\x1c\0\x04" + BOOK,
    "rar": b"Rar!\x1a\x07\x01\0" + BOOK,
    "Parquet": b"PAR1\x15\x04\x15\x20" + BOOK,
    "Arrow": b"\xff\xff\xff\xff\x78\x01\0\0\x10\0\0\0" + BOOK,
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<</Filter/FlateDecode>>stream\nx\x9c\x03\0\0\0\0\x01",
}


def refusal(folder: Path, name: str, data: bytes, characters: bool = False) -> str:
    """Return the message that refuses a file beside a plain one."""
    made(folder, {name: data, "plain.txt": BOOK})
    sources = corpora.find(text_corpus(path=str(folder)), [])
    with pytest.raises(UserError) as error:
        corpora.survey(sources, lambda size: None, characters)
    (folder / name).unlink()
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_than_text_are_refused_whatever_their_name_and_within_gzip_and_zstd_too(tmp_path, kind):
    for name, pack in [("a.bz2", bytes), ("A", bytes), ("a.gz", gzip.compress), ("a.zst", zstandard.compress)]:
        message = refusal(tmp_path, name, pack(KINDS[kind]))
        assert f"{name}: its content is" in message and kind in message and "decompress it first" in message
    assert kind in refusal(tmp_path, "a.gz", KINDS[kind])  # under the name of what is read


def test_a_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "database") as connection:
        connection.execute("create table text (line)")
    assert "SQLite" in refusal(tmp_path / "c", "a.db", (tmp_path / "database").read_bytes())


def test_a_file_that_is_compressed_twice_is_refused(tmp_path):
    for name, pack in [("a.gz", gzip.compress), ("a.zst", zstandard.compress)]:
        assert "decompress it first" in refusal(tmp_path, name, pack(pack(BOOK)))


@pytest.mark.parametrize("name", ["a.gz", "a.GZ", "a", "a.txt", "a.zst", "a.Zst"])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_gzip_and_zstd_are_read_by_their_content_whatever_their_name(tmp_path, name, pack):
    split_documents = documents(planned(text_corpus(train=str(made(tmp_path, {name: pack(BOOK)})))))
    assert split_documents == [("train", name, BOOK)]


def test_frames_that_zstd_skips_are_not_text(tmp_path):
    data = b"\x50\x2a\x4d\x18\x04\0\0\0\0\0\0\0" + zstandard.compress(BOOK)  # as pzstd begins
    assert documents(planned(text_corpus(train=str(made(tmp_path, {"a": data})))))[0][2] == BOOK


def test_plain_text_under_the_name_of_a_compressed_file_is_refused_with_a_remedy(tmp_path):
    for name, suffix in [("a.gz", ".gz"), ("a.GZ", ".gz"), ("b.zst", ".zst")]:
        message = refusal(tmp_path, name, BOOK)
        assert f"{name}: " in message and f"rename it without {suffix}" in message
    made(tmp_path, {"a.gz": b"", "b.txt": BOOK})  # empty, whatever its name
    assert [name for _, name, _ in documents(planned(text_corpus(train=str(tmp_path))))] == ["b.txt", "plain.txt"]


TEXTS = {
    "bzip2": b"BZh91AY&SY is how such files begin\n",
    "pdf": b"%PDF-1.4 \nis how such files begin, \xe9\xe8\n",
    "parquet": b"PAR1 was a robot\n",
    "zip": b"PK was his name\n",
    "rar": b"Rar! said the bear\n",
    "zstd": "(µ/ý is what Latin-1 makes of it\n".encode("latin-1"),
    "tar": b"a" * 257 + b"ustar \n",
    "sqlite": b"SQLite format 3 is a format\n",
    "terminal": b"\x1b[1mbold\x1b[0m\x07\b\f\n",
    "mark": b"\xef\xbb\xbfBZh91AY&SY\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_read_whatever_it_begins_with(tmp_path, name):
    split_documents = documents(planned(text_corpus(train=str(made(tmp_path, {"a.txt": TEXTS[name]})))))
    assert split_documents == [("train", "a.txt", TEXTS[name])]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_marks_of_other_encodings_are_refused_where_characters_are_read(tmp_path, encoding):
    data = ("\ufeff" + BOOK.decode()).encode(encoding)
    message = refusal(tmp_path, "a.txt", data, characters=True)
    assert f"iconv -f {encoding[:6].upper()} -t UTF-8" in message and "a.txt" in message
    assert documents(planned(text_corpus(train=str(made(tmp_path, {"a.txt": data})))))[0][2] == data
