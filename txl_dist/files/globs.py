"""Paths that users give as patterns."""

import glob
from collections.abc import Callable, Iterable
from pathlib import Path


def expand_globs(patterns: Iterable[str], accepts: Callable[[str], object]) -> list[str]:
    """Expand paths and globs, without repetitions; a glob matches those that are accepted, a path is itself."""
    expanded: list[str] = []
    for pattern in patterns:
        literal = not glob.has_magic(pattern) or Path(pattern).is_dir()  # a folder's name may hold [brackets]
        matches = [pattern] if literal else [path for path in sorted(glob.glob(pattern)) if accepts(path)]
        expanded += [path for path in matches if path not in expanded]
    return expanded
