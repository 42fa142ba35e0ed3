"""TLS of both ports. Certificates are read again at the first handshake after they changed."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kasa_runtime.errors import ConfigError
from server.config import TlsConfig
from server.files import Stamps, stamps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """One state of the files, for either port."""

    grpc: Any
    http: ssl.SSLContext


class Certificates:
    """The server's certificate and key, and whom it believes. From any thread.

    New files that do not fit together are logged, and the old ones stay in use.
    """

    def __init__(self, config: TlsConfig) -> None:
        """Raises ConfigError if the files cannot be read or do not fit together."""
        assert config.tls_cert is not None and config.tls_key is not None
        self._cert, self._key, self._client_ca = (
            config.tls_cert,
            config.tls_key,
            config.tls_client_ca,
        )
        self._paths = [path for path in (self._cert, self._key, self._client_ca) if path]
        self._lock = threading.Lock()
        try:
            self._stamps: Stamps | None = stamps(self._paths)
            self._loaded = self._load()
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls: {self._problem(error)}") from None

    @property
    def wants_clients(self) -> bool:
        """Whether clients must show a certificate."""
        return self._client_ca is not None

    def grpc_credentials(self) -> Any:
        """Of the gRPC port."""
        given = self._loaded.grpc

        def changed() -> Any:
            nonlocal given
            before, given = given, self._current().grpc
            return None if given is before else given

        return grpc.dynamic_ssl_server_credentials(
            given, changed, require_client_authentication=self.wants_clients
        )

    def http_context(self) -> ssl.SSLContext:
        """Of the HTTP port. A client's certificate is checked if it shows one; `http/access.py`
        wants one for all but the probes."""
        front = _Front(ssl.PROTOCOL_TLS_SERVER)
        front.current = lambda: self._current().http
        return front

    def _current(self) -> _Loaded:
        with self._lock:
            try:
                found = stamps(self._paths)
                if found != self._stamps:
                    self._stamps = found
                    self._loaded = self._load()
                    logger.info("read new certificates")
            except (OSError, ValueError) as error:
                logger.error("tls: %s; the old certificates stay in use", self._problem(error))
            return self._loaded

    def _load(self) -> _Loaded:
        context = _context(self.wants_clients)
        context.load_cert_chain(self._cert, self._key)
        authorities = None
        if self._client_ca is not None:
            authorities = self._client_ca.read_bytes()
            context.load_verify_locations(cadata=authorities.decode("ascii"))
        pair = (self._key.read_bytes(), self._cert.read_bytes())
        return _Loaded(grpc.ssl_server_certificate_configuration([pair], authorities), context)

    def _problem(self, error: Exception) -> str:
        files = ", ".join(map(str, self._paths))
        return f"want a certificate, its key and authorities in PEM in {files}: {error}"


class _Front(ssl.SSLContext):
    """Hands each connection to the context of the files as they are then: `current`.

    Not an `sni_callback`, which comes late: sessions would be resumed by the keys of the context
    that never changes, and a resumed one shows its certificate to nobody.
    """

    current: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        return self.current().wrap_bio(*arguments, **named)

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        return self.current().wrap_socket(*arguments, **named)


def _context(wants_clients: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL if wants_clients else ssl.CERT_NONE
    return context
