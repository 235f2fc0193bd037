"""Files that may be anybody's, damaged or hostile: what parsers raise on them, and bounded words for it."""

import json
import reprlib
import struct
import tokenize
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError

# What parsers raise on malformed input, OSError apart. Of a format's own exceptions add those to it.
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

Size = Annotated[int, Strict(), Field(ge=0, lt=1 << 62)]  # a count or a position: sums of them fit into int64
Number = Annotated[float, Strict()]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_!-]{1,64}$")]  # of a package
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=255)]  # leads out of no folder


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown(value: object) -> str:
    """Show a value of a foreign file in a few words, however large or deeply nested it is."""
    return reprlib.repr(value).replace("\n", " ")[:200]


def describe(error: BaseException) -> str:
    """Describe what a parser has raised, in one line of bounded length."""
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        return f"{key}={shown(detail['input'])}: {detail['msg'].replace('Input should', 'should')}"[:400]
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:300].removesuffix(": ")
