"""What a browser may be made to send by pages of others. A server on loopback without tokens trusts
who reaches it, and every page that a browser of this machine shows reaches it, too."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kasa_runtime.errors import PermissionDenied

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class OwnOrigin:
    """ASGI middleware: refuses what pages of other origins ask for, but for reading, whose answers
    the browser keeps from them. With `own_names_only`, also every request under another name than
    this machine's own: by DNS rebinding, an attacker's name can come to mean this server, and its
    pages to be of the same origin. Raises PermissionDenied."""

    def __init__(self, app: ASGIApp, *, own_names_only: bool) -> None:
        self._app = app
        self._own_names_only = own_names_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._own_names_only and host and not _is_own_name(host):
            raise PermissionDenied(
                f"host: want localhost or another name of loopback, got {host[:80]!r}; a server "
                "that is to be reached by other names needs tokens (--tokens-file), or "
                "--insecure where something in front of it sees to that"
            )
        if scope["method"] not in SAFE_METHODS and not _is_own_origin(headers, host):
            origin = headers.get("origin", "another origin")
            raise PermissionDenied(
                f"origin: pages of {origin[:80]} may change nothing here, only those of "
                f"{host[:80]}; a proxy in front has to pass the header Host on"
            )
        await self._app(scope, receive, send)


def _is_own_name(host: str) -> bool:
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _is_own_origin(headers: Headers, host: str) -> bool:
    """Browsers say `sec-fetch-site` to servers on loopback or with TLS, and `origin` to all;
    programs say neither."""
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.lower().partition("://")[2] == host.lower()
