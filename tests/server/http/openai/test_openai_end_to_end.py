"""The official client against a real runtime with a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from adapter.making import ALL_LINEAR, write_adapter
from conftest import CONFIG
from openai import AsyncOpenAI

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.client import AsyncClient
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime, RuntimeConfig
from kasa_runtime.types import ChatMessage, SamplingParams
from server.app import Edge, Server

GREEDY = {"temperature": 0, "max_tokens": 8}
EXTRA = {"ignore_eos": True, "return_token_ids": True}
SAME = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
PROMPT = "the quick brown"


@dataclass
class Live:
    runtime: Runtime
    client: AsyncOpenAI
    grpc: AsyncClient
    base: str

    async def settled(self) -> None:
        """Nothing is held any more: no request, no lease, no block of the cache."""
        async with asyncio.timeout(10):
            while True:
                stats = self.runtime.stats()
                held = sum(info.in_flight for info in self.runtime.list_adapters())
                running = stats.num_requests_running + stats.num_requests_waiting
                if not running and not held and not stats.kv_cache_usage:
                    return
                await asyncio.sleep(0.01)


@pytest.fixture
async def live(tiny_chat_model: Path, tmp_path: Path) -> AsyncIterator[Live]:
    base = BaseModel(tiny_chat_model)
    write_adapter(tmp_path / "adapters" / "style", base, targets=ALL_LINEAR, r=4)
    native = EngineConfig(executor="torch", threads=1, prefix_caching=False, max_num_seqs=4)
    config = RuntimeConfig(str(tiny_chat_model), tmp_path / "adapters", native=native)
    edge = Edge(CONFIG)
    async with await Runtime.create(config, edge) as runtime, Server(runtime, edge, CONFIG) as it:
        url = f"http://127.0.0.1:{it.http_port}/v1"
        async with (
            AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
            AsyncClient(f"127.0.0.1:{it.grpc_port}") as grpc,
        ):
            yield Live(runtime, client, grpc, runtime.model.name)


async def test_both_faces_give_the_same_tokens(live):
    for adapter in ("", "style"):
        wanted = await live.grpc.generate(PROMPT, adapter=adapter, sampling=SAME)
        asked = {"model": adapter or live.base, "prompt": PROMPT, **GREEDY, "logprobs": 0}
        answer = await live.client.completions.create(**asked, extra_body=EXTRA)
        (choice,) = answer.choices
        assert choice.token_ids == list(wanted.token_ids)
        assert (choice.text, choice.adapter) == (wanted.text, wanted.adapter)
        assert choice.logprobs.token_logprobs == pytest.approx(
            [entry.logprob for entry in wanted.logprobs], abs=1e-5
        )
        stream = await live.client.completions.create(**asked, extra_body=EXTRA, stream=True)
        parts = [part.choices[0] async for part in stream]
        assert [i for part in parts for i in part.token_ids] == choice.token_ids
        assert "".join(part.text for part in parts) == choice.text


async def test_both_faces_give_the_same_answer_to_a_chat(live):
    wanted = await live.grpc.generate(
        messages=[ChatMessage("user", PROMPT)], adapter="style", sampling=SAME
    )
    answer = await live.client.chat.completions.create(
        model="style",
        messages=[{"role": "user", "content": PROMPT}],
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    (choice,) = answer.choices
    assert choice.message.content == wanted.text
    assert choice.finish_reason == "length"
    tokens = choice.logprobs.content
    assert [len(token.top_logprobs) for token in tokens] == [3] * 8
    assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
    data = bytes(byte for token in tokens for byte in token.bytes if token.token[:2] != "<|")
    assert data.decode("utf-8", "replace").startswith(choice.message.content)


async def test_choices_are_those_of_the_following_seeds(live):
    asked = {"model": "style", "prompt": PROMPT, "max_tokens": 6}
    several = await live.client.completions.create(**asked, n=3, seed=5, extra_body=EXTRA)
    for number, choice in enumerate(several.choices):
        alone = await live.client.completions.create(**asked, seed=5 + number, extra_body=EXTRA)
        assert alone.choices[0].token_ids == choice.token_ids
    assert several.usage.completion_tokens == 18
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": "fox " * 200}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "fox", "max_tokens": 1000}, "max_tokens"),
    ],
)
async def test_what_does_not_fit_the_model_is_named(live, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await live.client.completions.create(model=live.base, **asked)
    assert caught.value.param == param


async def test_tools_need_a_template_that_knows_them(live):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    asked = {"model": live.base, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="does not know tools") as caught:
        await live.client.chat.completions.create(**asked, tools=[tool])
    assert caught.value.param == "tools"
    await live.client.chat.completions.create(**asked, tools=[tool], tool_choice="none")


async def test_clients_that_go_leave_nothing_behind(live):
    asked = {"model": "style", "prompt": PROMPT, "max_tokens": 100}

    async def leave_in_the_middle():
        stream = await live.client.completions.create(
            **asked, stream=True, n=2, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()

    async def leave_at_once():
        with pytest.raises(openai.APITimeoutError):
            await live.client.completions.create(
                **asked, timeout=0.05, extra_body={"ignore_eos": True}
            )

    await asyncio.gather(leave_in_the_middle(), leave_at_once(), leave_in_the_middle())
    await live.settled()


async def test_an_adapter_is_loaded_and_unloaded(live):
    loaded = {"lora_name": "style", "lora_path": str(live.runtime.config.adapters_dir / "style")}
    assert "added" in await live.client.post("/load_lora_adapter", body=loaded, cast_to=str)
    assert live.runtime.stats().resident_adapters == {"style": "slot"}
    body = {"lora_name": "style"}
    assert "removed" in await live.client.post("/unload_lora_adapter", body=body, cast_to=str)
    assert not live.runtime.stats().resident_adapters


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_the_form_that_was_asked_for(live, stream):
    asked = {"model": "style", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30}
    form = {"structured_outputs": {"choice": ["the quick fox", "a lazy dog"]}}
    answer = await live.client.chat.completions.create(**asked, stream=stream, extra_body=form)
    if stream:
        parts = [part.choices[0] async for part in answer]
        text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text in ("the quick fox", "a lazy dog") and reason == "stop"


async def test_a_form_that_cannot_be_is_named_as_it_was_asked_for(live):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no type"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await live.client.completions.create(
            model=live.base, prompt=PROMPT, extra_body={"response_format": form}
        )
    assert caught.value.param == "response_format"
