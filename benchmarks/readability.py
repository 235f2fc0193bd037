"""Measure how the house reads: python benchmarks/readability.py [TREE] [--before REV] [--show CHECK] [--quick]

Words are counted in the package, tests, conf and docs; everything about code in the package alone. The times are those
of this interpreter's packages.
"""

import argparse
import ast
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

TEXTS = ["txl_dist", "tests", "conf", "docs", "README.md"]
LONGEST_FUNCTION = 40
LONGEST_ENTRY_POINT = 80

# Words that nobody else uses so: counted wherever they stand, in prose and inside longer names.
TOLD = r"(?<![a-zA-Z])([Tt]old|[Tt]ells?)(?![a-zA-Z])"
PRIVATE = r"(?<![a-zA-Z])(Placement|placement|passed_steps|Sight|WAYS|Distances|surroundings|whole_norm|newest|damages"
PRIVATE += r"|Saver|interchange|dice|end_on|Clusters|Texts)(?![a-zA-Z])"
PHRASES = r"\b(nats|bits|tokens|seconds|bytes) a (token|second|step|byte|word)\b|\b(is|are) no (?!longer|more)"
PHRASES += r"|\b(goes|going|go) on\b|\bpassed over\b"
# English words: counted as names in Python only. (`part`, `size`, `weight` and `first` are everybody's names, too.)
NAMES = """standing trained reach way ways fastest World whole Which Yes Count Natural Share Meter Screen Skipped
    Contents meet leave refuses spike members each found mine here place"""

# A function whose docstring begins so says what it is, not what it does. Words in -s are not imperatives, either.
NO_VERB = r"""The An? All Any Each Every One Its? This These Those That Whether How Where When Which Who Why What Of If
    As By For From In On To With Without True False None No Not Ours Theirs \w*[^\Ws]s \d+"""

Place = tuple[Path, int, str]  # a file, a line, and what stands there
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code(tree: Path) -> Iterator[tuple[Path, ast.AST]]:
    """Yield every node of every module, with its file."""
    for path in sorted((tree / "txl_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def texts(tree: Path, *suffixes: str) -> Iterator[Path]:
    """Yield the files in which words are counted, without the runs and datasets of earlier versions."""
    for name in TEXTS:
        for path in [tree / name, *sorted((tree / name).rglob("*"))]:
            if path.suffix in suffixes and "fixtures" not in path.parts:
                yield path


def matches(expression: str, tree: Path) -> Iterator[Place]:
    for path in texts(tree, ".py", ".md", ".yaml"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for _ in re.finditer(expression, line):
                yield path, number, line.strip()


def names(tree: Path) -> Iterator[Place]:
    for path in texts(tree, ".py"):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME and token.string in NAMES.split():
                yield path, token.start[0], token.line.strip()


def parallel_assignments(tree: Path) -> Iterator[Place]:
    """Find `a, b = 1, 2`; a swap, or any other order of the same expressions, is allowed."""
    for path, node in code(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                if sorted(map(ast.unparse, targets)) != sorted(map(ast.unparse, values)):
                    yield path, node.lineno, ast.unparse(node)


def walruses(tree: Path) -> Iterator[Place]:
    for path, node in code(tree):
        if isinstance(node, ast.BoolOp):
            for child in ast.walk(node):
                if isinstance(child, ast.NamedExpr):
                    yield path, child.lineno, ast.unparse(child)


def long_functions(tree: Path) -> Iterator[Place]:
    for path, node in code(tree):
        if isinstance(node, Function) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
            yield path, node.lineno, node.name


def long_entry_points(tree: Path) -> Iterator[Place]:
    for path in sorted((tree / "txl_dist").glob("*.py")):
        text = path.read_text()
        if "\ndef main(" in text and text.count("\n") > LONGEST_ENTRY_POINT:
            yield path, text.count("\n"), "the last line"


def no_sentence(tree: Path) -> Iterator[Place]:
    """Find docstrings that begin with a forbidden word or a small letter, or whose first paragraph has no end."""
    for path, node in code(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
            first = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
            ended = first.endswith((".", ":", "!", "?", ".)")) or ": python " in first  # a title, and how to start it
            if re.match(r"(What|Of|The same)\b", first) or first[0].islower() or not ended:
                yield path, getattr(node, "lineno", 1), first


def no_verb(tree: Path) -> Iterator[Place]:
    for path, node in code(tree):
        if isinstance(node, Function) and not any("property" in ast.unparse(line) for line in node.decorator_list):
            text = ast.get_docstring(node) or ""
            if re.match(rf"({'|'.join(NO_VERB.split())})\b", text):
                yield path, node.lineno, text.split("\n")[0]


def no_docstring(tree: Path) -> Iterator[Place]:
    for path, parent in code(tree):
        if isinstance(parent, ast.Module | ast.ClassDef):
            for node in parent.body:
                public = isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")
                if public and not ast.get_docstring(node):
                    yield path, node.lineno, node.name


CHECKS: dict[str, tuple[str, Callable[[Path], Iterator[Place]]]] = {
    "told": ("told, tell, tells", partial(matches, TOLD)),
    "words": ("other private words", partial(matches, PRIVATE)),
    "names": ("English words as private names", names),
    "phrases": ("nats a token, is no, goes on, passed over", partial(matches, PHRASES)),
    "parallel": ("parallel assignments", parallel_assignments),
    "walrus": ("walruses inside and/or", walruses),
    "sentence": ("docstrings that are no sentence", no_sentence),
    "verb": ("docstrings of functions without a verb", no_verb),
    "missing": ("public, without a docstring", no_docstring),
    "functions": (f"functions beyond {LONGEST_FUNCTION} lines", long_functions),
    "entry": (f"entry points beyond {LONGEST_ENTRY_POINT} lines", long_entry_points),
}


def run(tree: Path, *command: str) -> float:
    """Run a command in a tree and return its CPU seconds, its children's included."""
    before = os.times()
    subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(tree: Path, quick: bool) -> dict[str, str]:
    counts = {title: len(list(check(tree))) for title, check in CHECKS.values()}
    rows = {title: f"{count:,}" for title, count in counts.items()}
    lines = [line.strip() for path in (tree / "txl_dist").rglob("*.py") for line in path.read_text().splitlines()]
    code_lines = sum(bool(line) and not line.startswith("#") for line in lines)
    rows["parallel assignments per 1,000 lines of code"] = f"{1000 * counts['parallel assignments'] / code_lines:.1f}"
    turns = [run(tree, sys.executable, "-m", "txl_dist.train", "--help") for _ in range(5)]
    rows["CPU seconds of train --help"] = f"{median(turns):.2f}"
    if quick and "\nquick:" in (tree / "Makefile").read_text():
        began = time.perf_counter()
        run(tree, "make", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}", "quick")
        rows["seconds of make quick"] = f"{time.perf_counter() - began:.0f}"
    return rows


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--show CHECK | head` is quiet
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parents[1], help="default: this checkout")
    parser.add_argument("--before", metavar="REV", help="measure this revision of git, too")
    parser.add_argument("--show", choices=CHECKS, help="list what a check finds, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="time `make quick`, too")
    options = parser.parse_args()
    tree = options.tree.resolve()
    if options.show:
        for path, line, text in CHECKS[options.show][1](tree):
            print(f"{path.relative_to(tree)}:{line}: {text}")
        return
    columns = {"now": measure(tree, options.quick)}
    if options.before:
        archive = subprocess.check_output(["git", "archive", options.before], cwd=tree)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            columns = {options.before: measure(Path(folder), options.quick)} | columns
    table = Table("", *columns, box=None)
    for title in columns["now"]:
        table.add_row(title, *(rows.get(title, "") for rows in columns.values()))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
