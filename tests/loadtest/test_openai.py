from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fake_openai import serving

from kasa_runtime.cli import cli
from kasa_runtime.errors import ConfigError, Unreachable
from kasa_runtime.loadtest.load import Load, Refused, Request, Sample
from kasa_runtime.loadtest.openai import OpenAiClient, ServedModel
from kasa_runtime.types import ChatMessage, SamplingParams, Usage


@pytest.fixture
def api():
    with serving() as api:
        yield api


@pytest.fixture
async def client(api):
    async with OpenAiClient(api.url, {"token": "secret"}) as client:
        assert await client.get_model() == ServedModel("base/model")
        yield client


async def collect(client, prompt="hello", adapter="", *, timeout_s=10.0, messages=None, **sampling):
    options = {"sampling": SamplingParams(**sampling), "timeout_s": timeout_s}
    stream = client.stream(prompt, messages=messages, adapter=adapter, **options)
    return [chunk async for chunk in stream]


async def test_adapters_are_the_models_that_have_a_parent(client):
    assert [info.name for info in await client.list_adapters()] == ["style"]


async def test_a_completion_comes_as_chunks_and_ends_with_its_usage(client):
    *parts, last = await collect(client)
    assert [(chunk.text, len(chunk.token_ids)) for chunk in parts] == [
        ("one", 1),
        (" two", 1),
        ("", 0),
    ]
    assert last.usage == Usage(5, 3, 2)


async def test_a_body_has_what_was_asked_for_under_the_names_of_the_api(api, client):
    await collect(client, adapter="style@1", max_tokens=7, stop=("a", "b"), ignore_eos=True)
    await collect(client, None, messages=[ChatMessage("user", "hi")], temperature=0.5, logprobs=2)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    asked = {"max_tokens": 7, "stop": ["a", "b"], "ignore_eos": True, "temperature": 0.0}
    assert api.bodies[0] == {"model": "style@1", "prompt": "hello", **stream, **asked}
    messages = [{"role": "user", "content": "hi"}]
    asked = {"temperature": 0.5, "logprobs": True, "top_logprobs": 2}
    assert api.bodies[1] == {"model": "base/model", "messages": messages, **stream, **asked}
    assert api.paths == ["/v1/completions", "/v1/chat/completions"]
    assert api.tokens == ["Bearer secret"] * 2


async def test_a_conversation_has_the_same_chunks(client):
    *parts, last = await collect(client, None, messages=[ChatMessage("user", "hi")])
    assert [chunk.text for chunk in parts] == ["one", " two", ""]
    assert last.usage == Usage(5, 3, 2)


OBJECT = {"message": "the queue is full", "type": "rate_limit_error", "code": "overloaded"}


@pytest.mark.parametrize(
    ("status", "text", "reason", "message"),
    [
        (429, json.dumps({"error": OBJECT}), "OVERLOADED", "the queue is full"),
        (500, json.dumps({"error": OBJECT | {"code": None}}), "HTTP_500", "the queue is full"),
        (400, json.dumps({"error": OBJECT | {"code": 400}}), "HTTP_400", "the queue is full"),
        (502, "<html>bad gateway", "HTTP_502", "HTTP_502: <html>bad gateway"),
        (404, "[]", "HTTP_404", "HTTP_404: []"),
    ],
)
async def test_a_refusal_has_its_reason(api, client, status, text, reason, message):
    api.refusal = (status, text)
    with pytest.raises(Refused) as caught:
        await collect(client)
    assert (caught.value.reason, str(caught.value)) == (reason, message)


async def test_an_error_in_the_middle_of_a_stream_is_one(api, client):
    api.failure = {"error": OBJECT}
    load = Load(lambda request: client.stream(request.prompt, messages=None, **OPTIONS))
    await load.closed_loop([Request("", "hello")], 1, 60.0)
    [sample] = load.samples
    assert (sample.error, sample.num_tokens) == ("OVERLOADED", 2)


OPTIONS = {"adapter": "", "sampling": SamplingParams(), "timeout_s": 10.0}


async def test_a_request_past_its_timeout_has_failed(api, client):
    api.held.clear()
    with pytest.raises(TimeoutError):
        await collect(client, timeout_s=0.05)


async def test_without_a_server_it_is_unreachable():
    async with OpenAiClient("http://127.0.0.1:1", {}) as client:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1: .*is `kasa serve` running there"):
            await client.get_model()


async def test_a_server_without_a_base_model_is_told(api):
    api.cards = [{"id": "style", "parent": "base/model"}]
    async with OpenAiClient(api.url, {}) as client:
        with pytest.raises(ConfigError, match="names no base model"):
            await client.get_model()


def test_what_is_no_url_is_told():
    with pytest.raises(ConfigError, match=r"want a URL like .*, got '127\.0\.0\.1:8080'"):
        OpenAiClient("127.0.0.1:8080", {})


@pytest.mark.parametrize(
    ("arrivals", "more", "counts"),
    [
        ([(0.1, 1), (0.2, 1), (0.3, 1)], 0, [1, 1, 1]),
        ([(0.1, 1), (0.2, 1), (0.3, 1)], 3, [1, 2, 3]),
        ([(0.1, 1)], 2, [3]),
        ([], 2, []),
    ],
)
def test_tokens_that_came_with_others_are_spread_over_the_messages(arrivals, more, counts):
    sample = Sample("", due_s=0.0, sent_s=0.0, arrivals=list(arrivals))
    assert sample.spread(more) == sum(counts) - len(arrivals)
    assert [count for _, count in sample.arrivals] == counts
    assert sum(sample.itl_s) == pytest.approx(0.2 if len(arrivals) == 3 else 0.0)


def test_kasa_bench_loads_the_api_and_reports_as_over_grpc(api, tmp_path):
    file, page = tmp_path / "load.json", tmp_path / "load.html"
    arguments = ["--http", f"{api.url}/v1/", "--adapters", "all", "--max-tokens", "4"]
    arguments += ["--concurrency", "2", "--requests", "10", "--warmup", "1"]
    arguments += ["--json", str(file), "--html", str(page)]
    result = CliRunner().invoke(cli, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert (report["all"]["num_requests"], report["all"]["num_failed"]) == (10, 0)
    assert report["all"]["output_tokens"] == 30
    assert [each["adapter"] for each in report["adapters"]] == ["style"]
    assert report["cached_prompt_share"] == pytest.approx(0.4)
    assert report["model"] == {"name": "base/model"}
    assert report["settings"]["address"] == f"{api.url}/v1/"
    assert {body["model"] for body in api.bodies} == {"style"}
    assert "base/model under load" in page.read_text()


def test_kasa_bench_counts_what_the_api_refuses(api):
    api.refusal = (429, json.dumps({"error": OBJECT}))
    arguments = ["bench", "--http", api.url, "--concurrency", "1", "--requests", "3"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert result.stderr == "kasa: error: 3 requests failed: 3 OVERLOADED\n"
    assert len(api.bodies) == 3
