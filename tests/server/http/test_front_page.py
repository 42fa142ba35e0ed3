"""The files of the page, as they are served; what they do is in test_browser.py."""

from __future__ import annotations

import re
from dataclasses import replace

import httpx
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime

from kasa_runtime import tokens
from kasa_runtime.tokens import Action
from server.app import Edge, Server
from server.config import AccessConfig
from server.http.front_page import FILES, TYPES

STATIC = sorted(path.name for path in FILES.iterdir())


async def get(served, path, **headers):
    async with httpx.AsyncClient() as client:
        return await client.get(served.url(path), headers=headers)


@pytest.mark.parametrize("name", STATIC)
async def test_files_have_a_type_and_are_fetched_once(served, name):
    path = "/" if name == "index.html" else f"/static/{name}"
    response = await get(served, path)
    assert response.status_code == 200
    assert response.content == (FILES / name).read_bytes()
    suffix = name[name.index(".") :]
    assert response.headers["content-type"].startswith(TYPES[suffix])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    etag = response.headers["etag"]
    again = await get(served, path, **{"if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert (await get(served, path, **{"if-none-match": '"other"'})).status_code == 200


async def test_the_page_may_run_its_own_files_and_nothing_else(served):
    policy = (await get(served, "/")).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == "'none'"
    assert {rules[name] for name in rules if rules[name] != "'none'"} == {"'self'"}


@pytest.mark.parametrize("name", STATIC)
def test_nothing_is_inline_nor_from_another_host(name):
    text = (FILES / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(
        r"https?://|\bstyle=|\son\w+=|javascript:|<script>|innerHTML|eval\(", text
    )


@pytest.mark.parametrize("path", ["/static/", "/static/../app.py", "/static/nothing.js"])
async def test_nothing_else_is_served(served, path):
    assert (await get(served, path)).status_code == 404


async def test_the_page_needs_no_token_to_ask_for_one():
    line = tokens.line("root", tokens.new_token(), {action: ["*"] for action in Action})
    config = replace(CONFIG, access=AccessConfig(tokens=line))
    edge = Edge(config)
    async with (
        Server(FakeRuntime(edge), edge, config) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as client,
    ):
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/static/page.js")).status_code == 200
        assert (await client.get("/kasa/v1/model")).status_code == 401
