"""Downloads files, checks them and takes them out of archives; none has its final name before it is complete."""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from txl_dist.errors import UserError
from txl_dist.files.atomic import make_folder, new_folder, rename, sha256_of_file
from txl_dist.files.lock import locked

ARCHIVES = (".zip", ".tgz", ".tar.gz")
BLOCK = 1 << 20
SILENCE = 60  # seconds without a byte after which a connection is given up


class Download(NamedTuple):
    """A file as it was published; size (in bytes) and SHA-256 are None if they were not published."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]


def download(source: Download, path: Path, advance: Callable[[int], None]) -> None:
    """Fetch `source` to `path`; an interrupted download resumes where it has stopped.

    Args:
        advance: is called with the number of bytes fetched.

    Raises:
        UserError: if the file that came is not the published one; it is deleted.
        OSError: if the network or the disk fails; what has come waits beside `path` for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Of several processes one fetches it, and the others wait.
    with locked(path.with_name(path.name + ".lock"), "downloading it"):
        if path.exists():
            return
        try:
            transfer(source, partial, advance)
        except HTTPException as error:
            raise OSError(f"the connection broke: {error!r}") from error
        problem = difference(partial, source)
        if problem:
            partial.unlink()
            raise UserError(f"{source.url}: what came {problem}; it is deleted: start again, or get it from elsewhere")
        rename(partial, path)


def transfer(source: Download, partial: Path, advance: Callable[[int], None]) -> None:
    """Append to `partial` the bytes that it lacks; all of them, if the server knows no ranges.

    Without a SHA-256 it begins anew, because the halves of two versions would go unnoticed.
    """
    size = partial.stat().st_size if source.sha256 and partial.exists() else 0
    if source.size and size >= source.size:
        return  # a file that is too long is found by its size
    headers = {"User-Agent": "txl_dist"}  # some servers refuse Python's own
    if size:
        headers["Range"] = f"bytes={size}-"
    try:
        with urlopen(Request(source.url, headers=headers), timeout=SILENCE) as answer:
            if answer.status != 206:
                size = 0
            total = size + int(answer.headers["Content-Length"] or 0)
            with open(partial, "ab" if size else "wb") as file:
                advance(size)
                while block := answer.read(BLOCK):
                    file.write(block)
                    advance(len(block))
                    size += len(block)
    except HTTPError as error:
        if error.code == 416:  # the server's file ends before this one: another version
            partial.unlink()
        raise
    if size < total:
        raise OSError(f"the connection broke after {size:,} of {total:,} bytes")


def difference(path: Path, source: Download) -> str | None:
    """Describe how a file differs from the published one; None if it does not."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"has {size:,} bytes, but {source.name} was published with {source.size:,}"
    if source.sha256 is not None:
        sha256 = sha256_of_file(path)
        if sha256 != source.sha256:
            return f"has the sha256 {sha256}, but {source.name} was published with {source.sha256}"
    return None


# ----------------------------------------------------------------------------------------------------- archives


def unpack(archive: Path, names: Collection[str], folder: Path, advance: Callable[[int], None]) -> None:
    """Extract the files of these names from a .zip, .tgz or .tar.gz into a new folder, unless it is there already.

    The files may lie anywhere in the archive; nothing else is written, and nowhere else. The folder gets its name when
    all of the archive was read, because damage is known at its end only.

    Raises:
        UserError: if the archive is damaged or cannot be read, or the folder cannot be written.
    """
    try:
        make_folder(folder.parent)
        with locked(folder.with_name(folder.name + ".lock"), f"unpacking {archive.name}") as lock:
            if folder.exists():
                return
            with new_folder(folder, lock) as partial:
                for name, stream in members(archive):
                    if name in names:
                        with stream, open(partial / name, "wb") as file:
                            while block := stream.read(BLOCK):
                                file.write(block)
                                advance(len(block))
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: is damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked to {folder} ({error.strerror or error})") from error


def members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name (without folders) and content of the regular files of an archive, each to be read before the next."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield PurePosixPath(info.filename).name, zipped.open(info)
    else:
        # gzip's own reader, because tarfile's does not check the checksum at the end.
        with gzip.open(archive) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as tar:
                for member in tar:
                    stream = tar.extractfile(member) if member.isfile() else None
                    if stream is not None:
                        yield PurePosixPath(member.name).name, stream
            while unzipped.read(BLOCK):
                pass
