"""What of structured output is refused, and with which words; on every engine the same."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kasa_runtime.engine.grammar import MAX_BYTES, check
from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import StructuredOutput


def schema(value: Any) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(value))


@pytest.mark.parametrize(
    "wanted",
    [
        schema({}),
        schema(True),
        schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "title": "annotations are"}),
        schema({"type": "object", "properties": {f"p{i}": {} for i in range(300)}}),
        StructuredOutput(regex=""),
        StructuredOutput(choice=("",)),
        StructuredOutput(choice=tuple(f"choice {i}" for i in range(5000))),
        StructuredOutput(grammar='start: "a" start | "b"'),
    ],
)
def test_what_can_be_followed_is_taken(wanted: StructuredOutput) -> None:
    check(wanted)


@pytest.mark.parametrize(
    ("wanted", "field", "reason"),
    [
        (StructuredOutput(json_schema="{"), "json_schema", "must be JSON"),
        (StructuredOutput(json_schema="[" * 50_000), "json_schema", "must be JSON"),
        (schema(None), "json_schema", "must be an object or true, got null"),
        (schema([]), "json_schema", "must be an object or true"),
        (schema({"type": "text"}), "json_schema", "Invalid type: text"),
        (schema(False), "json_schema", "must be an object or true, got false"),
        (schema({"enum": []}), "json_schema", "Unsatisfiable"),
        (schema({"$ref": "#/nowhere"}), "json_schema", "does not exist"),
        (schema({"$ref": "http://127.0.0.1/a"}), "json_schema", "does not fetch"),
        (schema({"type": "string", "format": "colour"}), "json_schema", "Unknown format"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "json_schema", "look-around"),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), "json_schema", "x-guidance"),
        (schema({"items": {"x-guidance": {"lenient": True}, "not": {}}}), "json_schema", "not"),
        (StructuredOutput(regex="["), "regex", "unclosed"),
        (StructuredOutput(regex=r"(a)\1"), "regex", "backreferences"),
        (StructuredOutput(regex="a" * (MAX_BYTES + 1)), "regex", f"at most {MAX_BYTES}"),
        (StructuredOutput(choice=("é" * MAX_BYTES,)), "choice", f"at most {MAX_BYTES}"),
        (StructuredOutput(grammar='other: "a"'), "grammar", "no start rule"),
        (StructuredOutput(grammar="start: missing"), "grammar", "unknown name"),
        (
            StructuredOutput(grammar='start: %json {"x-guidance": {"lenient": true}, "not": {}}'),
            "grammar",
            "not",
        ),
    ],
)
def test_what_cannot_is_refused_with_the_reason(
    wanted: StructuredOutput, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        check(wanted)
    assert caught.value.field == f"structured_output.{field}"
    assert len(caught.value.description) <= 400 and "backtrace" not in caught.value.description


@pytest.mark.parametrize(
    "keyword",
    [
        {"not": {"type": "null"}},
        {"then": {}, "if": {}},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {}},
        {"type": "object", "propertyNames": {"pattern": "a"}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "dependentSchemas": {"a": {}}},
        {"unevaluatedProperties": False},
        {"unevaluatedItems": False},
        {"$dynamicRef": "#a"},
        {"oneOf": [{"type": "string"}, {"minLength": 2}]},
    ],
)
def test_a_keyword_that_cannot_be_enforced_is_refused_not_ignored(keyword: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(list(keyword)[-1])):
        check(schema({"type": "object", "properties": {"deep": keyword}}))
