"""A resumed TLS session shows no certificate again: it must not outlive whom the files believe."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from certificates import Authority, Pair
from conftest import CONFIG
from fake_runtime import FakeRuntime

from server.app import Edge, Server
from server.config import TlsConfig

HTTP1 = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # empty SETTINGS
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Reached:
    """A server that believes clients of `authority`, and one of its clients."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "ours", "authority")
        self.stranger = Authority(directory / "theirs", "stranger")
        self.pair = self.authority.sign("server")
        self.own = self.authority.sign("client")
        self.believed = directory / "clients.pem"
        shutil.copy(self.authority.cert, self.believed)
        self.config = replace(CONFIG, tls=TlsConfig(self.pair.cert, self.pair.key, self.believed))

    def context(self, version: ssl.TLSVersion, own: Pair | None = None) -> ssl.SSLContext:
        own = own or self.own
        context = ssl.create_default_context(cafile=self.authority.cert)
        context.load_verify_locations(self.stranger.cert)
        context.load_cert_chain(own.cert, own.key)
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context


@pytest.fixture(scope="module")
def reached(tmp_path_factory) -> Reached:
    return Reached(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def as_at_first(reached):
    shutil.copy(reached.authority.cert, reached.believed)


@dataclass(frozen=True)
class Seen:
    """What a client saw of a connection that answered."""

    answer: bytes
    session: ssl.SSLSession
    resumed: bool
    certificate: bytes


def connect(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Seen:
    """Raises OSError where the client is not let in."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as tls,
    ):
        certificate = tls.getpeercert(binary_form=True)
        tls.sendall(HTTP2 if tls.selected_alpn_protocol() == "h2" else HTTP1)
        answer = tls.recv(4096)  # TLS 1.3 brings tickets, or that it refuses, only with this
        if not answer:
            raise ConnectionResetError("closed")
        return Seen(answer, tls.session, bool(tls.session_reused), certificate)


@pytest.fixture
async def server(reached):
    edge = Edge(reached.config)
    async with Server(FakeRuntime(edge), edge, reached.config) as server:
        yield server


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
async def test_a_session_ends_with_the_authority_that_admitted_it(reached, server, port, version):
    number, context = getattr(server, port), reached.context(version)
    first = await asyncio.to_thread(connect, number, context)
    again = await asyncio.to_thread(connect, number, context, first.session)
    shutil.copy(reached.stranger.cert, reached.believed)
    for session in (first.session, again.session):
        with pytest.raises(OSError):
            await asyncio.to_thread(connect, number, context, session)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
async def test_a_session_does_not_keep_an_old_certificate(reached, server, port, version):
    number, context = getattr(server, port), reached.context(version)
    first = await asyncio.to_thread(connect, number, context)
    reached.pair.replace_by(reached.stranger.sign("server"))
    again = await asyncio.to_thread(connect, number, context, first.session)
    assert not again.resumed
    assert again.certificate != first.certificate


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("believed", ["as before", "half a file"])
async def test_http_resumes_sessions_until_there_are_new_files(reached, server, believed, version):
    context = reached.context(version)
    first = await asyncio.to_thread(connect, server.http_port, context)
    if believed == "half a file":
        reached.believed.write_text(believed)
    again = await asyncio.to_thread(connect, server.http_port, context, first.session)
    assert again.resumed
    assert again.answer.startswith(b"HTTP/1.1 200")  # to no one without a certificate
