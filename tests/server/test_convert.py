from __future__ import annotations

import math

import pytest
from kasa.v1 import generation_pb2 as pb
from kasa.v1 import model_pb2

from kasa_runtime import client_wire as wire
from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import (
    ChatMessage,
    FinishReason,
    Mode,
    SamplingParams,
    StructuredOutput,
    TokenChunk,
    TokenLogprobs,
)
from server import convert
from server.chunks import merge_chunks


def converted(**fields):
    return convert.generation_request(pb.GenerateRequest(**fields), "id", None)


def test_the_cache_salt_arrives():
    assert converted(prompt="a").cache_salt == ""
    assert converted(prompt="a", cache_salt="ä" * 256).cache_salt == "ä" * 256


@pytest.mark.parametrize("count", [None, 0, 20])
def test_the_number_of_prompt_logprobs_arrives(count):
    assert converted(prompt="a", prompt_logprobs=count).prompt_logprobs == count


def test_an_empty_entry_stands_for_the_prompts_first_token():
    chunk = TokenChunk(
        "a", (1,), prompt_logprobs=(None, TokenLogprobs(0, 0.0), TokenLogprobs(5, -2, ((3, -1),)))
    )
    for convert_chunk in (convert.generate_response, convert.stream_response):
        first, certain, other = convert_chunk(chunk).prompt_logprobs
        assert first == certain == pb.TokenLogprobs()
        top = [pb.TokenLogprob(token_id=3, logprob=-1)]
        assert other == pb.TokenLogprobs(token_id=5, logprob=-2, top=top)
        assert wire.chunk(convert_chunk(chunk)).prompt_logprobs == chunk.prompt_logprobs


@pytest.mark.parametrize(
    ("wire", "want"),
    [
        ({"json_schema": "{}"}, StructuredOutput(json_schema="{}")),
        ({"regex": ""}, StructuredOutput(regex="")),
        ({"choice": pb.Choice(options=["a", ""])}, StructuredOutput(choice=("a", ""))),
        ({"grammar": "start: /a/"}, StructuredOutput(grammar="start: /a/")),
    ],
)
def test_every_form_of_a_structured_output_arrives(wire, want):
    message = pb.StructuredOutput(**wire)
    assert converted(prompt="a", structured_output=message).structured_output == want
    assert converted(prompt="a").structured_output is None


def chat(*messages):
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in messages])


def test_unset_sampling_is_the_librarys_default():
    assert converted(prompt="a").sampling == SamplingParams()


def test_zero_means_what_the_proto_says():
    sampling = pb.SamplingParams(max_tokens=0, top_p=0, repetition_penalty=0, seed=0, logprobs=0)
    assert converted(prompt="a", sampling=sampling).sampling == SamplingParams(seed=0, logprobs=0)


def test_every_sampling_field_arrives():
    values = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 42,
        "stop": ("\n", "END"),
        "ignore_eos": True,
        "logprobs": 3,
    }
    fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert fields == values.keys() == set(SamplingParams.__dataclass_fields__)
    sampling = converted(prompt="a", sampling=pb.SamplingParams(**values)).sampling
    assert sampling == SamplingParams(**values)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "input"),
        ({"prompt": ""}, "prompt"),
        ({"chat": chat()}, "chat.messages"),
        ({"chat": chat(("user", "hi"), ("robot", "beep"))}, "chat.messages[1].role"),
        ({"chat": chat(("", "hi"))}, "chat.messages[0].role"),
        ({"tokens": pb.TokenIds()}, "tokens.ids"),
        ({"prompt": "a", "adapter": "Upper"}, "adapter"),
        ({"prompt": "a", "adapter": "../etc"}, "adapter"),
        ({"prompt": "a", "adapter": "a/b"}, "adapter"),
        ({"prompt": "a", "adapter": "x" * 64}, "adapter"),
        ({"prompt": "a", "adapter": "name@"}, "adapter"),
        ({"prompt": "a", "adapter": "name@xyz"}, "adapter"),
        ({"prompt": "a", "adapter": "name\n"}, "adapter"),
        ({"prompt": "a", "cache_salt": "x" * 257}, "cache_salt"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "structured_output": pb.StructuredOutput()}, "structured_output"),
        (
            {"prompt": "a", "structured_output": pb.StructuredOutput(choice=pb.Choice())},
            "structured_output.choice.options",
        ),
    ],
)
def test_bad_request_names_the_field(fields, field):
    with pytest.raises(InvalidRequest) as caught:
        converted(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", -0.5),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("logprobs", 1000),
        ("stop", [""]),
    ],
)
def test_bad_sampling_value_names_the_field(name, value):
    with pytest.raises(InvalidRequest) as caught:
        converted(prompt="a", sampling=pb.SamplingParams(**{name: value}))
    assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize("adapter", ["a", "style.v2", "0-a_b", "x" * 63, "style@abc123"])
def test_good_adapter_names(adapter):
    assert converted(prompt="a", adapter=adapter).adapter == adapter


def test_chat_and_tokens_arrive():
    request = converted(chat=chat(("system", ""), ("user", "hi")))
    assert request.messages == (ChatMessage("system", ""), ChatMessage("user", "hi"))
    assert converted(tokens=pb.TokenIds(ids=[0, 5])).token_ids == (0, 5)


def test_missing_input_lists_the_choices():
    with pytest.raises(InvalidRequest, match="one of prompt, chat, got none"):
        convert.tokenize_input(model_pb2.TokenizeRequest())


@pytest.mark.parametrize("reason", FinishReason)
@pytest.mark.parametrize("mode", Mode)
def test_every_enum_value_has_a_name_on_the_wire(reason, mode):
    response = convert.generate_response(TokenChunk("", (), finish_reason=reason, mode=mode))
    assert pb.FinishReason.Name(response.finish_reason) == f"FINISH_REASON_{reason.name}"
    assert pb.Mode.Name(response.mode) == f"MODE_{mode.name}"


def test_merged_chunks_keep_all_tokens_and_the_last_ones_end():
    end = TokenChunk("c", (3,), finish_reason=FinishReason.STOP, adapter="a@1", mode=Mode.MERGED)
    of_prompt = (None, TokenLogprobs(9, -1.0))
    first = TokenChunk("a", (1,), prompt_logprobs=of_prompt)
    merged = merge_chunks([TokenChunk("", ()), first, TokenChunk("b", (2,)), end])
    assert (merged.text, merged.token_ids) == ("abc", (1, 2, 3))
    assert merged.prompt_logprobs == of_prompt
    assert (merged.finish_reason, merged.adapter) == (FinishReason.STOP, "a@1")
