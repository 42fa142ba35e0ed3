from __future__ import annotations

import asyncio
import shutil
import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from certificates import Authority, Pair
from click.testing import CliRunner
from conftest import CONFIG
from fake_runtime import MODEL, FakeRuntime

from kasa_runtime.cli import cli
from kasa_runtime.client import AsyncClient, Client
from kasa_runtime.errors import ConfigError, Unreachable
from server.app import Edge, Server
from server.config import AccessConfig, ServerConfig, TlsConfig
from server.healthcheck import check
from server.tls import Certificates


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "ours", "authority")


@pytest.fixture
def stranger(tmp_path) -> Authority:
    return Authority(tmp_path / "theirs", "stranger")


@pytest.fixture
def pair(authority) -> Pair:
    return authority.sign("server")


@asynccontextmanager
async def serving(pair: Pair, client_ca: Path | None = None):
    config = replace(CONFIG, tls=TlsConfig(pair.cert, pair.key, client_ca))
    edge = Edge(config)
    async with Server(FakeRuntime(edge), edge, config) as server:
        yield server


def address(server: Server) -> str:
    return f"127.0.0.1:{server.grpc_port}"


async def get(server: Server, path: str, ca: Path, own: Pair | None = None) -> int:
    context = ssl.create_default_context(cafile=ca)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    url = f"https://127.0.0.1:{server.http_port}{path}"
    async with httpx.AsyncClient(verify=context) as client:
        return (await client.get(url)).status_code


async def test_both_ports_speak_tls_and_nothing_else(authority, pair):
    async with serving(pair) as server:
        async with AsyncClient(address(server), root_certificates=authority.cert) as client:
            assert await client.get_model() == MODEL
        assert await get(server, "/metrics", authority.cert) == 200
        async with AsyncClient(address(server), max_attempts=1) as client:
            with pytest.raises(Unreachable):
                await client.get_model()
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{server.http_port}/metrics")


async def test_a_client_does_not_believe_a_server_of_another_authority(pair, stranger):
    async with serving(pair) as server:
        security = {"root_certificates": stranger.cert, "max_attempts": 1}
        async with AsyncClient(address(server), **security) as client:
            with pytest.raises(Unreachable):
                await client.get_model()
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await get(server, "/metrics", stranger.cert)


async def test_the_sync_client_an_upload_and_the_health_check_speak_tls(authority, pair, tmp_path):
    directory = tmp_path / "fresh"
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("{}")
    security = {"root_certificates": authority.cert, "token": "kept in every call"}
    async with serving(pair) as server:

        def use():
            with Client(address(server), **security) as client:
                return client.get_model(), client.generate("one two").text

        assert await asyncio.to_thread(use) == (MODEL, "one two ")
        async with AsyncClient(address(server), **security) as client:
            assert (await client.upload(directory)).name == "fresh"
        assert await asyncio.to_thread(check, address(server), security=security) == ""
        assert "UNAVAILABLE" in await asyncio.to_thread(check, address(server))


async def test_commands_speak_tls(authority, pair):
    own = authority.sign("client")
    async with serving(pair, authority.cert) as server:
        flags = ["--root-certificates", authority.cert, "--certificate", own.cert]
        arguments = ["generate", "one two", "--address", address(server), *flags]
        for key, status in ((["--private-key", own.key], 0), ([], 1)):
            given = [*map(str, [*arguments, *key])]
            result = await asyncio.to_thread(CliRunner().invoke, cli, given)
            assert result.exit_code == status, result.output
            if status == 0:
                assert result.stdout == "one two \n"
            else:
                assert "certificate and private_key must be given together" in result.stderr


async def test_with_an_authority_of_clients_only_theirs_come_in(authority, stranger, pair):
    ours, theirs = authority.sign("client"), stranger.sign("client")
    async with serving(pair, authority.cert) as server:
        for own, allowed in ((ours, True), (theirs, False), (None, False)):
            security = {"root_certificates": authority.cert, "max_attempts": 1}
            if own is not None:
                security |= {"certificate": own.cert, "private_key": own.key}
            async with AsyncClient(address(server), **security) as client:
                if allowed:
                    assert await client.get_model() == MODEL
                else:
                    with pytest.raises(Unreachable):
                        await client.get_model()
        assert await get(server, "/metrics", authority.cert, ours) == 200
        assert await get(server, "/metrics", authority.cert) == 403
        assert await get(server, "/healthz", authority.cert) == 200
        with pytest.raises(httpx.TransportError):
            await get(server, "/metrics", authority.cert, theirs)


async def test_new_certificates_are_used_without_a_restart(authority, stranger, pair, caplog):
    async with serving(pair) as server:
        await grpc_reaches(server, authority)
        pair.replace_by(stranger.sign("server"))
        await grpc_reaches(server, stranger)
        with pytest.raises(Unreachable):
            await grpc_reaches(server, authority)
        assert await get(server, "/metrics", stranger.cert) == 200
        pair.cert.write_text("half a file")
        await grpc_reaches(server, stranger)
        assert await get(server, "/metrics", stranger.cert) == 200
        assert "the old certificates stay in use" in caplog.text


async def grpc_reaches(server: Server, authority: Authority) -> None:
    security = {"root_certificates": authority.cert, "max_attempts": 1}
    async with AsyncClient(address(server), **security) as client:
        await client.get_model()


async def test_a_new_authority_of_clients_is_believed_without_a_restart(
    authority, stranger, pair, tmp_path
):
    believed = tmp_path / "clients.pem"
    shutil.copy(authority.cert, believed)
    theirs = stranger.sign("client")
    security = {
        "root_certificates": authority.cert,
        "certificate": theirs.cert,
        "private_key": theirs.key,
        "max_attempts": 1,
    }
    async with serving(pair, believed) as server:
        async with AsyncClient(address(server), **security) as client:
            with pytest.raises(Unreachable):
                await client.get_model()
        shutil.copy(stranger.cert, believed)
        async with AsyncClient(address(server), **security) as client:
            assert await client.get_model() == MODEL
        assert await get(server, "/metrics", authority.cert, theirs) == 200


def test_files_that_do_not_fit_together_are_refused_at_the_start(authority, stranger, pair):
    other = stranger.sign("other")
    for config in (
        TlsConfig(pair.cert, other.key),
        TlsConfig(pair.key, pair.key),
        TlsConfig(pair.cert, Path("nowhere")),
        TlsConfig(pair.cert, pair.key, other.key),
    ):
        with pytest.raises(ConfigError, match="want a certificate, its key"):
            Certificates(config)


def test_half_a_pair_is_refused(pair):
    with pytest.raises(ConfigError, match="together"):
        TlsConfig(pair.cert)
    with pytest.raises(ConfigError, match="tls_client_ca needs"):
        TlsConfig(tls_client_ca=pair.cert)
    with pytest.raises(ConfigError, match="together"):
        Client(certificate=pair.cert)
    with pytest.raises(ConfigError, match="root_certificates: nowhere cannot be read"):
        Client(root_certificates="nowhere")


TLS, CLIENT_CA = TlsConfig(Path("c"), Path("k")), TlsConfig(Path("c"), Path("k"), Path("ca"))
TOKENS = AccessConfig(tokens="some")


@pytest.mark.parametrize(
    ("host", "tls", "access", "allowed"),
    [
        ("127.0.0.1", TlsConfig(), AccessConfig(), True),
        ("127.8.0.1", TlsConfig(), AccessConfig(), True),
        ("::1", TlsConfig(), AccessConfig(), True),
        ("localhost", TlsConfig(), AccessConfig(), True),
        ("0.0.0.0", TlsConfig(), AccessConfig(), False),
        ("::", TlsConfig(), AccessConfig(), False),
        ("kasa.example", TlsConfig(), AccessConfig(), False),
        ("", TlsConfig(), AccessConfig(), False),
        ("0.0.0.0", TLS, AccessConfig(), False),
        ("0.0.0.0", TlsConfig(), TOKENS, False),
        ("0.0.0.0", TLS, TOKENS, True),
        ("0.0.0.0", CLIENT_CA, AccessConfig(), True),
        ("0.0.0.0", TlsConfig(), AccessConfig(insecure=True), True),
    ],
)
def test_other_addresses_than_loopback_want_tls_and_authentication(host, tls, access, allowed):
    if allowed:
        ServerConfig(host=host, tls=tls, access=access)
    else:
        with pytest.raises(ConfigError, match="not loopback"):
            ServerConfig(host=host, tls=tls, access=access)
