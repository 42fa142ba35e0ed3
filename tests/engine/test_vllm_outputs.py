"""What vLLM puts out, as the engine's outputs. Needs no vLLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.making import request
from kasa_runtime.engine.base import EngineOutput
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.vllm_engine import VllmEngine
from kasa_runtime.types import TokenLogprobs


def row(*ranked: tuple[int, float, int]) -> dict[int, Any]:
    """vLLM's log-probabilities in the place of one token: by token, with its rank."""
    return {
        token_id: SimpleNamespace(logprob=logprob, rank=rank) for token_id, logprob, rank in ranked
    }


def converted(prompt_logprobs: Any, count: int | None) -> EngineOutput:
    """One delta for the prompt 5 6 7."""
    completion = SimpleNamespace(token_ids=(4,), logprobs=None, finish_reason=None)
    output = SimpleNamespace(
        outputs=[completion],
        prompt_logprobs=prompt_logprobs,
        finished=False,
        metrics=None,
        num_cached_tokens=0,
    )
    engine = VllmEngine(Path("model"), EngineConfig(), tails=None)  # type: ignore[arg-type]
    return engine._output(replace(request("a", (5, 6, 7)), prompt_logprobs=count), output)


ROWS = [None, row((9, -0.5, 1), (3, -1.0, 2), (6, -4.0, 8)), row((7, -0.1, 1), (2, -3.0, 2))]


def test_a_prompts_rows_are_its_tokens_log_probabilities() -> None:
    found = converted(ROWS, 2).prompt_logprobs
    assert found == (
        None,
        TokenLogprobs(6, -4.0, ((9, -0.5), (3, -1.0))),
        TokenLogprobs(7, -0.1, ((7, -0.1), (2, -3.0))),
    )


def test_of_the_tokens_alone_there_are_no_others() -> None:
    rows = [None, row((6, -4.0, 8)), row((7, -0.1, 1))]
    found = converted(rows, 0).prompt_logprobs
    assert found == (None, TokenLogprobs(6, -4.0), TokenLogprobs(7, -0.1))


def test_later_deltas_and_other_requests_have_none() -> None:
    assert converted([], 2).prompt_logprobs == ()
    assert converted(None, None).prompt_logprobs == ()
