"""What goes in comes out, from any position; whatever is damaged is told by name."""

import base64
import functools
import json
import re
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_dist.data.index import Index
from txl_dist.data.preparing import shards
from txl_dist.data.preparing.shards import SplitWriter
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.errors import UserError

SAMPLE, SHARD = 16, 3


def write(folder: Path, documents: dict[str, list[np.ndarray]], step: int = 7) -> Path:
    """A dataset of these documents [n] of each split, which go in `step` tokens at a time."""
    tokenizer = BytesTokenizer()
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, given_documents in documents.items():
        writer = SplitWriter(folder, split, tokenizer.dtype, SAMPLE, SHARD)
        for document in given_documents:
            for at in range(0, len(document), step):
                writer.add(document[at : at + step], [0] if at == 0 else [], len(document[at : at + step]))
        splits[split] = writer.close()
    shards.write_index(folder, {"fingerprint": "of a test"}, tokenizer, SAMPLE, SHARD, splits)
    return folder


def made_up(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).astype("<u2") for length in lengths]


TRAIN = made_up([20, 1, 1, 58, 16, 12, 100, 5])  # 213 tokens: 14 samples in 5 shards
VALID = made_up([48], seed=1)  # fills samples and shard exactly
STREAM = np.concatenate(TRAIN)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("shards"), {"train": TRAIN, "valid": VALID})


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def test_every_span_of_the_stream_is_read_back(dataset):
    reader = SampleReader(Index.open(str(dataset)), "train", cache_samples=4)
    for start in range(len(STREAM) + 1):
        for length in range(min(40, len(STREAM) - start) + 1):
            found = reader.tokens(start, length)
            assert found.dtype == np.uint16 and found.tolist() == STREAM[start : start + length].tolist()
    assert reader.tokens(0, len(STREAM)).tolist() == STREAM.tolist()
    assert not reader.sample(0).flags.writeable


def test_the_index_tells_what_there_is(dataset):
    index = Index.open(str(dataset))
    train, valid = index.splits["train"], index.splits["valid"]
    assert (index.vocab_size, index.eos, index.sample_tokens, index.shard_samples) == (257, 256, SAMPLE, SHARD)
    assert index.tokenizer().decode(b"text") == "text"
    assert (train.tokens, train.documents, train.bytes, train.samples) == (213, 8, 213, 14)
    assert train.document_starts.tolist() == [0, 20, 21, 22, 80, 96, 108, 208, 213]
    assert [(shard.name, shard.samples, shard.tokens, shard.documents) for shard in train.shards] == [
        ("train/000000.tar", 3, 48, 4),
        ("train/000001.tar", 3, 48, 1),
        ("train/000002.tar", 3, 48, 2),
        ("train/000003.tar", 3, 48, 0),
        ("train/000004.tar", 2, 21, 1),
    ]
    assert [(shard.samples, shard.tokens) for shard in valid.shards] == [(3, 48)]


def test_the_shards_can_be_read_by_webdataset_and_say_where_they_are(dataset):
    from webdataset import WebDataset

    urls = [str(path) for path in sorted((dataset / "train").glob("*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(14)]
    assert np.concatenate([sample["tokens.npy"] for sample in samples]).tolist() == STREAM.tolist()
    starts = np.cumsum([0, *map(len, TRAIN)])[:-1]
    for number, sample in enumerate(samples):
        facts, position = sample["json"], number * SAMPLE
        assert facts["position"] == position
        assert facts["documents"] == [start - position for start in starts if position <= start < position + SAMPLE]
        assert starts[facts["document"]] + facts["offset"] == position
        assert facts["document"] == np.searchsorted(starts, position, "right") - 1


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), step=st.integers(1, 90))
def test_the_dataset_does_not_depend_on_how_the_tokens_come(tmp_path_factory, lengths, step):
    documents = made_up(lengths)
    folders = [write(tmp_path_factory.mktemp("same"), {"train": documents}, step=size) for size in (step, 1000)]
    contents = [{path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert contents[0] == contents[1]
    index = Index.open(str(folders[0]))
    assert SampleReader(index, "train").tokens(0, sum(lengths)).tolist() == np.concatenate(documents).tolist()
    assert index.splits["train"].document_starts.tolist() == np.cumsum([0, *lengths]).tolist()


def test_a_document_without_tokens_is_none(tmp_path):
    tokenizer = BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    writer = SplitWriter(tmp_path, "train", tokenizer.dtype, SAMPLE, SHARD)
    nothing = np.empty(0, tokenizer.dtype)
    writer.add(nothing, [0], 0)
    writer.add(STREAM[:20], [0, 0, 7, 7, 20], 20)  # one of them at the end, and the next begins there
    writer.add(STREAM[20 : SAMPLE * SHARD], [0], 28)
    writer.add(nothing, [0, 0], 0)
    shards.write_index(tmp_path, {}, tokenizer, SAMPLE, SHARD, {"train": writer.close()})
    split = Index.open(str(tmp_path)).splits["train"]
    assert split.document_starts.tolist() == [0, 7, 20, 48] and split.documents == 3


def test_the_sizes_of_a_text_are_kept_where_all_of_them_are_known(tmp_path):
    tokenizer = BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    splits = {}
    for split, words in (("train", [2, 3]), ("valid", [2, None])):
        writer = SplitWriter(tmp_path, split, tokenizer.dtype, SAMPLE, SHARD)
        for count in words:
            writer.add(STREAM[:10], [0], 10, 9, count)
        splits[split] = writer.close()
    shards.write_index(tmp_path, {}, tokenizer, SAMPLE, SHARD, splits)
    found = Index.open(str(tmp_path)).splits
    assert [(split.bytes, split.characters, split.words) for split in found.values()] == [(20, 18, 5), (20, 18, None)]
    facts = json.loads((tmp_path / "index.json").read_text())
    for wrong in ("5", -1, 1.5, True):
        facts["splits"]["train"]["words"] = wrong
        (tmp_path / "index.json").write_text(json.dumps(facts | {"sha256": None}))
        with pytest.raises(UserError, match=r"splits.train.words="):
            Index.open(str(tmp_path))


def test_threads_may_share_a_reader(dataset):
    reader = SampleReader(Index.open(str(dataset)), "train", cache_samples=2)
    spans = [(start, 20) for start in range(0, 195, 3)] * 5
    with ThreadPoolExecutor(8) as pool:
        for (start, length), found in zip(spans, pool.map(lambda span: reader.tokens(*span), spans), strict=True):
            assert found.tolist() == STREAM[start : start + length].tolist()


def read_all(folder: Path) -> None:
    reader = SampleReader(Index.open(str(folder)), "train")
    for number in range(reader.split.samples):
        reader.sample(number)


def test_every_flipped_byte_of_a_sample_is_found(copy):
    """In headers, padding that tar ignores excepted; none gives other tokens."""
    path = copy / "train" / "000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        tokens = [member for member in tar if member.name.endswith(".npy")]
        places = [member.offset_data + member.size - at for member in tokens for at in (1, 2, 31, 32)]  # tokens
        header = (0, 5, 100, 124, 148)  # name, mode, size, checksum
        places += [member.offset + at for member in tokens for at in header]
        places += [member.offset_data + 1 for member in tokens]  # the .npy header
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"000001.tar: sample [345]: .*(copy|prepare) it again"):
            read_all(copy)
    path.write_bytes(whole)
    read_all(copy)


def test_truncated_swapped_and_missing_shards_are_found(copy):
    first, second = copy / "train" / "000001.tar", copy / "train" / "000002.tar"
    whole, other = first.read_bytes(), second.read_bytes()
    assert len(whole) == len(other)
    for size in (0, 512, 2048, 4096):  # at boundaries of the tar, where its readers end silently
        first.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"000001.tar: sample 3: the shard has {size:,} bytes, not {len(whole):,}"):
            read_all(copy)
        first.write_bytes(whole[:size] + bytes(len(whole) - size))
        with pytest.raises(UserError, match=r"000001.tar: sample [345]: "):
            read_all(copy)
    first.write_bytes(other)
    with pytest.raises(UserError, match=r"000001.tar: sample 3: .*000000006"):
        read_all(copy)
    first.unlink()
    with pytest.raises(UserError, match=r"000001.tar: sample 3: No such file"):
        read_all(copy)


def test_tokens_of_another_place_are_found(copy):
    """A shard written again with two documents swapped, or shifted by a token: as a tar it is perfect."""
    path = copy / "train" / "000000.tar"
    for wrong in (np.roll(STREAM, 1), np.concatenate([TRAIN[1], TRAIN[0], *TRAIN[2:]])):
        other = write(copy / f"other{len(list(copy.iterdir()))}", {"train": [wrong]})
        data = (other / "train" / "000000.tar").read_bytes()
        path.write_bytes(data.ljust(path.stat().st_size, b"\0"))
        with pytest.raises(UserError, match=r"000000.tar: sample 0: .*"):
            read_all(copy)


def change(path: Path, *keys: str | int):
    """Add one to a number deep in index.json, as one of an earlier version: without a sha256 of its own."""
    index = json.loads(path.read_text())
    del index["sha256"]
    place = functools.reduce(lambda value, key: value[key], keys[:-1], index)
    place[keys[-1]] += 1
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "keys, told",
    [
        (("version",), "is not the index of a txl_dist dataset, version 1"),
        (("sample_tokens",), "split train: 213 tokens do not make 14 samples of 17"),
        (("shard_samples",), "other than the last has not 4 samples"),
        (("splits", "train", "tokens"), "tokens of its shards do not add up to 214"),
        (("splits", "train", "samples"), "samples of its shards do not add up"),
        (("splits", "train", "shards", 1, "documents"), "documents of its shards do not add up"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copy, keys, told):
    change(copy / "index.json", *keys)
    with pytest.raises(UserError, match=f"index.json.*{told}"):
        Index.open(str(copy))


def test_damaged_files_beside_the_shards_are_told(copy):
    for name in ("train/samples.npy", "valid/documents.npy"):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: is not the one in the index"):
            Index.open(str(copy))
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            Index.open(str(copy))
        (copy / name).write_bytes(data)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: is not the one"):
        Index.open(str(copy)).tokenizer()
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace(Index.open(str(copy)).splits["train"].shards[2].sha256, "0" * 64))
    with pytest.raises(UserError, match=r"index.json: is damaged \(its content has the sha256 \w{12}, not \w{12} as"):
        Index.open(str(copy))
    without = re.sub(r',\s*"sha256": "\w+"\s*}\s*$', "}", (copy / "index.json").read_text())
    (copy / "index.json").write_text(without)
    with pytest.raises(UserError, match=r"fingerprint is not that of its shards"):
        Index.open(str(copy))
    (copy / "index.json").write_text(text[:-10])
    with pytest.raises(UserError, match=r"index.json: is damaged"):
        Index.open(str(copy))
    with pytest.raises(UserError, match=r"no dataset can be read here .* -m txl_dist.prepare data.dir="):
        Index.open(str(copy / "nothing"))


@pytest.fixture
def served(copy):
    """The copy behind a URL, the paths that were asked for, and those whose next answer breaks off half-way."""
    asked: list[str] = []
    breaking: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *values) -> None:
            asked.append(self.path)

        def copyfile(self, source, outputfile) -> None:
            data = source.read()
            if self.path in breaking:
                breaking.remove(self.path)
                data = data[: len(data) // 2]
            outputfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(copy)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, breaking
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_a_url_is_read_through_a_cache(served, copy, tmp_path, monkeypatch):
    url, asked, _ = served
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("txl_dist.data.index.PAUSES", (0, 0))
    index = Index.open(url + "/")
    assert index.tokenizer().kind == "bytes"
    for _ in range(2):
        reader = SampleReader(index, "train", cache_samples=1)
        assert reader.tokens(0, 90).tolist() == STREAM[:90].tolist()
    assert [path for path in asked if path.endswith(".tar")] == ["/train/000000.tar", "/train/000001.tar"]
    assert (tmp_path / "cache" / "txl_dist" / index.fingerprint / "train" / "000000.tar").exists()

    shard = copy / "train" / "000003.tar"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(
        UserError, match=r"000003.tar: cannot be fetched: what came is not the one in the index \(its sha"
    ):
        reader.tokens(150, 1)
    assert asked.count("/train/000003.tar") == 3
    (copy / "train" / "000004.tar").unlink()
    with pytest.raises(UserError, match=r"train/000004.tar: cannot be fetched: what fetches it ended with code 22$"):
        reader.tokens(212, 1)
    with pytest.raises(UserError, match=r"no dataset can be read here"):
        Index.open(url + "/elsewhere")
    with pytest.raises(UserError, match=r"no dataset can be read here .*no gopen handler"):
        Index.open("nonsense://bucket/folder")


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_a_fetch_that_fails_is_tried_again(served, tmp_path, monkeypatch):
    url, asked, breaking = served
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("txl_dist.data.index.PAUSES", (0.1, 0.1))
    breaking += ["/index.json", "/index.json", "/train/documents.npy", "/train/000001.tar", "/train/000001.tar"]
    reader = SampleReader(Index.open(url), "train")
    assert reader.tokens(0, 90).tolist() == STREAM[:90].tolist()
    assert [asked.count(path) for path in ("/index.json", "/train/documents.npy", "/train/000001.tar")] == [3, 2, 3]
    breaking += ["/train/000002.tar"] * 3
    with pytest.raises(UserError, match=r"train/000002.tar: cannot be fetched: what fetches it ended with code 18$"):
        reader.tokens(100, 1)
    assert not [path for path in tmp_path.rglob("*") if path.name == "000002.tar" and "cache" in path.parts]
    assert reader.tokens(100, 1).tolist() == [STREAM[100]]  # the server has recovered


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_a_damaged_file_in_the_cache_is_named_and_fetched_again_where_it_is_deleted(served, tmp_path, monkeypatch):
    url, asked, _ = served
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = Index.open(url)
    SampleReader(index, "train").tokens(0, 1)
    for name, sample in (("train/000000.tar", ": sample 0"), ("train/samples.npy", "")):
        path = tmp_path / "cache/txl_dist" / index.fingerprint / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=f"{path}{sample}: .*; delete {path}, it is fetched again$"):
            SampleReader(Index.open(url), "train").tokens(0, 1)
        path.unlink()
        assert SampleReader(Index.open(url), "train").tokens(0, 1) == STREAM[:1]
        assert asked.count(f"/{name}") == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_curl_can_be_told_who_we_are(copy, tmp_path, monkeypatch):
    """What the refusal of a URL with a password advises."""
    netrc = tmp_path / ".netrc"

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Basic " + base64.b64encode(b"user:s3cret").decode():
                return self.send_error(401)
            super().do_GET()

        def log_message(self, *values) -> None:
            pass

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("txl_dist.data.index.PAUSES", ())
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(copy))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="what fetches it ended with code 22"):
            Index.open(url)
        (tmp_path / ".curlrc").write_text("netrc\n")
        netrc.write_text("machine 127.0.0.1 login user password s3cret\n")
        netrc.chmod(0o600)
        assert SampleReader(Index.open(url), "train").tokens(0, 3).tolist() == STREAM[:3].tolist()
        server.shutdown()
