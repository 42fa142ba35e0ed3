"""Who may come in, and how much at a time one client may take."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kasa_runtime.errors import (
    AdapterNotFound,
    CapacityExceeded,
    ConfigError,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
)
from kasa_runtime.limits import TokenBucket
from kasa_runtime.tokens import ANYONE, Caller, Tokens, not_found
from server.config import AccessConfig, ClientLimits, ServerConfig
from server.files import Stamps, stamps

logger = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
RELOAD_S = 1.0
RETRY_S = 1.0
MAX_IDLE_CLIENTS = 10_000


class Gate:
    """Knows callers by their tokens and counts what they take. Event loop only."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the tokens cannot be read."""
        self.wants_certificate = config.tls.tls_client_ca is not None
        self._tokens = _KnownTokens(config.access, clock) if config.access.enabled else None
        self._limits: ClientLimits = config.clients
        self._clock = clock
        self._streams: Counter[str] = Counter()
        self._uploads: dict[str, TokenBucket] = {}

    def caller(self, headers: Mapping[str, Any]) -> Caller:
        """Who sent these headers or metadata (keys in lower case). Raises Unauthenticated."""
        if self._tokens is None:
            return ANYONE
        scheme, _, token = str(headers.get(AUTHORIZATION, "")).partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(
                "this server wants a token, as `authorization: Bearer TOKEN`; give --token, "
                "KASA_TOKEN or Client(token=...)"
            )
        caller = self._tokens.current().find(token.strip())
        if caller is None:
            raise Unauthenticated("this server does not know the token, or no longer")
        return caller

    def sees(self, context: Any, adapter: str) -> bool:
        """Whether the caller of an RPC may know of an adapter; False without a known token."""
        try:
            return self.caller(dict(context.invocation_metadata() or ())).sees(adapter)
        except Unauthenticated:
            return False

    @contextmanager
    def stream(self, client: str) -> Iterator[None]:
        """One call of a client, until it ends. Raises Overloaded."""
        limit = self._limits.max_streams_per_client
        if limit and self._streams[client] >= limit:
            raise Overloaded(
                f"{client} has {limit} calls at the same time, as many as this server allows a "
                "client; try again later",
                retry_after_s=RETRY_S,
            )
        self._streams[client] += 1
        try:
            yield
        finally:
            self._streams[client] -= 1
            if not self._streams[client]:
                del self._streams[client]

    def require_upload_size(self, num_bytes: int) -> None:
        """Raises InvalidRequest if the files of an upload are larger than one may be."""
        if num_bytes > self._limits.max_upload_mib * 2**20:
            raise InvalidRequest(
                "manifest.files",
                f"have {num_bytes} bytes, this server takes {self._limits.max_upload_mib:g} MiB",
            )

    def upload(self, client: str, num_bytes: int) -> None:
        """Count an upload that begins. Raises InvalidRequest if it is too large, Overloaded."""
        self.require_upload_size(num_bytes)
        rate = self._limits.max_uploads_per_minute / 60
        if not rate:
            return
        now_s = self._clock()
        self._forget_full(now_s)
        bucket = self._uploads.setdefault(client, TokenBucket(rate, now_s))
        if wait_s := bucket.wait_s(now_s):
            raise Overloaded(
                f"{client} may begin {60 * rate:g} uploads per minute; try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        bucket.take(1, now_s)

    def _forget_full(self, now_s: float) -> None:
        if len(self._uploads) > MAX_IDLE_CLIENTS:
            self._uploads = {
                client: bucket for client, bucket in self._uploads.items() if bucket.wait_s(now_s)
            }


def client_of(caller: Caller, peer: str) -> str:
    """Whose limits a call counts against: the token's, else those of its address, without port."""
    return caller.name or peer.rpartition(":")[0]


def told_to(caller: Caller, error: Exception) -> Exception:
    """The error as the caller may know it: some name other adapters."""
    if caller.sees_all:
        return error
    if isinstance(error, AdapterNotFound):
        return AdapterNotFound(not_found(error.name), name=error.name)
    if isinstance(error, CapacityExceeded):
        logger.warning("%s was told that it does not fit: %s", caller.name, error)
        return CapacityExceeded("does not fit this server's settings, whose log says more")
    return error


class _KnownTokens:
    """The tokens of a file, read again when it changes, or of a text."""

    def __init__(self, config: AccessConfig, clock: Callable[[], float]) -> None:
        self._path = config.tokens_file
        self._clock = clock
        self._checked_s = clock()
        self._stamps: Stamps = ()
        if self._path is None:
            self._tokens = Tokens.parse(config.tokens, "tokens")
        else:
            self._tokens = self._read(self._path)

    def current(self) -> Tokens:
        now_s = self._clock()
        if self._path is not None and now_s >= self._checked_s + RELOAD_S:
            self._checked_s = now_s
            self._reload(self._path)
        return self._tokens

    def _reload(self, path: Path) -> None:
        try:
            if stamps([path]) != self._stamps:
                self._tokens = self._read(path)
                logger.info("read new tokens from %s", path)
        except (OSError, ConfigError) as error:
            logger.error("%s; the old tokens stay valid", error)

    def _read(self, path: Path) -> Tokens:
        try:
            self._stamps = stamps([path])
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokens_file: {path} cannot be read: {error}") from None
        return Tokens.parse(text, str(path))
