"""Structured output through the runtime: from text to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine.making import config
from jsonschema import Draft202012Validator

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.runtime import Runtime, RuntimeConfig
from kasa_runtime.types import FinishReason, GenerationRequest, SamplingParams, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["engineer", "manager"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}


async def text_of(
    runtime: Runtime, form: StructuredOutput, prompt: str = "the quick", **sampling: Any
) -> tuple[str, FinishReason | None]:
    params = SamplingParams(**{"max_tokens": 80, "temperature": 1.0, "seed": 5, **sampling})
    request = GenerationRequest("a", prompt=prompt, sampling=params, structured_output=form)
    chunks = [chunk async for chunk in runtime.generate(request)]
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


async def test_the_text_has_the_form_until_a_stop_string_cuts_it(
    tiny_chat_model: Path, tmp_path: Path
) -> None:
    settings = RuntimeConfig(str(tiny_chat_model), tmp_path, native=config())
    value = {"the": "quick fox, ünï"}
    form = StructuredOutput(json_schema=json.dumps({"const": value}))
    async with await Runtime.create(settings) as runtime:
        text, why = await text_of(runtime, form)
        assert (json.loads(text), why) == (value, FinishReason.STOP)
        text, why = await text_of(runtime, StructuredOutput(choice=("yes, no",)), stop=(", ",))
        assert (text, why) == ("yes", FinishReason.STOP)
        with pytest.raises(InvalidRequest, match="unclosed group"):
            await text_of(runtime, StructuredOutput(regex="("))
        assert runtime.stats().num_requests_running == runtime.stats().num_requests_waiting == 0


@pytest.mark.real_model
async def test_a_real_model_fills_in_a_schema(smollm2: Path, tmp_path: Path) -> None:
    form = StructuredOutput(json_schema=json.dumps(PERSON))
    prompt = "An employee, as JSON with name, age, role and tags:\n"
    async with await Runtime.create(RuntimeConfig(str(smollm2), tmp_path)) as runtime:
        for seed in range(2):
            text, why = await text_of(runtime, form, prompt, seed=seed, max_tokens=120)
            assert why is FinishReason.STOP, text
            Draft202012Validator(PERSON).validate(json.loads(text))
