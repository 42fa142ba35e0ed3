from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_runtime.errors import AdapterNotFound, InvalidRequest, KasaError
from server.http.openai import chat, completions
from server.http.openai.conversion import adapter_of, chat_messages
from server.http.openai.parsing import MAX_ERRORS, parse
from server.http.openai.requests import ChatParameters, CompletionParameters
from server.http.openai.tools import tool_use

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def objects(kind, **given):
    names = sorted(kind.model_fields)
    some = st.dictionaries(st.sampled_from([*names, "unknown"]), VALUES, max_size=4)
    return st.builds(lambda values: {**values, **given}, some)


@settings(max_examples=60, deadline=None)
@given(objects(CompletionParameters, model="fake", prompt="x"))
def test_any_completion_is_taken_or_refused_by_name(values):
    try:
        asked = parse(CompletionParameters, json.dumps(values).encode())
        completions._check(asked)
        completions._common(asked, "fake").request("1", 0, prompt="x")
    except KasaError as error:
        assert isinstance(error, InvalidRequest) and error.field and error.description


@settings(max_examples=60, deadline=None)
@given(objects(ChatParameters, model="fake") | objects(ChatParameters, model="x", messages=[{}]))
def test_any_chat_is_taken_or_refused_by_name(values):
    try:
        asked = parse(ChatParameters, json.dumps(values).encode())
        chat._check(asked)
        chat_messages(asked.messages)
        chat._common(asked, tool_use(asked), "fake").request("1", 0, messages=())
    except KasaError as error:
        assert isinstance(error, (InvalidRequest, AdapterNotFound)) and str(error)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=50) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_taken_or_refused(body):
    with pytest.raises(InvalidRequest):
        parse(CompletionParameters, body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model":' * 10_000,
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "\xff"}',
        b'{"model": "fake", "prompt": "x", "seed": 1e999}',
        b'{"model": "fake", "prompt": [1' + b"0" * 5000 + b"]}",
    ],
)
def test_what_json_may_hide_is_refused(body):
    try:
        asked = parse(CompletionParameters, body)
    except InvalidRequest:
        return
    assert asked.prompt == [[10**5000]]  # an id like any other that the model does not have


def test_of_very_many_errors_the_number_is_told():
    values = {"model": "fake", "prompt": "x", **{f"a{i}": 1 for i in range(MAX_ERRORS + 1)}}
    with pytest.raises(InvalidRequest, match=f"body: has {MAX_ERRORS + 1} errors"):
        parse(CompletionParameters, json.dumps(values).encode())


def test_an_unknown_parameter_is_named_before_other_errors_and_with_a_near_name():
    with pytest.raises(InvalidRequest, match=r"max_token: .* did you mean max_tokens\?"):
        parse(CompletionParameters, b'{"model": 1, "prompt": "x", "max_token": 5}')


@pytest.mark.parametrize(
    ("model", "adapter"), [("org/base", ""), ("style", "style"), ("style@ab12", "style@ab12")]
)
def test_a_models_name_stands_for_an_adapter(model, adapter):
    assert adapter_of(model, "org/base") == adapter


@pytest.mark.parametrize("model", ["", "gpt 4", "STYLE", "style@xyz", "a" * 100, "other/base"])
def test_a_name_that_no_adapter_has_is_not_found(model):
    with pytest.raises(AdapterNotFound):
        adapter_of(model, "org/base")
