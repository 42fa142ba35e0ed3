from __future__ import annotations

import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode

from kasa_runtime import errors
from kasa_runtime.errors import reason
from server.status import RULES, to_status


def tree(error_type):
    yield error_type
    for subclass in error_type.__subclasses__():
        yield from tree(subclass)


ALL = list(tree(errors.KasaError))


def make(error_type):
    if issubclass(error_type, errors.InvalidRequest):
        return error_type("sampling.top_p", "must be in (0, 1], got 2")
    if issubclass(error_type, errors.Overloaded):
        return error_type("the queue is full", retry_after_s=0.25)
    if issubclass(error_type, errors.AdapterError):
        return error_type("what is wrong", name="style")
    return error_type("what is wrong")


def details_of(status):
    found = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        packed.Unpack(found[name])
    return found


CODES = {
    "InvalidRequest": StatusCode.INVALID_ARGUMENT,
    "Unauthenticated": StatusCode.UNAUTHENTICATED,
    "PermissionDenied": StatusCode.PERMISSION_DENIED,
    "AdapterInvalid": StatusCode.INVALID_ARGUMENT,
    "AdapterNotFound": StatusCode.NOT_FOUND,
    "DigestMismatch": StatusCode.DATA_LOSS,
    "VersionConflict": StatusCode.ABORTED,
    "BaseMismatch": StatusCode.FAILED_PRECONDITION,
    "AdapterQuarantined": StatusCode.FAILED_PRECONDITION,
    "AdapterInUse": StatusCode.FAILED_PRECONDITION,
    "StoreReadOnly": StatusCode.FAILED_PRECONDITION,
    "CapacityExceeded": StatusCode.FAILED_PRECONDITION,
    "Overloaded": StatusCode.RESOURCE_EXHAUSTED,
    "LimitExceeded": StatusCode.RESOURCE_EXHAUSTED,
    "ShuttingDown": StatusCode.UNAVAILABLE,
    "EngineDead": StatusCode.UNAVAILABLE,
}


def test_every_error_class_has_a_rule():
    ours = {error_type for error_type in ALL if error_type.__module__ == errors.__name__}
    assert ours - RULES.keys() == set()


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_code(name, code):
    assert to_status(make(getattr(errors, name))).code == code.value[0]


@pytest.mark.parametrize("error_type", ALL, ids=lambda error_type: error_type.__name__)
def test_every_status_has_error_info_that_names_the_class(error_type):
    status = to_status(make(error_type))
    info = details_of(status)["ErrorInfo"]
    assert info.domain == "kasa.v1"
    assert info.reason == reason(error_type)
    assert status.message


def test_reasons_are_unique():
    assert len({reason(error_type) for error_type in ALL}) == len(ALL)
    assert reason(errors.AdapterNotFound) == "ADAPTER_NOT_FOUND"


def test_invalid_request_names_its_field():
    violation = details_of(to_status(make(errors.InvalidRequest)))["BadRequest"].field_violations[0]
    assert violation.field == "sampling.top_p"
    assert violation.description == "must be in (0, 1], got 2"


def test_not_found_names_the_adapter():
    details = details_of(to_status(make(errors.AdapterNotFound)))
    assert details["ResourceInfo"].resource_name == "style"
    assert details["ErrorInfo"].metadata["adapter"] == "style"


def test_overloaded_says_when_to_try_again():
    delay = details_of(to_status(make(errors.Overloaded)))["RetryInfo"].retry_delay
    assert delay.ToMilliseconds() == 250


def test_base_mismatch_is_a_failed_precondition_with_its_subject():
    violation = details_of(to_status(make(errors.BaseMismatch)))["PreconditionFailure"].violations[
        0
    ]
    assert (violation.type, violation.subject) == ("BASE_MISMATCH", "style")


def test_subclass_without_a_rule_has_its_parents():
    derived = type("Derived", (errors.AdapterNotFound,), {})
    try:
        assert to_status(derived("gone")).code == StatusCode.NOT_FOUND.value[0]
    finally:
        del derived


def test_foreign_error_tells_nothing():
    status = to_status(KeyError("secret"))
    assert status.code == StatusCode.INTERNAL.value[0]
    assert "secret" not in str(status)
