"""How a client reaches a server that wants TLS, certificates or a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import grpc

from kasa_runtime.errors import ConfigError


class SecurityOptions(TypedDict, total=False):
    """What a client takes beside the address; any of the files means TLS."""

    token: str | None  # sent as `authorization: Bearer`; without TLS, everybody on the way reads it
    tls: bool  # with the authorities that gRPC knows; default: False
    root_certificates: Path | str | None  # PEM: authorities that may have signed the server's
    certificate: Path | str | None  # PEM: the client's own, for servers that want one
    private_key: Path | str | None  # PEM: of that certificate


def open_channel(
    address: str,
    security: SecurityOptions,
    options: list[tuple[str, Any]],
    *,
    asynchronous: bool = False,
) -> Any:
    """A channel of gRPC's one kind or the other, whose calls carry the token. Raises ConfigError
    for files that cannot be read or are not complete."""
    make = grpc.aio if asynchronous else grpc
    credentials = _credentials(security)
    if credentials is None:
        channel = make.insecure_channel(address, options=options)
    else:
        channel = make.secure_channel(address, credentials, options=options)
    token = security.get("token")
    return _WithMetadata(channel, (("authorization", f"Bearer {token}"),)) if token else channel


def _credentials(security: SecurityOptions) -> Any:
    names = ("root_certificates", "private_key", "certificate")
    files = [_read(name, security.get(name)) for name in names]  # in ssl_channel_credentials' order
    if (files[1] is None) != (files[2] is None):
        raise ConfigError("certificate and private_key must be given together, got one of them")
    if not security.get("tls") and not any(files):
        return None
    return grpc.ssl_channel_credentials(*files)


def _read(name: str, path: Any) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None


class _WithMetadata:
    """A channel that adds metadata to every call. gRPC's own means, call credentials, want TLS."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        return self._adding(found) if name.endswith(("_unary", "_stream")) else found

    def __enter__(self) -> _WithMetadata:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _adding(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            call = method(*args, **kwargs)

            def called(request: Any, *, metadata: Any = None, **options: Any) -> Any:
                return call(request, metadata=(*(metadata or ()), *self._metadata), **options)

            return called

        return make
