"""SmolLM2-135M in float32 on both engines: the same greedy tokens, but where the model itself can
hardly tell the two most likely ones apart; the test says where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.making import Result, collect_all, make_deltas, request
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.engine.base import Engine, EngineRequest
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.factory import make_engine
from kasa_runtime.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]

COUNT = 32
CLOSE = 1e-3  # of logits, between which sums in another order may choose
MERGED = "kasa-4@1"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, for the first time,",
    "A good recipe for bread begins with",
    "The difference between a virus and a bacterium",
    "Dear Sir or Madam,",
    "To be, or not to be:",
    "SELECT name FROM users WHERE",
    "The largest planet of the solar system",
    "She opened the door and saw",
    "Photosynthesis is the process by which",
    "If x + 2 = 5, then x",
    "Yesterday the central bank announced that",
)


@dataclass(frozen=True)
class Case:
    """What is asked for, by name: an adapter's key, None for the base."""

    name: str
    adapter: str | None
    merged: bool = False


CASES = (
    Case("base", None),
    Case("LoRA", "lora@1"),
    Case("KaSA r = t = 4", MERGED),
    Case("KaSA r = t = 12", "kasa-12@1"),
    Case("KaSA r = t = 4, merged", MERGED, merged=True),
    Case("base beside the merged one", None, merged=True),
    Case("KaSA r = t = 12 beside the merged one", "kasa-12@1", merged=True),
)


@pytest.fixture(scope="module")
def adapters(smollm2: Path) -> list[AdapterWeights]:
    """Random ones, large enough to change what the model says and not that it speaks."""
    base = TailCache.for_model(smollm2).base
    return [
        make_deltas(base, "lora@1", LINEAR, r=8, seed=1, scale=0.03),
        make_deltas(base, MERGED, LINEAR, r=4, t=4, seed=2, scale=0.03),
        make_deltas(base, "kasa-12@1", LINEAR, r=12, t=12, seed=3, scale=0.03),
    ]


def requests(smollm2: Path, adapter: str | None) -> list[EngineRequest]:
    tokenizer = Tokenizer(smollm2)
    return [
        request(f"{i}", tokenizer.encode(text), COUNT, adapter, logprobs=2, ignore_eos=True)
        for i, text in enumerate(TEXTS)
    ]


async def answers(
    kind: str, smollm2: Path, adapters: Sequence[AdapterWeights], settings: EngineConfig
) -> Mapping[Case, Mapping[str, Result]]:
    """Of every case, 16 prompts in one batch."""
    engine: Engine = make_engine(kind, smollm2, TailCache.for_model(smollm2), settings)  # type: ignore[arg-type]
    await engine.start()
    found = {}
    try:
        for adapter in adapters:
            await engine.load_adapter(adapter)
        for case in sorted(CASES, key=lambda case: case.merged):
            if case.merged:
                await engine.merge_adapter(MERGED)
            found[case] = await collect_all(engine, requests(smollm2, case.adapter))
    finally:
        await engine.close()
    return found


def first_difference(ours: Result, theirs: Result) -> tuple[int, float] | None:
    """Where, and how far apart the two most likely tokens are there, by ours."""
    for i, (one, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        if one != other:
            logprobs = [p for output in ours.outputs for p in output.logprobs]
            (_, first), (_, second) = logprobs[i].top
            return i, first - second
    return None


async def test_vllm_says_what_the_native_engine_says(
    smollm2: Path, adapters: list[AdapterWeights]
) -> None:
    common = {"max_slots": 3, "max_num_seqs": 16, "max_model_len": 256, "kv_cache_gib": 0.5}
    native = EngineConfig(executor="torch", dtype="float32", **common)  # type: ignore[arg-type]
    vllm = EngineConfig(dtype="float32", max_lora_rank=32, **common)  # type: ignore[arg-type]
    ours = await answers("native", smollm2, adapters, native)
    theirs = await answers("vllm", smollm2, adapters, vllm)
    wrong = []
    for case in CASES:
        for i, text in enumerate(TEXTS):
            found = first_difference(ours[case][f"{i}"], theirs[case][f"{i}"])
            if found is None:
                continue
            at, gap = found
            where = f"{case.name}, {text!r}: token {at}, the first two are {gap:.1e} apart"
            print(where)
            if gap > CLOSE:
                wrong.append(where)
    said = {tuple(result.token_ids[0] for result in answer.values()) for answer in ours.values()}
    assert len(said) > 1, "the adapters change something"
    assert not wrong, "\n".join(wrong)
