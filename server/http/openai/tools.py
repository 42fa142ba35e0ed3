"""Functions that the model may call: told to it by the chat template, or made sure of by structured
output, whose text then is the call."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import StructuredOutput
from server.http.openai.requests import ChatParameters, Tool

ANYTHING = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """`told`: what the chat template gets. `function`: the one that has to be called; `required`:
    any of them has to; `schema` is then of the text that is generated."""

    told: tuple[Mapping[str, Any], ...] = ()
    function: str = ""
    required: bool = False
    schema: Mapping[str, Any] | None = None

    @property
    def structured_output(self) -> StructuredOutput | None:
        if self.schema is None:
            return None
        return StructuredOutput(json_schema=json.dumps(self.schema, ensure_ascii=False))

    def calls(self, text: str) -> list[dict[str, Any]] | None:
        """The calls that a generated text is. None if it is none, or not a whole one."""
        if self.function:
            return [call(self.function, text)]
        if not self.required:
            return None
        try:
            chosen = json.loads(text)
        except ValueError:
            return None
        return [
            call(one["name"], json.dumps(one["parameters"], ensure_ascii=False)) for one in chosen
        ]


def call(name: str, arguments: str) -> dict[str, Any]:
    """A call as answers have it."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def tool_use(asked: ChatParameters) -> ToolUse:
    """Raises InvalidRequest."""
    tools = asked.tools or []
    choice: Any = asked.tool_choice or "auto"
    if choice == "none" or (choice == "auto" and not tools):
        return ToolUse()
    told = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    if choice == "auto":
        return ToolUse(told)
    if choice == "required":
        if not tools:
            raise InvalidRequest("tool_choice", "is required, so there must be tools")
        return ToolUse(told, required=True, schema=_some(tools, asked.parallel_tool_calls))
    name = choice["function"]["name"]
    named = [tool for tool in tools if tool.function.name == name]
    if not named:
        found = [tool.function.name for tool in tools]
        raise InvalidRequest("tool_choice", f"must be one of the tools {found}, got {name!r:.80}")
    return ToolUse(told, function=name, schema=_arguments(named[0]))


def _arguments(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or ANYTHING


def _some(tools: list[Tool], parallel: bool | None) -> Mapping[str, Any]:
    """An array of calls."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": _arguments(tool)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel is not False else {**schema, "maxItems": 1}
