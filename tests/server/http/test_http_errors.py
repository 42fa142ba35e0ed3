from __future__ import annotations

import httpx
import pytest

from kasa_runtime import errors
from server.http.errors import RULES, to_problem


def tree(error_type):
    yield error_type
    for subclass in error_type.__subclasses__():
        yield from tree(subclass)


ALL = list(tree(errors.KasaError))


def make(error_type):
    if issubclass(error_type, errors.InvalidRequest):
        return error_type("top_p", "must be in (0, 1], got 2")
    if issubclass(error_type, errors.Overloaded):
        return error_type("the queue is full", retry_after_s=0.25)
    if issubclass(error_type, errors.AdapterError):
        return error_type("what is wrong", name="style")
    return error_type("what is wrong")


def test_every_error_class_has_a_rule():
    ours = {error_type for error_type in ALL if error_type.__module__ == errors.__name__}
    assert RULES.keys() == ours


@pytest.mark.parametrize("error_type", ALL, ids=lambda error_type: error_type.__name__)
def test_an_error_object_says_what_is_wrong(error_type):
    problem = to_problem(make(error_type))
    told = problem.body["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["message"] == str(make(error_type)) and told["code"] and told["type"]
    assert (told["param"] == "top_p") == issubclass(error_type, errors.InvalidRequest)
    assert ("retry-after", "1") in problem.headers or not issubclass(error_type, errors.Overloaded)


def test_a_subclass_without_a_rule_has_that_of_its_base():
    class Other(errors.Overloaded):
        pass

    assert to_problem(Other("full", retry_after_s=1.2)).status == 429
    assert dict(to_problem(Other("full", retry_after_s=1.2)).headers) == {"retry-after": "2"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/none", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/metrics/", 404, "not_found"),
        ("POST", "/v1/completions", 415, "unsupported_media_type"),
    ],
)
async def test_what_is_wrong_with_http_itself_is_an_error_object_too(
    served, method, path, status, code
):
    async with httpx.AsyncClient() as client:
        response = await client.request(method, served.url(path))
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"]


async def test_of_an_unexpected_error_the_log_tells_and_not_the_answer(served, caplog):
    served.runtime.error = ZeroDivisionError("secret")
    async with httpx.AsyncClient() as client:
        request = {"model": "fake", "prompt": "one"}
        response = await client.post(served.url("/v1/completions"), json=request)
    assert response.status_code == 500
    assert "secret" not in response.text and "secret" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


async def test_a_request_id_is_taken_and_returned(served, caplog):
    caplog.set_level("INFO", "server")
    async with httpx.AsyncClient(headers={"x-request-id": "req-7"}) as client:
        request = {"model": "style", "prompt": "one two"}
        response = await client.post(served.url("/v1/completions"), json=request)
    assert response.headers["x-request-id"] == "req-7"
    assert response.json()["id"] == "cmpl-req-7"
    assert served.runtime.requests[0].request_id.startswith("req-7/")
    (line,) = [record for record in caplog.records if record.name == "server.http.calls"]
    assert line.message == "POST /v1/completions"
    assert line.fields.items() >= {"code": "200", "completion_tokens": 2, "mode": "batched"}.items()


async def test_a_request_id_that_would_break_a_log_is_refused(served):
    async with httpx.AsyncClient() as client:
        headers = {"x-request-id": "a b"}
        response = await client.get(served.url("/v1/models"), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-id"


async def test_requests_are_counted_by_route_and_code(served):
    value = served.edge.registry.get_sample_value
    async with httpx.AsyncClient() as client:
        for path in ("/v1/models/style", "/v1/models/fake", "/v1/models/none", "/made/up"):
            await client.get(served.url(path))

    def count(handler, code):
        labels = {"handler": handler, "method": "GET", "code": code}
        return value("kasa_http_requests_total", labels)

    assert count("/v1/models/{model:path}", "200") == 2
    assert count("/v1/models/{model:path}", "404") == 1
    assert count("_other", "404") == 1
    assert value("kasa_http_request_seconds_count", {"handler": "_other"}) == 1
