from __future__ import annotations

import asyncio
import hashlib
import json
import re
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from conftest import CONFIG
from fake_runtime import STYLE, FakeRuntime

from kasa_runtime import tokens
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.tokens import Action
from kasa_runtime.types import TokenChunk
from server.app import Edge, Server
from server.config import AccessConfig, ClientLimits

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}
ROOT, ALICE, BOB = (tokens.new_token() for _ in range(3))
LINES = "\n".join(
    [
        tokens.line("root", ROOT, {action: ["*"] for action in Action}),
        tokens.line("alice", ALICE, {Action.OBSERVE: ["style"], Action.UPLOAD: ["a-*"]}),
        tokens.line("bob", BOB, {Action.ADMINISTER: ["b-*"]}),
    ]
)
NAMES = {ROOT: "root", ALICE: "alice", BOB: "bob"}
TENANTS = replace(CONFIG, access=AccessConfig(tokens=LINES))


@asynccontextmanager
async def serving(config=CONFIG):
    """A runtime behind a server, and a client of its HTTP port."""
    edge = Edge(config)
    runtime = FakeRuntime(edge)
    async with (
        Server(runtime, edge, config) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}/kasa/v1") as client,
    ):
        yield runtime, client


@pytest.fixture
async def api():
    async with serving() as (runtime, client):
        client.runtime = runtime
        yield client


@pytest.fixture
async def tenants():
    async with serving(TENANTS) as (runtime, client):
        client.runtime = runtime
        yield client


def bearer(token):
    return {"headers": {"authorization": f"Bearer {token}"}}


def parts(files=FILES):
    return [("file", (name, data)) for name, data in files.items()]


def error_of(response):
    return response.status_code, response.json()["error"]["message"]


async def test_model(api):
    model = (await api.get("/model")).json()
    assert model["name"] == "fake"
    assert model["context_length"] == 2048
    assert model["has_chat_template"] is True


async def test_adapters_have_what_gprc_says_of_them_and_why_one_is_refused(api):
    listing = (await api.get("/adapters")).json()
    style, broken = listing["adapters"]
    assert style["version"] == "abc123"
    assert (style["state"], style["tier"], style["pinned"]) == ("ready", "disk", False)
    assert (style["rank"], style["truncation_rank"], style["method"]) == (8, 8, "kasa")
    assert style["size_bytes"] == 4096
    assert broken["state"] == "quarantined"
    assert broken["reason"] == "adapter_config.json: no r"
    assert broken["method"] is None
    assert style["may"] == ["generate", "upload", "administer", "observe"]
    assert (await api.get("/adapters/style")).json() == style


async def test_latency_is_that_of_the_last_minutes_and_vanishes_with_the_adapter(api):
    edge = api.runtime.observer
    edge.adapters_changed(api.runtime.list_adapters())
    for adapter in ("style@abc123", ""):
        delivery = edge.delivery(adapter, arrival_s=0.0)
        delivery.wrote(TokenChunk("a", (1,)))
        delivery.wrote(TokenChunk("b", (2,)))
    listing = (await api.get("/adapters")).json()
    latency = listing["adapters"][0]["latency"]
    assert latency["requests"] == listing["base"]["latency"]["requests"] == 1
    assert latency["ttft_p50_s"] > latency["inter_token_p95_s"] > 0
    assert latency["tokens_per_s"] == pytest.approx(2 / listing["window_s"])
    assert listing["adapters"][1]["latency"]["requests"] == 0
    await api.delete("/adapters/style")
    api.runtime.put(STYLE)
    latency = (await api.get("/adapters/style")).json()["latency"]
    assert (latency["requests"], latency["ttft_p50_s"]) == (0, None)


async def test_an_adapter_without_metrics_of_its_own_has_no_latency():
    async with serving(replace(CONFIG, max_adapter_labels=0)) as (_, client):
        assert (await client.get("/adapters/style")).json()["latency"] is None


async def test_versions(api):
    versions = (await api.get("/adapters/style/versions")).json()["versions"]
    assert [(v["version"], v["current"]) for v in versions] == [("abc123", True), ("0ld", False)]


async def test_load_pin_unload_merge_unmerge_rollback_delete(api):
    async def post(path):
        response = await api.post(path)
        assert response.status_code == 200, response.text
        return response.json()

    loaded = await post("/adapters/style/load")
    assert (loaded["state"], loaded["pinned"]) == ("resident", False)
    assert (await post("/adapters/style/load?pin=true"))["pinned"] is True
    assert (await post("/adapters/style/unload"))["state"] == "ready"
    assert (await post("/adapters/style/merge"))["state"] == "merged"
    assert (await api.get("/adapters")).json()["merged"] == "style"
    status, message = error_of(await api.delete("/adapters/style"))
    assert (status, message) == (409, "style is merged; unmerge it first")
    assert (await api.post("/unmerge")).status_code == 204
    assert api.runtime.merged == ""
    assert (await post("/adapters/style/rollback"))["version"] == "0ld"
    assert (await post("/adapters/style/rollback?version=abc"))["version"] == "abc"
    assert (await api.delete("/adapters/style")).status_code == 204
    assert (await api.get("/adapters/style")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/adapters/none", 404, "no adapter 'none'"),
        ("GET", "/adapters/NAME", 400, "name: must match"),
        ("GET", "/adapters/..%2fup", 404, "Not Found"),
        ("GET", "/adapters/style@abc/versions", 400, "name: must match"),
        ("DELETE", "/adapters/style@abc", 400, "name: must match"),
        ("POST", "/adapters/style/load?pin=yes", 400, "pin: must be true or false, got 'yes'"),
        ("POST", "/adapters/style/load?slot=1", 400, "slot: is no parameter of this address; want"),
        ("POST", "/adapters/style/merge?pin=true", 400, "want none"),
        ("POST", "/adapters/style/rollback?version=NO", 400, "version: must be a version"),
        ("POST", "/adapters/none/merge", 404, "no adapter"),
        ("POST", "/adapters/style", 405, "Method Not Allowed"),
        ("GET", "/adapters/style/merge", 405, "Method Not Allowed"),
        ("GET", "/nothing", 404, "Not Found"),
    ],
)
async def test_what_is_wrong_is_said(api, method, path, status, words):
    found, message = error_of(await api.request(method, path))
    assert found == status
    assert words in message


async def test_errors_nobody_expected_tell_nothing(api):
    async def fail(name):
        raise RuntimeError("a secret")

    api.runtime.get_adapter = fail
    status, message = error_of(await api.get("/adapters/style"))
    assert status == 500
    assert "secret" not in message


# --- who may what ---------------------------------------------------------------------------------


async def test_without_a_token_nothing_is_told(tenants):
    for method, path in (("GET", "/model"), ("GET", "/adapters"), ("POST", "/unmerge")):
        response = await tenants.request(method, path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"


async def test_a_tenant_sees_its_own_alone(tenants):
    tenants.runtime.put(replace(STYLE, name="a-one"))
    tenants.runtime.merged = "style"
    alice = (await tenants.get("/adapters", **bearer(ALICE))).json()
    assert {a["name"]: a["may"] for a in alice["adapters"]} == {
        "a-one": ["upload"],
        "style": ["observe"],
    }
    assert (alice["base"], alice["merged"]) == (None, "style")
    bob = (await tenants.get("/adapters", **bearer(BOB))).json()
    assert (bob["adapters"], bob["merged"]) == ([], "")


@pytest.mark.parametrize(
    ("token", "method", "path", "status"),
    [
        (ALICE, "GET", "/adapters/broken", 404),
        (ALICE, "GET", "/adapters/broken/versions", 404),
        (ALICE, "POST", "/adapters/style/merge", 403),
        (ALICE, "POST", "/adapters/style/rollback", 403),
        (ALICE, "DELETE", "/adapters/style", 403),
        (ALICE, "POST", "/adapters/broken/load", 404),
        (ALICE, "POST", "/unmerge", 403),
        (BOB, "POST", "/adapters/b-one/merge", 403),  # style is merged, which is not his
        (BOB, "DELETE", "/adapters/b-one", 403),
        (ROOT, "POST", "/adapters/b-one/merge", 200),
        (ROOT, "DELETE", "/adapters/b-one", 204),
    ],
    ids=NAMES.get,  # tokens are others in each process
)
async def test_permissions_are_those_of_grpc(tenants, token, method, path, status):
    tenants.runtime.put(replace(STYLE, name="b-one"))
    tenants.runtime.merged = "style"
    response = await tenants.request(method, path, **bearer(token))
    assert response.status_code == status, response.text


async def test_an_upload_that_is_not_permitted_is_not_received(tenants):
    async with begun(tenants, "/adapters/style", 2**30, **bearer(ALICE)["headers"]) as answer:
        assert await answer() == (
            403,
            "token 'alice' may not upload the adapter 'style', only ['a-*']",
        )


# --- uploads --------------------------------------------------------------------------------------


def rejected(api):
    counted = api.runtime.observer.registry.collect()
    [family] = [family for family in counted if family.name == "kasa_upload_rejected"]
    return {sample.labels["reason"]: sample.value for sample in family.samples}


async def test_upload_publishes_what_was_sent(api):
    response = await api.put("/adapters/fresh", files=parts())
    assert response.status_code == 201
    made = response.json()
    assert made["name"] == "fresh"
    assert made["version"] == hashlib.sha256(b"".join(FILES.values())).hexdigest()
    assert api.runtime.uploaded == FILES
    assert rejected(api) == {}


async def test_upload_of_more_than_memory_spools_and_chunks(api):
    files = FILES | {"adapter_model.safetensors": bytes(range(256)) * 40_000}
    assert (await api.put("/adapters/fresh", files=parts(files))).status_code == 201
    assert api.runtime.uploaded == files


@pytest.mark.parametrize(
    ("expected", "status"), [("", 409), ("ffff", 409), ("abc123", 201), ("NO", 400)]
)
async def test_upload_onto_the_expected_version_only(api, expected, status):
    path = f"/adapters/style?expected_version={expected}"
    assert (await api.put(path, files=parts())).status_code == status


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (parts({"../up": b""}), "manifest.files[0].path: must be a file name"),
        (parts({".hidden": b""}), "manifest.files[0].path: must be a file name"),
        ([*parts(), *parts()], "manifest.files: must name each file once"),
        (parts({f"f{i}": b"" for i in range(17)}), "body: must have at most 16 files"),
    ],
)
async def test_wrong_files_are_named(api, files, words):
    status, message = error_of(await api.put("/adapters/fresh", files=files))
    assert status == 400
    assert words in message
    assert rejected(api) == {"InvalidRequest": 1}
    assert api.runtime.uploaded == {}


BODY = (
    b'--x\r\ncontent-disposition: form-data; name="file"; filename="adapter_config.json"\r\n\r\n'
    b'{}\r\n--x\r\ncontent-disposition: form-data; name="file"; filename="kasa_meta.json"\r\n\r\n'
    b"{}\r\n--x--\r\n"
)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (BODY[:-4], "ends before its last boundary"),
        (BODY[: BODY.index(b"{}\r\n--x--") + 1], "ends before its last boundary"),
        (BODY[: BODY.index(b"--x\r\n", 5)], "ends before its last boundary"),
        (b"", "ends before its last boundary"),
        (b"{}", "is no multipart/form-data"),
        (b"--x--\r\n", "manifest.files: must be 1 to 16 files, got 0"),
        (b"--x\r\ncontent-type: a/b\r\n\r\n\r\n--x--\r\n", "is no multipart/form-data"),
        (
            b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
            "must have files alone",
        ),
    ],
)
async def test_a_torn_body_publishes_nothing(api, body, words):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    status, message = error_of(await api.put("/adapters/fresh", content=body, headers=headers))
    assert status == 400
    assert words in message
    assert api.runtime.uploaded == {}


async def test_the_whole_body_of_the_torn_ones_is_right(api):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await api.put("/adapters/fresh", content=BODY, headers=headers)
    assert response.status_code == 201
    assert api.runtime.uploaded == {"adapter_config.json": b"{}", "kasa_meta.json": b"{}"}


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", ""])
async def test_another_type_of_body_is_refused(api, content_type):
    headers = {"content-type": content_type}
    response = await api.put("/adapters/fresh", content=b"{}", headers=headers)
    assert response.status_code == 400
    assert "multipart" in response.json()["error"]["message"]


@asynccontextmanager
async def begun(api, path, length, **headers):
    """An upload of which the head and the first bytes were sent; yields what awaits its answer."""
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    headers |= {"content-type": "multipart/form-data; boundary=x", "host": "localhost"}
    headers |= {"transfer-encoding": "chunked"} if length is None else {"content-length": length}
    lines = [f"PUT /kasa/v1{path} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    begin = BODY[: BODY.index(b"{}")] + bytes(2**18 if length is None else 2)
    writer.write(begin if length is not None else b"%x\r\n%b\r\n" % (len(begin), begin))
    await writer.drain()

    async def answer():
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        [length] = re.findall(r"content-length: (\d+)", head)
        body = json.loads(await reader.readexactly(int(length)))
        return int(head.split()[1]), body["error"]["message"]

    try:
        yield answer
    finally:
        writer.transport.abort()


async def test_a_client_that_goes_away_publishes_nothing(api):
    async with begun(api, "/adapters/fresh", len(BODY)):
        pass
    assert (await api.get("/adapters/fresh")).status_code == 404
    assert api.runtime.uploaded == {}


@pytest.mark.parametrize("length", [2**30, None])
async def test_a_larger_upload_is_refused_before_it_has_arrived(length):
    config = replace(CONFIG, clients=ClientLimits(max_upload_mib=0.1))
    async with serving(config) as (runtime, client):
        client.runtime = runtime
        async with begun(client, "/adapters/fresh", length) as answer:
            status, message = await answer()
        assert status == 400
        assert message.endswith("this server takes 0.1 MiB")
        assert rejected(client) == {"InvalidRequest": 1}


async def test_uploads_are_limited_by_client_and_minute():
    limits = ClientLimits(max_uploads_per_minute=1)
    async with serving(replace(CONFIG, clients=limits)) as (_, client):
        assert (await client.put("/adapters/one", files=parts())).status_code == 201
        response = await client.put("/adapters/two", files=parts())
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 50


async def test_what_is_wrong_with_the_adapter_is_said(api):
    @asynccontextmanager
    async def refuse(manifest):
        raise AdapterInvalid("adapter_config.json: want peft_type LORA, got 'IA3'", name="fresh")
        yield

    api.runtime.upload = refuse
    assert error_of(await api.put("/adapters/fresh", files=parts())) == (
        422,
        "adapter_config.json: want peft_type LORA, got 'IA3'",
    )
