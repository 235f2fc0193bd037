"""With any damage to a shard: right tokens, or an error of one line that names shard and sample."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.damage import (
    SAMPLE_BYTES,
    SHARD,
    SHARD_BYTES,
    TOKENS_4,
    TOKENS_START,
    check_messages,
    cut_to,
    dangling,
    flip,
    folder,
    from_another_dataset,
    gone,
    npy,
    pipe,
    put_instead,
    read,
    read_flipped,
    sample_of,
    unreadable,
)


def swap_samples(data: bytes) -> bytes:
    return sample_of(data, 1) + sample_of(data, 0) + data[2 * SAMPLE_BYTES :]


SHARDS = {
    # cut off, at every kind of boundary and within them; grown
    **{
        f"cut-{size}": (
            cut_to(size),
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
        f"{part}-of-sample-{3 + at}": (
            flip(at * SAMPLE_BYTES + position),
            [expected.format(3 + at)] if expected else [],
        )
        for at in (0, 1, 2)
        for part, position, expected in [
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
            ("first-token", TOKENS_START, "sample {}: the tokens are not those that were written"),
            ("last-token", TOKENS_START + 31, "sample {}: the tokens are not those that were written"),
        ]
    },
    # members
    "no-json": (put_instead(("000000004.tokens.npy", npy(TOKENS_4))), []),
    "no-tokens": (put_instead(("000000004.json", b"{}")), ["sample 4: expected 000000004 with its tokens"]),
    "other-key": (
        put_instead(("000000009.tokens.npy", npy(TOKENS_4))),
        ["sample 4: expected 000000004 with its .* 000000009"],
    ),
    "twice": (
        put_instead(*[("000000004.tokens.npy", npy(TOKENS_4))] * 2),
        ["sample 4: 000000004.tokens.npy: duplicate"],
    ),
    "other-order": (put_instead(("000000004.tokens.npy", npy(TOKENS_4)), ("000000004.json", b"{}")), []),
    "not-npy": (put_instead(("000000004.tokens.npy", b"hello")), ["sample 4: its tokens.npy does not hold an array"]),
    "empty-npy": (
        put_instead(("000000004.tokens.npy", b"")),
        ["sample 4: its tokens.npy does not hold an array of numbers"],
    ),
    "other-type": (
        put_instead(("000000004.tokens.npy", npy(TOKENS_4.astype("<u4")))),
        [r"sample 4: uint32 \(16,\) instead of uint16 \(16,\)"],
    ),
    "other-order-of-bytes": (put_instead(("000000004.tokens.npy", npy(TOKENS_4.astype(">u2")))), ["sample 4: >u2"]),
    "fewer": (put_instead(("000000004.tokens.npy", npy(TOKENS_4[:15]))), [r"sample 4: uint16 \(15,\) instead of"]),
    "other-tokens": (
        put_instead(("000000004.tokens.npy", npy(TOKENS_4[::-1]))),
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


@pytest.mark.parametrize("damage, expected", SHARDS.values(), ids=SHARDS)
def test_a_damaged_shard(copy, damage, expected):
    path = copy / SHARD
    assert path.stat().st_size == SHARD_BYTES
    path.write_bytes(damage(path.read_bytes()))
    check_messages(read(copy), expected)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (gone, "No such file or directory"),
        (folder, "is not a regular file"),
        (dangling, "No such file or directory"),
        (pipe, "is not a regular file"),
        (unreadable, "Permission denied"),
        (from_another_dataset, "the tokens are not those that were written"),
    ],
)
def test_something_else_in_the_place_of_a_shard(copy, other_dataset, damage, expected):
    damage(copy / SHARD, other_dataset)
    check_messages(read(copy), [f"{SHARD}: sample {number}: .*{expected}" for number in (3, 4, 5)])


def test_swapped_shards(copy):
    first, second = copy / SHARD, copy / "train/000002.tar"
    first.rename(copy / "third")
    second.rename(first)
    (copy / "third").rename(second)
    expected = [
        f"000001.tar: sample {n}: expected 00000000{n} with its tokens here, but there is 00000000{n + 3}"
        for n in (3, 4, 5)
    ]
    expected += [
        f"000002.tar: sample {n}: expected 00000000{n} with its tokens here, but there is 00000000{n - 3}"
        for n in (6, 7, 8)
    ]
    check_messages(read(copy), expected)


@given(
    name=st.sampled_from(["train/000001.tar", "train/000004.tar"]),
    position=st.integers(0, 10239),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_of_a_shard_gives_right_tokens_or_an_error(intact, tmp_path_factory, name, position, bit):
    read_flipped(intact, tmp_path_factory, name, position, bit)
