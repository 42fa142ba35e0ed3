"""Clients that send what no client should, or too slowly, or that vanish."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from conftest import CONFIG, serving_fake

from server.config import ClientLimits, HttpLimits

COMPLETION = {"model": "fake", "prompt": "word " * 1000, "max_tokens": 1000}


@asynccontextmanager
async def connection(served):
    reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader) -> tuple[int, dict[str, object]]:
    """Status and error object of one answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))["error"]


def post(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    given = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    return "\r\n".join([*given, f"content-length: {len(body)}", "", ""]).encode() + body


def stream(**fields) -> bytes:
    return post(json.dumps({**COMPLETION, "stream": True, **fields}).encode())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a TLS handshake
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000, 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 2**20, 431),
        (
            b"GET / HTTP/1.1\r\n"
            + b"a: "
            + b"b" * 40_000
            + b"\r\nc: "
            + b"d" * 40_000
            + b"\r\ne: f\r\n",
            431,
        ),
        (b"GET /" + b"a" * 100_000, 414),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400),
    ],
    ids=["garbage", "tls", "headers", "header", "bytes", "url", "lengths", "length"],
)
async def test_what_is_no_request_is_told_so_and_the_connection_closed(served, sent, status):
    async with connection(served) as (reader, writer):
        writer.write(sent)
        found, error = await answer(reader)
        assert found == status and error["message"]
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)


async def test_a_trailer_without_end_is_refused(served):
    async with connection(served) as (reader, writer):
        head = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        writer.write(head + b"2\r\n{}\r\n0\r\nx: " + b"y" * 200_000)
        assert (await answer(reader))[0] == 431


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HT", post(b"{}")[:-1]], ids=["none", "head", "body"]
)
async def test_a_slow_sender_is_not_waited_for(begun):
    async with serving_fake(replace(CONFIG, http=HttpLimits(http_receive_s=0.2))) as served:
        async with connection(served) as (reader, writer):
            writer.write(begun)
            if b"healthz" in begun:
                await asyncio.wait_for(reader.readuntil(b"ok\n"), 5)
                writer.write(b"\r\n")
            status, error = await answer(reader)
            assert (status, error["code"]) == (408, "request_timeout")
        async with connection(served) as (reader, writer):
            request = post(json.dumps({**COMPLETION, "max_tokens": 2}).encode())
            writer.write(request[:50])  # slow, but not too slow
            await asyncio.sleep(0.1)
            writer.write(request[50:])
            assert b"200 OK" in await asyncio.wait_for(reader.readline(), 5)


async def test_a_large_body_gets_the_time_that_it_needs():
    config = replace(CONFIG, http=HttpLimits(http_receive_s=0.2))
    async with serving_fake(config) as served, connection(served) as (reader, writer):
        body = json.dumps({**COMPLETION, "prompt": "x" * 10_000, "max_tokens": 2}).encode()
        writer.write(post(body)[:-1])
        await asyncio.sleep(0.5)
        writer.write(body[-1:])
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 5)


async def test_an_idle_connection_is_closed():
    config = replace(CONFIG, http=HttpLimits(http_idle_s=0.1))
    async with serving_fake(config) as served, connection(served) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"ok\n")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_told_so(chunked):
    config = replace(CONFIG, clients=ClientLimits(max_message_mib=0.01))
    async with serving_fake(config) as served, connection(served) as (reader, writer):
        body = b'{"model": "' + b"x" * 2**20 + b'"}'
        request = post(body)
        if chunked:
            head = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
            request = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        writer.write(request)
        status, error = await answer(reader)
        assert (status, error["code"]) == (413, "request_entity_too_large")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("half", [True, False], ids=["half-closed", "closed"])
async def test_a_client_that_goes_away_cancels_its_generation(served, streamed, half):
    served.runtime.delay_s = 0.01
    async with connection(served) as (reader, writer):
        writer.write(stream(stream=streamed, n=3))
        while len(served.runtime.running) < 3:
            await asyncio.sleep(0.01)
        if streamed:
            await reader.readuntil(b"data: ")
        if half:
            writer.write_eof()
        else:
            writer.transport.abort()
        await served.settled()
    labels = {"handler": "/v1/completions", "method": "POST", "code": "gone"}
    async with asyncio.timeout(5):
        while not served.edge.registry.get_sample_value("kasa_http_requests_total", labels):
            await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_holds_nothing_up(served):
    words = ["x" * 2000] * 2000  # 4 MB, far beyond what sockets buffer
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", served.server.http_port))
        body = stream(prompt=" ".join(words), max_tokens=2000)
        await loop.sock_sendall(client, body)
        await asyncio.wait_for(served.runtime.ended.wait(), 30)  # the engine is not held back
        await served.settled()
        received = b""
        async with asyncio.timeout(30):
            while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                received += await loop.sock_recv(client, 2**20)
    events = [json.loads(line) for line in re.findall(rb"data: (\{.*\})\n", received)]
    assert "".join(event["choices"][0]["text"] for event in events).split() == words
    assert len(events) < len(words) * 3 / 4


async def test_pipelined_requests_are_answered_in_turn(served):
    async with connection(served) as (reader, writer):
        requests = [post(json.dumps({"model": "fake", "prompt": word}).encode()) for word in "abc"]
        writer.write(b"".join(requests))
        texts = []
        for _ in requests:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            texts.append(json.loads(await reader.readexactly(length))["choices"][0]["text"])
    assert texts == ["a ", "b ", "c "]


async def test_garbage_behind_a_request_that_is_being_answered_ends_the_connection(served):
    served.runtime.delay_s = 0.01
    async with connection(served) as (reader, writer):
        writer.write(stream())
        await reader.readuntil(b"data: ")
        writer.write(b"GARBAGE\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 5)
    assert b"HTTP/1.1" not in rest
    await served.settled()


async def test_requests_in_flight_end_when_the_server_does():
    async with serving_fake(CONFIG) as served:
        served.runtime.delay_s = 0.01
        async with connection(served) as (reader, writer):
            writer.write(stream(max_tokens=20))
            await reader.readuntil(b"data: ")
            await served.server.__aexit__(None, None, None)
            assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"0\r\n\r\n")
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", served.server.http_port)
