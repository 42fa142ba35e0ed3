"""An OpenAI-compatible API that answers as it is told, on a thread."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CARDS = [
    {"id": "base/model", "object": "model", "parent": None},
    {"id": "style", "object": "model", "parent": "base/model"},
]


class FakeOpenAi(ThreadingHTTPServer):
    """`texts` of the tokens that come, one event each; `num_tokens` that the usage tells."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.texts = ("one", " two", "")
        self.num_tokens = 3
        self.cards: list[dict[str, Any]] = CARDS
        self.refusal: tuple[int, str] | None = None
        self.failure: dict[str, Any] | None = None  # an event in the middle of a stream
        self.held = threading.Event()
        self.held.set()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.tokens: list[str | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go away
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[FakeOpenAi]:
    with FakeOpenAi() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.held.set()
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAi

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"object": "list", "data": self.server.cards}))

    def do_POST(self) -> None:
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.paths.append(self.path)
        fake.bodies.append(body)
        fake.tokens.append(self.headers["Authorization"])
        fake.held.wait()
        if fake.refusal is not None:
            self._answer(*fake.refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for text in fake.texts:
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            self._event({"choices": [{"index": 0, **choice}]})
        if fake.failure is not None:
            self._event(fake.failure)
            return
        details = {"cached_tokens": 2}
        usage = {"prompt_tokens": 5, "completion_tokens": fake.num_tokens}
        self._event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Not on the terminal."""
