"""Files are found under the same names everywhere; what is wrong with them is reported by key and path."""

from pathlib import Path
from typing import Any

from txl_dist.config.schema import StdlibCorpusConfig, TextCorpusConfig
from txl_dist.data.preparing import corpora


def text_corpus(**values) -> TextCorpusConfig:
    defaults: dict[str, Any] = dict.fromkeys(("path", "train", "valid", "test"))
    defaults |= {"document": "file", "split_by": "auto", "valid_share": 0.05, "test_share": 0.1}
    return TextCorpusConfig(name="text", **{**defaults, **values})


def made(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(config: TextCorpusConfig) -> list[str]:
    problems: list[str] = []
    source_names = [source.name for source in corpora.find(config, problems)]
    assert not problems
    return source_names


def test_files_folders_and_globs_are_found_sorted_under_relative_names(tmp_path):
    made(
        tmp_path,
        {"b/2.txt": b"x", "b/1.txt": b"x", "b/.hidden": b"x", "b/.git/x": b"x", "a.md": b"x", "b/c/3.txt": b"x"},
    )
    assert names(text_corpus(path=str(tmp_path))) == ["a.md", "b/1.txt", "b/2.txt", "b/c/3.txt"]
    assert names(text_corpus(path=str(tmp_path / "*.md"))) == ["a.md"]
    assert names(text_corpus(path=str(tmp_path / "**" / "*.txt"))) == ["b/1.txt", "b/2.txt", "b/c/3.txt"]
    assert names(text_corpus(path=[str(tmp_path / "b" / "2.txt"), str(tmp_path / "b")])) == [
        "2.txt",
        "1.txt",
        "c/3.txt",
    ]


def test_all_problems_of_the_paths_are_reported_at_once(tmp_path):
    file = made(tmp_path, {"a.txt": b"x", "empty/.hidden": b""}) / "a.txt"
    problems: list[str] = []
    paths = [str(tmp_path / name) for name in ("none.txt", "*.none", "empty")]
    corpora.find(text_corpus(path=paths, valid=str(file), valid_share=0.5, test_share=0.5), problems)
    text = "\n".join(problems)
    for part in (
        "valid_share + corpus.test_share",
        "corpus.path and corpus.valid",
        "none.txt: there is no",
        "*.none: no file",
    ):
        assert part in text
    assert "holds no files" in text and len(problems) == 5

    for wrong, part in [({}, "corpus.path: is missing"), ({"valid": str(file)}, "corpus.train: is missing")]:
        problems = []
        corpora.find(text_corpus(**wrong), problems)
        assert len(problems) == 1 and part in problems[0]
    problems = []
    corpora.find(text_corpus(train=str(tmp_path), test=str(file)), problems)
    assert len(problems) == 1 and "in corpus.train as well" in problems[0]


def test_stdlib_is_python_source_without_tests():
    problems: list[str] = []
    source_names = [source.name for source in corpora.find(StdlibCorpusConfig("stdlib", 0.02, 0.02), problems)]
    assert source_names == sorted(source_names) and not problems
    assert {"argparse.py", "json/decoder.py"} <= set(source_names)
    assert not [
        name
        for name in source_names
        if not name.endswith(".py") or {"test", "tests", "site-packages"} & {*name.split("/")}
    ]
