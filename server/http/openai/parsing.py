"""A request's body to its parameters, or to an error that names what is wrong with it."""

from __future__ import annotations

import difflib
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kasa_runtime.errors import InvalidRequest
from server.http.openai.requests import Parameters

MAX_ERRORS = 100
"""Of one request; looking at more would hold up others."""

P = TypeVar("P", bound=Parameters)


def parse(kind: type[P], body: bytes) -> P:
    """Raises InvalidRequest naming the first parameter that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise InvalidRequest("body", f"has {error.error_count()} errors") from None
        details = error.errors(include_url=False)
        unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
        raise _invalid(kind, (unknown or details)[0]) from None


def _invalid(kind: type[Parameters], detail: ErrorDetails) -> InvalidRequest:
    where = _path(detail["loc"]) or "body"
    match detail["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(detail["loc"][-1]), kind.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near and len(detail["loc"]) == 1 else ""
            return InvalidRequest(where, f"this server knows no such parameter{hint}")
        case "missing":
            return InvalidRequest(where, "is required")
        case "value_error":
            return InvalidRequest(where, str(detail["ctx"]["error"]))
        case "json_invalid":
            return InvalidRequest("body", f"is no JSON: {detail['ctx']['error']}")
    return InvalidRequest(where, f"{detail['msg'].lower()}, got {detail['input']!r:.80}")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`. Kinds of a union that pydantic names too are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    return path
