"""Read files of torch.save and of pickle, pickled modules included, without executing anything.

A pickle is a program: it names functions and classes, and calls them. Here only tensors and plain containers are made.
Every other class becomes an inert object with the attributes of the pickled one; a call of anything else is refused.
Nothing larger than the file is made: a few bytes may ask for a storage of any size, or for an endless hash.
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

LEGACY = 0x1950A86A20F9469CFC6C  # the first value in files of torch.save before 1.6
MAX_DIM = 8  # dimensions of a tensor


class CallRefused(pickle.UnpicklingError):
    """A pickle asks for a call that is not allowed; its text is the name."""


class Refusing(type):
    """The class of inert classes: it refuses calls, by which a pickle attacks; making an object is harmless."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ not in HARMLESS_CALLS:
            raise CallRefused(cls.__name__)
        return super().__call__()


class Inert(metaclass=Refusing):
    """A stand-in for an object of an unknown class: its attributes, and no behaviour."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)


# Calls that occur in honest files and whose results are not needed here: an inert object takes their place.
HARMLESS_CALLS = {
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
    """Rebuild a tensor as a view of its storage.

    Raises:
        ValueError: where it has more dimensions than MAX_DIM, or more numbers than its storage.
    """
    view = storage.as_strided(size, stride, offset)
    if view.dim() > MAX_DIM or math.prod(view.shape) > storage.numel():
        raise ValueError(f"a tensor has the shape {shown(size)}, but its storage {storage.numel()} numbers")
    return view


def parameter(data: Tensor, *_: Any) -> Tensor:
    """Rebuild a parameter as a tensor."""
    return data


def instance(kind: type[Inert], *_: Any) -> Inert:
    """Make an object as protocols 0 and 1 ask for it."""
    return Inert.__new__(kind)


def mapping(items: Any = (), *_: Any) -> dict[Any, Any]:
    """Make any kind of dict an ordinary one."""
    made: dict[Any, Any] = {}
    put(made, items.items() if isinstance(items, dict) else items)
    return made


def mapping_with_default(factory: Any = None, *items: Any) -> dict[Any, Any]:
    """Make a defaultdict an ordinary dict."""
    return mapping(*items)


def put(target: Any, items: Iterable[Any]) -> None:
    """Set items of a dict.

    Raises:
        UnpicklingError: where it is not a dict, or a key not a number or a string: a tuple may take forever to hash.
    """
    if not isinstance(target, dict):
        raise pickle.UnpicklingError(f"an item of {type(target).__name__}, which is not a dict")
    for key, value in items:
        if not isinstance(key, str | bytes | int | float | None) or (isinstance(key, int) and key.bit_length() > 64):
            raise pickle.UnpicklingError(f"a dict's key is a {type(key).__name__}, not a string or a small number")
        target[key] = value


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
    **{f"{module}.set": list for module in ("builtins", "__builtin__")},  # sets are not needed, and hashes take time
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
    """Make tensors and plain containers, and inert objects in place of all else.

    It extends the unpickler that is written in Python: the one in C allocates as much as an index in the file asks for.

    Args:
        storage: returns the storage of a key, dtype and number of elements, as a tensor of one dimension.
    """

    def __init__(self, file: BinaryIO | mmap.mmap, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

    # Opcodes: each method does what the base class does, but with the checks and the plain containers of this module.

    def load_dict(self) -> None:
        """Push a dict of the items since the mark."""
        items = self.pop_mark()
        self.append(mapping(pairs(items)))

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        value = self.stack.pop()
        key = self.stack.pop()
        put(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        """Set the items since the mark."""
        items = self.pop_mark()
        put(self.stack[-1], pairs(items))

    def load_empty_set(self) -> None:
        """Push a list in place of a set."""
        self.append([])

    def load_frozenset(self) -> None:
        """Push a list in place of a frozenset."""
        self.append(self.pop_mark())

    def load_build(self) -> None:
        """Set an inert object's attributes; those of other objects (an OrderedDict's _metadata) are not needed."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert) and isinstance(state, dict):
            vars(self.stack[-1]).update(state)

    def load_bytearray(self) -> None:
        """Refuse a bytearray, whose size could be anything."""
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
        """Return our function for a call that is needed, a dtype for a storage's class, or an inert class."""
        full_name = f"{module}.{name}"
        if full_name in CALLS:
            return CALLS[full_name]
        if full_name in STORAGES:
            return STORAGES[full_name]
        return Refusing(full_name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage, or the class, that torch.save has kept out of the pickle."""
        kind, value, *rest = pid
        if kind == "module":  # a class together with its source, as old versions wrote it
            return value
        key, _, elements, *view = rest
        if kind != "storage" or not isinstance(value, torch.dtype) or view not in ([], [None]):
            raise pickle.UnpicklingError(f"{shown(kind)} {shown(value)} is not a storage of a known type")
        if not isinstance(key, str | int) or not isinstance(elements, int) or not 0 <= elements < 1 << 62:
            raise pickle.UnpicklingError(f"storage {shown(key)} cannot have {shown(elements)} elements")
        return self.storage(str(key), value, elements)


def pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    """Pair keys and values that alternate in a list."""
    return zip(items[::2], items[1::2], strict=True)


class Storages:
    """The storages of a file, made as they are asked for, and together no larger than the file.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.bytes_left = size
        self.made: dict[str, Tensor] = {}

    def empty(self, key: str, dtype: torch.dtype, elements: int) -> Tensor:
        """Return the storage of a key; a new one has not been filled yet.

        Raises:
            ValueError: where the file is too short for it, or it was asked for with another dtype or a smaller size.
        """
        if key not in self.made:
            self.bytes_left -= elements * dtype.itemsize
            if self.bytes_left < 0:
                raise ValueError(f"storage {shown(key)} of {elements:,} elements: the file is too short for it")
            self.made[key] = torch.empty(elements, dtype=dtype)
        if self.made[key].dtype != dtype or len(self.made[key]) < elements:
            raise ValueError(f"storage {shown(key)} has two types or sizes")
        return self.made[key]


def load(path: Path) -> Any:
    """Load the content of a file of torch.save (of any version since 0.4) or of pickle.dump.

    Raises:
        UserError: where it is not one, is damaged, or asks for a call that is not allowed.
    """
    try:
        with open(path, "rb") as file:
            storages = Storages(path.stat().st_size)
            return load_zip(file, storages) if zipfile.is_zipfile(file) else load_stream(file, storages)
    except CallRefused as error:
        raise UserError(
            f"{path}: is refused, because loading it would call {error}; nothing was executed; give a file of tensors "
            "and plain values, as a state dict"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *PARSE_ERRORS) as error:
        raise UserError(f"{path}: cannot be read as a file of torch.save or pickle ({describe(error)})") from error


def load_zip(file: BinaryIO, storages: Storages) -> Any:
    """Load what torch.save writes since 1.6: a zip archive with data.pkl, and each storage in a file of its own."""
    with zipfile.ZipFile(file) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise ValueError(f"the archive holds {len(pickled)} files data.pkl, not one")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("the archive is compressed, which torch.save never does")
        folder = pickled[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")

        def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
            is_new = key not in storages.made
            values = storages.empty(key, dtype, elements)
            if is_new:
                with archive.open(f"{folder}data/{key}") as entry:
                    fill(values, entry)
            return values

        with archive.open(pickled[0]) as stream:
            return Unpickler(stream, storage).load()  # type: ignore[arg-type]


def load_stream(file: BinaryIO, storages: Storages) -> Any:
    """Load what torch.save wrote before 1.6: pickles one after the other, then the storages; or one pickle alone."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:  # a read of too many bytes allocates none

        def next_pickle() -> Any:
            return Unpickler(stream, storages.empty).load()

        first = next_pickle()
        if first != LEGACY:
            return first
        next_pickle()  # the protocol
        next_pickle()  # sizes of C's types
        content = next_pickle()
        keys = next_pickle()
        file.seek(stream.tell())
    for key in keys:
        values = storages.made[str(key)]
        if int.from_bytes(file.read(8), "little") != values.numel():
            raise ValueError(f"storage {shown(key)} does not have the size that its tensors give it")
        fill(values, file)
    return content


def fill(storage: Tensor, file: Any) -> None:
    """Read a storage's numbers from a file.

    Raises:
        EOFError: where the file ends too early.
    """
    if storage.nbytes and file.readinto(storage.view(torch.uint8).numpy()) != storage.nbytes:
        raise EOFError("a storage ends too early")


def state_dict(module: Inert, prefix: str = "", seen: set[int] | None = None) -> dict[str, Tensor]:
    """Return the parameters and buffers of an inert torch module by their names, as Module.state_dict does.

    A module that has several names, or holds itself, appears under the first name only.
    """
    seen = set() if seen is None else seen
    seen.add(id(module))
    tensors: dict[str, Tensor] = {}
    own = vars(module)
    for name, value in [*own.get("_parameters", {}).items(), *own.get("_buffers", {}).items()]:
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Inert) and id(child) not in seen:
            tensors |= state_dict(child, f"{prefix}{name}.", seen)
    return tensors
