"""A dataset behind a URL is read through a cache; URLs that are commands or hold secrets are refused."""

import base64
import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.data.datasets import STREAM
from txl_dist.data.index import Index
from txl_dist.data.samples import SampleReader
from txl_dist.errors import UserError


@pytest.fixture
def served(copy):
    """Serve the copy: its URL, the paths that were asked for, and those whose next answer breaks off half-way."""
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
    monkeypatch.setattr("txl_dist.data.store.PAUSES", (0, 0))
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
        UserError, match=r"000003.tar: cannot be fetched: the file that came: SHA-256 differs from index.json \("
    ):
        reader.tokens(150, 1)
    assert asked.count("/train/000003.tar") == 3
    (copy / "train" / "000004.tar").unlink()
    with pytest.raises(UserError, match=r"train/000004.tar: cannot be fetched: its download ended with code 22$"):
        reader.tokens(212, 1)
    with pytest.raises(UserError, match=r"no dataset can be read here"):
        Index.open(url + "/elsewhere")
    with pytest.raises(UserError, match=r"no dataset can be read here .*no gopen handler"):
        Index.open("nonsense://bucket/folder")


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_a_fetch_that_fails_is_tried_again(served, tmp_path, monkeypatch):
    url, asked, breaking = served
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("txl_dist.data.store.PAUSES", (0.1, 0.1))
    breaking += ["/index.json", "/index.json", "/train/documents.npy", "/train/000001.tar", "/train/000001.tar"]
    reader = SampleReader(Index.open(url), "train")
    assert reader.tokens(0, 90).tolist() == STREAM[:90].tolist()
    assert [asked.count(path) for path in ("/index.json", "/train/documents.npy", "/train/000001.tar")] == [3, 2, 3]
    breaking += ["/train/000002.tar"] * 3
    with pytest.raises(UserError, match=r"train/000002.tar: cannot be fetched: its download ended with code 18$"):
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
def test_curl_may_have_credentials(copy, tmp_path, monkeypatch):
    """The refusal of a URL with a password advises this."""
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
    monkeypatch.setattr("txl_dist.data.store.PAUSES", ())
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(copy))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="its download ended with code 22"):
            Index.open(url)
        (tmp_path / ".curlrc").write_text("netrc\n")
        netrc.write_text("machine 127.0.0.1 login user password s3cret\n")
        netrc.chmod(0o600)
        assert SampleReader(Index.open(url), "train").tokens(0, 3).tolist() == STREAM[:3].tolist()
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:{}@host/data",
        "https://{}@host/data",
        "sftp://user:{}@host/data",
        "https://host/data?token={}",
        "https://host/data#{}",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"://host/data: the URL .*\.curlrc") as caught:
        Index.open(url.format("s3cret"))
    assert "s3cret" not in str(caught.value)


def test_a_command_is_not_a_location_of_data(tmp_path):
    """A run's config names the location of its data, and evaluate trusts it."""
    with pytest.raises(UserError, match="is a command"):
        Index.open(f"pipe:///bin/touch {tmp_path}/made; cat")
    assert list(tmp_path.iterdir()) == []
