"""Opens files of text, plain or compressed, by their content; other kinds of files are refused."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import zstandard

from txl_dist.errors import UserError

# How files begin that are not text; `signature` also asks for a control character, which text does not have.
SIGNATURES = {
    kind: re.compile(signature, re.DOTALL)
    for kind, signature in {
        "gzip": rb"\x1f\x8b\x08",
        "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
        "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
        "xz": rb"\xfd7zXZ\0",
        "lzma": rb"\x5d\0\0..(?:\xff{8}|.{5}\0{3})",
        "lzip": rb"LZIP[\0\1]",
        "lzop": rb"\x89LZO\0",
        "lz4": rb"[\x02\x04]\x22\x4d\x18|\x02\x21\x4c\x18",
        "snappy": rb"\xff\x06\0\0sNaPpY",
        "compress (.Z)": rb"\x1f[\x9d\xa0]",
        "a zip archive": rb"PK(?:\x03\x04|\x05\x06|\x07\x08|00PK\x03\x04)",
        "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
        "a rar archive": rb"Rar!\x1a\x07",
        "a tar archive": rb".{257}ustar[\0 ]",
        "a cabinet archive": rb"MSCF\0{4}",
        "Parquet": rb"PAR[1E]\x15",
        "Arrow": rb"ARROW1\0\0|FEA1\0|\xff{4}..\0\0\x10\0\0\0",
        "Avro": rb"Obj\x01",
        "HDF5": rb"\x89HDF\r\n\x1a\n",
        "a SQLite database": rb"SQLite format 3\0",
        "a PDF document": rb"%PDF-\d\.\d\s",
        "an Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    }.items()
}
CONTROL = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")
SUFFIXES = {"gzip": ".gz", "zstd": ".zst"}
WIDE = {  # the longer marks first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class ZstdReader(io.RawIOBase):
    """Reads the frames of a .zst file; unlike zstandard's own reader it notices if the last one is cut off."""

    def __init__(self, raw: BinaryIO):
        self.raw = raw
        self.frame: Any = None
        self.compressed = b""
        self.text = b""

    def readable(self) -> bool:
        """Return True, as io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with text and return how many bytes that are; 0 at the end.

        Raises:
            EOFError: if the file ends within a frame.
        """
        while not self.text:
            self.compressed = self.compressed or self.raw.read(1 << 14)
            if not self.compressed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ends within a frame")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.text = self.frame.decompress(self.compressed)
            self.compressed = self.frame.unused_data
        size = min(len(buffer), len(self.text))
        buffer[:size] = self.text[:size]
        self.text = self.text[size:]
        return size


READERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "zstd": ZstdReader,
}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open the text of a file, decompressed if its content, not its name, is gzip or zstd.

    Raises:
        UserError: if the file cannot be read or its compressed data are damaged.
    """
    try:
        with open(path, "rb") as raw:
            kind = compression(path, raw.peek())
            if kind is None:
                yield raw
                return
            try:
                yield io.BufferedReader(READERS[kind](raw), 1 << 16)
            except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
                position = f"about byte {raw.tell():,} of its {path.stat().st_size:,}"
                raise UserError(
                    f"{path}: is damaged at {position} ({error}); fetch it again, or test it: {kind} -t"
                ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def compression(path: Path, head: bytes) -> str | None:
    """Name the compression of a file that begins with `head`; None: it is read as it is."""
    kind = signature(head)
    if kind in READERS:
        return kind
    named = next((kind for kind, suffix in SUFFIXES.items() if path.name.lower().endswith(suffix)), None)
    if named and head and kind is None:
        raise UserError(
            f"{path}: is damaged at about byte 0 of its {path.stat().st_size:,} (it does not begin as {named} does); "
            f"fetch it again, or rename it without {SUFFIXES[named]} where it is plain text"
        )
    return None


def signature(head: bytes) -> str | None:
    """Name the kind of a file that begins with `head`; None: unknown, or text."""
    kind = next((kind for kind, signature in SIGNATURES.items() if signature.match(head)), None)
    return kind if kind and CONTROL.search(head) else None


def start_of_text(path: Path, head: bytes, characters: bool) -> int:
    """Return where the text of a file begins.

    Args:
        head: the beginning of its content, decompressed.
        characters: whether a tokenizer reads it as characters; then a byte order mark does not belong to the text.

    Raises:
        UserError: if it is not text, or not UTF-8 by its mark.
    """
    kind = signature(head)
    if kind:
        raise UserError(
            f"{path}: its content is {kind}, not text; decompress it first, or export the text that it holds: "
            "plain text, gzip and zstd are read"
        )
    if not characters:
        return 0
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    if encoding:
        raise UserError(
            f"{path}: begins with the byte order mark of {encoding}, and is not UTF-8; "
            f"convert it (iconv -f {encoding} -t UTF-8), or use tokenizer=bytes"
        )
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
