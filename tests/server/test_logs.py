from __future__ import annotations

import asyncio
import io
import json
import logging
from dataclasses import replace

import grpc
import pytest
from conftest import CONFIG
from fake_runtime import FakeRuntime
from kasa.v1 import generation_pb2 as pb
from kasa.v1 import generation_pb2_grpc

from kasa_runtime.client import AsyncClient
from kasa_runtime.errors import AdapterNotFound
from server import logs
from server.app import Edge, Server


@pytest.fixture
def lines(monkeypatch):
    """What is logged, as JSON."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.Json())
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


async def until_logged(lines, message):
    while not (found := [line for line in lines() if line["message"] == message]):
        await asyncio.sleep(0.01)
    return found


async def test_a_request_has_a_line_that_says_how_it_went(served, lines):
    async with AsyncClient(served.address) as client:
        await client.generate("one two", adapter="style", request_id="mine")
    (line,) = await until_logged(lines, "Generate")
    assert line.pop("time").endswith("+00:00") and line.pop("total_s") > 0
    assert line == {
        "level": "info",
        "logger": "server.rpc",
        "message": "Generate",
        "code": "OK",
        "adapter": "style@abc123",
        "mode": "batched",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "cached_prompt_tokens": 0,
        "completion_tokens": 2,
        "client": "ipv4:127.0.0.1",
        "request_id": "mine",
    }


async def test_errors_and_cancelled_requests_have_one_too(served, lines):
    async with AsyncClient(served.address) as client:
        with pytest.raises(AdapterNotFound):
            await client.get_adapter("nobody")
        (line,) = await until_logged(lines, "GetAdapter")
        assert (line["code"], line["error"]) == ("NOT_FOUND", "no adapter 'nobody'")
        served.runtime.delay_s = 0.02
        stream = client.stream("word " * 100)
        await anext(stream)
        await stream.aclose()
        (line,) = await until_logged(lines, "GenerateStream")
        assert line["code"] == "CANCELLED"


async def test_each_line_of_a_request_has_its_id(served, lines):
    logger = logging.getLogger("kasa_runtime.adapter")
    get_adapter = served.runtime.get_adapter

    async def speaking(name):
        await asyncio.to_thread(logger.info, "in a thread %s", name)
        await asyncio.create_task(asyncio.sleep(0.05))
        logger.info("later %s", name)
        return await get_adapter(name)

    served.runtime.get_adapter = speaking
    async with AsyncClient(served.address) as client:
        await asyncio.gather(client.get_adapter("style"), client.get_adapter("broken"))
    ids = {}
    for line in lines():
        if line["message"].endswith((" style", " broken")):
            name = line["message"].split()[-1]
            ids.setdefault(name, set()).add(line["request_id"])
    assert len(ids["style"]) == len(ids["broken"]) == 1 and ids["style"] != ids["broken"]


async def test_the_reply_has_the_request_id_of_its_lines(served, lines):
    call = served.generation.Generate(pb.GenerateRequest(prompt="hi"))
    await call
    (line,) = await until_logged(lines, "Generate")
    for metadata in (await call.initial_metadata(), await call.trailing_metadata()):
        assert dict(metadata)["x-request-id"] == line["request_id"]


async def test_an_unexpected_error_has_its_traceback_and_the_request_id(served, lines):
    served.runtime.error = RuntimeError("broken")
    with pytest.raises(grpc.aio.AioRpcError):
        await served.generation.Generate(pb.GenerateRequest(prompt="hi"))
    (line,) = [line for line in lines() if line["level"] == "error"]
    assert line["exception"].endswith("RuntimeError: broken") and line["request_id"]


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_logged_only_when_asked_for(log_prompts, lines):
    config = replace(CONFIG, log_prompts=log_prompts)
    edge = Edge(config)
    async with (
        Server(FakeRuntime(edge), edge, config) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a secret")])
        for given in ({"prompt": "a secret"}, {"chat": chat}):
            await stub.Generate(pb.GenerateRequest(**given))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(pb.GenerateRequest(**given, adapter="nobody"))
    of_server = [str(line) for line in lines() if line["logger"].startswith(("server", "kasa"))]
    assert sum("secret" in line for line in of_server) == (4 if log_prompts else 0)
    assert any("nobody" in line for line in of_server)


def record(message="hello", **values):
    made = logging.makeLogRecord({"name": "kasa", "levelname": "INFO", "msg": message})
    made.fields = values
    return made


def test_a_line_for_people_cannot_be_forged():
    line = logs.Human().format(record(prompt="one\n2026 ERROR two", total_s=0.12345, code="OK"))
    assert line.endswith('kasa: hello prompt="one\\n2026 ERROR two" total_s=0.123 code=OK')
    assert "\n" not in line
    with logs.request("mine"):
        assert logs.Human().format(record()).endswith("hello request_id=mine")
    assert "request_id" not in logs.Human().format(record())


def test_the_watcher_of_files_does_not_count_changes_at_level_info():
    watcher = logging.getLogger("watchfiles")
    try:
        logs.configure("info", "human")
        assert not watcher.getChild("main").isEnabledFor(logging.INFO)
        assert watcher.getChild("main").isEnabledFor(logging.WARNING)
    finally:
        watcher.setLevel(logging.NOTSET)
