"""The index of a dataset, opened and checked: what there is, and where its files are."""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, Field

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import PublishedCorpus
from txl_dist.data import tokenizers
from txl_dist.data.cache import cache_folder
from txl_dist.data.preparing.shards import (
    DOCUMENT_TABLE,
    FORMAT,
    SAMPLE_TABLE,
    SIDE_FILES,
    Shard,
    content_fingerprint,
)
from txl_dist.errors import UserError
from txl_dist.files.atomic import atomic_file, sha256_of, sha256_of_file, sha256_of_json
from txl_dist.files.lock import locked
from txl_dist.files.parsing import PARSE_ERRORS, Sha256, Size, Version, describe, shown

PAUSES = (1, 2, 4)  # seconds between the attempts to fetch a file


def how_to_prepare(location: str) -> str:
    """The command that makes a dataset; prepare's own names are CORPUS-TOKENIZER, each corpus with its tokenizer."""
    corpus = Path(location).name.rpartition("-")[0]
    known = ("stdlib", *get_args(get_type_hints(PublishedCorpus)["name"]))
    chosen = [f"corpus={corpus}"] if corpus in known else []
    return command_to_paste("python -m txl_dist.prepare", *chosen, data__dir=location)


class Store:
    """Where a dataset's files are: in a local folder, or behind a URL prefix.

    What is fetched from a URL is kept below $XDG_CACHE_HOME (or ~/.cache) in txl_dist/<fingerprint of the dataset>.

    Raises:
        UserError: where a URL is a command, or holds a secret.
    """

    def __init__(self, location: str):
        self.remote = re.match(r"[A-Za-z0-9+.-]+://", location) is not None
        if self.remote:
            check_url(location)
        self.location = location.rstrip("/") or "/"
        self.folder = Path(location).expanduser()  # of a remote dataset: its cache, once the fingerprint is known

    @property
    def place(self) -> str:
        """The location, independent of the working directory."""
        return self.location if self.remote else os.path.abspath(self.folder)

    def remedy(self, path: Path) -> str:
        return f"delete {path}, it is fetched again" if self.remote else "copy it again, or prepare it again"

    def read_index(self) -> dict[str, Any]:
        where = f"{self.location}/index.json"
        data = io.BytesIO()
        try:
            if self.remote:
                self._fetch("index.json", data)
            else:
                data.write((self.folder / "index.json").read_bytes())
        except OSError as error:
            raise UserError(
                f"{self.location}: no dataset can be read here ({error.strerror or error}); "
                f"prepare one: {how_to_prepare(self.location)}"
            ) from error
        try:
            index = json.loads(data.getvalue())
            written = index.pop("sha256", None) if isinstance(index, dict) else None
            found = sha256_of_json(index)
        except PARSE_ERRORS as error:
            raise UserError(f"{where}: is damaged ({describe(error)}); copy it again, or prepare it again") from error
        if not isinstance(index, dict) or any(index.get(key) != value for key, value in FORMAT.items()):
            raise UserError(f"{where}: is not the index of a {FORMAT['format']}, version {FORMAT['version']}")
        if written is not None and found != written:  # indexes of earlier versions have none
            raise UserError(
                f"{where}: is damaged (its content has the sha256 {found[:12]}, not {str(written)[:12]} as written); "
                "copy it again, or prepare it again"
            )
        if self.remote:
            self.folder = cache_folder() / re.sub(r"\W", "", str(index.get("fingerprint")))
        return index

    def local(self, name: str, sha256: str) -> Path:
        """The local path of a file of the dataset; a remote one is fetched, and checked, where it is not here yet."""
        path = self.folder / name
        if not self.remote or path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), "fetching it"):  # the others wait
            if not path.exists():
                try:
                    with atomic_file(path) as temporary, open(temporary, "w+b") as file:
                        self._fetch(name, file, sha256)
                except OSError as error:
                    raise UserError(f"{self.location}/{name}: cannot be fetched: {error}") from error
        return path

    def checked(self, name: str, sha256: str) -> Path:
        """As `local`, but the sha256 is checked every time."""
        path = self.local(name, sha256)
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self.remedy(path)}") from error
        if found != sha256:
            raise UserError(f"{path}: {not_the_one(found, sha256)}; {self.remedy(path)}")
        return path

    def _fetch(self, name: str, file: BinaryIO, sha256: str | None = None) -> None:
        """Fetch a file, which has this sha256; what fails is tried again, for networks and servers fail at times."""
        from webdataset import gopen

        for pause in (*PAUSES, None):
            try:
                file.seek(0)
                file.truncate()
                with gopen(f"{self.location}/{name}") as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                file.seek(0)
                if sha256 is None or (found := sha256_of(file)) == sha256:
                    return
                raise OSError(f"what came {not_the_one(found, sha256)}")
            except ValueError as error:  # webdataset knows no such scheme
                raise OSError(str(error)) from error
            except OSError as error:
                if pause is None:
                    ended = re.search(r": exit (\d+) \(read\)", str(error))  # after the whole command
                    raise OSError(f"what fetches it ended with code {ended[1]}" if ended else str(error)) from error
                time.sleep(pause)


def check_url(url: str) -> None:
    """Refuse what webdataset would run in a shell, for a run's config may be anybody's; and secrets, for what names the
    data goes into configs, checkpoints and logs."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: is no URL ({error})") from error
    if parts.scheme == "pipe":
        raise UserError(f"{url}: is a command, and none is run from a config; give a folder or a URL")
    if parts.query or parts.fragment:
        shown, what = parts._replace(query="", fragment=""), "holds more than a place (? or #)"
    elif parts.password is not None or (parts.username and parts.scheme in ("http", "https")):
        shown, what = parts, "holds a user name or a password"
    else:
        return
    shown = shown._replace(netloc=parts.netloc.rpartition("@")[2])
    raise UserError(
        f"{shown.geturl()}: the URL that was given {what}, and would be kept in configs, checkpoints and logs; "
        "give the folder's URL alone, and what proves who you are to curl, which fetches: a line `netrc` in ~/.curlrc "
        'and the password in ~/.netrc, or a line `header = "Authorization: ..."` in ~/.curlrc'
    )


def not_the_one(found: str, sha256: str) -> str:
    return f"is not the one in the index (its sha256 is {found[:12]}, not {sha256[:12]})"


@dataclass(frozen=True, eq=False)
class Split:
    """One stream of tokens. Lengths are in tokens, but `bytes`: of the text that it was made of.

    characters, words: of that text; None where it is not UTF-8, or was prepared before they were counted.
    document_starts: uint64 [documents + 1], where each document starts; the last entry is `tokens`.
    sample_table: SAMPLE_TABLE [samples]. Both are mapped into memory, not read.
    """

    tokens: int
    documents: int
    bytes: int
    samples: int
    shards: tuple[Shard, ...]
    document_starts: np.ndarray
    sample_table: np.ndarray
    characters: int | None = None
    words: int | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """What there is in a dataset. `fingerprint` names its content, `corpus` tells what it was made of."""

    store: Store
    fingerprint: str
    corpus: dict[str, Any]
    tokenizer_files: dict[str, str]  # name -> sha256
    vocab_size: int
    eos: int
    dtype: np.dtype
    sample_tokens: int
    shard_samples: int
    splits: dict[str, Split]

    @classmethod
    def open(cls, location: str) -> "Index":
        """Open a dataset in a local folder, or behind a URL prefix that webdataset can open (https://..., gs://...).

        Raises:
            UserError: where there is none, or what is there is damaged or does not fit together.
        """
        store = Store(location)
        told = store.read_index()
        where, again = f"{store.location}/index.json", "copy it again, or prepare it again"
        try:
            facts = IndexFile.model_validate(told)
            if facts.fingerprint != content_fingerprint(facts.tokenizer.files, told["splits"]):
                raise UserError(f"{where}: its fingerprint is not that of its shards; {again}")
            if strange := [name for name in names(facts) if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name)]:
                raise UserError(f"{where}: {shown(strange[0])} is no name of a file in a dataset; {again}")
            index = cls(
                store=store,
                fingerprint=facts.fingerprint,
                corpus=facts.corpus,
                tokenizer_files=facts.tokenizer.files,
                vocab_size=facts.tokenizer.vocab_size,
                eos=facts.tokenizer.eos,
                dtype=np.dtype(facts.dtype).newbyteorder("<"),
                sample_tokens=facts.sample_tokens,
                shard_samples=facts.shard_samples,
                splits={name: open_split(store, name, split) for name, split in facts.splits.items()},
            )
            if index.eos >= index.vocab_size:
                raise UserError(f"{where}: eos={index.eos} is not in its vocabulary of {index.vocab_size:,}; {again}")
            for name, split in index.splits.items():
                if wrong := index.contradiction(split):
                    raise UserError(f"{where}: split {name}: {wrong}; {again}")
        except PARSE_ERRORS as error:
            raise UserError(f"{where}: is damaged ({describe(error)}); {again}") from error
        return index

    def validate(self) -> list[str]:
        """Shards that are missing or have another size; of those behind a URL only the fetched ones are looked at."""
        found = []
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            path = self.store.folder / shard.name
            if not (path.is_file() or self.store.remote):
                found.append(f"{path}: is missing; {self.store.remedy(path)}")
            elif path.exists() and (size := path.stat().st_size) != shard.bytes:
                found.append(f"{path}: has {size:,} bytes, not {shard.bytes:,}; {self.store.remedy(path)}")
        return found

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Load the tokenizer; its files are checked, and that it has the vocabulary of the index."""
        for name, sha256 in self.tokenizer_files.items():
            self.store.checked(f"tokenizer/{name}", sha256)
        tokenizer = tokenizers.load(self.store.folder / "tokenizer")
        if (tokenizer.vocab_size, tokenizer.eos) != (self.vocab_size, self.eos):
            raise UserError(
                f"{self.store.location}/index.json: vocab_size={self.vocab_size} and eos={self.eos} are not those of "
                f"its tokenizer, {tokenizer.vocab_size} and {tokenizer.eos}; copy it again, or prepare it again"
            )
        return tokenizer

    def contradiction(self, split: Split) -> str | None:
        """What in a split does not fit together, if anything."""
        for key in ("samples", "tokens", "documents"):
            if sum(getattr(shard, key) for shard in split.shards) != getattr(split, key):
                return f"the {key} of its shards do not add up to {getattr(split, key)}"
        if split.samples != -(-split.tokens // self.sample_tokens):
            return f"{split.tokens} tokens do not make {split.samples} samples of {self.sample_tokens}"
        if any(shard.samples != self.shard_samples for shard in split.shards[:-1]):
            return f"a shard other than the last has not {self.shard_samples} samples"
        if not split.shards or not 0 < split.shards[-1].samples <= self.shard_samples:
            return "its last shard is missing, empty or too long"
        if any(shard.tokens * self.dtype.itemsize > shard.bytes for shard in split.shards):
            return "a shard is too small for its tokens"
        if split.sample_table.shape != (split.samples,) or split.sample_table.dtype != SAMPLE_TABLE:
            return "samples.npy is not the table of its samples"
        for i, shard in enumerate(split.shards):
            offsets = split.sample_table["offset"][i * self.shard_samples :][: shard.samples]
            if offsets[-1] >= shard.bytes or (offsets[1:] <= offsets[:-1]).any():
                return f"samples.npy has offsets that do not ascend within {shard.name}"
        starts = split.document_starts
        if starts.shape != (split.documents + 1,) or starts.dtype != DOCUMENT_TABLE:
            return "documents.npy is not the table of its documents"
        if starts[0] != 0 or starts[-1] != split.tokens or (starts[1:] < starts[:-1]).any():
            return f"documents.npy has starts that do not ascend from 0 to {split.tokens}"
        return None


class TokenizerEntry(BaseModel):
    vocab_size: Annotated[Size, Field(ge=1, le=1 << 32)]
    eos: Size
    files: dict[str, Sha256]


class SplitEntry(BaseModel):
    tokens: Size
    documents: Size
    bytes: Size
    characters: Size | None = None
    words: Size | None = None
    samples: Size
    files: dict[str, Sha256]
    shards: tuple[Shard, ...]


class IndexFile(BaseModel):
    """The schema of index.json."""

    written_by: dict[Literal["txl_dist"], Version] = {}  # early datasets of 0.1.0 do not record it
    fingerprint: Sha256
    corpus: dict[str, Any]
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    sample_tokens: Annotated[Size, Field(ge=1)]
    shard_samples: Annotated[Size, Field(ge=1)]
    splits: dict[str, SplitEntry]


def names(facts: IndexFile) -> Iterator[str]:
    """All names of files that an index tells. They become paths, and an index may be anybody's."""
    yield from (f"tokenizer/{name}" for name in facts.tokenizer.files)
    for name, split in facts.splits.items():
        yield name
        yield from (shard.name for shard in split.shards)


def open_split(store: Store, name: str, facts: SplitEntry) -> Split:
    sample_table, document_starts = (
        open_table(store.checked(f"{name}/{file}", facts.files[file])) for file in SIDE_FILES
    )
    return Split(
        tokens=facts.tokens,
        documents=facts.documents,
        bytes=facts.bytes,
        samples=facts.samples,
        shards=facts.shards,
        document_starts=document_starts,
        sample_table=sample_table,
        characters=facts.characters,
        words=facts.words,
    )


def open_table(path: Path) -> np.ndarray:
    """Map a .npy file of numbers into memory."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except PARSE_ERRORS as error:
        raise ValueError(f"{path.name}: {describe(error)}") from error
