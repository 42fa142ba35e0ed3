from __future__ import annotations

import pytest

from server.trace_context import trace_id

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_trace_id_of_a_sampled_trace(flags):
    assert trace_id([("user-agent", "x"), ("traceparent", f"00-{TRACE}-{PARENT}-{flags}")]) == TRACE


def test_later_versions_may_have_more_fields():
    assert trace_id([("traceparent", f"01-{TRACE}-{PARENT}-01-more")]) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{PARENT}-00",  # nobody records it
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01more",
        b"\xff",
        "",
    ],
)
def test_anything_else_is_no_trace(value):
    assert trace_id([("traceparent", value)]) == ""


@pytest.mark.parametrize("metadata", [None, (), [("tracestate", "a=b")]])
def test_without_the_header_there_is_no_trace(metadata):
    assert trace_id(metadata) == ""
