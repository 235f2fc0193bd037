"""Finds the files that a path, a folder or a glob stands for, under names that do not depend on where they lie."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def match(pattern: str, problems: list[str]) -> list[tuple[str, Path]]:
    """List the files (name, path) that a path, a folder or a glob stands for, sorted by name.

    Files that cannot be read are appended to `problems`, an empty list; so is it if no file is found.
    """
    path = Path(pattern)
    fixed = len(path.parts) - 1
    matches: Iterable[Path] = [path]
    if os.path.isdir(path):
        fixed += 1
    elif glob.has_magic(str(path)) and not os.path.lexists(path):
        fixed = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
        matches = expand(Path(*path.parts[:fixed]), path.parts[fixed:], problems)

    files: dict[str, Path] = {}
    root = Path(*path.parts[:fixed])
    for matched in matches:
        for file in walk(matched, problems) if os.path.isdir(matched) else readable([matched], problems):
            files[file.relative_to(root).as_posix()] = file
    if not files and not problems:
        problems.append("the folder holds no files" if os.path.isdir(path) else "no file matches the glob")
    return sorted(files.items())


def expand(root: Path, parts: Sequence[str], problems: list[str]) -> Iterator[Path]:
    """Expand the parts of a glob below `root`; `**` stands for a folder and all below it, each real one once."""
    if not parts or list(parts) == ["**"]:
        yield root
        return
    part, *rest = parts
    matches = (folder for folder, _ in tree(root, problems)) if part == "**" else children(root, part, problems)
    for path in matches:
        if not rest or os.path.isdir(path):
            yield from expand(path, rest, problems)


def children(folder: Path, part: str, problems: list[str]) -> Iterator[Path]:
    """Yield the paths in a folder that match one part of a glob; hidden ones only if the part begins with a dot."""
    try:
        if glob.has_magic(part):
            names = fnmatch.filter(os.listdir(folder), part)
        else:
            names = [part]
            os.lstat(folder / part)
    except OSError as error:
        if glob.has_magic(part) or error.errno not in LEADS_NOWHERE:
            problems.append(unreadable(error))
        return
    for name in names:
        if part.startswith(".") or not name.startswith("."):
            yield folder / name


def walk(root: Path, problems: list[str]) -> Iterator[Path]:
    """Yield all files below a folder except hidden ones; links to folders are followed."""
    for folder, names in tree(root, problems):
        yield from readable((folder / name for name in names), problems)


def tree(root: Path, problems: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and all folders below it, each with the names of its files; hidden ones are left out.

    Links are followed after everything else, in sorted order, and each real folder comes once: so one that lies below
    `root` has its own name whatever links to it, and links in a circle end.
    """
    seen: set[str] = set()
    starts = [root]
    while starts:
        links: list[Path] = []
        for start in sorted(starts):
            for folder, folders, names in os.walk(start, onerror=lambda error: problems.append(unreadable(error))):
                identity = os.path.realpath(folder)
                if identity in seen:
                    folders.clear()
                    continue
                seen.add(identity)
                folders[:] = [name for name in folders if not name.startswith(".")]
                paths = [Path(folder, name) for name in folders]
                links += [path for path in paths if path.is_symlink()]
                yield Path(folder), [name for name in names if not name.startswith(".")]
        starts = links


def readable(paths: Iterable[Path], problems: list[str]) -> Iterator[Path]:
    """Yield the regular files among `paths`; any other is appended to `problems`."""
    for path in paths:
        problem = flaw(path)
        if problem is None:
            yield path
        else:
            problems.append(problem)


def flaw(path: Path) -> str | None:
    """Describe why a path is not a file whose text can be read; None if it is."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return unreadable(error)
    return None if stat.S_ISREG(mode) else f"{path}: is not a regular file; the text is read more than once"


def unreadable(error: OSError) -> str:
    """Describe a path that cannot be read; a link that leads nowhere is named with its target."""
    path = Path(error.filename)
    if error.errno not in LEADS_NOWHERE:
        return f"{path}: cannot be read ({error.strerror})"
    if path.is_symlink():
        return f"{path}: is a link that leads nowhere (to {os.readlink(path)}); mend it or delete it"
    return f"{path}: there is no such file or folder (from {Path.cwd()})"
