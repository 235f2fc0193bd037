"""A dataset that is made to do harm, all its checksums right, does none and is refused in one line."""

import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.data.damage import (
    SHARD,
    SHARD_BYTES,
    TOKENS_4,
    TOKENS_START,
    assign,
    change_table,
    check_messages,
    npy,
    put_instead,
    read,
    seal,
)
from txl_dist.data.format import content_fingerprint
from txl_dist.files.atomic import sha256_of_file


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_dataset_is_unpickled(copy, tmp_path):
    trap = tmp_path / "trap"
    bait = npy(np.array([Trap(trap)], object), allow_pickle=True)
    path = copy / SHARD
    original = path.read_bytes()
    for data in (bait, pickle.dumps(Trap(trap))):
        path.write_bytes(put_instead(("000000004.tokens.npy", data))(original))
        (error,) = read(copy)
        assert f"{SHARD}: sample 4: its tokens.npy does not hold an array of numbers" in error
    path.write_bytes(original)
    table = copy / "train/samples.npy"
    index = json.loads((copy / "index.json").read_text())
    table.write_bytes(bait)
    index["splits"]["train"]["files"]["samples.npy"] = sha256_of_file(table)
    del index["sha256"]
    (copy / "index.json").write_text(json.dumps(index))
    (error,) = read(copy)
    assert "index.json: is damaged" in error and "object" in error.lower()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.is_dir()  # the trap was one


def test_members_with_other_paths_and_links_are_refused_and_write_nothing(copy, tmp_path):
    path = copy / SHARD
    original = path.read_bytes()
    before = sorted(tmp_path.rglob("*"))
    tokens = npy(TOKENS_4)
    for name in ("../000000004.tokens.npy", str(tmp_path / "000000004.tokens.npy")):
        path.write_bytes(put_instead((name, tokens))(original))
        check_messages(read(copy), ["sample 4: expected 000000004 with its tokens here, but "])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        link = tarfile.TarInfo("000000004.tokens.npy")
        link.type, link.linkname = kind, "/etc/passwd"
        path.write_bytes(original[:2048] + link.tobuf().ljust(2048, b"\0") + original[4096:])
        check_messages(read(copy), ["sample 4: no sample can be read here"])
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
    index["fingerprint"] = content_fingerprint(index["tokenizer"]["files"], index["splits"])
    (copy / "index.json").write_text(json.dumps(index))
    check_messages(read(copy), ["index.json: .* is not the name of a file in a dataset"])


HOSTILE = ["x", None, [], {}, True, -1, 0, 0.5, 1e999, 2**63, 2**70, "\ud800", [[[]]]]

KEYS = {
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


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_a_sealed_index_of_other_types_and_numbers_is_refused_in_one_line(copy, keys):
    for value in HOSTILE:
        if (keys[-1], value) in [("corpus", {}), ("name", "x")] or (keys[-1], value) == ("eos", 0):
            continue
        shutil.copy(copy / "index.json", copy / "index.before")
        try:
            seal(copy, assign(*keys, value=value))
        except (TypeError, AttributeError, KeyError):  # such an index has no fingerprint
            continue
        (error,) = set(read(copy))
        assert "index.json" in error and "\n" not in error and len(error) < 600, (value, error)
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
    seal(copy)
    check_messages(read(copy), [f"index.json: .*{name}"])


@pytest.mark.parametrize("start", [2**63, 2**64 - 1, 7])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_sealed_documents_ascend_from_the_first_token_to_the_last(copy, position, start):
    change_table(copy / "train/documents.npy", lambda table: table.__setitem__(position, start))
    seal(copy)
    errors = read(copy)
    assert errors == [] or "documents.npy has starts that do not ascend" in errors[0]
    assert errors or (position, start) == (1, 7)


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, SHARD_BYTES, 0])
def test_sealed_offsets_ascend_within_their_shard(copy, offset):
    change_table(copy / "train/samples.npy", lambda table: table["offset"].__setitem__(4, offset))
    seal(copy)
    check_messages(read(copy), ["index.json: split train: samples.npy has offsets that do not ascend within"])


def test_a_sealed_shard_cannot_be_shorter_than_its_tokens(copy):
    seal(copy, assign("splits", "train", "shards", 1, "bytes", value=90))
    check_messages(read(copy), ["index.json: .* (too small|do not ascend)"])


def test_the_index_and_the_tokenizer_have_one_vocabulary(copy):
    seal(copy, assign("tokenizer", "vocab_size", value=2**30))
    check_messages(read(copy), ["index.json: vocab_size=1073741824 and eos=256 are not those of its tokenizer, 257"])


def test_a_token_beyond_the_vocabulary_is_damage(copy):
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    content[TOKENS_START : TOKENS_START + 2] = b"\xff\xff"
    path.write_bytes(content)
    tokens = np.frombuffer(content[TOKENS_START : TOKENS_START + 32], "<u2")
    crc = np.uint32(zlib.crc32(tokens.tobytes()))
    change_table(copy / "train/samples.npy", lambda table: table["crc32"].__setitem__(3, crc))
    seal(copy)
    check_messages(read(copy), [f"{SHARD}: sample 3: token 65535 is not in the vocabulary of 257"])


def sparse(how: str) -> bytes:
    """Make a sparse member of 64 GB in two KB."""
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
    original = path.read_bytes()
    path.write_bytes(original[:2048] + sparse(how)[:2048].ljust(2048, b"\0") + original[4096:])
    seal(copy)
    tracemalloc.start()
    check_messages(read(copy), ["sample 4: no sample can be read here"])
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
    seal(copy)
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
    seal(copy)
    check_messages(read(copy), ["sample 4: "])
