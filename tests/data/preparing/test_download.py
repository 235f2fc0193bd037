"""An interrupted download is resumed, and only the published file gets its name."""

import hashlib
import socket
import tarfile
from pathlib import Path

import pytest

from txl_dist.data.preparing.download import Download, download, unpack
from txl_dist.errors import UserError

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def content(server):
    server.files["a.bin"] = CONTENT


def published(server, name: str = "a.bin", content: bytes = CONTENT) -> Download:
    return Download(server.url(name), len(content), hashlib.sha256(content).hexdigest())


def ignored(size: int) -> None:
    pass


def test_an_interrupted_download_resumes_where_it_stopped(server, tmp_path):
    path = tmp_path / "new" / "a.bin"
    advanced = []
    for cut in (100_000, 300_000):
        server.cut = cut
        with pytest.raises(OSError, match=f"broke after {cut:,} of 512,000 bytes"):
            download(published(server), path, ignored)
        assert not path.exists() and (path.parent / "a.bin.partial").read_bytes() == CONTENT[:cut]
    server.cut = 0
    download(published(server), path, advanced.append)
    assert server.asked == [None, "bytes=100000-", "bytes=300000-"]
    assert path.read_bytes() == CONTENT and sum(advanced) == len(CONTENT) and advanced[0] == 300_000
    download(published(server), path, ignored)  # it is there
    assert len(server.asked) == 3 and not (path.parent / "a.bin.partial").exists()


def test_a_download_that_cannot_be_resumed_begins_anew(server, tmp_path):
    path, partial = tmp_path / "a.bin", tmp_path / "a.bin.partial"
    server.ranges = False
    partial.write_bytes(CONTENT[:1000])
    download(published(server), path, ignored)
    assert path.read_bytes() == CONTENT
    path.unlink()
    partial.write_bytes(b"of another version")
    download(Download(server.url("a.bin")), path, ignored)  # nothing would distinguish the halves
    assert path.read_bytes() == CONTENT and server.asked == ["bytes=1000-", None]


def test_a_complete_file_that_was_not_checked_yet_is_not_fetched_again(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    download(published(server), tmp_path / "a.bin", ignored)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.asked == []


@pytest.mark.parametrize(
    "content, message",
    [
        (CONTENT[:-1] + b"x", "has the sha256 .* but a.bin was published with"),
        (CONTENT + b"x", "has 512,001 bytes, but a.bin was published with 512,000"),
        (CONTENT[:-1], "has 511,999 bytes"),
    ],
)
def test_a_file_that_differs_from_the_published_one_is_reported_and_deleted(server, tmp_path, content, message):
    wanted = published(server)
    server.files["a.bin"] = content
    with pytest.raises(UserError, match=rf"127.0.0.1:\d+/a.bin: what came {message}"):
        download(wanted, tmp_path / "a.bin", ignored)
    assert not list(tmp_path.iterdir())
    server.files["a.bin"] = CONTENT
    download(wanted, tmp_path / "a.bin", ignored)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_rest_that_the_server_does_not_have_is_dropped(server, tmp_path):
    wanted = published(server)
    server.files["a.bin"] = CONTENT[:1000]
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:2000])
    with pytest.raises(OSError, match="416"):
        download(wanted, tmp_path / "a.bin", ignored)
    server.files["a.bin"] = CONTENT
    download(wanted, tmp_path / "a.bin", ignored)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.asked == ["bytes=2000-", None]


def test_no_file_and_no_server_are_errors_of_the_network(server, tmp_path):
    with pytest.raises(OSError, match="404"):
        download(published(server, "none"), tmp_path / "a.bin", ignored)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            download(Download(f"http://127.0.0.1:{closed.getsockname()[1]}/a.bin"), tmp_path / "a.bin", ignored)


# ----------------------------------------------------------------------------------------------------- archives


every_kind = pytest.mark.parametrize("kind", [".zip", ".tgz", ".tar.gz"])


@every_kind
def test_only_the_named_files_come_out_and_only_into_the_folder(pack, tmp_path, kind):
    names = ["x/wanted", "../../outside", "../second", "/tmp/txl_dist_outside", "x/else", "__MACOSX/._wanted"]
    packed = pack(tmp_path / f"a{kind}", {name: name.encode() for name in names})
    folder = tmp_path / "deep" / "folder"
    advanced = []
    unpack(packed, {"wanted", "second", "absent"}, folder, advanced.append)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "wanted": b"x/wanted",
        "second": b"../second",
    }
    assert sum(advanced) == len("x/wanted") + len("../second")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {packed.name, "deep/folder/wanted", "deep/folder/second"}
    assert not Path("/tmp/txl_dist_outside").exists()


def test_links_and_devices_are_not_files(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("wanted")
            member.type, member.linkname = kind, str(tmp_path / "secret")
            tar.addfile(member)
    unpack(tmp_path / "a.tgz", {"wanted"}, tmp_path / "out", ignored)
    assert list((tmp_path / "out").iterdir()) == []


@every_kind
def test_a_cut_or_damaged_archive_is_reported_and_leaves_no_folder(pack, tmp_path, kind):
    data = hashlib.shake_256(b"").digest(100_000)  # does not compress
    original = pack(tmp_path / f"original{kind}", {"wanted": data}).read_bytes()
    flipped = original[:50_000] + bytes([original[50_000] ^ 1]) + original[50_001:]
    for damaged in (b"", b"no archive at all", original[:50_000], original[:-20], flipped):
        (tmp_path / f"a{kind}").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a{kind}: is damaged or cut off .*fetch it again"):
            unpack(tmp_path / f"a{kind}", {"wanted"}, tmp_path / "out", ignored)
        assert not (tmp_path / "out").exists()
    (tmp_path / f"a{kind}").write_bytes(original)
    unpack(tmp_path / f"a{kind}", {"wanted"}, tmp_path / "out", ignored)
    assert (tmp_path / "out" / "wanted").read_bytes() == data


def test_a_folder_that_cannot_be_written_is_reported(pack, tmp_path):
    packed = pack(tmp_path / "a.zip", {"wanted": b"x"})
    with pytest.raises(UserError, match=r"a.zip: cannot be unpacked to .*\(Not a directory\)"):
        unpack(packed, {"wanted"}, packed / "folder", ignored)
