"""Whatever is done to a dataset's files: right tokens, or an error of one line that names the file and the sample."""

import functools
import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.preparing.test_shards import STREAM, TRAIN, VALID, made_up, write
from txl_dist.data.index import Index
from txl_dist.data.preparing import shards
from txl_dist.data.samples import SampleReader
from txl_dist.errors import UserError
from txl_dist.files.atomic import sha256_of_file, sha256_of_json

SAMPLE_BYTES = 2048  # header and content of json, then of tokens.npy, 512 bytes each
SHARD = "train/000001.tar"  # samples 3, 4, 5
SHARD_BYTES = 10240  # three samples, and zeros as tar pads its files
TOKENS = 1536 + 128  # where they begin in a sample


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("damage"), {"train": TRAIN, "valid": VALID})


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Another dataset of the very same sizes."""
    documents = {"train": made_up([len(each) for each in TRAIN], seed=5), "valid": VALID}
    return write(tmp_path_factory.mktemp("foreign"), documents)


def read(folder: Path) -> list[str]:
    """What is wrong with a dataset: with all of it, or sample by sample. Tokens that are given are the right ones."""
    found = []
    try:
        index = Index.open(str(folder))
        index.tokenizer()
    except UserError as error:
        return [str(error)]
    reader = SampleReader(index, "train")
    for number in range(reader.split.samples):
        try:
            assert reader.sample(number).tolist() == STREAM[number * 16 : number * 16 + 16].tolist(), number
        except UserError as error:
            found.append(str(error))
    return found


def cut(size: int):
    return lambda data: data[:size]


def flip(place: int, bits: int = 1):
    return lambda data: data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def replace(old: bytes, new: bytes):
    def replaced(data: bytes) -> bytes:
        assert data.count(old) == 1, old
        return data.replace(old, new)

    return replaced


def packed(*members: tuple[str, bytes]) -> bytes:
    """A sample as in a shard: a tar file without its end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        size = tar.offset
    return stream.getvalue()[:size]


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def instead(*members: tuple[str, bytes], at: int = 1):
    """Another sample in the place of the at-th of a shard, as long as that."""
    sample = packed(*members)
    assert len(sample) <= SAMPLE_BYTES
    start = at * SAMPLE_BYTES
    return lambda data: data[:start] + sample.ljust(SAMPLE_BYTES, b"\0") + data[start + SAMPLE_BYTES :]


def sample_of(data: bytes, at: int) -> bytes:
    return data[at * SAMPLE_BYTES : (at + 1) * SAMPLE_BYTES]


def swap_samples(data: bytes) -> bytes:
    return sample_of(data, 1) + sample_of(data, 0) + data[2 * SAMPLE_BYTES :]


TOKENS_4 = STREAM[64:80]

SHARDS = {
    # cut off, at every kind of boundary and within them; grown
    **{
        f"cut-{size}": (
            cut(size),
            [rf"{SHARD}: sample {n}: the shard has {size:,} bytes, not 10,240; " for n in (3, 4, 5)],
        )
        for size in (0, 1, 511, 512, 600, 1024, 1536, 1664, 1696, 2048, 3000, 4096, 6143, 6144, 6656, 7168, 10239)
    },
    "grown": (lambda data: data + b"\0" * 512, [r"sample 3: the shard has 10,752 bytes", "sample 4", "sample 5"]),
    "zeros-from-the-second-sample": (
        lambda data: data[:2048].ljust(SHARD_BYTES, b"\0"),
        ["sample 4: no sample can be read here", "sample 5: no sample can be read here"],
    ),
    "all-zeros": (lambda data: bytes(SHARD_BYTES), [f"sample {n}: no sample can be read here" for n in (3, 4, 5)]),
    "all-ones": (lambda data: b"\xff" * SHARD_BYTES, [f"sample {n}: " for n in (3, 4, 5)]),
    # one bit
    **{
        f"{part}-of-sample-{3 + at}": (flip(at * SAMPLE_BYTES + place), [told.format(3 + at)] if told else [])
        for at in (0, 1, 2)
        for part, place, told in [
            ("json-name", 0, "sample {}: "),
            ("json-size", 134, "sample {}: "),
            ("json-checksum", 150, "sample {}: "),
            ("json", 520, ""),  # for other readers: nothing here is made of it
            ("padding", 1000, ""),
            ("name", 1024 + 4, "sample {}: "),
            ("size", 1024 + 134, "sample {}: "),
            ("checksum", 1024 + 150, "sample {}: "),
            ("kind", 1024 + 156, "sample {}: "),
            ("magic", 1536, "sample {}: "),
            ("descr", 1536 + 22, "sample {}: "),
            ("shape", 1536 + 62, "sample {}: "),
            ("first-token", TOKENS, "sample {}: the tokens are not those that were written"),
            ("last-token", TOKENS + 31, "sample {}: the tokens are not those that were written"),
        ]
    },
    # members
    "no-json": (instead(("000000004.tokens.npy", npy(TOKENS_4))), []),
    "no-tokens": (instead(("000000004.json", b"{}")), ["sample 4: not 000000004 with its tokens is here"]),
    "other-key": (instead(("000000009.tokens.npy", npy(TOKENS_4))), ["sample 4: not 000000004 with its .* 000000009"]),
    "twice": (instead(*[("000000004.tokens.npy", npy(TOKENS_4))] * 2), ["sample 4: 000000004.tokens.npy: duplicate"]),
    "other-order": (instead(("000000004.tokens.npy", npy(TOKENS_4)), ("000000004.json", b"{}")), []),
    "not-npy": (instead(("000000004.tokens.npy", b"hello")), ["sample 4: its tokens.npy holds no array"]),
    "empty-npy": (instead(("000000004.tokens.npy", b"")), ["sample 4: its tokens.npy holds no array of numbers"]),
    "other-type": (
        instead(("000000004.tokens.npy", npy(TOKENS_4.astype("<u4")))),
        [r"sample 4: uint32 \(16,\) instead of uint16 \(16,\)"],
    ),
    "other-order-of-bytes": (instead(("000000004.tokens.npy", npy(TOKENS_4.astype(">u2")))), ["sample 4: >u2"]),
    "fewer": (instead(("000000004.tokens.npy", npy(TOKENS_4[:15]))), [r"sample 4: uint16 \(15,\) instead of"]),
    "other-tokens": (
        instead(("000000004.tokens.npy", npy(TOKENS_4[::-1]))),
        [r"sample 4: the tokens are .* \(their crc32 is [0-9a-f]{8}, not [0-9a-f]{8}\); copy it again, or prepare it"],
    ),
    "samples-swapped": (swap_samples, ["sample 3: .* 000000004 with", "sample 4: .* 000000003 with"]),
    "a-sample-twice": (
        lambda data: sample_of(data, 0) + sample_of(data, 0) + data[2 * SAMPLE_BYTES :],
        ["sample 4: .* 000000003 with"],
    ),
    "compressed": (
        lambda data: gzip.compress(data[:2048]).ljust(SAMPLE_BYTES, b"\0") + data[SAMPLE_BYTES:],
        ["sample 3: no sample can be read here"],  # whatever it would become
    ),
}


@pytest.mark.parametrize("damage, told", SHARDS.values(), ids=SHARDS)
def test_a_damaged_shard(copy, damage, told):
    path = copy / SHARD
    assert path.stat().st_size == SHARD_BYTES
    path.write_bytes(damage(path.read_bytes()))
    one_line_each(read(copy), told)


def one_line_each(found: list[str], told: list[str]) -> None:
    assert len(found) == len(told), found
    for line, words in zip(found, told, strict=True):
        assert re.search(words, line) and "\n" not in line and " object at 0x" not in line, line
        assert len(line) < 400, line


def gone(path: Path, other: Path) -> None:
    path.unlink()


def folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_the_foreign(path: Path, other: Path) -> None:
    shutil.copy(other / path.relative_to(path.parents[1]), path)


def unreadable(path: Path, other: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


@pytest.mark.parametrize(
    "damage, told",
    [
        (gone, "No such file or directory"),
        (folder, "something else than a file"),
        (dangling, "No such file or directory"),
        (pipe, "something else than a file"),
        (unreadable, "Permission denied"),
        (of_the_foreign, "the tokens are not those that were written"),
    ],
)
def test_something_else_in_the_place_of_a_shard(copy, foreign, damage, told):
    damage(copy / SHARD, foreign)
    one_line_each(read(copy), [f"{SHARD}: sample {number}: .*{told}" for number in (3, 4, 5)])


def test_swapped_shards(copy):
    first, second = copy / SHARD, copy / "train/000002.tar"
    first.rename(copy / "third")
    second.rename(first)
    (copy / "third").rename(second)
    told = [f"000001.tar: sample {n}: not 00000000{n} with its tokens is here, but 00000000{n + 3}" for n in (3, 4, 5)]
    told += [f"000002.tar: sample {n}: not 00000000{n} with its tokens is here, but 00000000{n - 3}" for n in (6, 7, 8)]
    one_line_each(read(copy), told)


SIDE_FILES = {
    "cut": cut(-1),
    "cut-in-the-header": cut(30),
    "empty": cut(0),
    "grown": lambda data: data + b"\0",
    "magic": flip(0),
    "header": flip(40),
    "first-value": flip(128),
    "last-value": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("name", ["train/samples.npy", "train/documents.npy", "valid/samples.npy"])
@pytest.mark.parametrize("damage", SIDE_FILES.values(), ids=SIDE_FILES)
def test_damaged_tables(copy, name, damage):
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    told = rf"{name}: is not the one in the index \(its sha256 is \w{{12}}, not \w{{12}}\); copy it again"
    one_line_each(read(copy), [told])


@pytest.mark.parametrize("name", ["train/samples.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [gone, folder, dangling, unreadable])
def test_something_else_in_the_place_of_a_table(copy, foreign, name, damage):
    damage(copy / name, foreign)
    one_line_each(read(copy), [f"{name}: cannot be read"])


def test_files_of_another_dataset(copy, foreign):
    of_the_foreign(copy / "train/samples.npy", foreign)
    one_line_each(read(copy), ["train/samples.npy: is not the one in the index"])
    shutil.copy(foreign / "index.json", copy)
    shutil.copy(foreign / "train/documents.npy", copy / "train")
    told = [f"train/00000{number // 3}.tar: sample {number}: the tokens are not those" for number in range(14)]
    one_line_each(read(copy), told)


@pytest.mark.parametrize("damage", [cut(0), cut(20), flip(5), lambda data: data.replace(b"bytes", b"words")])
def test_a_damaged_tokenizer(copy, damage):
    path = copy / "tokenizer/tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    one_line_each(read(copy), [r"tokenizer/tokenizer.json: is not the one in the index \(its sha256 is"])


INDEXES = {
    "empty": (cut(0), "index.json: is damaged"),
    "cut": (cut(700), "index.json: is damaged"),
    "cut-at-the-end": (cut(-2), "index.json: is damaged"),
    "no-text": (flip(30, 0x80), "index.json: is damaged"),
    "deep": (lambda data: b"[" * 100_000, "index.json: is damaged"),
    "other-json": (lambda data: b"[]", "index.json: is not the index of a txl_dist dataset, version 1"),
    "other-version": (replace(b'"version": 1', b'"version": 3'), "index.json: is not the index of"),
    **{
        f"{key}": (
            replace(old, new),
            r"index.json: is damaged \(its content has the sha256 \w{12}, not \w{12} as written",
        )
        for key, old, new in [
            ("vocab_size", b'"vocab_size": 257', b'"vocab_size": 259'),
            ("eos", b'"eos": 256', b'"eos": 257'),
            ("bytes", b'"bytes": 213', b'"bytes": 217'),
            ("dtype", b'"dtype": "uint16"', b'"dtype": "uint17"'),
            ("sample_tokens", b'"sample_tokens": 16', b'"sample_tokens": 17'),
            ("key", b'"shard_samples"', b'"shard_sbmples"'),
            ("corpus", b'"of a test"', b'"of a tesu"'),
        ]
    },
}


@pytest.mark.parametrize("damage, told", INDEXES.values(), ids=INDEXES)
def test_a_damaged_index(copy, damage, told):
    path = copy / "index.json"
    path.write_bytes(damage(path.read_bytes()))
    one_line_each(read(copy), [told])


@functools.cache
def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@given(
    name=st.sampled_from(["train/000001.tar", "train/000004.tar"]), place=st.integers(0, 10239), bit=st.integers(0, 7)
)
def test_any_flipped_bit_of_a_shard_gives_right_tokens_or_an_error(whole, tmp_path_factory, name, place, bit):
    read_flipped(whole, tmp_path_factory, name, place, bit)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_index_is_found_or_means_nothing(whole, tmp_path_factory, place, bit):
    before = Index.open(str(whole))
    copy, found = read_flipped(whole, tmp_path_factory, "index.json", place % len(bytes_of(whole / "index.json")), bit)
    if not found:
        after = Index.open(str(copy))
        assert (after.vocab_size, after.eos, after.corpus) == (before.vocab_size, before.eos, before.corpus)
        for name, split in before.splits.items():
            assert (after.splits[name].bytes, after.splits[name].shards) == (split.bytes, split.shards)


def read_flipped(whole: Path, tmp_path_factory, name: str, place: int, bit: int) -> tuple[Path, list[str]]:
    copy = Path(shutil.copytree(whole, tmp_path_factory.mktemp("flipped") / "copy"))
    (copy / name).write_bytes(flip(place, 1 << bit)(bytes_of(whole / name)))
    found = read(copy)
    assert all(name in line and "\n" not in line for line in found) and len(found) <= 1, found
    return copy, found


# ----------------------------------------------------------------------------------------------------- security


class Trap:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_dataset_is_unpickled(copy, tmp_path):
    trap = tmp_path / "trap"
    bait = npy(np.array([Trap(trap)], object), allow_pickle=True)
    path = copy / SHARD
    whole = path.read_bytes()
    for data in (bait, pickle.dumps(Trap(trap))):
        path.write_bytes(instead(("000000004.tokens.npy", data))(whole))
        (found,) = read(copy)
        assert f"{SHARD}: sample 4: its tokens.npy holds no array of numbers" in found
    path.write_bytes(whole)
    table = copy / "train/samples.npy"
    index = json.loads((copy / "index.json").read_text())
    table.write_bytes(bait)
    index["splits"]["train"]["files"]["samples.npy"] = sha256_of_file(table)
    del index["sha256"]
    (copy / "index.json").write_text(json.dumps(index))
    (found,) = read(copy)
    assert "index.json: is damaged" in found and "object" in found.lower()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.is_dir()  # the trap was one


def test_members_with_other_paths_and_links_are_no_samples_and_write_nothing(copy, tmp_path):
    path = copy / SHARD
    whole = path.read_bytes()
    before = sorted(tmp_path.rglob("*"))
    tokens = npy(TOKENS_4)
    for name in ("../000000004.tokens.npy", str(tmp_path / "000000004.tokens.npy")):
        path.write_bytes(instead((name, tokens))(whole))
        one_line_each(read(copy), ["sample 4: not 000000004 with its tokens is here, but "])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        link = tarfile.TarInfo("000000004.tokens.npy")
        link.type, link.linkname = kind, "/etc/passwd"
        path.write_bytes(whole[:2048] + link.tobuf().ljust(2048, b"\0") + whole[4096:])
        one_line_each(read(copy), ["sample 4: no sample can be read here"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "train/../../x", "train/a b", "x;id", ".hidden", ""])
@pytest.mark.parametrize("where", ["shard", "split", "tokenizer"])
def test_an_index_names_no_file_outside_of_its_dataset(copy, name, where):
    index = json.loads((copy / "index.json").read_text())
    del index["sha256"]
    if where == "shard":
        index["splits"]["train"]["shards"][1]["name"] = name
    elif where == "split":
        index["splits"][name] = index["splits"].pop("train")
    else:
        index["tokenizer"]["files"] = {name: "0" * 64}
    index["fingerprint"] = shards.content_fingerprint(index["tokenizer"]["files"], index["splits"])
    (copy / "index.json").write_text(json.dumps(index))
    one_line_each(read(copy), ["index.json: .* is no name of a file in a dataset"])


@pytest.mark.parametrize(
    "url",
    [
        "https://user:{}@host/data",
        "https://{}@host/data",
        "sftp://user:{}@host/data",
        "https://host/data?token={}",
        "https://host/data#{}",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"://host/data: the URL .*\.curlrc") as caught:
        Index.open(url.format("s3cret"))
    assert "s3cret" not in str(caught.value)


def test_a_command_is_no_place_of_data(tmp_path):
    """A run's config tells where its data are, and evaluate believes it."""
    with pytest.raises(UserError, match="is a command"):
        Index.open(f"pipe:///bin/touch {tmp_path}/made; cat")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- sealed with the right checksums


def sealed(folder: Path, change=lambda index: None, tables=("samples.npy", "documents.npy")) -> None:
    """Change a dataset's index, and make all checksums right."""
    index = json.loads((folder / "index.json").read_text())
    for name in tables:
        index["splits"]["train"]["files"][name] = sha256_of_file(folder / "train" / name)
    for each in index["splits"]["train"]["shards"]:
        each["sha256"] = sha256_of_file(folder / each["name"])
    change(index)
    if isinstance(index.get("splits"), dict):
        index["fingerprint"] = shards.content_fingerprint(index["tokenizer"]["files"], index["splits"])
    index.pop("sha256", None)
    (folder / "index.json").write_text(json.dumps(index | {"sha256": sha256_of_json(index)}))


def put(*keys, value):
    """Set a value within the index."""

    def change(index):
        for key in keys[:-1]:
            index = index[key]
        index[keys[-1]] = value

    return change


HOSTILE = ["x", None, [], {}, True, -1, 0, 0.5, 1e999, 2**63, 2**70, "\ud800", [[[]]]]
PLACES = {
    "sample_tokens": ["sample_tokens"],
    "shard_samples": ["shard_samples"],
    "eos": ["tokenizer", "eos"],
    "vocab_size": ["tokenizer", "vocab_size"],
    "dtype": ["dtype"],
    "tokens": ["splits", "train", "tokens"],
    "documents": ["splits", "train", "documents"],
    "samples": ["splits", "train", "samples"],
    "shard's bytes": ["splits", "train", "shards", 1, "bytes"],
    "shard's tokens": ["splits", "train", "shards", 1, "tokens"],
    "shard's name": ["splits", "train", "shards", 1, "name"],
    "a table's hash": ["splits", "train", "files", "samples.npy"],
    "a split": ["splits", "valid"],
    "shards": ["splits", "train", "shards"],
    "corpus": ["corpus"],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_sealed_index_of_other_types_and_numbers_is_refused_in_one_line(copy, place):
    for value in HOSTILE:
        if (place[-1], value) in [("corpus", {}), ("name", "x")] or (place[-1], value) == ("eos", 0):
            continue
        shutil.copy(copy / "index.json", copy / "index.before")
        try:
            sealed(copy, put(*place, value=value))
        except (TypeError, AttributeError, KeyError):  # such an index has no fingerprint
            continue
        (found,) = set(read(copy))
        assert "index.json" in found and "\n" not in found and len(found) < 600, (value, found)
        shutil.move(copy / "index.before", copy / "index.json")


TABLES = {
    "shape of 2 ** 70": npy(np.zeros(3, "<u8")).replace(b"(3,)", b"(%d,)" % 2**70),
    "empty": b"",
    "zip": b"PK\3\4" + bytes(100),
    "parentheses": b"\x93NUMPY\1\0" + (5000).to_bytes(2, "little") + b"(" * 5000,
    "no header": b"\x93NUMPY\3\0\xff\xff\xff\xff",
    "floats": npy(np.zeros(15)),
    "two dimensions": npy(np.zeros((15, 2), "<u8")),
}


@pytest.mark.parametrize("name", ["samples.npy", "documents.npy"])
@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_a_sealed_table_of_another_kind_is_refused_in_one_line(copy, name, content):
    (copy / "train" / name).write_bytes(content)
    sealed(copy)
    one_line_each(read(copy), [f"index.json: .*{name}"])


def changed_table(path: Path, change) -> None:
    table = np.load(path)
    change(table)
    np.save(path, table)


@pytest.mark.parametrize("start", [2**63, 2**64 - 1, 7])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_sealed_documents_ascend_from_the_first_token_to_the_last(copy, place, start):
    changed_table(copy / "train/documents.npy", lambda table: table.__setitem__(place, start))
    sealed(copy)
    found = read(copy)
    assert found == [] or "documents.npy has starts that do not ascend" in found[0]
    assert found or (place, start) == (1, 7)


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, SHARD_BYTES, 0])
def test_sealed_offsets_ascend_within_their_shard(copy, offset):
    changed_table(copy / "train/samples.npy", lambda table: table["offset"].__setitem__(4, offset))
    sealed(copy)
    one_line_each(read(copy), ["index.json: split train: samples.npy has offsets that do not ascend within"])


def test_a_sealed_shard_cannot_be_shorter_than_its_tokens(copy):
    sealed(copy, put("splits", "train", "shards", 1, "bytes", value=90))
    one_line_each(read(copy), ["index.json: .* (too small|do not ascend)"])


def test_the_index_and_the_tokenizer_have_one_vocabulary(copy):
    sealed(copy, put("tokenizer", "vocab_size", value=2**30))
    one_line_each(read(copy), ["index.json: vocab_size=1073741824 and eos=256 are not those of its tokenizer, 257"])


def test_a_token_beyond_the_vocabulary_is_damage(copy):
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    content[TOKENS : TOKENS + 2] = b"\xff\xff"
    path.write_bytes(content)
    tokens = np.frombuffer(content[TOKENS : TOKENS + 32], "<u2")
    crc = np.uint32(zlib.crc32(tokens.tobytes()))
    changed_table(copy / "train/samples.npy", lambda table: table["crc32"].__setitem__(3, crc))
    sealed(copy)
    one_line_each(read(copy), [f"{SHARD}: sample 3: token 65535 is not in the vocabulary of 257"])


def sparse(how: str) -> bytes:
    """A sparse member of 64 GB in two KB."""
    member = tarfile.TarInfo("000000004.tokens.npy")
    size = 1 << 36
    if how == "old":
        member.type = tarfile.GNUTYPE_SPARSE
        block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
        block[386:483] = bytes(97)
        block[386:410] = b"00000000000\0" + b"00000001000\0"
        block[483:495] = b"\x80" + size.to_bytes(11, "big")
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
        return bytes(block)
    if how == "0.1":
        facts = {"GNU.sparse.map": f"0,1,{size},0", "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "2"}
    else:
        facts = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    member.pax_headers = facts | {"GNU.sparse.name": "000000004.tokens.npy"}
    return member.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(512, b"\0")


@pytest.mark.parametrize("how", ["old", "0.1", "1.0"])
def test_a_sparse_member_is_not_expanded(copy, how):
    path = copy / SHARD
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + sparse(how)[:2048].ljust(2048, b"\0") + whole[4096:])
    sealed(copy)
    tracemalloc.start()
    one_line_each(read(copy), ["sample 4: no sample can be read here"])
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0"])
def test_a_header_that_is_a_compressed_file_too_is_not_decompressed(copy, magic):
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    block = content[2048:2560]
    block[:100] = magic.ljust(100, b"x")
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    content[2048:2560] = block
    path.write_bytes(content)
    sealed(copy)
    assert read(copy) == []  # the tokens beside it are the right ones


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 6 + b"\xff" * 5, b"\xff" * 12])
def test_a_member_is_no_larger_than_its_sample(copy, size):
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    block = content[3072:3584]
    block[124:136] = size
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    content[3072:3584] = block
    path.write_bytes(content)
    sealed(copy)
    one_line_each(read(copy), ["sample 4: "])


def test_lost_samples_take_no_memory(copy):
    """An index may say of a sample that cannot be read that it has any number of tokens."""
    index = Index.open(str(copy))
    reader = SampleReader(index, "train", lost=-1)
    reader.damaged[3] = "damaged"
    assert reader.sample(3).strides == (0,) and reader.tokens(40, 20).tolist()[8:] == [-1] * 12
