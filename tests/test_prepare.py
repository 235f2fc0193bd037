"""Text in, a dataset out: the same one whatever the machine, and never half of one."""

import gzip
import json
import os
import signal
import subprocess
import sys
from codecs import BOM_UTF8
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    PrepareJob,
    SentencePieceTokenizerConfig,
    StdlibCorpusConfig,
    TextCorpusConfig,
    WordTokenizerConfig,
)
from txl_dist.data.index import Index
from txl_dist.data.preparing import corpora, pipeline, splitting, tokenizing
from txl_dist.data.preparing.workers import WorkerPool
from txl_dist.data.samples import SampleReader
from txl_dist.errors import ConfigError, RunError, UserError
from txl_dist.prepare import prepare

REPO = Path(__file__).resolve().parents[1]
TEXTS = Path(os.environ.get("TXL_DIST_TEXT", REPO.parent / "shared" / "data"))

TOKENIZERS: dict[str, Any] = {
    "bytes": BytesTokenizerConfig("bytes"),
    "word": WordTokenizerConfig("word", None, 1, None),
    "unigram": SentencePieceTokenizerConfig("sentencepiece", 305, "unigram", None),
    "bpe": SentencePieceTokenizerConfig("sentencepiece", 305, "bpe", None),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)


def text_job(folder: Path, tokenizer: str = "bytes", workers: int = 1, sample: int = 64, **corpus: Any) -> PrepareJob:
    values: dict[str, Any] = dict.fromkeys(("path", "train", "valid", "test"))
    values |= {"document": "file", "split_by": "auto", "valid_share": 0.1, "test_share": 0.1, **corpus}
    cut = DatasetConfig(str(folder), sample_tokens=sample, shard_samples=8)
    return PrepareJob(TextCorpusConfig(name="text", **values), TOKENIZERS[tokenizer], cut, workers)


def texts(folder: Path, number: int = 30) -> Path:
    """Small documents, some of them compressed, of different lengths, every other with no line end at its end."""
    folder.mkdir(parents=True)
    for n in range(number):
        lines = [f"line {line} of document {n}, for the sea and the forest, {n * line}" for line in range(n % 7 + 1)]
        text = ("\n".join(lines) + "\n" * (n % 2)).encode()
        if n % 5:
            (folder / f"{n:02d}.txt").write_bytes(text)
        else:
            (folder / f"{n:02d}.gz").write_bytes(gzip.compress(text, mtime=0))
    return folder


def plain(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(folder: Path) -> dict[str, list[str]]:
    """Decode the documents of each split."""
    index = Index.open(str(folder))
    tokenizer = index.tokenizer()
    by_split = {}
    for name, split in index.splits.items():
        reader = SampleReader(index, name)
        starts = split.document_starts.tolist()
        ids = [reader.tokens(start, end - start) for start, end in pairwise(starts)]
        assert all(document[-1] == tokenizer.eos for document in ids)
        by_split[name] = [tokenizer.decode(document) for document in ids]
    return by_split


@every_tokenizer
def test_every_document_comes_out_complete_in_its_split(tmp_path, tokenizer):
    folder = texts(tmp_path / "text")
    prepare(text_job(tmp_path / "data", tokenizer, path=str(folder)))
    by_split = decoded(tmp_path / "data")
    raw = [plain(path).decode() for path in sorted(folder.iterdir())]
    splits = Index.open(str(tmp_path / "data")).splits
    assert sum(split.bytes for split in splits.values()) == sum(len(text.encode()) for text in raw)
    if tokenizer == "word":  # words and line ends come back; some of valid and test are unknown
        del by_split["valid"], by_split["test"]
        raw = [text.rstrip("\n") + "\n" for text in raw]
    else:
        assert [len(by_split[split]) for split in corpora.SPLITS] == [24, 3, 3]
        assert sorted(text for documents in by_split.values() for text in documents) == sorted(raw)
    for documents in by_split.values():
        assert documents == [text for text in raw if text in documents]


@every_tokenizer
def test_the_result_does_not_depend_on_workers_or_location(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(splitting, "PIECE_BYTES", 100)  # many pieces, so that the order of the results matters
    monkeypatch.setattr(tokenizing, "SENTENCEPIECE_BYTES", 4000)  # less than there is
    prepare(text_job(tmp_path / "one", tokenizer, 1, path=str(texts(tmp_path / "text"))))
    prepare(text_job(tmp_path / "two", tokenizer, 3, path=str(texts(tmp_path / "another" / "place"))))
    assert content(tmp_path / "one") == content(tmp_path / "two")


@every_tokenizer
@pytest.mark.parametrize("document", ["file", "line"])
def test_the_result_does_not_depend_on_how_the_text_is_cut_into_pieces(tmp_path, monkeypatch, tokenizer, document):
    folder = str(texts(tmp_path / "text"))
    prepare(text_job(tmp_path / "one", tokenizer, path=folder, document=document))
    monkeypatch.setattr(splitting, "PIECE_BYTES", 100)
    prepare(text_job(tmp_path / "two", tokenizer, path=folder, document=document))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_second_run_finds_nothing_to_do_and_another_is_refused(tmp_path, capsys, monkeypatch):
    folder = texts(tmp_path / "text")
    job = text_job(tmp_path / "data", path=str(folder))
    prepare(job)
    before = content(tmp_path / "data")
    capsys.readouterr()
    monkeypatch.setattr(pipeline, "write_splits", None)
    prepare(job)
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.dir=.*another dataset \(other settings\).*another data.dir, or delete"):
        prepare(text_job(tmp_path / "data", "word", path=str(folder)))
    (folder / "01.txt").write_text("changed")
    with pytest.raises(UserError, match="another dataset"):
        prepare(job)
    assert content(tmp_path / "data") == before


def test_other_files_and_damaged_datasets_are_never_overwritten(tmp_path):
    folder = texts(tmp_path / "text")
    with pytest.raises(UserError, match="holds something that is not a dataset"):
        prepare(text_job(folder, path=str(folder)))
    job = text_job(tmp_path / "data", path=str(folder))
    (tmp_path / "data").mkdir()  # an empty folder is nothing
    prepare(job)
    (tmp_path / "data" / "train" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001.tar: is missing"):
        prepare(job)
    (tmp_path / "data" / "train" / "samples.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"samples.npy"):
        prepare(job)


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    job = text_job(tmp_path / "data", path=str(texts(tmp_path / "text")))
    left = tmp_path / ".data.partial" / "train"
    left.mkdir(parents=True)  # of a run that was killed
    (left / "000000.tar").write_text("half")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shards, "write_index", lambda *values: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
    prepare(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text"]


def test_two_at_once_make_one_dataset(tmp_path):
    """The second one waits, and finds nothing to do."""
    folder = texts(tmp_path / "text", 2000)
    command = [sys.executable, "-m", "txl_dist.prepare", "corpus=text", f"corpus.path={folder}", "tokenizer=word"]
    command += [f"data.dir={tmp_path}/deep/data", "workers=1"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("Nothing to do" in out for out, _ in outputs) == [False, True]
    assert "preparing a dataset since" in "".join(err for _, err in outputs)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]
    assert not Index.open(str(tmp_path / "deep" / "data")).validate()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words\n")
    monkeypatch.setattr(pipeline, "WorkerPool", None)
    with pytest.raises(RunError, match=r"data.dir=.*/a.txt/data: cannot be written: .*/a.txt: Not a directory"):
        prepare(text_job(tmp_path / "a.txt" / "data", path=str(tmp_path / "a.txt")))


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_stays(tmp_path, full_disk):
    (tmp_path / "a.txt").write_text("some words that fill a disk\n" * 20000)
    for tokenizer in ("bytes", "word"):
        command = [sys.executable, "-m", "txl_dist.prepare", "corpus=text", f"corpus.path={tmp_path}/a.txt"]
        command += [f"tokenizer={tokenizer}", f"data.dir={full_disk}/data"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
        assert f"data.dir={full_disk}/data: cannot be written: " in done.stderr and "No space left" in done.stderr
        assert not list(full_disk.iterdir())


def test_a_worker_that_is_killed_ends_it_with_a_message(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 1000)
    with pytest.raises(RunError, match="counting words: one of the 2 processes was killed"), WorkerPool(2) as workers:
        list(workers.map("counting words", kill_yourself, iter([piece(b"x")] * 3), 3))


def piece(data):
    return splitting.Piece(corpora.SourceFile(Path("a"), "a", None), "train", 0, data, True, True, None, False, False)


def kill_yourself(pieces):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_processes_that_tokenize_start_without_torch_and_hydra():
    with WorkerPool(2) as workers:
        assert list(workers.map("importing", heavy_modules, iter([piece(b"x")]), 1)) == [set()]


def heavy_modules(pieces):
    return {"torch", "hydra", "deepspeed"} & set(sys.modules)


def test_the_vocabulary_comes_from_the_training_split_alone(tmp_path):
    for split in corpora.SPLITS:
        (tmp_path / split).write_text(f"word of {split}\n" * 10)
    paths: dict[str, Any] = {split: str(tmp_path / split) for split in corpora.SPLITS}
    prepare(text_job(tmp_path / "data", "word", **paths))
    assert (tmp_path / "data" / "tokenizer" / "vocab.txt").read_text().split() == [
        "<eos>",
        "<unk>",
        "word",
        "of",
        "train",
    ]
    assert decoded(tmp_path / "data")["test"] == ["word of <unk>\n" * 10]


def test_the_vocabulary_leaves_out_lines_of_other_splits(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"word{n}\n" for n in range(200)))
    prepare(text_job(tmp_path / "data", "word", path=str(tmp_path / "a.txt"), document="line"))
    by_split = decoded(tmp_path / "data")
    assert "<unk>\n" not in by_split["train"] and len(by_split["train"]) < 190
    assert set(by_split["valid"]) == set(by_split["test"]) == {"<unk>\n"}


def test_text_that_is_not_utf8_is_named_by_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 1000 + b"caf\xe9 latin\n" + b"good\n" * 1000)
    for tokenizer, workers in (("word", 1), ("unigram", 2)):
        with pytest.raises(UserError, match=r"a.txt: byte 5,003 of the text is not UTF-8 .*tokenizer=bytes"):
            prepare(text_job(tmp_path / "data", tokenizer, workers, train=str(tmp_path / "a.txt")))
    (tmp_path / "b.txt").write_text("good\n")
    with pytest.raises(UserError, match=r"a.txt: byte 5,003 of the text is not UTF-8"):
        prepare(text_job(tmp_path / "data", "word", train=str(tmp_path / "b.txt"), test=str(tmp_path / "a.txt")))
    prepare(text_job(tmp_path / "data", train=str(tmp_path / "a.txt")))
    assert Index.open(str(tmp_path / "data")).splits["train"].bytes == 10011


def test_problems_of_the_config_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as error:
        prepare(text_job(tmp_path / "data", path=["nowhere", "*.none"]))
    assert len(error.value.problems) == 2


def test_a_given_model_is_the_datasets_tokenizer(tmp_path):
    folder = texts(tmp_path / "text")
    prepare(text_job(tmp_path / "first", "bpe", path=str(folder)))
    model = tmp_path / "first" / "tokenizer" / "sentencepiece.model"
    job = text_job(tmp_path / "second", path=str(folder))
    prepare(
        PrepareJob(job.corpus, SentencePieceTokenizerConfig("sentencepiece", 8000, "unigram", str(model)), job.data, 1)
    )
    assert (tmp_path / "second" / "tokenizer" / "sentencepiece.model").read_bytes() == model.read_bytes()
    assert decoded(tmp_path / "second") == decoded(tmp_path / "first")


def test_byte_order_marks_are_left_out_and_counted_but_for_bytes(tmp_path, capsys):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder, mark in ((plain, b""), (marked, BOM_UTF8)):
        folder.mkdir()
        for n in range(25):
            (folder / f"{n:02d}.txt").write_bytes(mark + b"house and sea of number %d\n" % n * (n + 20))
    for tokenizer, document in [("word", "file"), ("word", "line"), ("bpe", "file")]:
        for folder in (plain, marked):
            out = tmp_path / f"{folder.name}-{tokenizer}-{document}"
            prepare(text_job(out, tokenizer, 1, path=str(folder), document=document))
            assert ("byte order mark at the start of 25 files" in capsys.readouterr().err) == (folder == marked)
        made = [tmp_path / f"{folder.name}-{tokenizer}-{document}" for folder in (plain, marked)]
        assert [Index.open(str(folder)).fingerprint for folder in made][0] == Index.open(str(made[1])).fingerprint
    prepare(text_job(tmp_path / "bytes", path=str(marked)))
    assert "byte order mark" not in capsys.readouterr().err
    assert all(text.startswith("\ufeff") for documents in decoded(tmp_path / "bytes").values() for text in documents)


def test_a_given_model_reads_no_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM_UTF8 + b"line of the sea\n" * 40)
    prepare(text_job(tmp_path / "first", "bpe", path=str(texts(tmp_path / "text"))))
    tokenizer = SentencePieceTokenizerConfig(
        "sentencepiece", 8000, "bpe", str(tmp_path / "first" / "tokenizer" / "sentencepiece.model")
    )
    job = text_job(tmp_path / "second", train=str(tmp_path / "a.txt"))
    prepare(PrepareJob(job.corpus, tokenizer, job.data, 1))
    assert decoded(tmp_path / "second")["train"] == ["line of the sea\n" * 40]


@every_tokenizer
@pytest.mark.parametrize("document", ["file", "line"])
@pytest.mark.parametrize("piece", [1 << 20, 40])
def test_characters_and_words_are_those_of_the_original_text(tmp_path, monkeypatch, tokenizer, document, piece):
    monkeypatch.setattr(splitting, "PIECE_BYTES", piece)
    lines = [f"    line\t {n} — été,  of\u2003it\r\n" for n in range(300)] + ["\n", "x" * 99 + "日" * 40, " end"]
    (tmp_path / "a.txt").write_bytes("".join(lines).encode())
    (tmp_path / "b.txt").write_bytes(b"word")  # of its own, though no line end parts them
    prepare(text_job(tmp_path / "data", tokenizer, train=str(tmp_path), document=document))
    split = Index.open(str(tmp_path / "data")).splits["train"]
    text = "".join(lines)
    assert split.bytes == len(text.encode()) + 4 and split.characters == len(text) + 4
    assert split.words == len(text.split()) + text.count("\n") + 1


def test_text_that_is_not_utf8_has_no_characters_and_words(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n" * 100)
    prepare(text_job(tmp_path / "data", train=str(tmp_path / "a.txt")))
    facts = json.loads((tmp_path / "data" / "index.json").read_text())["splits"]["train"]
    assert (facts["bytes"], facts["characters"], facts["words"]) == (500, None, None)


@pytest.mark.skipif(not (TEXTS / "ptb").is_dir(), reason=f"no Penn Treebank in {TEXTS} (TXL_DIST_TEXT)")
def test_penn_treebank_has_the_tokens_of_the_literature(tmp_path):
    paths: dict[str, Any] = {split: str(TEXTS / "ptb" / f"ptb.{split}.txt") for split in corpora.SPLITS}
    prepare(text_job(tmp_path / "data", "word", sample=8192, **paths))
    index = Index.open(str(tmp_path / "data"))
    assert {name: split.tokens for name, split in index.splits.items()} == {
        "train": 929589,
        "valid": 73760,
        "test": 82430,
    }
    assert index.vocab_size == 10000
    lines = Path(paths["valid"]).read_text().splitlines()
    assert decoded(tmp_path / "data")["valid"] == ["".join(" ".join(line.split()) + "\n" for line in lines)]


@pytest.mark.slow
def test_the_command_prepares_the_standard_library_and_prints_the_next_command(tmp_path):
    command = [sys.executable, "-m", "txl_dist.prepare", f"data.dir={tmp_path}/data"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"-m txl_dist.train +experiment=quickstart data.dir={tmp_path}/data" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    corpus = json.loads((tmp_path / "data" / "index.json").read_text())["corpus"]
    assert corpus["name"] == "stdlib" and corpus["files"] > 500
    wrong = subprocess.run([*command, "corpus=text"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and "corpus.path: is missing" in wrong.stderr


def test_the_documents_of_the_stdlib_are_its_files(tmp_path):
    config = StdlibCorpusConfig("stdlib", 0, 0)
    prepare(PrepareJob(config, TOKENIZERS["bytes"], DatasetConfig(str(tmp_path / "data"), 8192, 64), 1))
    index = Index.open(str(tmp_path / "data"))
    texts = [text for source in corpora.find(config, []) if (text := source.path.read_bytes())]
    starts = index.splits["train"].document_starts.astype(np.int64)
    assert np.diff(starts).tolist() == [len(text) + 1 for text in texts]
    reader = SampleReader(index, "train")
    for number in (0, len(texts) // 2, len(texts) - 1):
        assert reader.tokens(starts[number], len(texts[number])).astype(np.uint8).tobytes() == texts[number]
