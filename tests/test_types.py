from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import FinishReason, GenerationRequest, Mode, Observer, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", v) for v in (0, -1)),
        *(("min_tokens", v) for v in (-1,)),
        *(("temperature", v) for v in (-0.1, 100.1, NAN, INF, -INF)),
        *(("top_p", v) for v in (0.0, -0.1, 1.01, NAN, INF)),
        *(("top_k", v) for v in (-1,)),
        *(("min_p", v) for v in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", v) for v in (0.0, -1.0, 100.1, NAN, INF)),
        *(("presence_penalty", v) for v in (-100.1, 100.1, NAN, INF)),
        *(("frequency_penalty", v) for v in (-100.1, 100.1, NAN, -INF)),
        *(("seed", v) for v in (-1, 2**63)),
        *(("stop", v) for v in (("",), ("a",) * 17, ("a" * 1025,))),
        *(("logprobs", v) for v in (-1, 21)),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{field}"
    assert "got" in caught.value.description


@pytest.mark.parametrize("count", [-1, 21])
def test_more_log_probabilities_of_the_prompt_than_there_may_be_are_refused(count: int) -> None:
    with pytest.raises(InvalidRequest, match=f"prompt_logprobs: must be from 0 to 20, got {count}"):
        GenerationRequest("a", prompt="a", prompt_logprobs=count)
    for allowed in (None, 0, 20):
        GenerationRequest("a", prompt="a", prompt_logprobs=allowed)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1, "min_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 100.0, "top_p": 1.0, "top_k": 10**9, "min_p": 1.0},
        {"top_p": 5e-324, "repetition_penalty": 5e-324},
        {"presence_penalty": -100.0, "frequency_penalty": 100.0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"stop": ("a",) * 16},
        {"stop": ("a" * 1024,)},
        {"logprobs": 0},
        {"logprobs": 20, "min_tokens": 10**6},
    ],
    ids=str,
)
def test_the_edges_of_the_ranges_are_taken(params: dict[str, Any]) -> None:
    assert SamplingParams(**params)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.min_tokens: must be at most max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_the_default_is_greedy_and_unlimited() -> None:
    default = SamplingParams()
    assert (default.temperature, default.max_tokens, default.stop) == (0.0, None, ())


def test_values_are_words() -> None:
    assert f"{FinishReason.STOP} {Mode.MERGED}" == "stop merged"


def test_an_observer_may_ignore_everything() -> None:
    observer = Observer()
    observer.queued("a")
    observer.first_token("a", queue_s=0.1, load_s=0.05, ttft_s=0.2, prompt_tokens=3)
    observer.tokens("a", count=1, gap_s=None)
    observer.finished("a", Mode.BASE, FinishReason.STOP, decode_s=0.5, total_s=1.0)
    observer.failed("a", ValueError())
    observer.adapter_loaded("a", stage="read", seconds=0.1)
    observer.adapter_load_failed("a", ValueError())
    observer.merged("a", seconds=0.1)
    observer.upload_rejected("why")
    observer.adapters_changed([])


def test_the_types_need_neither_torch_nor_protobuf() -> None:
    code = "import sys, kasa_runtime.types as t; print({'torch', 'google'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
