"""What is vLLM's own: death of its processes, what does not fit beside a merged adapter, what it
cannot serve, and the whole server over it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from adapter.making import make_adapter
from tiny import save_tiny_chat_model

from engine.making import MemoryTails, collect, make_deltas, prompt, request, until
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.client import AsyncClient
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.vllm_engine import VllmEngine
from kasa_runtime.errors import ConfigError, EngineDead, ModelError
from kasa_runtime.types import FinishReason, Mode, SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]

SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of which there is a CPU kernel
PATIENCE_S = 600.0
LONG = {"ignore_eos": True}
ROOT = Path(__file__).parents[2]


def settings(**changes: Any) -> EngineConfig:
    small: dict[str, Any] = {"max_num_seqs": 4, "kv_cache_gib": 0.02, "max_slots": 2}
    return EngineConfig(**{**small, "max_lora_rank": 8, "cuda_graphs": False, **changes})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("vllm") / "tiny", **SHAPE)


@pytest.fixture
def own_tails(model_dir: Path) -> MemoryTails:
    return MemoryTails(BaseModel(model_dir))


@pytest.fixture
async def engine(model_dir: Path, own_tails: MemoryTails) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(model_dir, settings(), own_tails)
    await engine.start()
    yield engine
    await engine.close()


async def test_who_does_not_fit_beside_the_merged_one_waits_for_its_end(
    engine: VllmEngine, own_tails: MemoryTails
) -> None:
    """r = 6 fits, its difference from another with r = 6 does not; one that runs is waited for."""
    first, second = (
        make_deltas(own_tails.base, f"{name}@1", ("q_proj",), r=6, seed=seed)
        for seed, name in enumerate(("first", "second"))
    )
    await engine.load_adapter(first)
    await engine.load_adapter(second)
    want = await collect(engine, request("a", prompt(5), 20, second.key, **LONG))
    running = asyncio.create_task(
        collect(engine, request("running", prompt(5), 100, second.key, **LONG))
    )
    await until(lambda: engine.stats().num_running == 1, PATIENCE_S)
    await engine.merge_adapter(first.key)
    assert running.done(), "it ended before the switch"
    assert (await running).token_ids[:20] == want.token_ids
    soon = request("soon", prompt(5), 3, second.key, deadline_s=time.monotonic() + 0.2, **LONG)
    assert (await collect(engine, soon)).reason is FinishReason.DEADLINE
    later = asyncio.create_task(
        collect(engine, request("later", prompt(5), 20, second.key, **LONG))
    )
    merged = await collect(engine, request("b", prompt(5), 4, first.key, **LONG))
    assert set(merged.modes) == {Mode.MERGED.value}
    assert not later.done() and engine.stats().num_waiting == 1
    await engine.unmerge_adapter()
    assert (await later).token_ids == want.token_ids


async def test_the_death_of_its_process_fails_requests_and_all_later_calls(
    engine: VllmEngine, own_tails: MemoryTails
) -> None:
    adapter = make_deltas(own_tails.base, "a@1", ("q_proj",), r=2)
    reading = asyncio.create_task(collect(engine, request("a", prompt(5), 120, **LONG)))
    await until(lambda: engine.stats().num_running == 1, PATIENCE_S)
    # The merge waits for the base's request, and finds the engine dead.
    await engine.load_adapter(adapter)
    merging = asyncio.create_task(engine.merge_adapter(adapter.key))
    [core] = [child for child in multiprocessing.active_children() if "Engine" in child.name]
    core.kill()
    for task in (reading, merging):
        with pytest.raises(EngineDead, match="restart"):
            await task
    await until(lambda: not engine.alive, PATIENCE_S)
    for call in (
        lambda: collect(engine, request("b", prompt(5))),
        lambda: engine.load_adapter(adapter),
        lambda: engine.unload_adapter(adapter.key),
        engine.unmerge_adapter,
    ):
        with pytest.raises(EngineDead, match="restart"):
            await call()


async def test_a_model_without_kernels_is_refused_at_the_start(
    tmp_path: Path, tiny_chat_model: Path
) -> None:
    """Its heads are of 16, of which vLLM's CPU attention learns with the first token."""
    engine = VllmEngine(tiny_chat_model, settings(), MemoryTails(BaseModel(tiny_chat_model)))
    with pytest.raises(ModelError, match="died of the first token"):
        await engine.start()
    assert not engine.alive


async def test_an_engine_argument_that_vllm_does_not_have_is_refused(
    model_dir: Path, own_tails: MemoryTails
) -> None:
    engine = VllmEngine(model_dir, settings(engine_arg=("tensor_paralel_size=2",)), own_tails)
    with pytest.raises(ConfigError, match="no engine argument tensor_paralel_size"):
        await engine.start()
    await engine.close()


# --- the server ----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """`kasa serve --engine vllm` with one adapter, and the address of its gRPC."""
    model = save_tiny_chat_model(tmp_path / "model", **SHAPE)
    base = BaseModel(model)
    adapter = make_adapter(base, ("q_proj", "down_proj"), seed=1)
    checkpoint.write(tmp_path / "adapters" / "tenant", adapter)
    flags = {
        "engine": "vllm",
        "model": str(model),
        "adapters-dir": str(tmp_path / "adapters"),
        "poll-interval-s": "0.05",
        "grpc-port": "0",
        "http-port": "0",
        "kv-cache-gib": "0.02",
        "max-slots": "2",
        "max-lora-rank": "16",
        "max-num-seqs": "4",
    }
    command = [sys.executable, "-m", "kasa_runtime.cli", "serve", "--no-cuda-graphs"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
    )
    assert process.stdout is not None
    try:
        found = re.search(r"grpc=(\S+)", process.stdout.readline())
        assert found, log.seek(0) or log.read()
        yield process, found[1], log
    finally:
        process.kill()
        process.wait()
        log.close()


async def test_a_server_over_vllm_serves_stops_at_strings_and_ends_with_its_engine(
    served: Any,
) -> None:
    process, address, log = served
    async with AsyncClient(address) as client:
        plain = await client.generate("the quick brown", adapter="tenant", sampling=tokens(24))
        assert (plain.adapter.partition("@")[0], plain.mode) == ("tenant", Mode.BATCHED)
        stop = plain.text[6:9]
        cut = await client.generate(
            "the quick brown", adapter="tenant", sampling=tokens(24, stop=(stop,))
        )
        assert cut.finish_reason is FinishReason.STOP
        assert cut.text == plain.text[: plain.text.index(stop)]
        await client.merge_adapter("tenant")
        merged = await client.generate("the quick brown", adapter="tenant", sampling=tokens(24))
        assert (merged.text, merged.mode) == (plain.text, Mode.MERGED)
        os.kill(engine_core_of(process.pid), signal.SIGKILL)
    assert await asyncio.to_thread(process.wait, PATIENCE_S) == 1
    log.seek(0)
    assert "the engine has stopped; exiting" in log.read()


def engine_core_of(pid: int) -> int:
    """vLLM's process among the children of all threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    [core] = [
        child for child in children if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return core


def tokens(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **more)
