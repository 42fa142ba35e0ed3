from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tomllib
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import httpx
import pytest
from click.testing import CliRunner
from conftest import CONFIG, Served
from fake_runtime import STYLE, FakeRuntime
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kasa.v1 import adapters_pb2
from kasa.v1 import generation_pb2 as pb

from kasa_runtime import tokens
from kasa_runtime.cli import cli
from kasa_runtime.client import AsyncClient
from kasa_runtime.errors import (
    AdapterNotFound,
    CapacityExceeded,
    ConfigError,
    InvalidRequest,
    KasaError,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
)
from kasa_runtime.tokens import Action, Caller, Tokens
from server import access
from server.access import Gate, told_to
from server.app import Edge, Server
from server.config import AccessConfig, ClientLimits, ServerConfig

ROOT, ALICE, BOB, WATCHER, NOTHING = (tokens.new_token() for _ in range(5))
EVERYTHING = {action: ["*"] for action in Action}
LINES = "\n".join(
    [
        tokens.line("root", ROOT, EVERYTHING),
        tokens.line(
            "alice", ALICE, {a: ["a-*"] for a in Action} | {Action.GENERATE: ["a-*", "_base"]}
        ),
        tokens.line("bob", BOB, {Action.GENERATE: ["b-*", "style"], Action.UPLOAD: ["b-*"]}),
        tokens.line("nothing", NOTHING, {}),
        tokens.line("watcher", WATCHER, {Action.OBSERVE: ["*"]}),
    ]
)


@asynccontextmanager
async def serving(config: ServerConfig):
    edge = Edge(config)
    runtime = FakeRuntime(edge)
    for name in ("a-one", "b-one"):
        runtime.put(replace(STYLE, name=name))
    async with (
        Server(runtime, edge, config) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Served(runtime, edge, server, channel)


@pytest.fixture
async def guarded():
    async with serving(replace(CONFIG, access=AccessConfig(tokens=LINES))) as served:
        yield served


@pytest.fixture
def adapter_dir(tmp_path):
    directory = tmp_path / "fresh"
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("{}")
    return directory


def client(served, token=None):
    return AsyncClient(served.address, token=token)


@pytest.mark.parametrize("token", [None, "wrong", ALICE[:-1]], ids=["none", "wrong", "cut off"])
async def test_without_a_known_token_nothing_is_answered(guarded, token, adapter_dir):
    async with client(guarded, token) as stranger:
        for call in (
            stranger.get_model(),
            stranger.tokenize("a"),
            stranger.list_adapters(),
            stranger.generate("hi"),
            stranger.upload(adapter_dir),
            stranger.unmerge_adapter(),
        ):
            with pytest.raises(Unauthenticated, match="token"):
                await call
        with pytest.raises(Unauthenticated):
            await anext(stranger.stream("hi"))
    assert not guarded.runtime.requests
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guarded.generation.Generate(pb.GenerateRequest(prompt="hi"))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "x-request-id" in dict(caught.value.trailing_metadata())


async def test_a_token_lists_and_sees_its_own_adapters_only(guarded):
    async with client(guarded, ALICE) as alice, client(guarded, ROOT) as root:
        assert [info.name for info in await alice.list_adapters()] == ["a-one"]
        assert len(await root.list_adapters()) == 4
        assert (await alice.get_adapter("a-one")).name == "a-one"
        assert (await alice.get_model()).name == "fake"


async def test_another_tenants_adapter_is_as_if_it_were_not_there(guarded):
    async with client(guarded, ALICE) as alice:
        for name in ("b-one", "nobody", "a-nobody"):
            for call in (
                alice.get_adapter(name),
                alice.generate("hi", adapter=name),
                alice.load_adapter(name),
                alice.unload_adapter(name),
                alice.merge_adapter(name),
                alice.delete_adapter(name),
                alice.rollback_adapter(name),
            ):
                with pytest.raises(AdapterNotFound) as caught:
                    await call
                assert str(caught.value) == tokens.not_found(name)
                assert caught.value.name == name
    assert guarded.runtime.find("b-one").tier == STYLE.tier


async def test_what_a_token_may_see_but_not_do_is_denied(guarded, adapter_dir):
    async with client(guarded, BOB) as bob:
        assert (await bob.generate("hi", adapter="style")).adapter == "style@abc123"
        assert (await bob.generate("hi", adapter="b-one@abc123")).adapter == "b-one@abc123"
        for call, message in (
            (bob.generate("hi"), r"'bob' may not generate the base model \(_base\)"),
            (bob.delete_adapter("style"), "'bob' may not upload the adapter 'style', only"),
            (bob.rollback_adapter("style"), "may not upload"),
            (bob.load_adapter("b-one"), "may not administer .* only nothing"),
            (bob.merge_adapter("b-one"), "may not administer"),
            (bob.unmerge_adapter(), "may not administer"),
            (bob.upload(adapter_dir, name="a-one"), "may not upload the adapter 'a-one'"),
            (bob.upload(adapter_dir, name="new"), "may not upload the adapter 'new'"),
        ):
            with pytest.raises(PermissionDenied, match=message):
                await call
        assert (await bob.upload(adapter_dir, name="b-two")).name == "b-two"
        await bob.delete_adapter("b-two")
    assert guarded.runtime.find("a-one").version == STYLE.version


async def test_no_method_of_the_adapter_service_forgets_to_ask(guarded):
    """Methods that are added later, too: a token that permits nothing gets nothing."""
    metadata = [("authorization", f"Bearer {NOTHING}")]
    before = guarded.runtime.list_adapters()
    for method in adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods:
        request = getattr(adapters_pb2, method.input_type.name)()
        if method.client_streaming:
            request.manifest.name = "a-one"
            request.manifest.files.add(path="adapter_config.json", sha256="0" * 64)
        elif "name" in method.input_type.fields_by_name:
            request.name = "a-one"
        call = getattr(guarded.adapters, method.name)
        try:
            response = await call(
                iter([request]) if method.client_streaming else request, metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            codes = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED)
            assert error.code() in codes, method.name
        else:
            assert response == type(response)(), method.name
    assert guarded.runtime.list_adapters() == before


async def test_what_another_tenant_merged_stays_merged(guarded):
    async with client(guarded, ALICE) as alice, client(guarded, ROOT) as root:
        await alice.merge_adapter("a-one")
        await alice.unmerge_adapter()
        await root.merge_adapter("b-one")
        for call in (alice.unmerge_adapter(), alice.merge_adapter("a-one")):
            with pytest.raises(PermissionDenied) as caught:
                await call
            assert "b-one" not in str(caught.value)
        assert guarded.runtime.merged == "b-one"


async def test_tenants_do_not_share_cached_prompts(guarded):
    for token in (ALICE, ROOT):
        async with client(guarded, token) as tenant:
            await tenant.generate("hi", cache_salt="same")
    assert [request.cache_salt for request in guarded.runtime.requests] == [
        "alice/same",
        "root/same",
    ]


async def test_health_tells_of_adapters_only_those_who_may_see_them(guarded):
    health = health_pb2_grpc.HealthStub(guarded.channel)

    async def names(*metadata):
        response = await health.List(health_pb2.HealthListRequest(), metadata=metadata)
        return {name for name in response.statuses if name.startswith("adapter/")}

    alice = ("authorization", f"Bearer {ALICE}")
    assert await names() == set()
    assert await names(alice) == {"adapter/a-one"}
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    own, other = (health_pb2.HealthCheckRequest(service=f"adapter/{n}-one") for n in "ab")
    assert (await health.Check(own, metadata=[alice])).status == 1
    for request, metadata in ((own, []), (other, [alice])):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(request, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(request, metadata=metadata)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


@pytest.mark.parametrize(
    ("token", "status"),
    [(None, 401), ("wrong", 401), (ALICE, 403), (WATCHER, 200), (ROOT, 200)],
    ids=["none", "wrong", "alice", "watcher", "root"],
)
async def test_metrics_are_for_those_who_may_see_everything(guarded, token, status):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(headers=headers) as client:
        for path, wanted in (("/metrics", status), ("/healthz", 200), ("/readyz", 200)):
            response = await client.get(guarded.url(path))
            assert response.status_code == wanted
            assert ("WWW-Authenticate" in response.headers) == (wanted == 401)


def test_errors_that_name_other_adapters_are_told_to_those_who_see_all():
    errors = [AdapterNotFound("there are b-one", name="x"), CapacityExceeded("b-one is pinned")]
    limited = Caller("alice", {Action.GENERATE: ("a-*",)})
    for error in errors:
        assert told_to(tokens.ANYONE, error) is error
        assert type(told_to(limited, error)) is type(error)
        assert "b-one" not in str(told_to(limited, error))
    other = InvalidRequest("prompt", "must not be empty")
    assert told_to(limited, other) is other


def headers(token):
    return {"authorization": f"Bearer {token}"}


def test_a_changed_file_of_tokens_is_read_again(tmp_path, caplog):
    path, now_s = tmp_path / "tokens.toml", [0.0]
    path.write_text(LINES)
    gate = Gate(ServerConfig(access=AccessConfig(tokens_file=path)), lambda: now_s[0])
    assert gate.caller(headers(BOB)).name == "bob"
    path.write_text(tokens.line("alice", ALICE, {}))
    now_s[0] += access.RELOAD_S
    assert gate.caller(headers(ALICE)).name == "alice"
    with pytest.raises(Unauthenticated):
        gate.caller(headers(BOB))
    path.write_text("not TOML")
    now_s[0] += access.RELOAD_S
    assert gate.caller(headers(ALICE)).name == "alice"
    os.unlink(path)
    now_s[0] += access.RELOAD_S
    assert gate.caller(headers(ALICE)).name == "alice"
    assert caplog.text.count("the old tokens stay valid") == 2


def test_two_tokens_of_one_name_are_for_their_rotation():
    digests = [tokens.digest(token) for token in (ALICE, BOB)]
    known = Tokens.parse(f"a = {{ sha256 = {json.dumps(digests)}, generate = ['*'] }}", "file")
    assert known.find(ALICE) == known.find(BOB) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a =", "file is no TOML"),
        ("", "file has no token"),
        ("a = 1", "file: a must be a table"),
        ("a = {}", r"file: a.sha256 must be 64"),
        ("a = { sha256 = 'x' }", r"file: a.sha256 must be 64"),
        ("a = { sha256 = [] }", r"file: a.sha256 must be 64"),
        (f"a = {{ sha256 = '{'0' * 64}', genrate = [] }}", r"a.genrate is none of sha256, gen"),
        (f"a = {{ sha256 = '{'0' * 64}', upload = '*' }}", r"a.upload must be an array"),
        (f"a = {{ sha256 = '{'0' * 64}', upload = [1] }}", r"a.upload must be an array"),
    ],
)
def test_a_wrong_file_of_tokens_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Tokens.parse(text, "file")


def test_a_file_of_tokens_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tokens_file"):
        Gate(ServerConfig(access=AccessConfig(tokens_file=tmp_path / "none")))
    with pytest.raises(ConfigError, match="one of tokens and tokens_file"):
        AccessConfig(tokens_file=tmp_path, tokens=LINES)


def test_kasa_token_new_prints_a_line_that_lets_its_token_in(tmp_path):
    arguments = ["token", "new", "alice", "--generate", "a-*", "--generate", "_base"]
    result = CliRunner().invoke(cli, [*arguments, "--upload", "a-*"])
    token = result.stderr.split()[-1]
    assert (
        token not in result.stdout and hashlib.sha256(token.encode()).hexdigest() in result.stdout
    )
    caller = Tokens.parse(result.stdout, "file").find(token)
    assert caller.name == "alice"
    assert caller.may(Action.GENERATE, "") and caller.may(Action.GENERATE, "a-one@abc")
    assert caller.may(Action.UPLOAD, "a-one") and not caller.may(Action.UPLOAD, "")
    assert not caller.may(Action.ADMINISTER, "a-one") and not caller.sees("b-one")
    as_json = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert tomllib.loads(as_json["line"])["alice"]["sha256"] == tokens.digest(as_json["token"])
    assert as_json["token"] != token
    refused = CliRunner().invoke(cli, ["token", "new", "a b"])
    assert refused.exit_code == 1 and "a token's name must match" in refused.stderr


async def test_commands_send_the_token_of_the_environment(guarded):
    async def run(env):
        arguments = ["adapters", "list", "--json", "--address", guarded.address]
        return await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=env)

    result = await run({"KASA_TOKEN": ALICE})
    assert [info["name"] for info in json.loads(result.stdout)] == ["a-one"]
    result = await run({})
    assert json.loads(result.stderr)["error"]["reason"] == "UNAUTHENTICATED"


def limited(**limits) -> ServerConfig:
    return replace(CONFIG, clients=ClientLimits(**limits))


async def test_one_client_has_only_so_many_streams():
    config = replace(limited(max_streams_per_client=2), access=AccessConfig(tokens=LINES))
    async with serving(config) as served, client(served, ALICE) as alice:
        served.runtime.delay_s = 0.02
        streams = [alice.stream("word " * 100) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded, match="alice has 2 calls") as caught:
            await alice.get_model()
        assert caught.value.retry_after_s > 0
        async with client(served, ROOT) as root:
            await root.get_model()
        for stream in streams:
            await stream.aclose()
        await served.runtime.ended.wait()
        while served.runtime.running:
            await asyncio.sleep(0.01)
        await alice.get_model()


async def test_without_tokens_a_client_is_an_address():
    async with serving(limited(max_streams_per_client=1)) as served, client(served) as first:
        served.runtime.delay_s = 0.02
        stream = first.stream("word " * 100)
        await anext(stream)
        async with client(served) as second:
            with pytest.raises(Overloaded, match=r"127\.0\.0\.1 has 1 calls"):
                await second.get_model()
        await stream.aclose()


async def test_a_larger_message_is_refused():
    async with serving(limited(max_message_mib=0.5)) as served, client(served) as anyone:
        await anyone.tokenize("a" * 2**18)
        with pytest.raises(KasaError, match="RESOURCE_EXHAUSTED"):
            await anyone.tokenize("a" * 2**20)


async def test_a_larger_upload_is_refused(adapter_dir):
    async with serving(limited(max_upload_mib=0.001)) as served, client(served) as anyone:
        await anyone.upload(adapter_dir)
        (adapter_dir / "adapter_model.safetensors").write_bytes(bytes(2000))
        with pytest.raises(InvalidRequest, match=r"have 2002 bytes, this server takes 0.001 MiB"):
            await anyone.upload(adapter_dir)


def test_uploads_are_limited_by_client_and_minute():
    now_s = [0.0]
    gate = Gate(limited(max_uploads_per_minute=2), lambda: now_s[0])
    gate.upload("alice", 1)
    with pytest.raises(Overloaded, match="2 uploads per minute") as caught:
        gate.upload("alice", 1)
    assert caught.value.retry_after_s == pytest.approx(30)
    gate.upload("bob", 1)
    now_s[0] += 30.0
    gate.upload("alice", 1)


def test_clients_that_have_their_rate_back_are_forgotten(monkeypatch):
    monkeypatch.setattr(access, "MAX_IDLE_CLIENTS", 10)
    now_s = [0.0]
    gate = Gate(limited(max_uploads_per_minute=60), lambda: now_s[0])
    for index in range(100):
        gate.upload(f"client {index}", 0)
        now_s[0] += 0.5
    assert len(gate._uploads) <= 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_message_mib": 0.0},
        {"max_upload_mib": float("nan")},
        {"max_streams_per_client": -1},
        {"max_uploads_per_minute": -1.0},
    ],
)
def test_wrong_limits_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ClientLimits(**wrong)
