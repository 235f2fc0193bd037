"""Where the files of a dataset are: in a local folder, or behind a URL and in a cache."""

import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_type_hints
from urllib.parse import urlsplit

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import PublishedCorpusConfig
from txl_dist.data.format import FORMAT
from txl_dist.errors import UserError
from txl_dist.files.atomic import atomic_file, sha256_of, sha256_of_file, sha256_of_json
from txl_dist.files.cache import cache_folder
from txl_dist.files.lock import locked
from txl_dist.files.parsing import PARSE_ERRORS, describe

PAUSES = (1, 2, 4)  # seconds between the attempts to fetch a file
AGAIN = "copy it again, or prepare it again"


class Store:
    """The files of a dataset, in a local folder or behind a URL prefix.

    Files that are fetched from a URL are kept below $XDG_CACHE_HOME (or ~/.cache) in
    txl_dist/<fingerprint of the dataset>.

    Raises:
        UserError: if a URL is a command, or holds a secret.
    """

    def __init__(self, location: str):
        self.is_remote = re.match(r"[A-Za-z0-9+.-]+://", location) is not None
        if self.is_remote:
            check_url(location)
        self.location = location.rstrip("/") or "/"
        self.folder = Path(location).expanduser()  # of a remote dataset: its cache, once the fingerprint is known

    @property
    def absolute_location(self) -> str:
        """The location, independent of the working directory."""
        return self.location if self.is_remote else os.path.abspath(self.folder)

    def remedy(self, path: Path) -> str:
        """Say what to do about a damaged file."""
        return f"delete {path}, it is fetched again" if self.is_remote else AGAIN

    def read_index(self) -> dict[str, Any]:
        """Read index.json and check its format, version and SHA-256.

        Raises:
            UserError: if there is no dataset, or its index is damaged or of another format.
        """
        path = f"{self.location}/index.json"
        content = self._index_content()
        try:
            index = json.loads(content)
            sealed = index.pop("sha256", None) if isinstance(index, dict) else None
            sha256 = sha256_of_json(index)
        except PARSE_ERRORS as error:
            raise UserError(f"{path}: is damaged ({describe(error)}); {AGAIN}") from error
        if not isinstance(index, dict) or any(index.get(key) != value for key, value in FORMAT.items()):
            raise UserError(f"{path}: is not the index of a {FORMAT['format']}, version {FORMAT['version']}")
        if sealed is not None and sha256 != sealed:  # indexes of earlier versions have none
            raise UserError(f"{path}: is damaged (its SHA-256 is {sha256[:12]}, not {str(sealed)[:12]}); {AGAIN}")
        if self.is_remote:
            self.folder = cache_folder() / re.sub(r"\W", "", str(index.get("fingerprint")))
        return index

    def _index_content(self) -> bytes:
        try:
            if not self.is_remote:
                return (self.folder / "index.json").read_bytes()
            stream = io.BytesIO()
            self._fetch("index.json", stream)
            return stream.getvalue()
        except OSError as error:
            raise UserError(
                f"{self.location}: no dataset can be read here ({error.strerror or error}); "
                f"prepare one: {how_to_prepare(self.location)}"
            ) from error

    def local(self, name: str, sha256: str) -> Path:
        """Return the local path of a file; fetch and check it first if it is remote and not in the cache yet."""
        path = self.folder / name
        if not self.is_remote or path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), "fetching it"):  # other processes wait
            if path.exists():
                return path
            try:
                with atomic_file(path) as temporary, open(temporary, "w+b") as file:
                    self._fetch(name, file, sha256)
            except OSError as error:
                raise UserError(f"{self.location}/{name}: cannot be fetched: {error}") from error
        return path

    def checked(self, name: str, sha256: str) -> Path:
        """Return the local path of a file whose SHA-256 is checked on every call."""
        path = self.local(name, sha256)
        try:
            actual = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self.remedy(path)}") from error
        if actual != sha256:
            raise UserError(f"{path}: {difference(actual, sha256)}; {self.remedy(path)}")
        return path

    def _fetch(self, name: str, file: BinaryIO, sha256: str | None = None) -> None:
        """Write a remote file into `file`; try again on failure, because networks and servers fail at times."""
        from webdataset import gopen  # imports torch, which the processes that tokenize do not need

        for pause in (*PAUSES, None):
            try:
                file.seek(0)
                file.truncate()
                with gopen(f"{self.location}/{name}") as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                file.seek(0)
                if sha256 is None:
                    return
                actual = sha256_of(file)
                if actual == sha256:
                    return
                raise OSError(f"the file that came: {difference(actual, sha256)}")
            except ValueError as error:  # webdataset knows no such scheme
                raise OSError(str(error)) from error
            except OSError as error:
                if pause is None:
                    raise OSError(fetch_problem(error)) from error
                time.sleep(pause)


def fetch_problem(error: OSError) -> str:
    """Describe why a fetch failed; without the command that webdataset ran, which its error begins with."""
    exit_code = re.search(r": exit (\d+) \(read\)", str(error))
    return f"its download ended with code {exit_code[1]}" if exit_code else str(error)


def difference(actual: str, expected: str) -> str:
    """Say that a file has another SHA-256 than the index names."""
    return f"SHA-256 differs from index.json ({actual[:12]}, not {expected[:12]})"


def check_url(url: str) -> None:
    """Refuse a URL that webdataset would run in a shell, or that holds a secret.

    A run's config may come from anybody; and the location of the data goes into configs, checkpoints and logs.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: is not a URL ({error}); give a folder or a URL") from error
    if parts.scheme == "pipe":
        raise UserError(f"{url}: is a command, and none is run from a config; give a folder or a URL")
    if parts.query or parts.fragment:
        problem = "holds more than a location (? or #)"
    elif parts.password is not None or (parts.username and parts.scheme in ("http", "https")):
        problem = "holds a user name or a password"
    else:
        return
    public = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    raise UserError(
        f"{public}: the URL that was given {problem}, and would be kept in configs, checkpoints and logs; "
        "give the folder's URL alone, and your credentials to curl, which fetches: a line `netrc` in ~/.curlrc "
        'and the password in ~/.netrc, or a line `header = "Authorization: ..."` in ~/.curlrc'
    )


def how_to_prepare(location: str) -> str:
    """Return the command that makes a dataset; prepare itself names it CORPUS-TOKENIZER."""
    corpus = Path(location).name.rpartition("-")[0]
    known = ("stdlib", "duplication", *get_args(get_type_hints(PublishedCorpusConfig)["name"]))
    overrides = [f"corpus={corpus}"] if corpus in known else []
    return command_to_paste("python -m txl_dist.prepare", *overrides, data__dir=location)
