"""Reads what torch.save or pickle wrote, pickled modules included, without executing anything.

A pickle is a program: it names functions and classes, and calls them. Here only tensors and plain containers are made.
Every other class becomes an inert object with the attributes of the pickled one; a call of anything else is refused.
Nothing is made that is larger than the file: a few bytes may ask for a storage of any size, or for an endless hash.
"""

import math
import mmap
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from txl_dist.errors import UserError
from txl_dist.files.parsing import PARSE_ERRORS, describe, shown

LEGACY = 0x1950A86A20F9469CFC6C  # what torch.save began with before 1.6
MAX_DIM = 8  # of a tensor


class CallRefused(pickle.UnpicklingError):
    """A pickle wants something called; its text is the name."""


class Refusing(type):
    """The class of inert classes: making an object is harmless, a call is what a pickle attacks with."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ not in NOT_NEEDED:
            raise CallRefused(cls.__name__)
        return super().__call__()


class Inert(metaclass=Refusing):
    """What stands for an object of a class that is not here: its attributes, and no behaviour."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)


# Calls found in honest files, whose results nobody here looks at: nothing is called, an inert object stands for them.
NOT_NEEDED = {
    "_codecs.encode",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "re._compile",
    "torch.Size",
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",
}


def tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    view = storage.as_strided(size, stride, offset)
    if view.dim() > MAX_DIM or math.prod(view.shape) > storage.numel():
        raise ValueError(f"a tensor of the shape {shown(size)} in a storage of {storage.numel()} numbers")
    return view


def parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def instance(kind: type[Inert], *_: Any) -> Inert:
    """An object as protocols 0 and 1 make it."""
    return Inert.__new__(kind)


def mapping(items: Any = (), *_: Any) -> dict[Any, Any]:
    """Any kind of dict, as an ordinary one."""
    return put({}, items.items() if isinstance(items, dict) else items)


def mapping_with_default(factory: Any = None, *items: Any) -> dict[Any, Any]:
    return mapping(*items)


def put(target: Any, items: Iterable[Any]) -> Any:
    """Set items of a dict. A key is a number or a text: tuples can take endless time to hash."""
    if not isinstance(target, dict):
        raise pickle.UnpicklingError(f"an item of {type(target).__name__}, which is not a dict")
    for key, value in items:
        if not isinstance(key, str | bytes | int | float | None) or (isinstance(key, int) and key.bit_length() > 64):
            raise pickle.UnpicklingError(f"a key of {type(key).__name__}")
        target[key] = value
    return target


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "copyreg._reconstructor": instance,
    "copy_reg._reconstructor": instance,
    "collections.OrderedDict": mapping,
    "collections.Counter": mapping,
    "collections.defaultdict": mapping_with_default,
    **{f"{module}.set": list for module in ("builtins", "__builtin__")},  # nobody looks at sets, and hashes take time
    **{f"{module}.object": object for module in ("builtins", "__builtin__")},
}


STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


InPython: Any = pickle._Unpickler


class Unpickler(InPython):
    """Makes tensors and plain containers, and stands inert objects in for all else.

    Of Python's two unpicklers it extends the one in Python: that in C makes as many places as an index asks for.

    Args:
        storage: gives the storage of a key, dtype and number of elements, as a tensor of one dimension.
    """

    def __init__(self, file: BinaryIO | mmap.mmap, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(put({}, pairs(items)))

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        put(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        put(self.stack[-1], pairs(items))

    def load_empty_set(self) -> None:
        self.append([])

    def load_frozenset(self) -> None:
        self.append(self.pop_mark())

    def load_build(self) -> None:
        """Give an inert object its attributes; those of all else (an OrderedDict's _metadata) are not needed."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert) and isinstance(state, dict):
            vars(self.stack[-1]).update(state)

    def load_bytearray(self) -> None:
        raise pickle.UnpicklingError("a bytearray, which no file of PyTorch holds")

    dispatch = InPython.dispatch | {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: InPython.load_appends,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole in CALLS:
            return CALLS[whole]
        if whole in STORAGES:
            return STORAGES[whole]
        return Refusing(whole, (Inert,), {})

    def persistent_load(self, told: Any) -> Any:
        kind, what, *rest = told
        if kind == "module":  # a class together with its source, as old versions wrote it
            return what
        key, _, elements, *view = rest
        if kind != "storage" or not isinstance(what, torch.dtype) or view not in ([], [None]):
            raise pickle.UnpicklingError(f"{shown(kind)} {shown(what)} is no storage of a known type")
        if not isinstance(key, str | int) or not isinstance(elements, int) or not 0 <= elements < 1 << 62:
            raise pickle.UnpicklingError(f"storage {shown(key)} of {shown(elements)} elements")
        return self.storage(str(key), what, elements)


def pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


class Storages:
    """The storages of a file, made as they are asked for, and together no larger than the file.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.left = size
        self.made: dict[str, Tensor] = {}

    def empty(self, key: str, dtype: torch.dtype, elements: int) -> Tensor:
        """The storage of a key, yet without its numbers where it is new."""
        if key not in self.made:
            self.left -= elements * dtype.itemsize
            if self.left < 0:
                raise ValueError(f"storage {shown(key)} of {elements:,} elements: the file is too short for it")
            self.made[key] = torch.empty(elements, dtype=dtype)
        if self.made[key].dtype != dtype or len(self.made[key]) < elements:
            raise ValueError(f"storage {shown(key)} has two types or sizes")
        return self.made[key]


def read(path: Path) -> Any:
    """The content of a file of torch.save (of any version since 0.4) or of pickle.dump.

    Raises:
        UserError: where it is none, is damaged, or wants something called.
    """
    try:
        with open(path, "rb") as file:
            storages = Storages(path.stat().st_size)
            return read_zip(file, storages) if zipfile.is_zipfile(file) else read_stream(file, storages)
    except CallRefused as error:
        raise UserError(f"{path}: is refused, for loading it would call {error}; nothing of it was executed") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: cannot be read as a file of PyTorch ({describe(error)})") from error


def read_zip(file: BinaryIO, storages: Storages) -> Any:
    """As torch.save writes since 1.6: a zip archive with data.pkl, and each storage in a file of its own."""
    with zipfile.ZipFile(file) as archive:
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("the archive holds no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("the archive is compressed, which torch.save never does")
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")

        def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
            is_new = key not in storages.made
            values = storages.empty(key, dtype, elements)
            if is_new:
                with archive.open(f"{folder}data/{key}") as entry:
                    fill(values, entry)
            return values

        with archive.open(found[0]) as stream:
            return Unpickler(stream, storage).load()  # type: ignore[arg-type]


def read_stream(file: BinaryIO, storages: Storages) -> Any:
    """As torch.save wrote before 1.6: pickles one after the other, then the storages. Or one pickle without tensors."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:  # which makes no room for more than is there

        def load() -> Any:
            return Unpickler(stream, storages.empty).load()

        first = load()
        if first != LEGACY:
            return first
        load(), load()  # the protocol, and sizes of C's types
        content = load()
        keys = load()
        file.seek(stream.tell())
    for key in keys:
        values = storages.made[str(key)]
        if int.from_bytes(file.read(8), "little") != values.numel():
            raise ValueError(f"storage {shown(key)} has not the size that is told of it")
        fill(values, file)
    return content


def fill(storage: Tensor, file: Any) -> None:
    """Read a storage's numbers."""
    if storage.nbytes and file.readinto(storage.view(torch.uint8).numpy()) != storage.nbytes:
        raise EOFError("a storage ends too early")


def state_dict(module: Inert, prefix: str = "", seen: set[int] | None = None) -> dict[str, Tensor]:
    """The parameters and buffers of an inert torch module by their names, as Module.state_dict gives them.

    A module that stands in several places, or within itself, is named by the first alone.
    """
    seen = set() if seen is None else seen
    seen.add(id(module))
    found: dict[str, Tensor] = {}
    own = vars(module)
    for name, value in [*own.get("_parameters", {}).items(), *own.get("_buffers", {}).items()]:
        if isinstance(value, Tensor):
            found[prefix + name] = value
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Inert) and id(child) not in seen:
            found |= state_dict(child, f"{prefix}{name}.", seen)
    return found
