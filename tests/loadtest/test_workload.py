from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from kasa_runtime.errors import AdapterNotFound, ConfigError
from kasa_runtime.loadtest.workload import (
    choose_adapters,
    make_requests,
    read_prompts,
    zipf_weights,
)
from kasa_runtime.types import AdapterInfo, AdapterState


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "prompts"
        path.write_text(text)
        return path

    return write


def test_prompts_are_lines_or_json_lines(write):
    assert read_prompts(write("one\n\ntwo two\n")) == ["one", "two two"]
    lines = '{"prompt": "one\\nline"}\n\n{"id": 2, "prompt": "two"}\n'
    assert read_prompts(write(lines)) == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("\n \n", "has no prompt"),
        ('{"prompt": "a"}\nb\n', r"prompts:2: want a JSON object with `prompt`, got 'b'"),
        ('{"text": "a"}\n', "prompts:1: want a JSON object"),
        ('{"prompt": ""}\n', "prompts:1: `prompt` must be a text that is not empty, got ''"),
        ('{"prompt": 3}\n', "prompts:1: .* got 3"),
    ],
)
def test_wrong_prompts_are_named_by_file_and_line(write, text, error):
    with pytest.raises(ConfigError, match=error):
        read_prompts(write(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        read_prompts(tmp_path / "none")


KNOWN = [
    AdapterInfo("b", "1", AdapterState.READY),
    AdapterInfo("a", "1", AdapterState.RESIDENT),
    AdapterInfo("broken", "", AdapterState.QUARANTINED),
]


def test_adapters_are_chosen_by_name_or_all():
    assert choose_adapters("all", KNOWN) == ["a", "b"]
    assert choose_adapters("b,-, a@01", KNOWN) == ["b", "", "a@01"]
    for wanted in ("c", "broken", "a,"):
        with pytest.raises(AdapterNotFound, match=r"there are \['a', 'b'\]"):
            choose_adapters(wanted, KNOWN)
    with pytest.raises(AdapterNotFound, match="the server has no adapter"):
        choose_adapters("all", [])


def test_zipf_weights():
    assert zipf_weights(4, 0.0) == [0.25] * 4
    one, two, four = zipf_weights(4, 1.0)[0], zipf_weights(4, 1.0)[1], zipf_weights(4, 1.0)[3]
    assert (one / two, one / four) == (pytest.approx(2), pytest.approx(4))
    assert sum(zipf_weights(7, 1.3)) == pytest.approx(1)


def test_requests_take_prompts_in_turn_and_adapters_by_their_weights():
    num = 12_000
    requests = list(islice(make_requests(["p", "q"], ["a", "", "c"], 1.0, Random(0)), num))
    assert [request.prompt for request in requests[:3]] == ["p", "q", "p"]
    counts = Counter(request.adapter for request in requests)
    for adapter, weight in zip(["a", "", "c"], zipf_weights(3, 1.0), strict=True):
        assert counts[adapter] == pytest.approx(num * weight, abs=5 * (num * weight) ** 0.5)
    again = list(islice(make_requests(["p", "q"], ["a", "", "c"], 1.0, Random(0)), num))
    assert again == requests
