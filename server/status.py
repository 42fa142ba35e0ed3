"""Errors to gRPC codes with google.rpc details: the only place that knows which is which.

`RULES` names every class of `kasa_runtime.errors`; a test fails when one is missing.
`ErrorInfo.reason` is the class's name in UPPER_SNAKE_CASE, from which `kasa_runtime.client` finds
the class again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from kasa_runtime import errors
from kasa_runtime.errors import reason

DOMAIN = "kasa.v1"


class DeadlineExpired(Exception):
    """The deadline of the call passed while the engine worked on it."""


Details = Callable[[Any], Iterable[Message]]


@dataclass(frozen=True)
class Rule:
    """The code of an error class, and the details beside ErrorInfo."""

    code: StatusCode
    details: Details = lambda error: ()


def _bad_request(error: errors.InvalidRequest) -> Iterable[Message]:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field, description=error.description
    )
    yield error_details_pb2.BadRequest(field_violations=[violation])


def _adapter_resource(error: errors.AdapterError) -> Iterable[Message]:
    yield error_details_pb2.ResourceInfo(
        resource_type="kasa.v1.Adapter", resource_name=error.name, description=str(error)
    )


def _retry(error: errors.Overloaded) -> Iterable[Message]:
    delay = Duration()
    delay.FromNanoseconds(round(max(error.retry_after_s, 0.0) * 1e9))
    yield error_details_pb2.RetryInfo(retry_delay=delay)


def _precondition(error: errors.KasaError) -> Iterable[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=reason(type(error)), subject=getattr(error, "name", ""), description=str(error)
    )
    yield error_details_pb2.PreconditionFailure(violations=[violation])


RULES: dict[type[errors.KasaError], Rule] = {
    errors.InvalidRequest: Rule(StatusCode.INVALID_ARGUMENT, _bad_request),
    errors.Unauthenticated: Rule(StatusCode.UNAUTHENTICATED),
    errors.PermissionDenied: Rule(StatusCode.PERMISSION_DENIED),
    errors.AdapterInvalid: Rule(StatusCode.INVALID_ARGUMENT, _adapter_resource),
    errors.AdapterNotFound: Rule(StatusCode.NOT_FOUND, _adapter_resource),
    errors.DigestMismatch: Rule(StatusCode.DATA_LOSS, _adapter_resource),
    errors.VersionConflict: Rule(StatusCode.ABORTED, _adapter_resource),
    errors.BaseMismatch: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    errors.AdapterQuarantined: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    errors.AdapterInUse: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    errors.AdapterError: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    errors.StoreReadOnly: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    # Not RESOURCE_EXHAUSTED, which clients retry: it will not fit later either.
    errors.CapacityExceeded: Rule(StatusCode.FAILED_PRECONDITION, _precondition),
    errors.Overloaded: Rule(StatusCode.RESOURCE_EXHAUSTED, _retry),
    errors.LimitExceeded: Rule(StatusCode.RESOURCE_EXHAUSTED, _retry),
    errors.ShuttingDown: Rule(StatusCode.UNAVAILABLE, _retry),
    errors.EngineDead: Rule(StatusCode.UNAVAILABLE),
    # Not raised while serving; should one come up all the same, the client cannot help it.
    errors.ConfigError: Rule(StatusCode.INTERNAL),
    errors.ModelError: Rule(StatusCode.INTERNAL),
    errors.Unreachable: Rule(StatusCode.INTERNAL),
    errors.TrainingError: Rule(StatusCode.INTERNAL),
    errors.DataError: Rule(StatusCode.INTERNAL),
    errors.KasaError: Rule(StatusCode.INTERNAL),
}


def to_status(error: BaseException) -> status_pb2.Status:
    """The status of an error, with its details. Of errors that are not ours, it tells nothing."""
    match error:
        case errors.KasaError():
            rule = next(RULES[base] for base in type(error).__mro__ if base in RULES)
            return _status(rule.code, str(error), reason(type(error)), error, rule.details(error))
        case DeadlineExpired():
            message = "the deadline passed before the generation ended"
            return _status(StatusCode.DEADLINE_EXCEEDED, message, "DEADLINE_EXCEEDED", error)
        case _:
            message = "internal error; the server's log has it under the x-request-id of this call"
            return _status(StatusCode.INTERNAL, message, "INTERNAL", error)


def _status(
    code: StatusCode,
    message: str,
    reason: str,
    error: BaseException,
    details: Iterable[Message] = (),
) -> status_pb2.Status:
    name = getattr(error, "name", "")
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain=DOMAIN, metadata={"adapter": name} if name else {}
    )
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (info, *details):
        status.details.add().Pack(detail)
    return status
