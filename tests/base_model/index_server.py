"""A package index on 127.0.0.1 with one wheel, whose manners a test can spoil."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


def make_wheel(distribution: str, version: str, members: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts, holding `members`."""
    package = distribution.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


class IndexServer:
    """Serves `wheel` at `file_url` and an index of it at `index_url`, while entered."""

    def __init__(self, distribution: str, version: str, wheel: bytes) -> None:
        self.distribution = distribution
        self.file_name = f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"
        self.wheel = wheel
        self.ranges = True
        self.cut_after: int | None = None  # break the next answer off after so many bytes
        self.status: int | None = None  # answer requests for the file with this
        self.asked: list[str] = []  # the Range header of each request for the file

    @property
    def index_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/simple"

    @property
    def file_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/files/{self.file_name}"

    def __enter__(self) -> IndexServer:
        owner = self

        class Handler(_Handler):
            index = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="index-server")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    index: IndexServer

    def do_GET(self) -> None:
        if self.path.startswith("/files/"):
            self._send_file()
        elif self.path.strip("/") == f"simple/{self.index.distribution}":
            digest = hashlib.sha256(self.index.wheel).hexdigest()
            link = f"/files/{self.index.file_name}#sha256={digest}"
            page = f'<!DOCTYPE html><a href="{link}">{self.index.file_name}</a>'.encode()
            self._send(200, page, {"Content-Type": "text/html"})
        else:
            self._send(404, b"", {})

    def _send_file(self) -> None:
        wanted = self.headers.get("Range", "")
        self.index.asked.append(wanted)
        wheel = self.index.wheel
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.index.status is not None:
            self._send(self.index.status, b"", {})
        elif not wanted or not self.index.ranges:
            self._send(200, wheel, {})
        elif start >= len(wheel):
            self._send(416, b"", {"Content-Range": f"bytes */{len(wheel)}"})
        else:
            content_range = f"bytes {start}-{len(wheel) - 1}/{len(wheel)}"
            self._send(206, wheel[start:], {"Content-Range": content_range})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut, self.index.cut_after = self.index.cut_after, None
        self.wfile.write(body[:cut])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests look at `asked`."""
