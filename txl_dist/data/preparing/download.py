"""Files from elsewhere: downloaded, checked, taken out of archives. None has its name before it is whole."""

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
    """A file as it was published. size: in bytes. Both None where nobody has told them."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def download(source: Download, path: Path, advance: Callable[[int], None]) -> None:
    """Fetch `source` to `path`; `advance` is told the bytes. An interrupted download goes on where it has stopped.

    Raises:
        UserError: where what has come is not what was published; it is deleted.
        OSError: where the network or the disk fails; what has come waits beside `path` for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with locked(path.with_name(path.name + ".lock"), "downloading it"):  # the others wait
        if path.exists():
            return
        try:
            transfer(source, partial, advance)
        except HTTPException as error:
            raise OSError(f"the connection broke: {error!r}") from error
        if problem := difference(partial, source):
            partial.unlink()
            raise UserError(f"{source.url}: what came {problem}; it is deleted: start again, or get it from elsewhere")
        rename(partial, path)


def transfer(source: Download, partial: Path, advance: Callable[[int], None]) -> None:
    """Append to `partial` what it lacks; all of it, where the server knows no ranges.

    Without a sha256 it begins anew, for the halves of two versions would go unnoticed.
    """
    have = partial.stat().st_size if source.sha256 and partial.exists() else 0
    if source.size and have >= source.size:
        return  # what is too long is found by its size
    # Some servers refuse Python's own User-Agent.
    headers = {"User-Agent": "txl_dist"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(Request(source.url, headers=headers), timeout=SILENCE) as answer:
            have = have if answer.status == 206 else 0
            whole = have + int(answer.headers["Content-Length"] or 0)
            with open(partial, "ab" if have else "wb") as file:
                advance(have)
                while block := answer.read(BLOCK):
                    file.write(block)
                    advance(len(block))
                    have += len(block)
    except HTTPError as error:
        if error.code == 416:  # the server's file ends before what is here: another version
            partial.unlink()
        raise
    if have < whole:
        raise OSError(f"the connection broke after {have:,} of {whole:,} bytes")


def difference(path: Path, source: Download) -> str | None:
    """What tells a file from the published one, in words."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"has {size:,} bytes, but {source.name} was published with {source.size:,}"
    if source.sha256 is not None and (found := sha256_of_file(path)) != source.sha256:
        return f"has the sha256 {found}, but {source.name} was published with {source.sha256}"
    return None


# ----------------------------------------------------------------------------------------------------- archives


def unpack(archive: Path, names: Collection[str], folder: Path, advance: Callable[[int], None]) -> None:
    """Take the files of these names, wherever they lie in a .zip, .tgz or .tar.gz, into a new `folder`, if it is not
    there yet.

    Nothing else is written, and nowhere else, whatever the archive holds. The folder has its name when all of the
    archive was read, for what is damaged is known at its end only.

    Raises:
        UserError: where the archive is damaged or cannot be read, or the folder cannot be written.
    """
    try:
        make_folder(folder.parent)
        with locked(folder.with_name(folder.name + ".lock"), f"unpacking {archive.name}") as lock:  # the others wait
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
    """The regular files of an archive, without their folders, each to be read before the next."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield PurePosixPath(info.filename).name, zipped.open(info)
    else:
        # gzip's own reader, for tarfile's does not check the sum at the end.
        with gzip.open(archive) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as tar:
                for member in tar:
                    if (stream := tar.extractfile(member) if member.isfile() else None) is not None:
                        yield PurePosixPath(member.name).name, stream
            while unzipped.read(BLOCK):
                pass
