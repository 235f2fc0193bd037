"""Files are found through links, each real one once; unreadable ones are named, and nothing is left out silently."""

import os
import socket
from pathlib import Path

import pytest

from tests.data.preparing.test_corpora import made, names, text_corpus
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import PrepareJob
from txl_dist.data.preparing import corpora
from txl_dist.errors import ConfigError


def problems_of(**values) -> list[str]:
    problems: list[str] = []
    corpora.find(text_corpus(**values), problems)
    return problems


def linked(folder: Path) -> Path:
    """A corpus with a link to a folder elsewhere, which has links in a circle, and one to a folder of its own."""
    made(folder / "elsewhere", {"texts/1.txt": b"x", "texts/deep/2.txt": b"x", "texts/.hidden": b"x"})
    made(folder / "corpus", {"book.txt": b"x", "real/3.txt": b"x"})
    (folder / "corpus" / "more").symlink_to(folder / "elsewhere" / "texts")
    (folder / "corpus" / "a-link").symlink_to("real")
    (folder / "corpus" / "circle").symlink_to(".")
    (folder / "elsewhere" / "texts" / "deep" / "back").symlink_to("..")
    (folder / "elsewhere" / "texts" / "deep" / "other").symlink_to("../../../corpus")
    return folder / "corpus"


def test_links_to_folders_are_followed_each_real_folder_once(tmp_path):
    wanted = ["book.txt", "more/1.txt", "more/deep/2.txt", "real/3.txt"]
    assert names(text_corpus(path=str(linked(tmp_path)))) == wanted
    assert names(text_corpus(train=str(tmp_path / "corpus"))) == wanted
    assert names(text_corpus(path=f"{tmp_path}/corpus/**/*.txt")) == wanted
    assert names(text_corpus(path=f"{tmp_path}/corpus/**")) == wanted
    (tmp_path / "only links").mkdir()
    (tmp_path / "only links" / "c").symlink_to(tmp_path / "corpus")
    assert names(text_corpus(path=str(tmp_path / "only links"))) == [f"c/{name}" for name in wanted]


GLOBS = {
    "*.txt": ["[y].txt", "x.txt"],
    "*/1.txt": ["a/1.txt", "b/1.txt"],
    "?/*.txt": ["a/1.txt", "b/1.txt"],
    "[!a]/*": ["b/1.txt", "b/c/3.txt"],
    "a/.*": [".h.txt"],
    ".d/*": ["4.txt"],
    "*": ["[y].txt", "a/1.txt", "a/2.md", "b/1.txt", "b/c/3.txt", "x.txt"],
    "b/../*/*.md": ["a/2.md"],
    "**/*.txt": ["[y].txt", "a/1.txt", "b/1.txt", "b/c/3.txt", "x.txt"],
    "./b/**": ["1.txt", "c/3.txt"],
    "**/c/**/*.txt": ["b/c/3.txt"],
    "[y].txt": ["[y].txt"],  # a name, where there is one
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_match_as_in_a_shell(tmp_path, monkeypatch, pattern):
    files = ["a/1.txt", "a/2.md", "a/.h.txt", "b/1.txt", "b/c/3.txt", ".d/4.txt", "x.txt", "[y].txt"]
    monkeypatch.chdir(made(tmp_path, dict.fromkeys(files, b"x")))
    assert names(text_corpus(path=pattern)) == GLOBS[pattern]


def test_a_glob_below_a_folder_that_is_not_there_names_it():
    (line,) = problems_of(path="none/*.txt")
    assert line.startswith("corpus.path=none/*.txt: none: there is no such file or folder")


def test_many_folders_that_link_to_each_other_are_walked_once(tmp_path):
    folders = [tmp_path / f"{number:02d}" for number in range(12)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:
        (folder / "a.txt").write_text(folder.name)
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    wanted = [f"{folder.name}/a.txt" for folder in folders]
    assert names(text_corpus(path=str(tmp_path))) == wanted
    assert names(text_corpus(path=f"{tmp_path}/**/a.txt")) == wanted


def test_links_that_lead_nowhere_are_named_wherever_they_are_found(tmp_path):
    made(tmp_path / "c", {"a.txt": b"x"})
    (tmp_path / "c" / "gone.txt").symlink_to("../gone/text")
    (tmp_path / "c" / "self.txt").symlink_to("self.txt")
    for path in (tmp_path / "c", tmp_path / "c" / "*", tmp_path / "**" / "*.txt"):
        lines = problems_of(path=str(path))
        assert len(lines) == 2 and all("link that leads nowhere" in line for line in lines)
        assert "gone.txt" in lines[0] and "../gone/text" in lines[0] and "self.txt" in lines[1]
    (line,) = problems_of(path=str(tmp_path / "c" / "gone.txt"))
    assert line.startswith("corpus.path=") and "leads nowhere (to ../gone/text)" in line
    lines = problems_of(train=str(tmp_path / "c" / "a.txt"), valid=str(tmp_path / "c" / "self.txt"))
    assert len(lines) == 1 and lines[0].startswith("corpus.valid=")
    for number in range(50):
        (tmp_path / "c" / f"more{number}").symlink_to("../gone")
    lines = problems_of(path=str(tmp_path / "c"))
    assert len(lines) == 3 and "and 49 more likewise" in lines[-1]


def test_paths_that_are_neither_file_nor_folder_are_named(tmp_path):
    made(tmp_path, {"a.txt": b"x"})
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path, tmp_path / "*"):
        lines = problems_of(path=str(path))
        assert [Path(line.split(": ")[1]).name for line in lines] == ["pipe", "socket"]
        assert all("is not a regular file" in line for line in lines)
    assert "is not a regular file" in problems_of(path=str(tmp_path / "pipe"))[0]
    assert "no such file" not in problems_of(path="/dev/null")[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_named(tmp_path):
    made(tmp_path, {"a.txt": b"x", "closed/b.txt": b"x", "listed/c.txt": b"x"})
    (tmp_path / "closed").chmod(0)
    (tmp_path / "listed").chmod(0o444)
    lines = problems_of(path=str(tmp_path))
    assert len(lines) == 2 and all("Permission denied" in line for line in lines)


TEXT = {"name": "text", "path": None, "train": None, "valid": None, "test": None, "document": "file"}
TEXT |= {"split_by": "auto", "valid_share": 0.05, "test_share": 0.05}
WORD = {"name": "word", "vocab_size": None, "min_count": 1}
SENTENCEPIECE = {"name": "sentencepiece", "vocab_size": 8000, "type": "bpe"}


@pytest.mark.parametrize(
    "key, values",
    [
        *((f"corpus.{key}", TEXT) for key in ("path", "train", "valid", "test")),
        ("corpus.path", {"name": "wikitext103"}),
        ("tokenizer.vocab", WORD),
        ("tokenizer.model", SENTENCEPIECE),
    ],
)
def test_an_empty_path_is_refused_with_its_key(key, values):
    section, name = key.split(".")
    job = {"corpus": TEXT, "tokenizer": {"name": "bytes"}, "workers": 1}
    job["data"] = {"dir": "data", "sample_tokens": 64, "shard_samples": 8}

    def problems(value) -> list[str]:
        with pytest.raises(ConfigError) as error:
            parse_config(PrepareJob, job | {section: {**values, name: value}})
        return error.value.problems

    for value in ("", " "):
        assert problems(value) == [f"{key}={value}: is empty; give a path"]
    if values is TEXT:
        assert problems(["book.txt", ""]) == [f"{key}.1=: is empty; give a path"]
        assert problems([]) == [f"{key}=[]: should have 1 or more items"]


def test_the_home_folder_may_be_written_as_a_tilde_in_every_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(made(tmp_path, {"a/1.txt": b"x", "b/2.txt": b"x"})))
    assert names(text_corpus(path=["~/a", "~/b/*.txt"])) == ["1.txt", "2.txt"]
    assert names(text_corpus(train="~/a", test="~/b/2.txt")) == ["1.txt", "2.txt"]
    assert "there is no such file" in problems_of(path="~nobody-of-this-name/a")[0]
