"""Errors to HTTP statuses and OpenAI's error objects: the only place that knows which is which.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`RULES` names every class of `kasa_runtime.errors`; a test fails when one is missing. `code` is the
class's name in snake_case, but where OpenAI has a code of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kasa_runtime import errors
from kasa_runtime.errors import reason
from server.status import DeadlineExpired

INVALID = "invalid_request_error"
SERVER = "server_error"


@dataclass(frozen=True)
class Rule:
    """The status of an error class, OpenAI's type of it, and its code where it is another than the
    class's name."""

    status: int
    type: str
    code: str = ""


# 409 and 429 are retried by clients, 422 is not.
RULES: dict[type[errors.KasaError], Rule] = {
    errors.InvalidRequest: Rule(400, INVALID),
    errors.Unauthenticated: Rule(401, "authentication_error", "invalid_api_key"),
    errors.PermissionDenied: Rule(403, "permission_error"),
    errors.AdapterNotFound: Rule(404, INVALID, "model_not_found"),
    errors.AdapterInvalid: Rule(422, INVALID),
    errors.DigestMismatch: Rule(422, INVALID),
    errors.VersionConflict: Rule(409, INVALID),
    errors.BaseMismatch: Rule(422, INVALID),
    errors.AdapterQuarantined: Rule(422, INVALID),
    errors.AdapterInUse: Rule(409, INVALID),
    errors.AdapterError: Rule(422, INVALID),
    errors.StoreReadOnly: Rule(422, INVALID),
    errors.CapacityExceeded: Rule(422, INVALID),
    errors.Overloaded: Rule(429, "rate_limit_error"),
    errors.LimitExceeded: Rule(429, "rate_limit_error"),
    errors.ShuttingDown: Rule(503, SERVER),
    errors.EngineDead: Rule(503, SERVER),
    # Not raised while serving; should one come up all the same, the client cannot help it.
    errors.ConfigError: Rule(500, SERVER),
    errors.ModelError: Rule(500, SERVER),
    errors.Unreachable: Rule(500, SERVER),
    errors.TrainingError: Rule(500, SERVER),
    errors.DataError: Rule(500, SERVER),
    errors.KasaError: Rule(500, SERVER),
}


@dataclass(frozen=True)
class Problem:
    """An error as a client is told of it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> dict[str, Any]:
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=dict(self.headers))


def to_problem(error: BaseException) -> Problem:
    """What to tell of an error. Of errors that are not ours, it tells nothing."""
    match error:
        case errors.KasaError():
            rule = next(RULES[base] for base in type(error).__mro__ if base in RULES)
            code = rule.code or reason(type(error)).lower()
            message, param = str(error), getattr(error, "field", None)
            return Problem(rule.status, message, rule.type, code, param, _headers(error))
        case DeadlineExpired():
            message = "the deadline passed before the generation ended"
            return Problem(504, message, SERVER, "deadline_exceeded")
        case HTTPException():
            return of_status(error.status_code, error.detail, tuple((error.headers or {}).items()))
        case _:
            message = "internal error; the server's log has it under this answer's x-request-id"
            return Problem(500, message, SERVER, "internal")


def of_status(status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> Problem:
    """A problem with HTTP itself: no such path, a body that is too large."""
    code = HTTPStatus(status).name.lower()
    return Problem(status, message, INVALID if status < 500 else SERVER, code, headers=headers)


def _headers(error: errors.KasaError) -> tuple[tuple[str, str], ...]:
    match error:
        case errors.Unauthenticated():
            return (("www-authenticate", "Bearer"),)
        case errors.Overloaded():
            return (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    return ()
