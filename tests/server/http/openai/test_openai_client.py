"""The official client against a server over the fake runtime."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import openai
import pytest
from conftest import CONFIG, serving_fake
from openai import OpenAI

from kasa_runtime import tokens
from kasa_runtime.errors import AdapterQuarantined, EngineDead, Overloaded, ShuttingDown
from kasa_runtime.types import BASE, ChatMessage, StructuredOutput, ToolCall
from server.config import AccessConfig, ClientLimits

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


async def events(stream):
    return [event async for event in await stream]


async def test_models_are_the_base_and_what_is_served(served):
    async with served.openai() as client:
        base, style = (await client.models.list()).data
        assert (base.id, base.parent) == ("fake", None)
        assert (style.id, style.root, style.parent) == ("style", "fake", "fake")
        assert style.version == "abc123" and style.created == 1_700_000_000
        assert (await client.models.retrieve("style@abc123")).id == "style@abc123"
        for missing in ("none", "broken", "Not a name", "../etc"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.retrieve(missing)
            assert caught.value.code == "model_not_found"


async def test_a_completion(served):
    async with served.openai() as client:
        answer = await client.completions.create(model="style", prompt="one two three")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("one two three ", "stop", None)
    assert answer.model == "style" and answer.object == "text_completion"
    assert (choice.adapter, choice.mode) == ("style@abc123", "batched")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    (request,) = served.runtime.requests
    assert (request.adapter, request.prompt) == ("style", "one two three")
    assert (request.sampling.temperature, request.sampling.max_tokens) == (1.0, 16)


async def test_every_parameter_arrives(served):
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "seed": 7,
        "stop": "end",
        "max_tokens": 5,
        "user": "somebody",
    }
    extra = {
        "top_k": 10,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "cache_salt": "mine",
        "skip_special_tokens": True,
    }
    async with served.openai() as client:
        await client.completions.create(model="fake", prompt=[5, 6], **asked, extra_body=extra)
    (request,) = served.runtime.requests
    assert (request.adapter, request.token_ids, request.cache_salt) == (BASE, (5, 6), "mine")
    wanted = {**asked, **extra, "stop": ("end",)}
    for name in ("user", "cache_salt", "skip_special_tokens"):
        del wanted[name]
    assert {name: getattr(request.sampling, name) for name in wanted} == wanted


async def test_a_stream_says_the_same_as_the_whole(served):
    served.runtime.delay_s = 0.005
    asked = {"model": "style", "prompt": "one two three"}
    async with served.openai() as client:
        options = {"include_usage": True}
        *parts, last = await events(
            client.completions.create(**asked, stream=True, stream_options=options)
        )
        whole = await client.completions.create(**asked)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert len(parts) > 1
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["stop"]
    assert not last.choices and last.usage == whole.usage
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in parts}) == 1


async def test_usage_in_every_event_where_asked_for(served):
    served.runtime.delay_s = 0.005
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with served.openai() as client:
        stream = client.chat.completions.create(
            model="fake", messages=HI, stream=True, stream_options=options
        )
        parts = await events(stream)
    assert all(part.usage.prompt_tokens for part in parts)
    counts = [part.usage.completion_tokens for part in parts]
    assert counts == sorted(counts) and counts[-1] == 2


async def test_several_choices_of_several_prompts(served):
    async with served.openai() as client:
        answer = await client.completions.create(
            model="fake", prompt=["one two", "three"], n=2, seed=10
        )
        stream = client.completions.create(
            model="fake", prompt=["one two", "three"], n=2, stream=True
        )
        parts = await events(stream)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = ["one two ", "one two ", "three ", "three "]
    assert [choice.text for choice in answer.choices] == texts
    assert [request.sampling.seed for request in served.runtime.requests[:4]] == [10, 11, 10, 11]
    assert len({request.request_id for request in served.runtime.requests}) == 8
    assert answer.usage.prompt_tokens == 3  # each prompt once
    assert answer.usage.completion_tokens == 6
    told = [""] * 4
    for part in parts:
        told[part.choices[0].index] += part.choices[0].text
    assert told == texts


async def test_logprobs_of_a_completion(served):
    async with served.openai() as client:
        answer = await client.completions.create(model="fake", prompt="a b", logprobs=2)
        parts = await events(
            client.completions.create(model="fake", prompt="a b", logprobs=2, stream=True)
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["t0 ", "t1 "]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.top_logprobs == [{"t0 ": -0.5, "t7 ": -1.5}, {"t1 ": -0.5, "t7 ": -1.5}]
    assert logprobs.text_offset == [0, 3]
    offsets = [offset for part in parts for offset in part.choices[0].logprobs.text_offset]
    assert offsets == [0, 3]


async def test_echo_has_the_prompts_logprobs_and_may_generate_nothing(served):
    asked = {"model": "fake", "prompt": [4, 5, 6], "echo": True, "logprobs": 1}
    async with served.openai() as client:
        answer = await client.completions.create(**asked, max_tokens=0)
        (choice,) = answer.choices
        assert choice.text == "t4 t5 t6 "
        assert choice.logprobs.tokens == ["t4 ", "t5 ", "t6 "]
        assert choice.logprobs.token_logprobs == [None, -0.25, -0.25]
        assert choice.logprobs.top_logprobs[0] is None
        assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 0)
        (request,) = served.runtime.requests
        assert (request.prompt_logprobs, request.sampling.max_tokens) == (1, 1)
        both = await client.completions.create(**asked, max_tokens=1)
        assert both.choices[0].text == "t4 t5 t6 hello "
        assert both.choices[0].logprobs.token_logprobs == [None, -0.25, -0.25, -0.5]
        text = await client.completions.create(model="fake", prompt="a b", echo=True)
        assert text.choices[0].text == "a ba b "


async def test_the_prompts_logprobs_as_vllm_has_them(served):
    async with served.openai() as client:
        answer = await client.completions.create(
            model="fake", prompt=[4, 5], extra_body={"prompt_logprobs": 1}
        )
    first, second = answer.choices[0].prompt_logprobs
    assert first is None
    assert second == {"1": {"logprob": -0.25, "rank": 1, "decoded_token": "t1 "}}


async def test_a_chat_completion(served):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    async with served.openai() as client:
        answer = await client.chat.completions.create(
            model="style@abc123", messages=messages, max_completion_tokens=9
        )
        message = answer.choices[0].message
        assert (message.role, message.content) == ("assistant", "hello there ")
        await client.chat.completions.create(model="fake", messages=[*messages, message])
    first, second = served.runtime.requests
    assert first.adapter == "style@abc123" and first.sampling.max_tokens == 9
    assert first.messages == (ChatMessage("system", "be kind"), ChatMessage("user", "a\nb"))
    assert second.sampling.max_tokens is None
    assert second.messages[-1] == ChatMessage("assistant", "hello there ")


async def test_a_streamed_chat_completion(served):
    served.runtime.delay_s = 0.005
    async with served.openai() as client:
        parts = await events(
            client.chat.completions.create(
                model="fake", messages=HI, stream=True, logprobs=True, top_logprobs=2
            )
        )
    deltas = [part.choices[0].delta for part in parts]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(parts) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "hello there "
    tokens_told = [token for part in parts for token in part.choices[0].logprobs.content]
    assert [(token.token, token.bytes) for token in tokens_told] == [
        ("t0 ", [116, 48, 32]),
        ("t1 ", [116, 49, 32]),
    ]
    assert [top.logprob for top in tokens_told[0].top_logprobs] == [-0.5, -1.5]


async def test_the_streaming_helper_of_the_client_understands_the_events(served):
    async with (
        served.openai() as client,
        client.chat.completions.stream(model="fake", messages=HI) as stream,
    ):
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "hello there "


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            StructuredOutput(json_schema='{"type": "object"}'),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True},
                }
            },
            StructuredOutput(json_schema='{"type": "integer"}'),
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, StructuredOutput(json_schema='{"a": 1}')),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
        ({"guided_grammar": 'start: "a"'}, StructuredOutput(grammar='start: "a"')),
        ({"guided_json": '{"type": "null"}'}, StructuredOutput(json_schema='{"type": "null"}')),
    ],
)
async def test_the_form_of_an_answer_arrives(served, asked, form):
    async with served.openai() as client:
        await client.chat.completions.create(model="fake", messages=HI, extra_body=asked)
    assert served.runtime.requests[0].structured_output == form


async def test_tools_go_to_the_chat_template_and_calls_come_back_in_messages(served):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
    }
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    async with served.openai() as client:
        await client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])
        await client.chat.completions.create(
            model="fake", messages=HI, tools=[WEATHER], tool_choice="none"
        )
    first, second = served.runtime.requests
    assert first.tools == (WEATHER,) and first.structured_output is None
    assert first.messages[1].tool_calls == (ToolCall("call_1", "weather", '{"city": "Bonn"}'),)
    assert first.messages[2] == ChatMessage("tool", "sun", tool_call_id="call_1")
    assert second.tools == ()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_tool_is_called(served, stream):
    served.runtime.answer = '{"city":  "Bonn"}'
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"model": "fake", "messages": HI, "tools": [WEATHER], "tool_choice": choice}
    call, reason = await called(served, asked, stream)
    (request,) = served.runtime.requests
    parameters = WEATHER["function"]["parameters"]
    assert json.loads(request.structured_output.json_schema) == parameters
    assert request.tools == (WEATHER,)
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather",
        {"city": "Bonn"},
    )
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_some_tool_is_called_where_one_is_required(served, stream):
    served.runtime.answer = '[{"name": "weather", "parameters": {"city": "Bonn"}}]'
    asked = {"model": "fake", "messages": HI, "tools": [WEATHER], "tool_choice": "required"}
    call, reason = await called(served, asked, stream)
    schema = json.loads(served.runtime.requests[0].structured_output.json_schema)
    assert schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "weather"}
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bonn"}')
    assert reason == "tool_calls"


async def called(served, asked, stream):
    """The one call of the answer, and the reason of its end."""
    async with served.openai() as client:
        if stream:
            async with client.chat.completions.stream(**asked) as told:
                answer = await told.get_final_completion()
        else:
            answer = await client.chat.completions.create(**asked)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_") and not choice.message.content
    return call, choice.finish_reason


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"model": 5}, "model"),
        ({"seed": 1.5}, "seed"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
async def test_what_is_wrong_with_a_completion_is_named(served, asked, param):
    async with served.openai() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**{"model": "fake", "prompt": "x"}, extra_body=asked)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert param in caught.value.message
    assert not served.runtime.requests


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "x", "arguments": "no"},
                            }
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_what_is_wrong_with_a_chat_is_named(served, asked, param):
    async with served.openai() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="fake", messages=HI, extra_body=asked)
    assert caught.value.param == param
    assert not served.runtime.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=3.2), openai.RateLimitError),
        (ShuttingDown("bye", retry_after_s=5), openai.InternalServerError),
        (EngineDead("dead"), openai.InternalServerError),
        (AdapterQuarantined("no r", name="style"), openai.UnprocessableEntityError),
    ],
)
async def test_errors_of_the_runtime_are_the_clients_own(served, error, kind, stream):
    served.runtime.error = error
    async with served.openai() as client:
        with pytest.raises(kind) as caught:
            await client.completions.create(model="style", prompt="x", stream=stream)
    if isinstance(error, Overloaded):
        assert int(caught.value.response.headers["retry-after"]) >= error.retry_after_s


async def test_an_error_in_the_middle_of_a_stream_is_an_event(served):
    generate = served.runtime.generate

    async def failing(request):
        async for chunk in generate(request):
            yield chunk
            raise EngineDead("the engine has stopped")

    served.runtime.generate = failing
    async with served.openai() as client:
        stream = await client.completions.create(model="fake", prompt="one two", stream=True)
        told = []
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            async for part in stream:
                told.append(part.choices[0].text)
    assert told == ["one "]
    await served.settled()
    labels = {"handler": "/v1/completions", "method": "POST", "code": "503"}
    assert served.edge.registry.get_sample_value("kasa_http_requests_total", labels) == 1


ROOT, ALICE = tokens.new_token(), tokens.new_token()
EVERYTHING = {action: ["*"] for action in tokens.Action}
LINES = "\n".join(
    (
        tokens.line("root", ROOT, EVERYTHING),
        tokens.line("alice", ALICE, {tokens.Action.GENERATE: ["style"]}),
    )
)


async def test_a_token_permits_what_it_does_over_grpc():
    async with serving_fake(replace(CONFIG, access=AccessConfig(tokens=LINES))) as served:
        async with served.openai() as nobody:
            with pytest.raises(openai.AuthenticationError):
                await nobody.models.list()
        async with served.openai(api_key=ALICE) as alice, served.openai(api_key=ROOT) as root:
            assert [model.id for model in (await alice.models.list()).data] == ["style"]
            assert [model.id for model in (await root.models.list()).data] == ["fake", "style"]
            await alice.completions.create(model="style", prompt="x")
            assert served.runtime.requests[0].cache_salt == "alice/"
            with pytest.raises(openai.PermissionDeniedError):
                await alice.completions.create(model="fake", prompt="x")
            with pytest.raises(openai.NotFoundError) as caught:
                await alice.completions.create(model="broken", prompt="x")
            assert "that this token may see" in caught.value.message
            for path in ("load_lora_adapter", "unload_lora_adapter"):
                body = {"lora_name": "style", "lora_path": "style"}
                if path.startswith("un"):
                    del body["lora_path"]
                with pytest.raises(openai.PermissionDeniedError):
                    await alice.post(f"/{path}", body=body, cast_to=str)


async def test_choices_count_as_calls_of_their_client():
    config = replace(CONFIG, clients=ClientLimits(max_streams_per_client=2))
    async with serving_fake(config) as served, served.openai() as client:
        served.runtime.delay_s = 0.01
        answer = await client.completions.create(model="fake", prompt="x", n=2)
        assert len(answer.choices) == 2
        with pytest.raises(openai.RateLimitError, match="has 2 calls"):
            await client.completions.create(model="fake", prompt="word " * 100, n=3)
        await served.settled()
        await client.completions.create(model="fake", prompt="x", n=2)


async def test_a_client_that_leaves_a_stream_cancels_it(served):
    served.runtime.delay_s = 0.01
    async with served.openai() as client:
        stream = await client.completions.create(
            model="fake", prompt="word " * 1000, max_tokens=1000, stream=True, n=2
        )
        async for _ in stream:
            break
        await stream.close()
        await served.settled()


async def test_a_request_that_the_drain_cuts_off_is_told_to_go_elsewhere(served):
    from kasa_runtime.types import FinishReason, TokenChunk

    async def cut(request):
        yield TokenChunk("one ", (1,))
        yield TokenChunk("", (), finish_reason=FinishReason.CANCELLED)

    served.runtime.generate = cut
    async with served.openai() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="fake", prompt="x")
        assert caught.value.status_code == 503


async def test_adapters_are_loaded_as_vllm_loads_them(served, tmp_path):
    directory = str(served.runtime.config.adapters_dir.absolute() / "style")
    async with served.openai() as client:

        async def load(**body):
            return await client.post("/load_lora_adapter", body=body, cast_to=str)

        said = await load(lora_name="style", lora_path=directory)
        assert said == "Success: LoRA adapter 'style' added successfully."
        assert (await served.runtime.get_adapter("style")).state == "resident"
        await load(lora_name="style", lora_path="style", load_inplace=True)
        body = {"lora_name": "style", "lora_int_id": 1}
        said = await client.post("/unload_lora_adapter", body=body, cast_to=str)
        assert said == "Success: LoRA adapter 'style' removed successfully."
        assert (await served.runtime.get_adapter("style")).state == "ready"
        for path in ("/etc", "../style", "other", "style/../../etc", str(tmp_path / "style")):
            with pytest.raises(openai.BadRequestError) as caught:
                await load(lora_name="style", lora_path=path)
            assert caught.value.param == "lora_path"
        with pytest.raises(openai.NotFoundError):
            await load(lora_name="none", lora_path="none")


async def test_the_sync_client_works_too(served):
    def use():
        with OpenAI(base_url=served.url("/v1"), api_key="none") as client:
            whole = client.chat.completions.create(model="style", messages=HI)
            stream = client.completions.create(model="fake", prompt="one two", stream=True)
            return whole.choices[0].message.content, [part.choices[0].text for part in stream]

    content, texts = await asyncio.to_thread(use)
    assert content == "hello there " and "".join(texts) == "one two "
