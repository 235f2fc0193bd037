"""Fixtures for tests of downloads: a real HTTP server whose connections can break, and archives."""

import io
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


class Server(ThreadingHTTPServer):
    """Serves `files`. cut: the byte of a file at which connections break. ranges: the Range header is obeyed."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges = files, 0, True
        self.asked: list[str | None] = []  # the Range of every request

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        data = self.server.files.get(self.path[1:])
        wanted = self.headers["Range"]
        self.server.asked.append(wanted)
        if data is None or "Python" in self.headers["User-Agent"]:
            return self.send_error(404 if data is None else 403)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : self.server.cut or len(data)])

    def log_message(self, *values):
        pass


@pytest.fixture
def server():
    with Server({}) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def pack():
    """Write an archive, .zip or .tgz, of files (name -> content)."""

    def pack(path: Path, files: dict[str, bytes]) -> Path:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
                for name, data in files.items():
                    zipped.writestr(name, data)
        else:
            with tarfile.open(path, "w:gz") as tar:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return path

    return pack
