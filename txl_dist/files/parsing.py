"""Tools to parse files that may be damaged or hostile: the exceptions of parsers, and bounded descriptions."""

import json
import reprlib
import struct
import tokenize
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError

# What parsers raise on malformed input, except OSError. Where a format has exceptions of its own, add them.
PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError, and what torch raises
    SyntaxError,
    TypeError,
    ValueError,  # of JSON and of UTF-8, too
    struct.error,
    tokenize.TokenError,
)

Size = Annotated[int, Strict(), Field(ge=0, lt=1 << 62)]  # a count or a position; sums of them fit into int64
Number = Annotated[float, Strict()]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_!-]{1,64}$")]  # of a package
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=255)]  # without a way out of its folder


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown(value: object) -> str:
    """Return at most 200 characters that show a value, however large or deeply nested it is."""
    return reprlib.repr(value).replace("\n", " ")[:200]


def describe(error: BaseException) -> str:
    """Describe the exception of a parser, in one line of at most 400 characters."""
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        return f"{key}={shown(detail['input'])}: {detail['msg'].replace('Input should', 'should')}"[:400]
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:300].removesuffix(": ")
