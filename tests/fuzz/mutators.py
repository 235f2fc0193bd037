"""Damage the content of files: one mutator for each kind, and one for any bytes. All draw from their `rng` alone."""

import copy
import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = [-1, 0, 1, 2, 7, 2**16, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-40]
NUMBERS += [1e300, float("inf"), float("nan")]
TEXTS = ["", " ", "x", "null", "12", "../../x", "/etc/passwd", "a/b", "\ud800", "\0", "é" * 300, "x" * 70_000, "${x}"]
VALUES: list[Any] = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [1] * 50_000, {"x": 1}, [None], {"": {}}]


def nested(depth: int, leaf: Any = 0) -> Any:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def any_bytes(data: bytes, rng: Random) -> bytes:
    """Flip bits, cut, splice and repeat."""
    content = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content))
        end = min(len(content), at + rng.choice([1, 8, 64, 512]))
        kind = rng.choice(["flip", "flip", "byte", "cut", "splice", "remove", "repeat", "zeros", "ones"])
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            content[at] = rng.randrange(256)
        elif kind == "cut":
            del content[at:]
        elif kind == "splice":
            start = rng.randrange(len(content))
            content[at:end] = content[start : start + end - at]
        elif kind == "remove":
            del content[at:end]
        elif kind == "repeat":
            content[at:at] = content[at:end] * rng.choice([1, 3, 100])
        else:
            content[at:end] = (b"\0" if kind == "zeros" else b"\xff") * (end - at)
        if not content:
            break
    return bytes(content)


# --------------------------------------------------------------------------------------------------------- JSON


def all_slots(value: Any) -> list[tuple[Any, Any]]:
    """Return all (container, key) within a JSON value."""
    slots: list[tuple[Any, Any]] = []
    unread = [value]
    while unread:
        container = unread.pop()
        if isinstance(container, dict | list):
            keys = list(container) if isinstance(container, dict) else range(len(container))
            slots += [(container, key) for key in keys]
            unread += [container[key] for key in keys]
    return slots


def json_value(value: Any, rng: Random) -> Any:
    """Change values, keys and shapes within a JSON value, in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        slots = all_slots(value)
        if not slots:
            break
        container, key = rng.choice(slots)
        kind = rng.choice(["value", "value", "value", "near", "remove", "twice", "swap", "key", "deep"])
        old = container[key]
        if kind == "near" and type(old) in (int, float):
            container[key] = old + rng.choice([-1, 1, 0.5, 2**32])
        elif kind == "near" and isinstance(old, str):
            container[key] = rng.choice([old.upper(), old + "x", old[1:], old + "\n", f"../{old}"])
        elif kind == "remove":
            del container[key]
        elif kind == "twice" and isinstance(container, list):
            container.append(old)
        elif kind == "swap":
            other, other_key = rng.choice(slots)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == "key" and isinstance(container, dict):
            container[rng.choice(TEXTS)] = container.pop(key)
        elif kind == "deep":
            container[key] = nested(rng.choice([10, 100, 200]))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))  # which the next change may be within
    return value


def json_text(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.1:
        return rng.choice([b"[" * 100_000, b"1" * 5000, b'{"a":' * 2000, b"\xff\xfe", b"null", b"[]", b"1e999", b'""'])
    try:
        return json.dumps(json_value(json.loads(data), rng)).encode()
    except RecursionError:
        return b"[" * 100_000


# ------------------------------------------------------------------------------------------- tables and archives


def npy(data: bytes, rng: Random) -> bytes:
    """Change the header, or numbers behind it."""
    size = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + size]
    body = bytearray(data[10 + size :])
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 3])):
            at = rng.randrange(0, max(len(body) - 8, 1))
            body[at : at + 8] = struct.pack(
                "<Q", rng.choice([0, 1, 2**31, 2**62, 2**63, 2**64 - 1, rng.randrange(2**16)])
            )
        return data[: 10 + size] + bytes(body)
    shape = rng.choice(
        ["(2**70,)", f"({2**70},)", f"({2**62},)", "(0,)", "(-1,)", "()", "(3, 5)", "'x'", "(" * 9000, "None"]
    )
    descr = rng.choice(
        ["'<u8'", "'|O'", "'|V8'", "'|S1000000000'", "[('a', '<u8'), ('a', '<u8')]", "'<f8'", "''", "5", "'<U2'"]
    )
    order = rng.choice(["False", "True", "3"])
    text = rng.choice([
        f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}",
        f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}",
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}",
        "{}", "((((", "'" * 999, "1L", "{'descr'", "\n", header.decode("latin-1").replace("<", ">"),
    ]).encode()  # fmt: skip
    version = rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"])
    header_length = (len(text) + 1).to_bytes(2 if version == b"\1\0" else 4, "little")
    if rng.random() < 0.1:
        header_length = b"\xff" * len(header_length)
    magic = rng.choice([b"\x93NUMPY"] * 8 + [b"PK\3\4", b"\x80\4"])
    return magic + version + header_length + text + b"\n" + bytes(body)


def tar(data: bytes, rng: Random) -> bytes:
    """Change kind, size or name of a member, and make the checksum of its header right."""
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return any_bytes(data, rng)
    content = bytearray(data)
    at = rng.choice(headers)
    kind = rng.choice(["type", "size", "name", "sparse", "pax", "magic", "token"])
    if kind == "type":
        content[at + 156] = rng.choice(b"0123456789SxgLKVD\0A")
    elif kind == "size":
        huge = rng.choice(
            [b"77777777777\0", b"\x80" + b"\0" * 6 + b"\xff" * 5, b"\xff" * 12, b"0\0", b"x", b"00000000001\0"]
        )
        content[at + 124 : at + 124 + len(huge)] = huge
    elif kind == "name":
        name = rng.choice(
            [b"../../x", b"/etc/x", b"\x1f\x8b\x08", b"BZh91AY&SY", b"\xff" * 100, b"", b"000000001.tokens.npy"]
        )
        content[at : at + 100] = name.ljust(100, b"\0")
    elif kind == "sparse":
        content[at + 156] = ord("S")
        content[at + 386 : at + 386 + 96] = (b"00000000000\0" + b"77777777777\0") * 4
        content[at + 483 : at + 495] = b"77777777777\0"
    elif kind == "pax":
        content[at : at + 1536] = pax_member(rng)[:1536].ljust(1536, b"\0")
    elif kind == "magic":
        content[at + 257 : at + 265] = rng.choice([b"ustar  \0", b"ustar\x0099", b"\0" * 8])
    else:
        start = at + 512 + 128
        content[start : start + 2] = rng.choice([b"\xff\xff", b"\1\1", b"\0\1"])
    if kind not in ("pax", "token"):
        block = content[at : at + 148] + b" " * 8 + content[at + 156 : at + 512]
        content[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(content[: len(data)])


def pax_member(rng: Random) -> bytes:
    """Make a member whose pax headers say that it is sparse, or has another size or name."""
    member = tarfile.TarInfo("000000000.tokens.npy")
    member.pax_headers = rng.choice([
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 36)},
        {"GNU.sparse.map": f"0,1,{1 << 36},0", "GNU.sparse.size": str(1 << 36), "GNU.sparse.numblocks": "2"},
        {"size": str(1 << 40)},
        {"path": "../" * 100 + "x"},
    ])  # fmt: skip
    return member.tobuf(tarfile.PAX_FORMAT)


def safetensors(data: bytes, rng: Random) -> bytes:
    """Change names, types, shapes and offsets in the header; at times with data that fit it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    kind = rng.choice(["length", "value", "value", "shape", "rename", "drop", "half", "many", "alias"])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    if kind == "length":
        length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + data[8:]
    if kind == "value":
        json_value(header, rng)
    elif kind == "shape":
        entry["shape"] = rng.choice(
            [entry["shape"][::-1], [*entry["shape"], 1], [len(body)], [0, 2**62], [2**32, 2**32], []]
        )
    elif kind == "rename":
        header[rng.choice([f"module.{name}", "x", "", "__metadata__", *names])] = header.pop(name)
    elif kind == "drop":
        start, end = entry["data_offsets"]
        body = body[:start] + body[end:]
        del header[name]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [offset - (end - start) for offset in other["data_offsets"]]
    elif kind == "half":
        for other in names:
            header[other]["dtype"] = rng.choice(["F16", "BF16"])
            header[other]["shape"] = [2, *header[other]["shape"]]
    elif kind == "many":
        header |= {f"layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}
    else:
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# ------------------------------------------------------------------------------------------------------- pickles

DOUBLED = b"]q\x7f" + b"".join(b"](h\x7fh\x7feq\x7f" for _ in range(60))  # a list of 2 ** 60 lists
KEY = b")q\x7f" + b"h\x7fh\x7f\x86q\x7f" * 60  # a tuple whose hash takes 2 ** 60 steps
BOMBS = [
    b"r\xff\xff\xff\x7f",  # memo slot 2 ** 31
    b"\x8d" + struct.pack("<Q", 2**40),  # a text of so many bytes
    b"\x8e" + struct.pack("<Q", 2**33),
    b"\x96" + struct.pack("<Q", 2**33),  # a bytearray
    b"\x95" + struct.pack("<Q", 2**40),  # a frame
    b"\x8b" + struct.pack("<i", 2**31 - 1),  # a long number
    b"(" * 50_000,
    b"]" * 50_000 + b"a" * 49_999,
    b"I" + b"9" * 5000 + b"\n",
    DOUBLED,
    KEY,
    b"}" + KEY + b"Ns",
    b"\x8f(" + KEY + b"\x90",
    b"(" + KEY + b"\x91",
    b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)R",
    b"cos\nsystem\n(X\x02\0\0\0idtR",
    b"N)R", b"Nb", b"}b", b"0", b"0" * 50, b"1", b"u", b"e", b"\x81", b"\x93", b"Q", b"\x82\1", b"\x97", b"\x98",
    b"h\xee",
]  # fmt: skip
INTEGERS = {"BININT": 4, "BININT1": 1, "BININT2": 2}


def pickle_stream(data: bytes, rng: Random) -> bytes:
    """Insert, remove or repeat operations of one pickle, or change their numbers."""
    operations = list(pickletools.genops(data))
    cuts = [position for _, _, position in operations] + [operations[-1][2] + 1]
    content = data
    for _ in range(rng.choice([1, 1, 2])):
        number = rng.randrange(len(operations))
        start, end = cuts[number : number + 2]
        kind = rng.choice(["bomb", "bomb", "remove", "repeat", "number", "number", "size"])
        if kind == "number":
            numbers = [i for i, (code, _, _) in enumerate(operations) if code.name in INTEGERS]
            number = rng.choice(numbers or [number])
            start, end = cuts[number : number + 2]
            value = rng.choice([0, 1, 255, 2**31 - 1, 2**20, 2**40, 2**62, 2**70, -1])
            new = b"\x8a" + bytes([len(raw := pickle.encode_long(value))]) + raw if numbers else b"N"
        elif kind == "size":
            new = pickle.dumps(rng.choice([(2**20, 2**20), (2**62, 2**62), (), (-1,), [None], (0.5,), "x"]), 2)[2:-1]
        else:
            new = {"bomb": rng.choice(BOMBS), "remove": b"", "repeat": content[start:end] * 2}[kind]
            start = end if kind == "bomb" else start
        content = content[:start] + new + content[end:]
        if kind != "bomb" or len(new) > 100:
            break
    return content


def torch_file(data: bytes, rng: Random) -> bytes:
    """Damage the pickle of a file of torch.save, its storages, or the archive around them."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        ends = [0]
        for _ in range(5):
            try:
                ends.append(ends[-1] + max(position for _, _, position in pickletools.genops(data[ends[-1] :])) + 1)
            except ValueError:
                break
        number = rng.randrange(len(ends) - 1)
        start, end = ends[number : number + 2]
        return data[:start] + pickle_stream(data[start:end], rng) + data[end:]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    main = next(name for name in entries if name.endswith("data.pkl"))
    storages = [name for name in entries if "/data/" in name]
    kind = rng.choice(["pickle"] * 7 + ["cut", "drop", "deflated", "twice", "byteorder"])
    if kind == "pickle":
        entries[main] = pickle_stream(entries[main], rng)
    elif kind == "cut":
        name = rng.choice(storages)
        entries[name] = entries[name][: rng.randrange(len(entries[name]) + 1)]
    elif kind == "drop":
        del entries[rng.choice(list(entries))]
    elif kind == "deflated":
        entries[rng.choice(storages)] = bytes(200 << 20)
    elif kind == "twice":
        entries["other/data.pkl"] = entries[main]
    else:
        entries[main.replace("data.pkl", "byteorder")] = rng.choice([b"big", b"", b"little" * 9])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=archive.compression)
    return stream.getvalue()


# --------------------------------------------------------------------------------------------------- words, lines


def words(data: bytes, rng: Random) -> bytes:
    """Change words, line ends and counts of a vocabulary with one word per line."""
    lines = data.split(b"\n")
    for _ in range(rng.choice([1, 2, 5])):
        new = rng.choice(
            [b"", b" ", b"<eos>", b"<unk>", b"\xff", b"\xef\xbb\xbf", b"a b", b"\0", b"x" * 100_000, b"\xc2\x85"]
        )
        at = rng.randrange(len(lines))
        kind = rng.choice(["replace", "insert", "remove", "swap"])
        if kind == "replace":
            lines[at] = new
        elif kind == "insert":
            lines.insert(at, new)
        elif kind == "remove" and len(lines) > 1:
            del lines[at]
        else:
            lines[0], lines[at] = lines[at], lines[0]
    return rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\0\n"]).join(lines)


def arguments(given: list[str], rng: Random) -> list[str]:
    """Change values, keys and characters of a command line."""
    given = list(given)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(given))
        key, _, value = given[at].partition("=")
        kind = rng.choice(["value"] * 5 + ["typed", "key", "remove", "twice", "flag", "noise"])
        if kind == "value":
            given[at] = f"{key}={rng.choice(NUMBERS)}"
        elif kind == "typed":
            given[at] = f"{key}={rng.choice(['null', 'true', '[]', '{}', '[1,2]', '{a: 1}', '', '???', *TEXTS[1:9]])}"
        elif kind == "key":
            given[at] = (
                f"{rng.choice(['+', '++', '~', '', 'x.', 'hydra.'])}{key}{rng.choice(['', '.x', '@y', '/z'])}={value}"
            )
        elif kind == "remove" and len(given) > 1:
            del given[at]
        elif kind == "twice":
            given.append(given[at])
        elif kind == "flag":
            given.insert(
                at, rng.choice(["--help", "--cfg", "job", "--resolve", "--info", "-h", "--x", "--", "=", "=x", "x="])
            )
        else:
            noise = "".join(rng.choices("=,[]{}()'\"\\$#@~%: \t\n\x01aé€", k=rng.randint(1, 12)))
            given[at] = f"{key}={value}{noise}"
    return [typed(argument, key) for argument in given]


def typed(argument: str, fallback: str) -> str:
    """Return an argument as a shell would pass it; `fallback` if it holds surrogates that a shell cannot pass."""
    if any(0xD800 <= ord(character) < 0xDC80 for character in argument):
        return fallback
    return argument.replace("\0", "\x01").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
