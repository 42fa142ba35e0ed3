"""The page at `/`, for people: the files of `static/`, served from memory. It holds nothing secret,
so it needs no token; what it shows comes from `/kasa/v1` and `/v1`, which ask for one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = Path(__file__).with_name("static")
INDEX = "index.html"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Asked for again each time, which costs a 304: a new version is there at once.
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def routes() -> list[Route]:
    found = [_File.read(path) for path in sorted(FILES.iterdir())]
    return [Route("/" if f.name == INDEX else f"/static/{f.name}", f.answer) for f in found]


@dataclass(frozen=True)
class _File:
    name: str
    content: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return cls(path.name, content, TYPES[path.suffix], f'"{digest[:32]}"')

    async def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "etag": self.etag}
        known = request.headers.get("if-none-match", "").split(",")
        if self.etag in (etag.strip().removeprefix("W/") for etag in known):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.content_type)
