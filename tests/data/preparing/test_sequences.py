"""Numbers in, a dataset out: every number of every document, in the split of its name; what is no number is named."""

import gzip
import json
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from txl_dist.config import checks
from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    DuplicationCorpusConfig,
    FilesCorpusConfig,
    IdsTokenizerConfig,
    PrepareJob,
    StdlibCorpusConfig,
    TokensCorpusConfig,
)
from txl_dist.data.index import Index
from txl_dist.data.mu_law import from_mu_law
from txl_dist.data.preparing import sequences, splitting
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import IdsTokenizer, Picture, Sound
from txl_dist.errors import ConfigError, UserError
from txl_dist.prepare import prepare

SPLITS = ("train", "valid", "test")
AS_NEEDED = IdsTokenizerConfig("ids", None, None)


def tokens_corpus(**values: Any) -> TokensCorpusConfig:
    defaults: dict[str, Any] = dict.fromkeys(("path", *SPLITS)) | {"key": "ids", "valid_share": 0.0, "test_share": 0.0}
    return TokensCorpusConfig(name="tokens", **{**defaults, **values})


def files_corpus(**values: Any) -> FilesCorpusConfig:
    defaults: dict[str, Any] = dict.fromkeys(("path", *SPLITS, "size", "rate"))
    defaults |= {"read": "bytes", "channels": 3, "valid_share": 0.0, "test_share": 0.0}
    return FilesCorpusConfig(name="files", **{**defaults, **values})


def prepared(folder: Path, corpus: Any, tokenizer: IdsTokenizerConfig = AS_NEEDED, workers: int = 1) -> Index:
    prepare(PrepareJob(corpus, tokenizer, DatasetConfig(str(folder), sample_tokens=64, shard_samples=8), workers))
    return Index.open(str(folder))


def read(index: Index, split: str) -> list[list[int]]:
    """Return the documents of a split, without <eos>, which ends each of them or none."""
    reader = SampleReader(index, split)
    starts = index.splits[split].document_starts.tolist()
    all_tokens = [reader.tokens(start, end - start).tolist() for start, end in pairwise(starts)]
    tokenizer = index.tokenizer()
    assert all((document[-1] == index.eos) == tokenizer.ends_documents for document in all_tokens)
    documents = [document[: len(document) - tokenizer.ends_documents] for document in all_tokens]
    assert not any(index.eos in document for document in documents)
    return documents


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers(count: int, seed: int = 0, largest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, largest + 1, rng.integers(1, 150)).tolist() for _ in range(count)]


# ------------------------------------------------------------------------------------------------------ tokens


def test_all_kinds_of_files_give_their_documents_back(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    one, *tracks = numbers(4)
    rows = np.arange(60).reshape(5, 12)
    np.save(folder / "a.npy", np.array(one, np.uint8))
    np.save(folder / "b.npy", np.asfortranarray(rows))
    np.save(folder / "c.npy", np.zeros((3, 0), np.int32))  # rows without a number are no documents
    (folder / "d.jsonl").write_text("[1,2,3]\n\n[]\n" + json.dumps({"ids": [7, 8], "more": "x"}))
    (folder / "e.json").write_text("[4, 5]\n[6]\n")  # lines, too
    (folder / "f.json").write_text(json.dumps({"ids": tracks, "programs": [0]}, indent=1))
    (folder / "g.json").write_text(json.dumps({"ids": one}))
    (folder / "h.jsonl.gz").write_bytes(gzip.compress(b"[9]\n"))
    index = prepared(tmp_path / "data", tokens_corpus(path=[str(folder)]))
    assert read(index, "train") == [one, *rows.tolist(), [1, 2, 3], [7, 8], [4, 5], [6], *tracks, one, [9]]
    assert index.eos == 60 and index.vocab_size == 61 and index.dtype == np.dtype("<u2")
    split = index.splits["train"]
    assert (split.bytes, split.characters, split.words) == (None, None, None)


def test_large_numbers_have_four_bytes(tmp_path):
    np.save(tmp_path / "a.npy", np.array([0, 70_000]))
    index = prepared(tmp_path / "data", tokens_corpus(train=[str(tmp_path / "a.npy")]))
    assert index.dtype == np.dtype("<u4") and read(index, "train") == [[0, 70_000]]


@pytest.mark.parametrize("end", [True, False])
def test_nothing_depends_on_workers_pieces_or_place(tmp_path, monkeypatch, end):
    tokenizer = IdsTokenizerConfig("ids", None, end)
    for place in ("one", "deep/other"):
        (tmp_path / place).mkdir(parents=True)
        np.save(tmp_path / place / "a.npy", np.random.default_rng(1).integers(0, 300, (50, 200)))
        lines = [json.dumps(document) for document in numbers(40, 2)]
        (tmp_path / place / "b.jsonl").write_text("\n".join(lines))
    shares = {"valid_share": 0.2, "test_share": 0.2}
    prepared(tmp_path / "first", tokens_corpus(path=[str(tmp_path / "one")], **shares), tokenizer, 1)
    monkeypatch.setattr(splitting, "PIECE_BYTES", 400)  # rows of several pieces
    for number, workers in enumerate((1, 3)):
        folder = tmp_path / f"again{number}"
        prepared(folder, tokens_corpus(path=[str(tmp_path / "deep" / "other")], **shares), tokenizer, workers)
        assert content(folder) == content(tmp_path / "first")


def test_the_split_of_a_document_is_its_name_and_number_alone(tmp_path):
    documents = numbers(200)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    corpus = tokens_corpus(path=[str(tmp_path / "a.jsonl")], valid_share=0.2, test_share=0.1)
    index = prepared(tmp_path / "data", corpus, IdsTokenizerConfig("ids", 41, None))
    expected: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    for number, document in enumerate(documents):
        expected[splitting.split_of_document("a.jsonl", number, (0.2, 0.1))].append(document)
    assert {split: read(index, split) for split in SPLITS} == expected
    assert all(len(expected[split]) > 5 for split in SPLITS)


def test_many_files_are_divided_as_files(tmp_path):
    for number in range(20):  # each with two tracks, which stay together
        (tmp_path / f"{number:02d}.json").write_text(json.dumps({"ids": [[number, 1], [number, 2]]}))
    index = prepared(tmp_path / "data", tokens_corpus(path=[str(tmp_path / "*.json")], valid_share=0.1, test_share=0.1))
    by_split = {split: read(index, split) for split in SPLITS}
    assert [len(by_split[split]) for split in SPLITS] == [32, 4, 4]
    for documents in by_split.values():
        assert [first for first, _ in documents[::2]] == [first for first, _ in documents[1::2]]


def test_the_vocabulary_is_that_of_the_training_split(tmp_path):
    np.save(tmp_path / "train.npy", np.array([[3, 1], [2, 9]]))
    np.save(tmp_path / "test.npy", np.array([[4, 1], [2, 12]]))
    paths = {split: [str(tmp_path / f"{split}.npy")] for split in ("train", "test")}
    with pytest.raises(UserError, match=r"test.npy: document 2, number 2: 12 is larger than 9.*vocab_size=13 or more"):
        prepared(tmp_path / "data", tokens_corpus(**paths))
    assert not (tmp_path / "data").exists()
    assert prepared(tmp_path / "data", tokens_corpus(**paths), IdsTokenizerConfig("ids", 13, None)).eos == 13
    with pytest.raises(UserError, match=r"train.npy: document 2, number 2: 9 is larger than 8"):
        prepared(tmp_path / "small", tokens_corpus(**paths), IdsTokenizerConfig("ids", 9, None))


def test_the_vocabulary_leaves_out_documents_of_other_splits(tmp_path):
    splits = [splitting.split_of_document("a.jsonl", number, (0.2, 0.2)) for number in range(50)]
    large = splits.index("valid")
    documents = [[1000] if number == large else [number % 7] for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    corpus = tokens_corpus(path=[str(tmp_path / "a.jsonl")], valid_share=0.2, test_share=0.2)
    with pytest.raises(UserError, match=f"a.jsonl: line {large + 1}, number 1: 1000 is larger than 6"):
        prepared(tmp_path / "data", corpus)


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.txt", b"words\n", "is not a file of numbers by its name; give .npy, .jsonl or .json"),
        ("a.npy", b"words\n", "is not an array of numbers that can be read"),
        ("a.npy", np.array([Harmful()], object), "Python objects, which are pickles"),
        ("a.npy", np.array([1.5, 2]), "is an array of float64 with 1 dimensions; give integers"),
        ("a.npy", np.array([True]), "is an array of bool"),
        ("a.npy", np.zeros((2, 2, 2), int), "with 3 dimensions"),
        ("a.npy", np.array(3), "with 0 dimensions"),
        ("a.npy", np.array([[1, 2], [3, -4]]), "document 2, number 2: -4 is negative"),
        ("a.npy", np.array([1, 2**40]), "number 2: 1099511627776 is larger than"),
        ("a.npy", np.array([2**64 - 1], np.uint64), "number 1: 18446744073709551615 is larger than"),
        ("a.jsonl", b"some words\n", "line 1: is not JSON"),
        ("a.jsonl", b"[1]\n[1, 2\n", "line 2: is not JSON"),
        ("a.jsonl", b"[1]\n[1, 2.0]\n", r"line 2: is not a list of integers, but \[1, 2.0\]"),
        ("a.jsonl", b"[1]\n[true]\n", r"line 2: is not a list of integers, but \[True\]"),
        ("a.jsonl", b"[1]\n[[1], [2]]\n", "line 2: is not a list of integers"),
        ("a.jsonl", b"[1]\n{}\n", r"line 2: has no key 'ids' \(corpus.key\)"),
        ("a.jsonl", b"[1]\n[2, -7]\n", "line 2, number 2: -7 is negative"),
        ("a.jsonl", b"[%d]\n" % 10**30, "line 1: 1000000000000000000000000000000 does not fit"),
        ("a.jsonl", b"[" * 100_000, "line 1: is not JSON"),
        ("a.json", b'{"ids": [[1, 2], [3, "x"]]}', "document 2: is not a list of integers"),
        ("a.json", b'{"ids": 3}', "is not a list of integers, but 3"),
        ("a.json", b"\xff\xfe\x00", "is not JSON"),
        ("a.jsonl.gz", b"no gzip", "is damaged at about byte 0"),
    ],
)
def test_what_holds_no_numbers_is_named_and_nothing_stays(tmp_path, capsys, name, data, reason):
    path = tmp_path / name
    if isinstance(data, np.ndarray):
        np.save(path, data, allow_pickle=True)
    else:
        path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as error:
        prepared(tmp_path / "data", tokens_corpus(train=[str(path)]))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_cut_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a.npy: is not an array of numbers that can be read"):
        prepared(tmp_path / "data", tokens_corpus(train=[str(tmp_path)]))


def test_all_files_of_another_kind_are_named_at_once(tmp_path):
    for number in range(14):
        (tmp_path / f"{number:02d}.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError) as error:
        prepared(tmp_path / "data", tokens_corpus(train=[str(tmp_path)]))
    assert len(error.value.problems) == 11 and "4 more files" in error.value.problems[-1]


# ------------------------------------------------------------------------------------------------------- files


def test_bytes_are_read_as_they_are(tmp_path, monkeypatch):
    contents = [gzip.compress(b"x" * 50), bytes(range(256)) * 3, b"\0", b""]
    for number, data in enumerate(contents):
        (tmp_path / f"{number}.bin").write_bytes(data)
    whole = prepared(tmp_path / "whole", files_corpus(train=[f"{tmp_path}/*.bin"]))
    assert read(whole, "train") == [list(data) for data in contents if data]
    assert (whole.eos, whole.vocab_size) == (256, 257)
    monkeypatch.setattr(splitting, "PIECE_BYTES", 100)
    pieces = prepared(tmp_path / "pieces", files_corpus(train=[f"{tmp_path}/*.bin"]), workers=2)
    assert pieces.fingerprint == whole.fingerprint


def pictures(folder: Path, count: int, height: int = 8, width: int = 6, channels: int = 3) -> list[np.ndarray]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 256, (height, width, channels), np.uint8) for _ in range(count)]
    for number, picture in enumerate(drawn):
        Image.fromarray(picture if channels == 3 else picture[:, :, 0]).save(folder / f"{number:02d}.png")
    return drawn


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_size_is_its_pixels(tmp_path, channels):
    drawn = pictures(tmp_path / "in", 30, channels=channels)
    corpus = files_corpus(
        path=[str(tmp_path / "in")], read="image", size=[8, 6], channels=channels, valid_share=0.1, test_share=0.1
    )
    index = prepared(tmp_path / "data", corpus, workers=2)
    expected = [picture.reshape(-1).tolist() for picture in drawn]
    by_split = {split: read(index, split) for split in SPLITS}
    assert [len(by_split[split]) for split in SPLITS] == [24, 3, 3]
    assert sorted(document for documents in by_split.values() for document in documents) == sorted(expected)
    tokenizer = index.tokenizer()
    assert isinstance(tokenizer, IdsTokenizer) and tokenizer.content == Picture(8, 6, channels)
    assert not tokenizer.ends_documents and index.splits["train"].tokens == 24 * 48 * channels
    settings = index.corpus["settings"]
    assert settings["corpus"] == {"read": "image", "height": 8, "width": 6, "channels": channels}


def test_the_middle_of_an_image_is_scaled(tmp_path):
    """Four colours of 10 x 10 pixels each, and red on both sides, which is cut off."""
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[..., 0] = 255
    picture[:10, 20:30] = (0, 40, 0)
    picture[:10, 30:40] = (0, 0, 80)
    picture[10:, 20:30] = (120, 0, 0)
    picture[10:, 30:40] = (160, 160, 160)
    Image.fromarray(picture).save(tmp_path / "a.png")
    corpus = files_corpus(train=[str(tmp_path / "a.png")], read="image", size=[2, 2])
    expected = [0, 40, 0, 0, 0, 80, 120, 0, 0, 160, 160, 160]
    assert read(prepared(tmp_path / "data", corpus), "train") == [expected]
    tall = np.ascontiguousarray(picture.transpose(1, 0, 2))
    Image.fromarray(tall).save(tmp_path / "b.png")
    corpus = files_corpus(train=[str(tmp_path / "b.png")], read="image", size=[2, 2])
    assert read(prepared(tmp_path / "tall", corpus), "train") == [[0, 40, 0, 120, 0, 0, 0, 0, 80, 160, 160, 160]]


def test_a_scaled_pixel_is_the_mean_of_what_it_covers(tmp_path):
    Image.fromarray(np.array([[0, 40, 8, 8], [200, 100, 8, 16]], np.uint8)).save(tmp_path / "b.png")
    small = files_corpus(train=[str(tmp_path / "b.png")], read="image", size=[1, 2], channels=1)
    assert read(prepared(tmp_path / "small", small), "train") == [[85, 10]]
    Image.fromarray(np.array([[0, 100, 8], [200, 100, 16]], np.uint8)).save(tmp_path / "a.png")
    large = files_corpus(train=[str(tmp_path / "a.png")], read="image", size=[4, 6], channels=1)
    rows = np.repeat(np.repeat([[0, 100, 8], [200, 100, 16]], 2, axis=0), 2, axis=1)
    assert read(prepared(tmp_path / "large", large), "train") == [rows.reshape(-1).tolist()]


def test_files_that_are_no_images_are_all_named(tmp_path):
    pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "a.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "in" / "b.png")
    corpus = files_corpus(train=[str(tmp_path / "in")], read="image", size=[4, 4])
    with pytest.raises(ConfigError) as error:
        prepared(tmp_path / "data", corpus)
    no_image, deep = error.value.problems
    assert no_image == f"{tmp_path}/in/a.png: is not an image of a kind that Pillow knows; give images only"
    assert deep.startswith(f"{tmp_path}/in/b.png: its pixels have more than 8 bits")


def test_a_cut_image_is_named_and_nothing_stays(tmp_path):
    pictures(tmp_path / "in", 2, 40, 40)
    path = tmp_path / "in" / "01.png"
    path.write_bytes(path.read_bytes()[:900])
    corpus = files_corpus(train=[str(tmp_path / "in")], read="image", size=[4, 4])
    with pytest.raises(UserError, match=r"in/01.png: is not an image that can be read"):
        prepared(tmp_path / "data", corpus, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def write_sound(path: Path, samples: np.ndarray, width: int = 2, rate: int = 8000) -> None:
    """Write samples [n, channels] from -1 to 1."""
    scaled = (samples * 2.0 ** (8 * width - 1)).round().clip(-(2 ** (8 * width - 1)), 2 ** (8 * width - 1) - 1)
    integers = scaled.astype(np.int64)
    if width == 1:
        data = (integers + 128).astype(np.uint8).tobytes()
    else:
        data = integers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_comes_back_within_a_step_of_mu_law(tmp_path, monkeypatch, width, channels):
    times = np.arange(3000) / 8000
    left = np.sin(2 * np.pi * 440 * times) * np.linspace(0, 0.99, len(times))
    samples = np.stack([left, 0.5 * left], axis=1)[:, :channels]
    write_sound(tmp_path / "a.wav", samples, width)
    monkeypatch.setattr(splitting, "PIECE_BYTES", 1000)
    index = prepared(tmp_path / "data", files_corpus(train=[str(tmp_path / "a.wav")], read="audio"))
    (levels,) = read(index, "train")
    mean = samples.mean(axis=1)
    # The distance of two levels at a sample is at most ln(256) / 255 of (1 / 255 + its size), times 2 for -1 to 1.
    step = 2 * np.log(256) / 255 * (1 / 255 + np.abs(mean)) * 1.05
    assert (np.abs(from_mu_law(np.array(levels)) - mean) <= step / 2 + 2.0 ** -(8 * width - 1)).all()
    tokenizer = index.tokenizer()
    assert isinstance(tokenizer, IdsTokenizer) and tokenizer.content == Sound(8000) and tokenizer.ends_documents
    assert index.corpus["settings"]["corpus"] == {"read": "audio", "rate": 8000}


def test_sounds_that_cannot_be_read_are_all_named(tmp_path):
    samples = np.zeros((500, 1))
    write_sound(tmp_path / "a.wav", samples)
    write_sound(tmp_path / "b.wav", samples)
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:-100])
    (tmp_path / "c.wav").write_text("no sound")
    write_sound(tmp_path / "d.wav", samples, rate=16000)
    float_header = (tmp_path / "a.wav").read_bytes().replace(b"\x10\0\0\0\x01\0", b"\x10\0\0\0\x03\0")
    (tmp_path / "e.wav").write_bytes(float_header)
    with pytest.raises(ConfigError) as error:
        prepared(tmp_path / "data", files_corpus(train=[str(tmp_path)], read="audio"))
    cut, no_sound, of_floats, rate = error.value.problems
    assert cut == f"{tmp_path}/b.wav: is cut off: it has 450 of its 500 samples; copy it again"
    assert no_sound.startswith(f"{tmp_path}/c.wav: is not a WAV file of 8, 16, 24 or 32 bits")
    assert of_floats.startswith(f"{tmp_path}/e.wav: is not a WAV file") and "format: 3" in of_floats
    assert rate.startswith(f"{tmp_path}/d.wav: has 16,000 samples per second, not 8,000")
    with pytest.raises(ConfigError, match=r"a.wav: has 8,000 samples per second, not 16,000"):
        prepared(tmp_path / "data", files_corpus(train=[str(tmp_path / "a.wav")], read="audio", rate=16000))


def test_too_few_files_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="1 documents are too few.*give more files, or set corpus.valid_share"):
        prepared(tmp_path / "data", files_corpus(path=[str(tmp_path)], valid_share=0.5))


# ------------------------------------------------------------------------------------------------- duplication


def test_drawn_sequences_are_0w0w_and_depend_on_nothing_else(tmp_path):
    config = DuplicationCorpusConfig("duplication", 32, 20, 3, 2, 5)
    index = prepared(tmp_path / "data", config)
    by_split = {split: read(index, split) for split in SPLITS}
    assert [len(by_split[split]) for split in SPLITS] == [20, 3, 2] and index.vocab_size == 129
    documents = [document for split in SPLITS for document in by_split[split]]
    assert len({tuple(document) for document in documents}) == 25
    for document in documents:
        assert len(document) == 32 and document[:16] == document[16:] and document[0] == 0
        assert all(1 <= symbol <= 127 for symbol in document[1:16])
    more = prepared(tmp_path / "more", DuplicationCorpusConfig("duplication", 32, 30, 1, 0, 5), workers=3)
    assert read(more, "train")[:20] == by_split["train"] and read(more, "valid") == by_split["valid"][:1]
    assert set(more.splits) == {"train", "valid"}
    assert sequences.draw(config, "train", 7).tolist() == by_split["train"][7]
    other = DuplicationCorpusConfig("duplication", 32, 20, 3, 2, 6)
    assert sequences.draw(other, "train", 7).tolist() != by_split["train"][7]


# ------------------------------------------------------------------------------------------- settings and checks


def test_a_second_run_finds_nothing_to_do_and_another_is_refused(tmp_path, capsys):
    pictures(tmp_path / "in", 3)
    prepared(tmp_path / "data", files_corpus(train=[str(tmp_path / "in")], read="image", size=[4, 3]))
    capsys.readouterr()
    same = IdsTokenizerConfig("ids", 256, False)  # as the corpus has it
    prepared(tmp_path / "data", files_corpus(train=[str(tmp_path / "in")], read="image", size=[4, 3]), same)
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another dataset \(other settings\)"):
        prepared(tmp_path / "data", files_corpus(train=[str(tmp_path / "in")], read="image", size=[3, 4]))


def test_what_does_not_fit_together_is_refused():
    def problems(corpus, tokenizer=AS_NEEDED):
        return [*checks.tokenizer_fits_corpus(corpus, tokenizer), *checks.files_can_be_read(corpus)]

    assert not problems(tokens_corpus()) and not problems(files_corpus(read="image", size=[2, 2]))
    assert not problems(files_corpus(), IdsTokenizerConfig("ids", 256, True))
    (text,) = problems(StdlibCorpusConfig("stdlib", 0.1, 0.1))
    assert text.startswith("tokenizer=ids: corpus=stdlib is text")
    (ids,) = problems(tokens_corpus(), BytesTokenizerConfig("bytes"))
    assert ids.startswith("tokenizer=bytes: corpus=tokens is numbers")
    (size,) = problems(files_corpus(), IdsTokenizerConfig("ids", 100, True))
    assert size.startswith("tokenizer.vocab_size=100: the numbers of corpus=files are below 256")
    assert [problem.partition(":")[0] for problem in problems(files_corpus(size=[2, 2], rate=8000))] == [
        "corpus.size=[2, 2]",
        "corpus.rate=8000",
    ]
    (missing,) = problems(files_corpus(read="image"))
    assert missing.startswith("corpus.size: is missing")
