"""Serve a page to the browsers of this machine, with data that are asked for again and again."""

import errno
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from txl_dist.errors import UserError, describe_os_error
from txl_dist.pages.page import embedded

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # under which a browser of this machine asks, also through a tunnel


class PageServer(ThreadingHTTPServer):
    """Serves `/`, the page, and `/data?VERSION`: 204 where the data still have that version, else the data.

    Args:
        port: 0: a free one.
        version: returns a text that is another one when the data are others.
        data: returns the data.
        page: returns the HTML of data.

    Raises:
        UserError: if the port cannot be taken.
    """

    daemon_threads = True

    def __init__(
        self, port: int, version: Callable[[], str], data: Callable[[], Any], page: Callable[[Any], str]
    ) -> None:
        self.version = version
        self.data = data
        self.page = page
        try:
            super().__init__((HOST, port), PageHandler)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be taken ({error.strerror})"
            raise UserError(f"port={port}: {reason}; give another one, or port=0 for one that is free") from error

    @property
    def address(self) -> str:
        """Return the URL of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def versioned_data(self) -> Any:
        """Return the data with their version, which is read first: what is added meanwhile is another version."""
        version = self.version()
        return {"version": version, **self.data()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that does not wait for the answer."""


class PageHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page or its data."""
        url = urlsplit(self.path)
        if self.headers.get("Host", "").partition(":")[0] not in NAMES:  # a page of another site must not read here
            self.answer(403, "text/plain", "This page is for browsers of this machine.")
        elif url.path not in ("/", "/data"):
            self.answer(404, "text/plain", "There is nothing here.")
        elif url.path == "/data" and unquote(url.query) == self.server.version():
            self.answer(204, "application/json", "")
        else:
            self.answer_with_data(is_page=url.path == "/")

    def answer_with_data(self, is_page: bool) -> None:
        """Answer with the page, or its data alone; with the reason where files cannot be read."""
        try:
            data = self.server.versioned_data()
        except (OSError, UserError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            self.answer(500, "text/plain", reason)
            return
        if is_page:
            self.answer(200, "text/html", self.server.page(data))
        else:
            self.answer(200, "application/json", embedded(data))

    def answer(self, status: int, kind: str, text: str) -> None:
        """Send an answer that is not to be kept."""
        content = text.encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing about requests."""
