"""The runtime over a real tiny model: text and adapters by name, in and out."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from adapter.making import ALL_LINEAR, write_adapter
from engine.making import (
    MemoryTails,
    config,
    greedy,
    load_adapted,
    load_model,
    require_openvino,
    until,
)
from tiny import save_tiny_chat_model, save_tiny_llama

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import fold
from kasa_runtime.adapter.store import AdapterStore
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterQuarantined,
    CapacityExceeded,
    ConfigError,
    EngineDead,
    InvalidRequest,
    LimitExceeded,
    ModelError,
    Overloaded,
    ShuttingDown,
)
from kasa_runtime.limits import LimitsConfig
from kasa_runtime.runtime import Runtime, RuntimeConfig, begin
from kasa_runtime.tokenizer import Tokenizer
from kasa_runtime.types import (
    AdapterInfo,
    AdapterState,
    AdapterTier,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Mode,
    Observer,
    SamplingParams,
    TokenChunk,
)

PROMPT = "the quick brown fox"
LONG = SamplingParams(max_tokens=90, ignore_eos=True)
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"targets": ALL_LINEAR, "r": 4, "seed": 1},
    "beta": {"targets": ("q_proj", "down_proj"), "r": 6, "seed": 2},
    "gamma": {"targets": ("v_proj", "up_proj"), "r": 2, "seed": 3, "kasa": False},
}


@pytest.fixture(scope="session")
def base(tiny_chat_model: Path) -> BaseModel:
    return BaseModel(tiny_chat_model)


@pytest.fixture(scope="session")
def trained(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters; to copy from."""
    root = tmp_path_factory.mktemp("trained")
    for name, options in ADAPTERS.items():
        write_adapter(root / name, base, **options)
    return root


@pytest.fixture
def adapters_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapters"))


@pytest.fixture(scope="session")
def want(tiny_chat_model: Path, base: BaseModel, trained: Path) -> Callable[[str, int], list[int]]:
    """Greedy tokens after PROMPT, from transformers, of an adapter or "" for the base."""
    tails = MemoryTails(base)
    ids = Tokenizer(tiny_chat_model).encode(PROMPT)
    known: dict[str, list[int]] = {}

    def get(name: str, count: int = 12) -> list[int]:
        if name not in known:
            if name:
                weights = fold(checkpoint.read(trained / name, base), name)
                model = load_adapted(tiny_chat_model, weights, tails)
            else:
                model = load_model(tiny_chat_model)
            known[name] = greedy(model, ids, 24)
        return known[name][:count]

    return get


@dataclass
class Recorder(Observer):
    """Keeps the events."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def names(self, *wanted: str) -> list[str]:
        return [e[0] for e in self.events if not wanted or e[0] in wanted]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [e[1:] for e in self.events if e[0] == name]

    def queued(self, adapter: str) -> None:
        self.events.append(("queued", adapter))

    def first_token(
        self, adapter: str, *, queue_s: float, load_s: float, ttft_s: float, prompt_tokens: int
    ) -> None:
        assert 0 <= load_s <= queue_s <= ttft_s
        self.events.append(("first_token", adapter, prompt_tokens))

    def tokens(self, adapter: str, *, count: int, gap_s: float | None) -> None:
        self.events.append(("tokens", adapter, count, gap_s is None))

    def finished(
        self, adapter: str, mode: Mode, reason: FinishReason, *, decode_s: float, total_s: float
    ) -> None:
        assert 0 <= decode_s <= total_s
        self.events.append(("finished", adapter, mode, reason))

    def failed(self, adapter: str, error: BaseException) -> None:
        self.events.append(("failed", adapter, type(error)))

    def adapter_loaded(self, adapter: str, *, stage: str, seconds: float) -> None:
        self.events.append(("adapter_loaded", adapter, stage))

    def merged(self, adapter: str, *, seconds: float) -> None:
        self.events.append(("merged", adapter))

    def adapters_changed(self, adapters: Any) -> None:
        self.events.append(("adapters_changed", [a.name for a in adapters]))


@asynccontextmanager
async def serving(
    model_dir: Path,
    adapters_dir: Path,
    observer: Observer | None = None,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[Runtime]:
    """`settings`: of the runtime; `changes`: of its engine."""
    wanted = RuntimeConfig(
        model=str(model_dir),
        adapters_dir=adapters_dir,
        native=config(**changes),
        **{"poll_interval_s": 0.02, "start_wait_s": 300.0} | (settings or {}),
    )
    async with asyncio.timeout(300), await Runtime.create(wanted, observer) as runtime:
        yield runtime


async def test_what_was_begun_before_is_used(tiny_chat_model: Path, adapters_dir: Path) -> None:
    wanted = RuntimeConfig(str(tiny_chat_model), adapters_dir, native=config())
    with pytest.raises(ModelError, match="no-such-model"):
        begin(replace(wanted, model="no-such-model"))
    async with await Runtime.create(wanted, None, begin(wanted)) as runtime:
        assert await read(runtime, ask())


def ask(name: str = "a", **fields: Any) -> GenerationRequest:
    """12 greedy tokens after PROMPT, unless `fields` says something else."""
    if not {"messages", "token_ids"} & fields.keys():
        fields.setdefault("prompt", PROMPT)
    fields.setdefault("sampling", SamplingParams(max_tokens=12))
    return GenerationRequest(name, **fields)


async def read(runtime: Runtime, request: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in runtime.generate(request)]


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def text_of(chunks: list[TokenChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def info(runtime: Runtime, name: str) -> AdapterInfo:
    return next(i for i in runtime.list_adapters() if i.name == name)


# --- generate ------------------------------------------------------------------------------------


async def test_base_and_adapters_by_name_and_version(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        version = info(runtime, "alpha").version
        for adapter, mode in (
            ("", Mode.BASE),
            ("alpha", Mode.BATCHED),
            (f"alpha@{version}", Mode.BATCHED),
            (f"alpha@{version[:6]}", Mode.BATCHED),
            ("beta", Mode.BATCHED),
            ("gamma", Mode.BATCHED),
        ):
            chunks = await read(runtime, ask(adapter=adapter))
            name = adapter.partition("@")[0]
            assert tokens_of(chunks) == want(name), adapter
            last = chunks[-1]
            key = f"{name}@{info(runtime, name).version}" if name else ""
            assert (last.adapter, last.mode) == (key, mode)
    assert len({tuple(want(name)) for name in ("", *ADAPTERS)}) == 4


async def test_usage_says_how_much_of_the_prompt_was_cached(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        found = []
        for adapter in ("", "alpha", "alpha", ""):
            last = (await read(runtime, ask(adapter=adapter, prompt=4 * PROMPT)))[-1]
            assert last.usage is not None
            found.append(last.usage.cached_prompt_tokens)
        num_prompt_tokens, stats = last.usage.prompt_tokens, runtime.stats()
    num_found = (num_prompt_tokens - 1) // 4 * 4  # blocks of four
    assert found == [0, 0, num_found, num_found] and num_found > 0
    assert stats.prefix_cache_queries == 4 * num_prompt_tokens
    assert stats.prefix_cache_hits == 2 * num_found


async def test_only_requests_with_one_salt_share_the_cache(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    found = []
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for salt in ("", "mine", "yours", "mine"):
            request = ask(adapter="alpha", prompt=4 * PROMPT, cache_salt=salt)
            last = (await read(runtime, request))[-1]
            assert last.usage is not None
            found.append(last.usage.cached_prompt_tokens > 0)
    assert found == [False, False, False, True]


async def test_the_last_chunk_has_the_end_and_only_it(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        before_s = time.monotonic()
        *chunks, last = await read(runtime, ask(adapter="alpha", sampling=LONG))
        elapsed_s = time.monotonic() - before_s
        prompt_tokens = len(runtime.tokenize(prompt=PROMPT))
    assert all(c.finish_reason is c.usage is c.timing is None for c in chunks)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None and last.timing is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt_tokens, 90)
    timing = last.timing
    assert 0 <= timing.queue_s <= timing.ttft_s <= timing.total_s <= elapsed_s


async def test_the_text_is_that_of_the_tokens(tiny_chat_model: Path, adapters_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for seed in range(5):
            params = SamplingParams(max_tokens=30, temperature=1.5, seed=seed)
            chunks = await read(runtime, ask(sampling=params))
            text = tokenizer.decode(tokens_of(chunks), skip_special_tokens=True)
            assert text_of(chunks) == text.rstrip("\ufffd")
            assert all("\ufffd" not in c.text for c in chunks[:-1] if "\ufffd" not in text)


async def test_prompt_chat_and_tokens_are_the_same_request(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    messages = (ChatMessage("system", "be brief"), ChatMessage("user", "again"))
    templated = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        ids = runtime.tokenize(messages=messages)
        assert ids == runtime.tokenize(prompt=templated)
        forms = [{"messages": messages}, {"prompt": templated}, {"token_ids": tuple(ids)}]
        found = [tokens_of(await read(runtime, ask(**form))) for form in forms]
    assert found[0] == found[1] == found[2]


async def test_a_stop_string_ends_it_and_is_cut(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        whole = text_of(await read(runtime, ask(sampling=LONG)))
        stop = whole[8:12]
        chunks = await read(runtime, ask(sampling=replace(LONG, stop=(stop,))))
        assert text_of(chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason is FinishReason.STOP
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(tokens_of(chunks)) < 90
        assert runtime.stats().kv_cache_usage == 0


async def test_logprobs_come_with_their_tokens(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        params = SamplingParams(max_tokens=4, logprobs=2)
        chunks = await read(runtime, ask(sampling=params))
    entries = [entry for c in chunks for entry in c.logprobs]
    assert [e.token_id for e in entries] == tokens_of(chunks)
    assert all(e.top[0] == (e.token_id, e.logprob) and len(e.top) == 2 for e in entries)


async def test_log_probabilities_of_the_prompt_come_with_the_first_tokens(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        ids = runtime.tokenize(prompt="the quick brown")
        request = ask(prompt="the quick brown", sampling=SamplingParams(max_tokens=4))
        chunks = await read(runtime, replace(request, prompt_logprobs=2))
    first, *others = (chunk for chunk in chunks if chunk.token_ids)
    assert not any(chunk.prompt_logprobs for chunk in others)
    assert first.prompt_logprobs[0] is None
    entries = [entry for entry in first.prompt_logprobs if entry is not None]
    assert [entry.token_id for entry in entries] == ids[1:]
    assert all(len(entry.top) == 2 for entry in entries)


async def test_many_at_once(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    names = ["", "alpha", "beta", "gamma"] * 5
    async with serving(tiny_chat_model, adapters_dir, max_num_seqs=6) as runtime:
        found = await asyncio.gather(
            *(read(runtime, ask(f"{i}", adapter=name)) for i, name in enumerate(names))
        )
        assert runtime.stats().resident_adapters == dict.fromkeys(ADAPTERS, "slot")
    assert [tokens_of(chunks) for chunks in found] == [want(name) for name in names]


async def test_more_adapters_than_slots_take_turns(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    names = ["alpha", "beta", "gamma"] * 4
    async with serving(tiny_chat_model, adapters_dir, max_slots=1) as runtime:
        found = await asyncio.gather(
            *(read(runtime, ask(f"{i}", adapter=name)) for i, name in enumerate(names))
        )
        tiers = runtime.stats().resident_adapters
    assert sorted(tiers.values()) == ["host", "host", "slot"]
    assert [tokens_of(chunks) for chunks in found] == [want(name) for name in names]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "fox " * 200}, "prompt"),
        ({"token_ids": ()}, "tokens.ids"),
        ({"token_ids": (5, 320)}, "tokens.ids"),
        ({"token_ids": (5, -1)}, "tokens.ids"),
        ({"token_ids": (5,) * 128}, "tokens.ids"),
        ({"messages": (ChatMessage("user", "fox " * 200),)}, "chat"),
        (
            {"token_ids": (5,) * 100, "sampling": SamplingParams(max_tokens=29)},
            "sampling.max_tokens",
        ),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_by_field(
    fields: dict[str, Any], where: str, tiny_chat_model: Path, adapters_dir: Path
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer) as runtime:
        with pytest.raises(InvalidRequest) as caught:
            await read(runtime, ask(adapter="alpha", **fields))
        assert caught.value.field == where
        assert observer.of("failed") == [("alpha", InvalidRequest)]
        assert runtime.stats().num_requests_waiting == 0


async def test_a_text_with_a_token_that_the_model_has_not_is_refused(
    tmp_path: Path, adapters_dir: Path
) -> None:
    """A tokenizer may know more tokens than the model has embeddings for."""
    from transformers import AutoTokenizer

    model_dir = save_tiny_chat_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens([f"<|extra {i}|>" for i in range(40)], special_tokens=True)
    tokenizer.save_pretrained(model_dir)
    async with serving(model_dir, tmp_path / "adapters") as runtime:
        for fields, where in (
            ({"prompt": "fox <|extra 39|>"}, "prompt"),
            ({"messages": (ChatMessage("user", "<|extra 39|>"),)}, "chat"),
        ):
            with pytest.raises(InvalidRequest, match="from 0 to 319") as caught:
                await read(runtime, ask(**fields))
            assert caught.value.field == where
        assert await read(runtime, ask())


async def test_the_whole_context_can_be_used(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        params = SamplingParams(max_tokens=28, ignore_eos=True)
        chunks = await read(runtime, ask(token_ids=(5,) * 100, sampling=params))
        assert len(tokens_of(chunks)) == 28
        unlimited = SamplingParams(ignore_eos=True)
        chunks = await read(runtime, ask(token_ids=(5,) * 100, sampling=unlimited))
        assert len(tokens_of(chunks)) == 28
        assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_adapters_that_are_not_there(tiny_chat_model: Path, adapters_dir: Path) -> None:
    (adapters_dir / "broken").mkdir()
    (adapters_dir / "broken" / checkpoint.CONFIG_FILE).write_text("{}")
    (adapters_dir / "broken" / checkpoint.WEIGHTS_FILE).write_bytes(b"no safetensors")
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for adapter in ("nobody", "nobody@abcd", "alpha@0000", "../alpha", "alpha@"):
            if adapter == "alpha@":
                assert await read(runtime, ask(adapter=adapter))
                continue
            with pytest.raises(AdapterNotFound):
                await read(runtime, ask(adapter=adapter))
        with pytest.raises(AdapterQuarantined, match="torn"):
            await read(runtime, ask(adapter="broken"))
        assert info(runtime, "broken").state is AdapterState.QUARANTINED


@dataclass
class Spans:
    """A trace that keeps what it is told, by path."""

    found: dict[str, tuple[float, float]] = field(default_factory=dict)
    path: str = ""

    def span(self, name: str, start_s: float, end_s: float) -> Spans:
        path = f"{self.path}{name}"
        assert path not in self.found
        self.found[path] = (start_s, end_s)
        return Spans(self.found, f"{path}/")


async def test_a_trace_is_told_what_the_time_went_to(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        parts = []
        for adapter in ("", "alpha", "alpha"):
            trace, began_s = Spans(), time.monotonic()
            await read(runtime, ask(adapter=adapter, trace=trace))
            times = [at_s for span in trace.found.values() for at_s in span]
            assert began_s <= min(times) and max(times) <= time.monotonic()
            parts.append(trace.found)
        base, missed, hit = parts
        assert list(base) == ["queue", "prefill", "decode"]
        assert list(missed) == ["queue", "lease", "lease/load", "prefill", "decode"]
        assert list(hit) == ["queue", "lease", "prefill", "decode"]
        for found in parts:
            ends = [found[name] for name in found if "/" not in name]
            assert all(start_s <= end_s for start_s, end_s in ends)
            assert all(one[1] <= two[0] for one, two in pairwise(ends))
        (lease, load) = missed["lease"], missed["lease/load"]
        assert lease[0] <= load[0] < load[1] == lease[1]


async def test_a_trace_of_a_request_that_ends_early_has_the_parts_that_it_had(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        cancelled = Spans()
        async with aclosing(runtime.generate(ask(sampling=LONG, trace=cancelled))) as chunks:
            await anext(chunks)
        assert list(cancelled.found) == ["queue", "prefill", "decode"]
        unknown = Spans()
        with pytest.raises(AdapterNotFound):
            await read(runtime, ask(adapter="nobody", trace=unknown))
        assert list(unknown.found) == ["queue", "lease"]


async def test_prompts_may_be_limited_below_the_context(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    limits = {"limits": LimitsConfig(max_prompt_tokens=8)}
    async with serving(tiny_chat_model, adapters_dir, settings=limits) as runtime:
        await read(runtime, ask(token_ids=(5,) * 8))
        with pytest.raises(InvalidRequest, match="has 9 tokens, this server takes 8"):
            await read(runtime, ask(token_ids=(5,) * 9))


async def test_a_chat_without_a_template_is_refused(tmp_path: Path, adapters_dir: Path) -> None:
    model_dir = save_tiny_chat_model(tmp_path / "model")
    for file in model_dir.glob("*.jinja"):
        file.unlink()
    async with serving(model_dir, tmp_path / "adapters") as runtime:
        assert not runtime.model.has_chat_template
        with pytest.raises(InvalidRequest, match="no chat template"):
            await read(runtime, ask(messages=(ChatMessage("user", "fox"),)))


async def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    model_dir = save_tiny_chat_model(tmp_path / "model")
    template = "{{ raise_exception('roles must alternate') }}"
    (model_dir / "chat_template.jinja").write_text(template)
    async with serving(model_dir, tmp_path / "adapters") as runtime:
        with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
            await read(runtime, ask(messages=(ChatMessage("user", "fox"),)))
        assert caught.value.field == "chat"


async def test_when_the_queue_is_full_one_more_is_refused(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_num_seqs=1, max_queue=1) as runtime:
        reading = [asyncio.create_task(read(runtime, ask(f"{i}", sampling=LONG))) for i in range(2)]
        await until(lambda: runtime.stats().num_requests_running == 1)
        assert runtime.stats().num_requests_waiting == 1
        with pytest.raises(Overloaded) as caught:
            await read(runtime, ask("more"))
        assert caught.value.retry_after_s > 0
        assert [len(tokens_of(chunks)) for chunks in await asyncio.gather(*reading)] == [90, 90]
        assert await read(runtime, ask("later"))


async def test_a_full_queue_has_room_for_an_adapter_that_does_not_fill_it(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_num_seqs=1, max_queue=6) as runtime:
        flood = [
            asyncio.create_task(read(runtime, ask(f"{i}", adapter="alpha", sampling=LONG)))
            for i in range(7)
        ]
        await until(lambda: runtime.stats().num_requests_running == 1)
        assert tokens_of(await read(runtime, ask("other", adapter="beta")))
        results = await asyncio.gather(*flood, return_exceptions=True)
    assert [isinstance(result, Overloaded) for result in results] == [False] * 6 + [True]


async def test_a_flood_in_the_only_slot_leaves_it_to_others_in_turn(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    changes = {"max_slots": 1, "max_num_seqs": 2}
    async with serving(tiny_chat_model, adapters_dir, **changes) as runtime:
        stopped = False

        async def flood(i: int) -> None:
            num_requests = 0
            while not stopped:
                await read(runtime, ask(f"{i}/{num_requests}", adapter="alpha", sampling=LONG))
                num_requests += 1

        floods = [asyncio.create_task(flood(i)) for i in range(8)]
        await until(lambda: runtime.stats().num_requests_running == 2)
        for name in ("beta", "gamma"):
            chunks = await read(runtime, ask(name, adapter=name))
            assert tokens_of(chunks) == want(name)
        stopped = True
        await asyncio.gather(*floods)


async def test_a_limit_of_an_adapter_is_its_own(tiny_chat_model: Path, adapters_dir: Path) -> None:
    limits = LimitsConfig(adapter_limit=("alpha=1", "beta=:1"))
    wanted = RuntimeConfig(str(tiny_chat_model), adapters_dir, limits=limits, native=config())
    async with asyncio.timeout(30), await Runtime.create(wanted) as runtime:
        reading = asyncio.create_task(read(runtime, ask("a", adapter="alpha", sampling=LONG)))
        await until(lambda: runtime.stats().num_requests_running == 1)
        with pytest.raises(LimitExceeded, match="alpha"):
            await read(runtime, ask("b", adapter=f"alpha@{info(runtime, 'alpha').version}"))
        await read(runtime, ask("c", adapter="beta", sampling=LONG))
        with pytest.raises(LimitExceeded, match="1 tokens per second") as caught:
            await read(runtime, ask("d", adapter="beta"))
        assert 0 < caught.value.retry_after_s < 120  # 90 tokens and the prompt's
        assert await read(runtime, ask("e", adapter="gamma"))
        assert await read(runtime, ask("f"))
        await reading


async def test_a_name_that_nobody_has_is_refused_at_once_however_busy(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    changes = {"max_slots": 1, "max_num_seqs": 1}
    async with serving(tiny_chat_model, adapters_dir, **changes) as runtime:
        busy = [
            asyncio.create_task(read(runtime, ask(f"{i}", adapter="alpha", sampling=LONG)))
            for i in range(4)
        ]
        await until(lambda: runtime.stats().num_requests_running == 1)
        with pytest.raises(AdapterNotFound):
            await read(runtime, ask("b", adapter="nobody"))
        assert not any(task.done() for task in busy)
        await asyncio.gather(*busy)


async def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model_dir = save_tiny_llama(tmp_path / "model")
    with pytest.raises(ModelError):
        await Runtime.create(RuntimeConfig(str(model_dir), tmp_path / "adapters"))


# --- the adapters directory ----------------------------------------------------------------------


async def test_an_adapter_copied_in_is_served(
    tiny_chat_model: Path, trained: Path, tmp_path: Path, want: Callable[[str], list[int]]
) -> None:
    root = tmp_path / "adapters"
    async with serving(tiny_chat_model, root) as runtime:
        assert runtime.list_adapters() == []
        shutil.copytree(trained / "beta", root / "beta")
        await until(lambda: bool(runtime.list_adapters()))
        assert tokens_of(await read(runtime, ask(adapter="beta"))) == want("beta")


async def test_a_request_keeps_its_version_while_a_new_one_comes(
    tiny_chat_model: Path, adapters_dir: Path, trained: Path, want: Callable[[str, int], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        old = info(runtime, "alpha")
        request = ask("old", adapter="alpha", sampling=SamplingParams(max_tokens=20))
        async with aclosing(runtime.generate(request)) as chunks:
            first = await anext(chunks)
            shutil.copytree(trained / "beta", adapters_dir / "alpha", dirs_exist_ok=True)
            await until(lambda: info(runtime, "alpha").version != old.version)
            assert tokens_of(await read(runtime, ask(adapter="alpha"))) == want("beta", 12)
            rest = [chunk async for chunk in chunks]
        assert tokens_of([first, *rest]) == want("alpha", 20)
        assert rest[-1].adapter == f"alpha@{old.version}"
        again = await read(runtime, ask(adapter=f"alpha@{old.version}"))
        assert tokens_of(again) == want("alpha", 12)
        await runtime.rollback_adapter("alpha", "")
        assert info(runtime, "alpha").version == old.version


async def test_an_adapter_taken_away_is_no_longer_served_but_finishes(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str, int], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        request = ask("old", adapter="alpha", sampling=SamplingParams(max_tokens=20))
        async with aclosing(runtime.generate(request)) as chunks:
            first = await anext(chunks)
            await runtime.delete_adapter("alpha")
            with pytest.raises(AdapterNotFound):
                await read(runtime, ask(adapter="alpha"))
            rest = [chunk async for chunk in chunks]
        assert tokens_of([first, *rest]) == want("alpha", 20)
        assert "alpha" not in runtime.stats().resident_adapters


async def test_an_adapter_is_read_while_its_request_waits(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_slots=1, max_num_seqs=1) as runtime:
        asks = [ask(f"{i}", adapter="alpha", sampling=LONG) for i in range(12)]
        held = asyncio.gather(*(read(runtime, request) for request in asks))
        await until(lambda: runtime.stats().num_requests_running == 1)
        waiting = asyncio.create_task(read(runtime, ask("waiting", adapter="beta")))
        await until(lambda: info(runtime, "beta").tier is AdapterTier.HOST)
        assert not held.done()
        assert tokens_of(await waiting) == want("beta")
        await held


async def test_an_adapter_that_comes_back_to_its_slot_is_not_read_again(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer, max_slots=1) as runtime:
        for name in ("alpha", "beta", "gamma", "alpha", "beta"):
            assert tokens_of(await read(runtime, ask(adapter=name))) == want(name)
        loads = observer.of("adapter_loaded")
        assert [name for name, stage in loads if stage == "read"] == [*ADAPTERS]
        assert len([name for name, stage in loads if stage == "slot"]) == 5
        assert info(runtime, "alpha").tier is AdapterTier.HOST
        used_bytes = runtime.stats().host_tier_bytes
        assert (await runtime.unload_adapter("alpha")).tier is AdapterTier.DISK
        assert 0 < runtime.stats().host_tier_bytes < used_bytes


@pytest.mark.parametrize("executor", ["torch", "openvino"])
async def test_unloading_frees_every_copy_of_the_weights(
    executor: str, tiny_chat_model: Path, adapters_dir: Path
) -> None:
    if executor == "openvino":
        require_openvino()
    changes = {"executor": executor, "max_slots": 1}
    async with serving(tiny_chat_model, adapters_dir, **changes) as runtime:
        for held_by_others in (False, True):
            await read(runtime, ask(adapter="alpha"))
            (resident,) = runtime._manager._residency._resident.values()
            assert resident.weights is not None
            weights = weakref.ref(resident.weights)
            tensors = [weakref.ref(d.a) for d in resident.weights.modules.values()]
            del resident
            if held_by_others:  # by the tier beside the slots
                await read(runtime, ask(adapter="beta"))
                assert weights() is not None
            await runtime.unload_adapter("alpha")
            gc.collect()
            assert weights() is None and not any(tensor() is not None for tensor in tensors)


async def test_a_pinned_adapter_stays_whatever_comes(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    observer = Recorder()
    settings = {"pin": ("alpha",)}
    async with serving(tiny_chat_model, adapters_dir, observer, settings, max_slots=2) as runtime:
        names = ["beta", "gamma", "alpha"] * 4
        found = await asyncio.gather(
            *(read(runtime, ask(f"{i}", adapter=name)) for i, name in enumerate(names))
        )
        assert [tokens_of(chunks) for chunks in found] == [want(name) for name in names]
        loads = [name for name, stage in observer.of("adapter_loaded") if stage == "slot"]
        assert loads.count("alpha") == 1
        assert info(runtime, "alpha").pinned
        with pytest.raises(CapacityExceeded, match="alpha, beta would have slots for good"):
            await runtime.load_adapter("beta", pin=True)
        assert not (await runtime.unload_adapter("alpha")).pinned
        assert (await runtime.load_adapter("beta", pin=True)).pinned


@pytest.mark.parametrize("what", ["merge", "pin"])
async def test_a_stream_of_requests_does_not_keep_a_slot_from_who_is_to_stay(
    what: str, tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    """Requests of two adapters overlap, so that both slots are never idle."""
    async with serving(tiny_chat_model, adapters_dir, max_slots=2) as runtime:
        stop = asyncio.Event()

        async def stream(number: int, adapter: str) -> None:
            count = 0
            while not stop.is_set():
                await read(runtime, ask(f"{number}-{count}", adapter=adapter, sampling=LONG))
                count += 1

        async with asyncio.TaskGroup() as group:
            for number, adapter in enumerate(("alpha", "gamma") * 2):
                group.create_task(stream(number, adapter))
            await until(lambda: runtime.stats().num_requests_running > 1)
            if what == "merge":
                changed = await runtime.merge_adapter("beta")
                assert changed.state is AdapterState.MERGED
                await runtime.unmerge_adapter()
            else:
                assert (await runtime.load_adapter("beta", pin=True)).pinned
            stop.set()
        for name in ADAPTERS:
            assert tokens_of(await read(runtime, ask(adapter=name))) == want(name)


async def test_a_hint_in_a_full_engine_waits_for_nobody(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str, int], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_slots=1) as runtime:
        async with aclosing(runtime.generate(ask(adapter="alpha", sampling=LONG))) as chunks:
            await anext(chunks)
            hinted = await runtime.load_adapter("beta")
            assert (hinted.state, hinted.tier) == (AdapterState.READY, AdapterTier.HOST)
            assert info(runtime, "alpha").in_flight == 1
        assert tokens_of(await read(runtime, ask(adapter="beta"))) == want("beta", 12)


async def test_requests_are_served_before_all_adapters_have_been_checked(
    tiny_chat_model: Path,
    adapters_dir: Path,
    want: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_check, take_in = threading.Semaphore(0), AdapterStore.take_in

    def wait_and_take_in(*arguments: Any) -> Any:
        may_check.acquire()
        return take_in(*arguments)

    monkeypatch.setattr(AdapterStore, "take_in", wait_and_take_in)
    settings = {"start_wait_s": 0.0}
    async with serving(tiny_chat_model, adapters_dir, None, settings) as runtime:
        assert runtime.list_adapters() == []
        assert tokens_of(await read(runtime, ask())) == want("")
        asked = asyncio.create_task(read(runtime, ask("b", adapter="gamma")))
        late = ask("late", adapter="beta", deadline_s=time.monotonic() + 0.05)
        assert (await read(runtime, late))[-1].finish_reason is FinishReason.DEADLINE
        with pytest.raises(AdapterNotFound):
            await read(runtime, ask("c", adapter="nobody"))
        assert not asked.done()
        may_check.release(3)
        assert tokens_of(await asked) == want("gamma")
        await until(lambda: len(runtime.list_adapters()) == 3)


# --- merged --------------------------------------------------------------------------------------


async def test_merging_changes_the_mode_and_not_the_tokens(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for merged in ("alpha", "gamma"):
            assert (await runtime.merge_adapter(merged)).state is AdapterState.MERGED
            assert runtime.stats().merged_adapter == f"{merged}@{info(runtime, merged).version}"
            for name in ("", *ADAPTERS):
                chunks = await read(runtime, ask(adapter=name))
                assert tokens_of(chunks) == want(name)
                other = Mode.BATCHED if name else Mode.BASE
                assert chunks[-1].mode is (Mode.MERGED if name == merged else other)
        assert info(runtime, "alpha").state is AdapterState.RESIDENT
        with pytest.raises(AdapterInUse):
            await runtime.unload_adapter("gamma")
        with pytest.raises(AdapterInUse):
            await runtime.delete_adapter("gamma")
        await runtime.unmerge_adapter()
        await runtime.unmerge_adapter()
        assert runtime.stats().merged_adapter == ""
        assert tokens_of(await read(runtime, ask())) == want("")
        assert (await runtime.unload_adapter("gamma")).state is AdapterState.READY


async def test_the_only_slot_can_be_merged(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_slots=1) as runtime:
        await runtime.merge_adapter("alpha")
        for name in ("", "alpha"):
            assert tokens_of(await read(runtime, ask(adapter=name))) == want(name)
        with pytest.raises(CapacityExceeded, match="has the only slot"):
            await read(runtime, ask(adapter="beta"))
        await runtime.unmerge_adapter()
        assert tokens_of(await read(runtime, ask(adapter="beta"))) == want("beta")


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
async def test_a_switch_whose_caller_goes_away_is_not_forgotten(
    operation: str, tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    async with serving(tiny_chat_model, adapters_dir, max_slots=1) as runtime:
        if operation == "unmerge":
            await runtime.merge_adapter("alpha")
        else:
            await runtime.load_adapter("alpha")
        for delay_s in (0, 0, 0.0005, 0.001, 0.002, 0.004):
            switch = asyncio.create_task(
                runtime.merge_adapter("alpha")
                if operation == "merge"
                else runtime.unmerge_adapter()  # type: ignore[arg-type]
            )
            await asyncio.sleep(delay_s)
            switch.cancel()
            await asyncio.gather(switch, return_exceptions=True)
        await runtime.unmerge_adapter()
        assert tokens_of(await read(runtime, ask(adapter="beta"))) == want("beta")
        assert tokens_of(await read(runtime, ask(adapter="alpha"))) == want("alpha")


async def test_requests_that_go_away_while_slots_change_leave_nothing_wrong(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    names = ["alpha", "beta", "gamma"]
    async with serving(tiny_chat_model, adapters_dir, max_slots=1) as runtime:
        for i in range(60):
            going = asyncio.create_task(read(runtime, ask(f"{i}", adapter=names[i % 3])))
            await asyncio.sleep(0.0005 * (i % 13))
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
        for name in names:
            assert tokens_of(await read(runtime, ask(adapter=name))) == want(name)
        assert all(i.in_flight == 0 for i in runtime.list_adapters())
        assert runtime.stats().kv_cache_usage == 0


# --- ends ----------------------------------------------------------------------------------------


async def test_closing_the_generator_frees_the_cache_and_the_lease(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer) as runtime:
        request = ask(adapter="alpha", sampling=LONG)
        async with aclosing(runtime.generate(request)) as chunks:
            await anext(chunks)
            assert info(runtime, "alpha").in_flight == 1
            assert runtime.stats().kv_cache_usage > 0
        stats = runtime.stats()
        assert info(runtime, "alpha").in_flight == 0
        assert stats.kv_cache_usage == 0
        assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
        cancelled = ("alpha", Mode.BATCHED, FinishReason.CANCELLED)
        assert observer.of("finished") == [cancelled]
        assert (await runtime.unload_adapter("alpha")).state is AdapterState.READY


async def test_a_cancelled_reader_counts_as_cancelled(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer) as runtime:
        reading = asyncio.create_task(read(runtime, ask(adapter="beta", sampling=LONG)))
        await until(lambda: bool(observer.of("tokens")))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert observer.of("finished") == [("beta", Mode.BATCHED, FinishReason.CANCELLED)]
    assert observer.of("failed") == []


async def test_a_deadline_passes_while_it_waits_for_a_slot(
    tiny_chat_model: Path, adapters_dir: Path, want: Callable[[str], list[int]]
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer, max_slots=1) as runtime:
        async with aclosing(runtime.generate(ask("holds", adapter="alpha"))) as holding:
            await anext(holding)  # a lease is held until the generator ends
            late = ask("late", adapter="beta", deadline_s=time.monotonic() + 0.1)
            [chunk] = await read(runtime, late)
        assert (chunk.finish_reason, chunk.token_ids) == (FinishReason.DEADLINE, ())
        assert chunk.usage is not None and chunk.usage.completion_tokens == 0
        assert ("beta", Mode.BASE, FinishReason.DEADLINE) in observer.of("finished")
        assert tokens_of(await read(runtime, ask(adapter="beta"))) == want("beta")


async def test_a_deadline_that_has_passed(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for adapter in ("", "alpha"):
            late = ask(adapter=adapter, deadline_s=time.monotonic() - 1)
            [chunk] = await read(runtime, late)
            assert chunk.finish_reason is FinishReason.DEADLINE


async def test_draining_lets_requests_finish_and_takes_no_more(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        assert runtime.ready
        reading = asyncio.create_task(read(runtime, ask(adapter="alpha", sampling=LONG)))
        await until(lambda: runtime.stats().num_requests_running == 1)
        draining = asyncio.create_task(runtime.drain(20))
        await asyncio.sleep(0)
        assert not runtime.ready and runtime.alive
        with pytest.raises(ShuttingDown):
            await read(runtime, ask("more"))
        await draining
        assert (await reading)[-1].finish_reason is FinishReason.LENGTH


async def test_draining_too_long_cancels(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        async with aclosing(runtime.generate(ask(sampling=LONG))) as chunks:
            await anext(chunks)
            await runtime.drain(0.05)
            rest = [chunk async for chunk in chunks]
        assert rest[-1].finish_reason is FinishReason.CANCELLED
        assert runtime.stats().kv_cache_usage == 0


async def test_closing_ends_requests_as_cancelled(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        for name in ("alpha", "beta"):  # so that none has ended before the last one runs
            await runtime.load_adapter(name)
        requests = [
            ask(f"{i}", adapter=name, sampling=SamplingParams(ignore_eos=True))
            for i, name in enumerate(["", "alpha", "beta", "alpha"])
        ]
        reading = [asyncio.create_task(read(runtime, request)) for request in requests]
        await until(lambda: runtime.stats().num_requests_running == 4)
        await runtime.delete_adapter("alpha")  # leaves with its last request
        await runtime.close()
        for task in reading:
            assert (await task)[-1].finish_reason is FinishReason.CANCELLED
        assert not runtime.alive and not runtime.ready
        with pytest.raises(ShuttingDown):
            await read(runtime, ask("late"))


async def test_a_dead_engine_fails_requests_and_readiness(
    tiny_chat_model: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer, max_slots=1) as runtime:
        await runtime.load_adapter("alpha")

        def broken(*_: object) -> None:
            raise RuntimeError("the device fell off the bus")

        monkeypatch.setattr(TorchExecutor, "run", broken)
        with pytest.raises(EngineDead):
            await read(runtime, ask(adapter="alpha"))
        assert not runtime.alive and not runtime.ready
        for adapter in ("", "alpha", "beta"):
            with pytest.raises(EngineDead):
                await read(runtime, ask(adapter=adapter))
        with pytest.raises(EngineDead):
            await runtime.merge_adapter("alpha")
    assert {error for _, error in observer.of("failed")} == {EngineDead}


# --- events and descriptions ---------------------------------------------------------------------


async def test_an_observer_sees_a_generation_from_its_arrival_to_its_end(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer) as runtime:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        await read(runtime, ask(adapter="alpha", sampling=params))
        prompt_tokens = len(runtime.tokenize(prompt=PROMPT))
    of_requests = [e for e in observer.events if e[0] != "adapters_changed"]
    assert of_requests == [
        ("queued", "alpha"),
        ("adapter_loaded", "alpha", "read"),
        ("adapter_loaded", "alpha", "tail"),
        ("adapter_loaded", "alpha", "slot"),
        ("first_token", "alpha", prompt_tokens),
        ("tokens", "alpha", 1, True),
        ("tokens", "alpha", 1, False),
        ("tokens", "alpha", 1, False),
        ("finished", "alpha", Mode.BATCHED, FinishReason.LENGTH),
    ]
    assert observer.of("adapters_changed")[-1] == (["alpha", "beta", "gamma"],)


async def test_an_observer_sees_failures_and_merges(
    tiny_chat_model: Path, adapters_dir: Path
) -> None:
    observer = Recorder()
    async with serving(tiny_chat_model, adapters_dir, observer) as runtime:
        with pytest.raises(AdapterNotFound):
            await read(runtime, ask(adapter="nobody@1234"))
        await runtime.merge_adapter("beta")
        await runtime.unmerge_adapter()
    assert observer.of("failed") == [("nobody", AdapterNotFound)]
    assert observer.of("merged") == [("beta",), ("",)]


async def test_the_model_describes_itself(tiny_chat_model: Path, adapters_dir: Path) -> None:
    async with serving(tiny_chat_model, adapters_dir) as runtime:
        model = runtime.model
        assert runtime.tokenize(prompt=PROMPT) == Tokenizer(tiny_chat_model).encode(PROMPT)
    assert (model.name, model.architecture) == (tiny_chat_model.name, "LlamaForCausalLM")
    assert (model.engine, model.executor, model.dtype) == ("native", "torch", "float32")
    assert (model.context_length, model.vocab_size, model.num_layers) == (128, 320, 3)
    assert model.has_chat_template
    assert len(model.fingerprint) == 64


@pytest.mark.parametrize(
    "setting",
    [
        {"keep_versions": 0},
        {"poll_interval_s": 0.0},
        {"start_wait_s": -1.0},
        {"host_cache_gib": -0.5},
        {"host_cache_gib": float("nan")},
        {"pin": ("Not/a/name",)},
    ],
)
def test_settings_of_the_store_are_checked(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name} must be"):
        RuntimeConfig(**setting)


def test_more_pins_than_slots_are_refused():
    native = config(max_slots=2)
    assert RuntimeConfig(pin=("a", "a"), native=native).pin
    with pytest.raises(ConfigError, match="pin has 2 names, and of the 2 slots at least one"):
        RuntimeConfig(pin=("a", "b"), native=native)
