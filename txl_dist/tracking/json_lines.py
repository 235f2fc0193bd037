"""Files with a JSON object per line, which are appended to."""

import json
from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from txl_dist.errors import UserError

Record = dict[str, Any]


def append_line(path: Path, record: Record) -> None:
    """Append an object to a file.

    Raises:
        OSError: if it cannot be written; it names the file.
        ValueError: for a number that is not finite, which JSON does not have.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        # The error of a full disk does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def lines_backwards(path: Path, read: Callable[[bytes], Record | None]) -> Iterator[tuple[int, Record | None]]:
    """Yield the lines from the last to the first: the byte at which each ends, and what `read` makes of it.

    An incomplete last line, as left by a machine that stopped, is left out.

    Raises:
        UserError: if the path is not a file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file; move it away")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            yield end, read(content[start:end])
            end = start


def cut(path: Path, end: int) -> None:
    """Cut a file off after so many bytes; make an empty one where there is none."""
    with path.open("ab") as file:
        file.truncate(end)
