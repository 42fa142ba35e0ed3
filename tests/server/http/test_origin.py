"""A browser is told what to send by any page; these are the pages of others."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime

from kasa_runtime import tokens
from kasa_runtime.tokens import Action
from server.app import Edge, Server
from server.config import AccessConfig, ServerConfig, TlsConfig

TOKEN = tokens.new_token()
LINE = tokens.line("root", TOKEN, {action: ["*"] for action in Action})
UNMERGE = ("POST", "/kasa/v1/unmerge")


async def send(served, method, path, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient() as client:
        return await client.request(method, served.url(path), headers=names)


FOREIGN = (
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},  # another port of localhost
    {"sec_fetch_site": "cross-site", "origin": "http://OWN"},
    {"origin": "http://evil.example"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://OWN.evil.example"},
    {"origin": "null"},
)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        UNMERGE,
        ("PUT", "/kasa/v1/adapters/new"),
        ("DELETE", "/kasa/v1/adapters/style"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
async def test_pages_of_other_origins_change_nothing(served, method, path):
    own = served.url("").removeprefix("http://")
    for headers in FOREIGN:
        headers = {name: value.replace("OWN", own) for name, value in headers.items()}
        response = await send(served, method, path, **headers)
        assert response.status_code == 403, headers
        assert response.json()["error"]["message"].startswith("origin: pages of ")
    assert served.runtime.find("style")


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program
        {"sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "same-origin", "origin": "https://outside.example"},  # behind a proxy
        {"origin": "http://OWN"},
    ],
)
async def test_the_own_page_and_programs_may(served, headers):
    own = served.url("").removeprefix("http://")
    headers = {name: value.replace("OWN", own) for name, value in headers.items()}
    assert (await send(served, *UNMERGE, **headers)).status_code == 204


async def test_others_may_ask_but_their_browser_keeps_the_answer(served):
    headers = {"origin": "http://evil.example", "sec_fetch_site": "cross-site"}
    response = await send(served, "GET", "/kasa/v1/adapters", **headers)
    assert response.status_code == 200
    preflight = await send(
        served, "OPTIONS", UNMERGE[1], **headers, access_control_request_method="POST"
    )
    assert preflight.status_code == 405
    for answer in (response, preflight):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "[::2]:80"]
)
async def test_a_rebound_name_is_told_nothing(served, host):
    for path in ("/", "/metrics", "/kasa/v1/adapters", "/v1/models", "/healthz"):
        response = await send(served, "GET", path, host=host)
        assert response.status_code == 403, path
        assert response.json()["error"]["message"].startswith("host: want localhost")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "a.localhost", "127.0.0.1:1", "127.1.2.3", "[::1]:80"]
)
async def test_names_of_loopback_are_its_own(served, host):
    assert (await send(served, "GET", "/kasa/v1/adapters", host=host)).status_code == 200


@pytest.mark.parametrize(
    "access", [AccessConfig(tokens=LINE), AccessConfig(insecure=True)], ids=["tokens", "insecure"]
)
async def test_a_server_that_others_guard_may_have_any_name(access):
    config = replace(CONFIG, access=access)
    edge = Edge(config)
    async with (
        Server(FakeRuntime(edge), edge, config) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as client,
    ):
        headers = {"host": "kasa.example", "authorization": f"Bearer {TOKEN}"}
        response = await client.get("/kasa/v1/adapters", headers=headers)
        assert response.status_code == 200
        headers |= {"origin": "https://evil.example"}
        assert (await client.post("/kasa/v1/unmerge", headers=headers)).status_code == 403
        headers |= {"origin": "https://kasa.example"}
        assert (await client.post("/kasa/v1/unmerge", headers=headers)).status_code == 204


def test_only_a_server_that_nothing_guards_minds_its_name(tmp_path):
    pem = tmp_path / "a.pem"
    assert ServerConfig().is_open_on_loopback
    assert not ServerConfig(tls=TlsConfig(pem, pem)).is_open_on_loopback
    assert not ServerConfig(access=AccessConfig(insecure=True), host="0.0.0.0").is_open_on_loopback
