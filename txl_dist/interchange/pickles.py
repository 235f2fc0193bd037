"""Reads what torch.save or pickle wrote, pickled modules included, without executing anything.

A pickle is a program: it names functions and classes, and calls them. Here only tensors and plain containers are made.
Every other class becomes an inert object with the attributes of the pickled one; a call of anything else is refused.
"""

import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from txl_dist.errors import UserError

LEGACY = 0x1950A86A20F9469CFC6C  # what torch.save began with before 1.6


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

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {})


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
    return storage.as_strided(size, stride, offset)


def parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def instance(kind: type[Inert], *_: Any) -> Inert:
    """An object as protocols 0 and 1 make it."""
    return Inert.__new__(kind)


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "copyreg._reconstructor": instance,
    "copy_reg._reconstructor": instance,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    "collections.defaultdict": collections.defaultdict,
    **{f"{module}.set": set for module in ("builtins", "__builtin__")},
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


class Unpickler(pickle.Unpickler):
    """Makes tensors and plain containers, and stands inert objects in for all else.

    Args:
        storage: gives the storage of a key, dtype and number of elements, as a tensor of one dimension.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

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
        if kind != "storage" or not isinstance(what, torch.dtype) or any(view):
            raise pickle.UnpicklingError(f"{kind} {what} is no storage of a known type")
        return self.storage(str(key), what, elements)


def read(path: Path) -> Any:
    """The content of a file of torch.save (of any version since 0.4) or of pickle.dump.

    Raises:
        UserError: where it is none, is damaged, or wants something called.
    """
    try:
        with open(path, "rb") as file:
            return read_zip(file) if zipfile.is_zipfile(file) else read_stream(file)
    except CallRefused as error:
        raise UserError(f"{path}: is refused, for loading it would call {error}; nothing of it was executed") from error
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        OverflowError,
    ) as error:
        raise UserError(f"{path}: cannot be read as a file of PyTorch ({type(error).__name__}: {error})") from error


def read_zip(file: BinaryIO) -> Any:
    """As torch.save writes since 1.6: a zip archive with data.pkl, and each storage in a file of its own."""
    with zipfile.ZipFile(file) as archive:
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("the archive holds no data.pkl")
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        known: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
            if key not in known:
                content = bytearray(archive.read(f"{folder}data/{key}"))
                known[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            return known[key][:elements]

        with archive.open(found[0]) as stream:
            return Unpickler(stream, storage).load()  # type: ignore[arg-type]


def read_stream(file: BinaryIO) -> Any:
    """As torch.save wrote before 1.6: pickles one after the other, then the storages. Or one pickle without tensors."""
    file.seek(0)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        if key not in storages:
            storages[key] = torch.empty(elements, dtype=dtype)
        return storages[key]

    def load() -> Any:
        return Unpickler(file, storage).load()

    first = load()
    if first != LEGACY:
        return first
    load(), load()  # the protocol, and sizes of C's types
    content = load()
    for key in load():
        values = storages[str(key)]
        if int.from_bytes(file.read(8), "little") != values.numel():
            raise ValueError(f"storage {key} has not the size that is told of it")
        data = file.read(values.nbytes)
        if len(data) != values.nbytes:
            raise EOFError(f"storage {key} ends too early")
        if data:
            values.copy_(torch.frombuffer(bytearray(data), dtype=values.dtype))
    return content


def state_dict(module: Inert, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and buffers of an inert torch module by their names, as Module.state_dict gives them."""
    found: dict[str, Tensor] = {}
    own = vars(module)
    for name, value in [*own.get("_parameters", {}).items(), *own.get("_buffers", {}).items()]:
        if isinstance(value, Tensor):
            found[prefix + name] = value
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Inert):
            found |= state_dict(child, f"{prefix}{name}.")
    return found
