"""Log-probabilities of a prompt's tokens: transformers' own, whatever happens to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_llama

from engine.making import (
    MemoryTails,
    Result,
    collect,
    collect_all,
    config,
    few_blocks,
    load_adapted,
    load_model,
    logits_of,
    make_deltas,
    prompt,
    request,
    running,
)
from engine.test_native_engine import Driven
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.native import scheduler
from kasa_runtime.engine.native.executor import Executor
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.types import TokenLogprobs

TOLERANCE = 2e-5
IDS = prompt(50, seed=9)
Key = str | None


def scored(
    name: str, token_ids: Sequence[int], count: int = 3, key: Key = None, max_tokens: int = 3
) -> EngineRequest:
    wanted = request(name, token_ids, max_tokens, key, ignore_eos=True)
    return replace(wanted, prompt_logprobs=count)


def of_prompt(result: Result) -> tuple[TokenLogprobs | None, ...]:
    """They are in the first output, and in no other."""
    first, *others = result.outputs
    assert first.token_ids and not any(output.prompt_logprobs for output in others)
    return first.prompt_logprobs


def assert_scored(result: Result, model: Any, token_ids: Sequence[int], count: int = 3) -> None:
    """As transformers scores these tokens."""
    found = of_prompt(result)
    assert found[0] is None and len(found) == len(token_ids)
    want = torch.log_softmax(logits_of(model, token_ids), dim=-1)
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None and entry.token_id == token_ids[position]
        row = want[position - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=TOLERANCE)
        assert len({token for token, _ in entry.top}) == len(entry.top) == count
        best = row.topk(count).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=TOLERANCE)
        own = [float(row[token]) for token, _ in entry.top]
        assert own == pytest.approx(best, abs=TOLERANCE)


@pytest.fixture(scope="module")
def models(
    tiny_llama: Path, bare: Any, adapters: list[AdapterWeights], tails: MemoryTails
) -> Mapping[Key, Any]:
    """In transformers, by adapter; None is the base."""
    return {None: bare} | {a.key: load_adapted(tiny_llama, a, tails) for a in adapters}


@pytest.fixture(scope="module")
def executor(tiny_llama: Path) -> TorchExecutor:
    return TorchExecutor(tiny_llama, config())


@pytest.mark.parametrize("merged", [False, True])
async def test_a_mixed_batch_scores_every_prompt_by_its_own_model(
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    executor_class: type[Executor],
    models: Mapping[Key, Any],
    merged: bool,
) -> None:
    """Beside prompts that are not scored, and have their tokens as ever."""
    prompts = {key: prompt(7 + 9 * i, seed=i) for i, key in enumerate(models)}
    wanted = [
        wanted
        for i, (key, ids) in enumerate(prompts.items())
        for wanted in (scored(f"{key}", ids, i, key), request(f"plain {key}", ids, 3, key))
    ]
    async with running(tiny_llama, tails, adapters, executor_class) as engine:
        if merged:
            await engine.merge_adapter(adapters[0].key)
        found = await collect_all(engine, wanted)
    for i, (key, ids) in enumerate(prompts.items()):
        assert_scored(found[f"{key}"], models[key], ids, i)
        assert not of_prompt(found[f"plain {key}"])
        n = len(found[f"plain {key}"].token_ids)
        assert found[f"plain {key}"].token_ids == found[f"{key}"].token_ids[:n]


async def test_the_last_layer_adapted_scores_exactly(
    tmp_path: Path, executor_class: type[Executor]
) -> None:
    """All of a prompt's rows reach it, in the order of the tokens."""
    model_dir = save_tiny_llama(tmp_path, tie_word_embeddings=False)
    own_tails = MemoryTails(BaseModel(model_dir))
    head = make_deltas(own_tails.base, "head@1", ("lm_head", "down_proj"), r=4, seed=4)
    short = prompt(11, seed=1)
    async with running(model_dir, own_tails, [head], executor_class) as engine:
        found = await collect_all(engine, [scored("a", IDS, key=head.key), scored("b", short)])
    assert_scored(found["a"], load_adapted(model_dir, head, own_tails), IDS)
    assert_scored(found["b"], load_model(model_dir), short)


@pytest.mark.parametrize("budget", [4, 7, 16])
def test_a_prompt_in_chunks_is_scored_as_a_whole(
    executor: TorchExecutor, bare: Any, budget: int
) -> None:
    driven = Driven(executor, max_num_seqs=4, max_num_batched_tokens=budget)
    for i in range(3):
        driven.add(scored(f"{i}", IDS[i:], 2))
    driven.drain()
    for i in range(3):
        assert_scored(driven.results[f"{i}"], bare, IDS[i:], 2)


async def test_what_is_in_the_cache_is_scored_all_the_same_and_found_by_others(
    tiny_llama: Path, executor_class: type[Executor], bare: Any
) -> None:
    ids = prompt(70, seed=3)  # more than two blocks of either executor
    async with running(tiny_llama, make=executor_class) as engine:
        for name in ("first", "again"):
            result = await collect(engine, scored(name, ids))
            assert_scored(result, bare, ids)
            assert result.outputs[0].num_cached_tokens == 0
        assert engine.stats().prefix_cache_queries == 0
        plain = await collect(engine, request("plain", ids, 3, ignore_eos=True))
    assert plain.outputs[0].num_cached_tokens >= 32
    assert plain.token_ids == result.token_ids


def test_preempted_prompts_are_scored_once(
    tiny_llama: Path, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a prompt and after it: what is known is not computed again."""
    small = TorchExecutor(tiny_llama, config(**few_blocks(24)))
    num_logits = watch_logits(small, monkeypatch)
    driven = Driven(small, max_num_seqs=4, max_num_batched_tokens=8)
    prompts = {f"{i}": prompt(30 + i, seed=i) for i in range(4)}
    for name, ids in prompts.items():
        driven.add(scored(name, ids, max_tokens=20))
    sent_away = set()
    while driven.scheduler.has_work:
        driven.step()
        sent_away |= {
            len(seq.prompt_logprobs) == seq.num_prompt_tokens
            for seq in driven.scheduler.waiting
            if len(seq.prompt_logprobs) > 1
        }
    assert sent_away == {False, True}
    for name, ids in prompts.items():
        assert_scored(driven.results[name], bare, ids)
        assert len(driven.results[name].token_ids) == 20
    assert sum(num_logits) == sum(len(ids) - 1 + 20 for ids in prompts.values())


def test_a_step_has_logits_of_a_bounded_number_of_prompt_tokens(
    executor: TorchExecutor, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And plain prompts go on beside those that wait for it."""
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 10)
    num_logits = watch_logits(executor, monkeypatch)
    driven = Driven(executor, max_num_seqs=8, max_num_batched_tokens=512)
    plain = driven.add(request("plain", prompt(60, seed=5), 3, ignore_eos=True))
    for i in range(3):
        driven.add(scored(f"{i}", IDS[i : i + 25]))
    driven.step()
    assert plain.num_output_tokens == 1 and num_logits == [1 + 10]
    driven.drain()
    assert max(num_logits) <= 10 + 4
    for i in range(3):
        assert_scored(driven.results[f"{i}"], bare, IDS[i : i + 25])


def test_a_token_alone_follows_nothing(executor: TorchExecutor) -> None:
    driven = Driven(executor)
    driven.add(scored("a", IDS[:1], 20))
    driven.drain()
    assert of_prompt(driven.results["a"]) == (None,)


def watch_logits(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of logits each step has from now on."""
    num_logits: list[int] = []
    run = executor.run

    def watched(batch: Any) -> Any:
        logits = run(batch)
        num_logits.append(len(logits))
        return logits

    monkeypatch.setattr(executor, "run", watched)
    return num_logits
