"""The engine protocol, by one suite on every engine: whatever generates, a request gets what its
own adapted model alone gives, and every call means the same."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tiny import save_tiny_chat_model
from tokenizers import Tokenizer

from engine.making import (
    MemoryTails,
    collect,
    collect_all,
    config,
    greedy,
    load_adapted,
    load_model,
    logits_of,
    make_deltas,
    prompt,
    request,
    until,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.base import Engine
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.factory import make_engine
from kasa_runtime.errors import CapacityExceeded, EngineDead, InvalidRequest, KasaError
from kasa_runtime.types import FinishReason, Mode, StructuredOutput

pytestmark = pytest.mark.asyncio(loop_scope="module")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
COUNT = 10
PROMPTS = [prompt(4 + 3 * i, seed=i) for i in range(4)]
ENDING = prompt(6)
PATIENCE_S = 600.0
LONG = {"ignore_eos": True}
Key = str | None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of which vLLM's CPU kernels have the head size; it ends after a few tokens of
    ENDING."""
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
    endless = tmp_path_factory.mktemp("protocol") / "endless"
    tokens = greedy(load_model(save_tiny_chat_model(endless, **shape)), ENDING, 20)
    eos = next(token for i, token in enumerate(tokens) if i >= 4 and token not in tokens[:i])
    ending = tmp_path_factory.mktemp("protocol") / "ending"
    return save_tiny_chat_model(ending, **shape, eos_token_id=[eos, 127])


@pytest.fixture(scope="module")
def base_model(model_dir: Path) -> BaseModel:
    return BaseModel(model_dir)


@pytest.fixture(scope="module")
def own_tails(base_model: BaseModel) -> MemoryTails:
    return MemoryTails(base_model)


@pytest.fixture(scope="module")
def loaded(base_model: BaseModel) -> list[AdapterWeights]:
    """KaSA everywhere, KaSA of another rank and truncation on some layers, plain LoRA of a third on
    others; parts of what vLLM packs among them."""
    return [
        make_deltas(base_model, "kasa@1", ATTENTION + MLP, r=4, t=4, seed=1),
        make_deltas(base_model, "wide@1", ("q_proj", "k_proj", "down_proj"), r=8, t=6, seed=2),
        make_deltas(base_model, "lora@1", ("q_proj", *MLP), r=3, seed=3),
    ]


@pytest.fixture(scope="module")
def newer(base_model: BaseModel) -> AdapterWeights:
    """The next version of the first one."""
    return make_deltas(base_model, "kasa@2", ATTENTION + MLP, r=2, t=3, seed=8)


@pytest.fixture(scope="module")
def alone(
    model_dir: Path, loaded: list[AdapterWeights], newer: AdapterWeights, own_tails: MemoryTails
) -> Mapping[Key, Any]:
    """transformers' models, that never end: None is the base, the others hold an adapter."""
    models: dict[Key, Any] = {None: load_model(model_dir)}
    for adapter in (*loaded, newer):
        models[adapter.key] = load_adapted(model_dir, adapter, own_tails)
    for model in models.values():
        model.generation_config.eos_token_id = None
    return models


@pytest.fixture(scope="module")
def want(alone: Mapping[Key, Any]) -> Callable[[Key, Sequence[int], int], list[int]]:
    """The greedy tokens of an adapter's own model."""
    known: dict[tuple[Key, tuple[int, ...]], list[int]] = {}

    def get(key: Key, ids: Sequence[int], count: int) -> list[int]:
        at = key, tuple(ids)
        if len(known.get(at, ())) < count:
            known[at] = greedy(alone[key], ids, count)
        return known[at][:count]

    return get


def settings(kind: str, **changes: Any) -> EngineConfig:
    if kind == "native":
        return config(max_slots=4, **changes)
    small: dict[str, Any] = {"max_num_seqs": 16, "kv_cache_gib": 0.02, "max_slots": 4}
    small |= {"block_size": 32}
    return EngineConfig(**{**small, "max_lora_rank": 32, "cuda_graphs": False, **changes})


async def started(kind: str, model_dir: Path, tails: MemoryTails, **changes: Any) -> Engine:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    engine = make_engine(kind, model_dir, tails, settings(kind, **changes), None, tokenizer)  # type: ignore[arg-type]
    await engine.start()
    return engine


@pytest.fixture(scope="module", params=["native", pytest.param("vllm", marks=pytest.mark.vllm)])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    kind: str, model_dir: Path, own_tails: MemoryTails, loaded: list[AdapterWeights]
) -> AsyncIterator[Engine]:
    """With three adapters of four slots; every test leaves it as it found it."""
    engine = await started(kind, model_dir, own_tails)
    for adapter in loaded:
        await engine.load_adapter(adapter)
    yield engine
    await engine.close()


async def idle(engine: Engine) -> None:
    """Until the engine knows that nothing runs."""

    def nothing_runs() -> bool:
        stats = engine.stats()
        return (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)

    await until(nothing_runs, PATIENCE_S)


async def assert_all_exact(
    engine: Engine, keys: Sequence[Key], want: Any, merged: Key = None
) -> None:
    """Every prompt for each of them, all in one batch."""
    asked = {f"{k} {i}": (k, ids) for k in keys for i, ids in enumerate(PROMPTS)}
    found = await collect_all(
        engine, [request(name, ids, COUNT, k, **LONG) for name, (k, ids) in asked.items()]
    )
    for name, (key, ids) in asked.items():
        assert found[name].token_ids == want(key, ids, COUNT), name
        mode = Mode.BASE if key is None else Mode.MERGED if key == merged else Mode.BATCHED
        assert set(found[name].modes) == {mode.value}, name


# --- adapters ------------------------------------------------------------------------------------


def keys_of(loaded: Sequence[AdapterWeights]) -> list[Key]:
    return [None, *(adapter.key for adapter in loaded)]


async def test_the_adapters_differ_visibly(loaded: list[AdapterWeights], want: Any) -> None:
    found = {tuple(want(key, PROMPTS[0], COUNT)) for key in keys_of(loaded)}
    assert len(found) == 1 + len(loaded)


async def test_a_mixed_batch_gives_everybody_their_own(
    engine: Engine, loaded: list[AdapterWeights], want: Any
) -> None:
    await assert_all_exact(engine, keys_of(loaded), want)


async def test_with_every_slot_taken_what_has_no_delta_gets_none(
    engine: Engine, loaded: list[AdapterWeights], newer: AdapterWeights, want: Any
) -> None:
    """Neither the base nor, in merged weights, the merged adapter."""
    await engine.load_adapter(newer)
    keys = keys_of([*loaded, newer])
    try:
        await assert_all_exact(engine, keys, want)
        for merged in (loaded[0].key, newer.key):
            await engine.merge_adapter(merged)
            await assert_all_exact(engine, keys, want, merged=merged)
        await engine.unmerge_adapter()
        await assert_all_exact(engine, keys, want)
    finally:
        await engine.unload_adapter(newer.key)


async def test_merged_equals_batched_and_others_go_on_exactly(
    engine: Engine, loaded: list[AdapterWeights], want: Any
) -> None:
    keys = keys_of(loaded)
    for adapter in loaded:
        await engine.merge_adapter(adapter.key)
        await assert_all_exact(engine, keys, want, merged=adapter.key)
    await engine.unmerge_adapter()
    await assert_all_exact(engine, keys, want)


async def test_merging_while_requests_run_does_not_change_their_tokens(
    engine: Engine, loaded: list[AdapterWeights], want: Any
) -> None:
    keys = keys_of(loaded)
    wanted = [request(f"{key}", PROMPTS[0], 100, key, **LONG) for key in keys]
    reading = [asyncio.create_task(collect(engine, w)) for w in wanted]
    await until(lambda: engine.stats().num_running == len(keys), PATIENCE_S)
    await engine.merge_adapter(loaded[0].key)
    await engine.merge_adapter(loaded[1].key)
    await engine.unmerge_adapter()
    for key, task in zip(keys, reading, strict=True):
        assert (await task).token_ids == want(key, PROMPTS[0], 100), key


async def test_an_adapter_that_comes_while_another_is_merged(
    engine: Engine, loaded: list[AdapterWeights], newer: AdapterWeights, want: Any
) -> None:
    await engine.merge_adapter(loaded[0].key)
    await engine.load_adapter(newer)
    await assert_all_exact(engine, [None, newer.key], want)
    await engine.unmerge_adapter()
    await assert_all_exact(engine, [None, newer.key], want)
    await engine.unload_adapter(newer.key)


async def test_a_new_version_takes_the_place_of_the_old_one_under_load(
    engine: Engine, loaded: list[AdapterWeights], newer: AdapterWeights, want: Any
) -> None:
    old = loaded[0]
    before = [
        asyncio.create_task(collect(engine, request(f"old {i}", ids, 60, old.key, **LONG)))
        for i, ids in enumerate(PROMPTS)
    ]
    await until(lambda: engine.stats().num_running == len(PROMPTS), PATIENCE_S)
    await engine.load_adapter(newer)
    await assert_all_exact(engine, [newer.key], want)
    for ids, task in zip(PROMPTS, before, strict=True):
        assert (await task).token_ids == want(old.key, ids, 60)
    await engine.unload_adapter(old.key)
    with pytest.raises(KeyError):
        await collect(engine, request("gone", PROMPTS[0], 1, old.key))
    await assert_all_exact(engine, [None, newer.key], want)
    await engine.unload_adapter(newer.key)
    await engine.load_adapter(old)
    await assert_all_exact(engine, [old.key], want)


async def test_calls_that_change_nothing(engine: Engine, loaded: list[AdapterWeights]) -> None:
    await engine.load_adapter(loaded[0])
    await engine.unload_adapter("nobody@1")
    await engine.unmerge_adapter()


async def test_what_does_not_fit_is_refused(
    engine: Engine, kind: str, base_model: BaseModel, loaded: list[AdapterWeights]
) -> None:
    largest = {"native": settings(kind).max_rank, "vllm": 32}[kind]
    assert engine.limits.max_rank == largest
    wide = make_deltas(base_model, "too-wide@1", ("q_proj",), r=largest + 1, only="layers.0.")
    with pytest.raises(CapacityExceeded, match="rank"):
        await engine.load_adapter(wide)
    small = [make_deltas(base_model, f"small@{i}", ("q_proj",), r=1) for i in range(2)]
    await engine.load_adapter(small[0])
    with pytest.raises(CapacityExceeded, match="max_slots"):
        await engine.load_adapter(small[1])
    await engine.unload_adapter(small[0].key)
    for call in (engine.merge_adapter("nobody@1"), collect(engine, request("a", [5], 1, "no@1"))):
        with pytest.raises(KeyError):
            await call


async def test_a_layer_that_cannot_be_adapted_is_refused(
    engine: Engine, loaded: list[AdapterWeights]
) -> None:
    [delta, *_] = loaded[2].modules.values()
    strange = AdapterWeights("strange@1", {**loaded[2].modules, "model.layers.0.gate": delta})
    with pytest.raises(CapacityExceeded, match=r"cannot adapt model\.layers\.0\.gate"):
        await engine.load_adapter(strange)


async def test_what_is_merged_is_not_unloaded(engine: Engine, loaded: list[AdapterWeights]) -> None:
    await engine.merge_adapter(loaded[2].key)
    with pytest.raises(CapacityExceeded, match="is merged"):
        await engine.unload_adapter(loaded[2].key)
    await engine.unmerge_adapter()


# --- the prefix cache ----------------------------------------------------------------------------


async def num_found(engine: Engine, ids: Sequence[int], key: Key, salt: str, want: Any) -> int:
    """How many tokens of the prompt were found in the cache; what was found must be its own."""
    result = await collect(engine, request("a", ids, COUNT, key, cache_salt=salt, **LONG))
    assert result.token_ids == want(key, ids, COUNT)
    [num_cached] = {output.num_cached_tokens for output in result.outputs}
    return num_cached


async def test_equal_beginnings_are_found_by_the_same_adapter_salt_and_mode_alone(
    engine: Engine, loaded: list[AdapterWeights], want: Any
) -> None:
    ids = prompt(100, seed=40)  # more than a block of any engine
    keys = keys_of(loaded[:2])
    for change in (
        lambda: engine.merge_adapter(loaded[0].key),
        lambda: engine.merge_adapter(loaded[1].key),
        engine.unmerge_adapter,
    ):
        for key in keys:
            for salt in ("", "tenant"):
                assert await num_found(engine, ids, key, salt, want) == 0
        for key in keys:
            for salt in ("", "tenant"):
                assert await num_found(engine, ids, key, salt, want) >= 32
        await change()
    assert await num_found(engine, ids, None, "", want) == 0


async def test_a_version_never_finds_what_another_one_computed(
    engine: Engine, loaded: list[AdapterWeights], newer: AdapterWeights, want: Any
) -> None:
    ids = prompt(100, seed=41)
    assert await num_found(engine, ids, loaded[0].key, "", want) == 0
    await engine.load_adapter(newer)
    assert await num_found(engine, ids, newer.key, "", want) == 0
    await engine.unload_adapter(newer.key)
    assert await num_found(engine, ids, loaded[0].key, "", want) >= 32


# --- ends ----------------------------------------------------------------------------------------


async def test_the_end_of_sequence_ends_it(engine: Engine, want: Any) -> None:
    assert 127 in engine.limits.eos_ids and len(engine.limits.eos_ids) == 2
    result = await collect(engine, request("a", ENDING, 20))
    past = await collect(engine, request("b", ENDING, 20, **LONG))
    assert past.token_ids == want(None, ENDING, 20)
    length = len(result.token_ids)
    assert result.token_ids == past.token_ids[:length] and 5 <= length < 20
    assert result.token_ids[-1] in engine.limits.eos_ids
    assert (result.reason, past.reason) == (FinishReason.STOP, FinishReason.LENGTH)


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_no_end_of_sequence_before_min_tokens(
    engine: Engine, model_dir: Path, ignore_eos: bool
) -> None:
    model = load_model(model_dir)
    ids = torch.tensor([ENDING])
    mask = torch.ones_like(ids)
    found = model.generate(
        ids, attention_mask=mask, min_new_tokens=10, max_new_tokens=10, pad_token_id=0
    )
    asked = request("a", ENDING, 10, min_tokens=10, ignore_eos=ignore_eos)
    result = await collect(engine, asked)
    assert result.token_ids == found[0, len(ENDING) :].tolist()


async def test_a_full_context_ends_it(engine: Engine, want: Any) -> None:
    assert engine.limits.context_length == 128
    ids = prompt(120, seed=7)
    result = await collect(engine, request("a", ids, None, **LONG))
    last = await collect(engine, request("b", prompt(127), None, **LONG))
    assert result.token_ids == want(None, ids, 8)
    assert len(last.token_ids) == 1
    assert result.reason is last.reason is FinishReason.LENGTH


async def test_outputs_say_when_a_request_was_first_scheduled(engine: Engine) -> None:
    before_s = time.monotonic()
    result = await collect(engine, request("a", PROMPTS[0], 4, **LONG))
    [scheduled_s] = {o.scheduled_s for o in result.outputs}
    assert scheduled_s is not None and before_s <= scheduled_s <= time.monotonic()


async def test_cancelling_frees_the_cache(engine: Engine) -> None:
    asked = request("a", PROMPTS[0], 100, **LONG)
    async with aclosing(engine.generate(asked)) as outputs:
        assert (await anext(outputs)).token_ids
    await idle(engine)
    assert (await collect(engine, request("a", PROMPTS[0], 2))).token_ids, "its id is free again"


async def test_cancelling_the_task_that_reads_cancels_the_request(engine: Engine) -> None:
    reading = asyncio.create_task(collect(engine, request("a", PROMPTS[0], 110, **LONG)))
    await until(lambda: engine.stats().num_running == 1, PATIENCE_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await idle(engine)


async def test_a_passed_deadline_ends_it_before_it_begins(engine: Engine) -> None:
    late = request("a", PROMPTS[0], 5, deadline_s=time.monotonic() - 1)
    [output] = (await collect(engine, late)).outputs
    assert output.finish_reason is FinishReason.DEADLINE
    assert (output.token_ids, output.scheduled_s) == ((), None)


async def test_a_deadline_ends_it_in_the_middle(engine: Engine, want: Any) -> None:
    deadline_s = time.monotonic() + 0.02
    result = await collect(engine, request("a", [5], 127, deadline_s=deadline_s, **LONG))
    assert result.reason is FinishReason.DEADLINE
    assert result.token_ids == want(None, [5], 127)[: len(result.token_ids)]
    await idle(engine)


async def test_a_request_id_is_used_once_at_a_time(engine: Engine) -> None:
    first = asyncio.create_task(collect(engine, request("a", PROMPTS[0], 60, **LONG)))
    await until(lambda: engine.stats().num_running == 1, PATIENCE_S)
    with pytest.raises(KasaError, match="'a' is in use"):
        await collect(engine, request("a", PROMPTS[0], 5))
    assert len((await first).token_ids) == 60


# --- sampling ------------------------------------------------------------------------------------


async def test_logprobs_are_of_the_models_own_distribution(
    engine: Engine, alone: Mapping[Key, Any], loaded: list[AdapterWeights]
) -> None:
    key, ids = loaded[0].key, PROMPTS[2]
    how = {"logprobs": 3, "temperature": 2.0, "seed": 1, "presence_penalty": 1.0, **LONG}
    result = await collect(engine, request("a", ids, 5, key, **how))
    plain = await collect(engine, request("b", ids, 5, key))
    own = await collect(engine, request("c", ids, 1, key, logprobs=0))
    rows = torch.log_softmax(logits_of(alone[key], ids + result.token_ids), dim=-1)
    assert all(o.logprobs == () for o in plain.outputs)
    assert [p.top for p in own.outputs[0].logprobs] == [()]
    found = [p for o in result.outputs for p in o.logprobs]
    for logprob, token, row in zip(found, result.token_ids, rows[len(ids) - 1 :], strict=False):
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-3)
        best, best_ids = row.topk(3)
        assert [i for i, _ in logprob.top] == best_ids.tolist()
        assert [p for _, p in logprob.top] == pytest.approx(best.tolist(), abs=1e-3)
    assert len(found) == len(result.token_ids) == 5


async def test_a_prompts_logprobs_are_of_the_models_own_distribution(
    engine: Engine, alone: Mapping[Key, Any], loaded: list[AdapterWeights]
) -> None:
    key, ids = loaded[0].key, PROMPTS[3]
    wanted = request("a", ids, 3, key, temperature=2.0, seed=1, presence_penalty=1.0, **LONG)
    for _ in range(2):  # the second time, of a prompt that is in the cache
        result = await collect(engine, replace(wanted, prompt_logprobs=2))
        first, *others = result.outputs
        assert first.prompt_logprobs[0] is None and not any(o.prompt_logprobs for o in others)
        rows = torch.log_softmax(logits_of(alone[key], ids), dim=-1)
        for entry, token, row in zip(first.prompt_logprobs[1:], ids[1:], rows, strict=False):
            assert entry is not None and entry.token_id == token
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
            best, best_ids = row.topk(2)
            assert [i for i, _ in entry.top] == best_ids.tolist()
            assert [p for _, p in entry.top] == pytest.approx(best.tolist(), abs=1e-3)
        assert len(first.prompt_logprobs) == len(ids)
    own = await collect(engine, replace(wanted, prompt_logprobs=0))
    assert [e and e.top for e in own.outputs[0].prompt_logprobs] == [None, *[()] * (len(ids) - 1)]


async def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(engine: Engine) -> None:
    wanted = {
        f"{seed}": request(f"{seed}", PROMPTS[1], 24, temperature=1.0, seed=seed, **LONG)
        for seed in range(5)
    }
    alone = {i: (await collect(engine, r)).token_ids for i, r in wanted.items()}
    crowd = await collect_all(engine, list(wanted.values()))
    assert len({tuple(ids) for ids in alone.values()}) == 5
    assert {i: r.token_ids for i, r in crowd.items()} == alone


async def test_without_a_seed_every_request_draws_anew(engine: Engine) -> None:
    wanted = [request(f"{i}", PROMPTS[1], 12, temperature=1.5, **LONG) for i in range(4)]
    found = await collect_all(engine, wanted)
    assert len({tuple(r.token_ids) for r in found.values()}) == 4


@pytest.mark.parametrize("one_token", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=str)
async def test_what_leaves_one_token_is_greedy(
    engine: Engine, one_token: dict[str, Any], want: Any
) -> None:
    asked = request("a", PROMPTS[1], COUNT, temperature=1.0, seed=3, **one_token, **LONG)
    assert (await collect(engine, asked)).token_ids == want(None, PROMPTS[1], COUNT)


@torch.no_grad()
def penalised(
    model: Any, ids: Sequence[int], count: int, *, repetition: float, presence: float, often: float
) -> list[int]:
    """Greedy tokens by the definitions of the three penalties."""
    tokens = list(ids)
    for _ in range(count):
        logits = logits_of(model, tokens)[-1]
        for token in set(tokens):
            value = float(logits[token])
            logits[token] = value / repetition if value > 0 else value * repetition
        for token in set(output := tokens[len(ids) :]):
            logits[token] -= presence + often * output.count(token)
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


async def test_penalties_count_what_they_say(engine: Engine, alone: Mapping[Key, Any]) -> None:
    model = alone[None]
    found, plain = {}, greedy(model, PROMPTS[3], 24)
    for name, values in {
        "repetition": (1.8, 0.0, 0.0),
        "presence": (1.0, 1.5, 0.0),
        "frequency": (1.0, 0.0, 0.9),
        "all": (1.3, -0.4, 0.7),
    }.items():
        repetition, presence, often = values
        asked = request(
            name,
            PROMPTS[3],
            24,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=often,
            **LONG,
        )
        found[name] = (await collect(engine, asked)).token_ids
        assert found[name] == penalised(
            model, PROMPTS[3], 24, repetition=repetition, presence=presence, often=often
        ), name
    assert any(tokens != plain for tokens in found.values())


# --- the end -------------------------------------------------------------------------------------


async def test_closing_ends_requests_as_cancelled(
    kind: str, model_dir: Path, own_tails: MemoryTails, loaded: list[AdapterWeights]
) -> None:
    engine = await started(kind, model_dir, own_tails)
    assert engine.alive
    wanted = [request(f"{i}", PROMPTS[0], 120, **LONG) for i in range(20)]
    reading = [asyncio.create_task(collect(engine, w)) for w in wanted]
    await until(lambda: engine.stats().num_running == 16, PATIENCE_S)
    await engine.close()
    assert {(await task).reason for task in reading} == {FinishReason.CANCELLED}
    assert not engine.alive
    for call in (
        lambda: collect(engine, request("late", PROMPTS[0])),
        lambda: engine.load_adapter(loaded[0]),
        lambda: engine.merge_adapter(loaded[0].key),
        engine.unmerge_adapter,
    ):
        with pytest.raises(EngineDead, match="closed"):
            await call()


# --- structured output ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (StructuredOutput(json_schema='{"enum": ["fox", 12]}'), '"fox"|12'),
        (StructuredOutput(regex="(ab|cd){2,3}"), "(ab|cd){2,3}"),
        (StructuredOutput(choice=("yes", "no")), "yes|no"),
        (StructuredOutput(grammar='start: "(" start ")" | "x"'), r"\(*x\)*"),
    ],
)
async def test_a_structured_output_has_its_form(
    engine: Engine, model_dir: Path, form: StructuredOutput, pattern: str
) -> None:
    """With an adapter too, whose tokens are others."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for key in (None, "kasa@1"):
        wanted = request("a", PROMPTS[0], 60, key, temperature=1.0, seed=3, structured_output=form)
        result = await collect(engine, wanted)
        tokens = [token for token in result.token_ids if token not in engine.limits.eos_ids]
        text = tokenizer.decode(tokens)
        assert re.fullmatch(pattern, text) or result.reason is FinishReason.LENGTH, text


async def test_a_structured_output_that_cannot_be_had_is_refused(engine: Engine) -> None:
    form = StructuredOutput(json_schema='{"not": {}}')
    with pytest.raises(InvalidRequest) as caught:
        await collect(engine, request("a", PROMPTS[0], 5, structured_output=form))
    assert caught.value.field == "structured_output.json_schema"
    await idle(engine)
