"""Generations of several architectures, and the refusal of those that would come out wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.architectures import REFUSED, SERVED
from engine.making import (
    MemoryTails,
    collect_all,
    config,
    greedy,
    load_adapted,
    load_model,
    make_deltas,
    prompt,
    request,
    running,
    save_model,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.engine.native.engine import NativeEngine
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import ModelError


@pytest.mark.parametrize("name", SERVED)
async def test_greedy_tokens_are_those_of_transformers(
    name: str, served_model: Callable[[str], Path]
) -> None:
    model = load_model(served_model(name))
    prompts = {str(length): prompt(length, seed=length) for length in (2, 7, 19, 30)}
    async with running(served_model(name), max_num_batched_tokens=16) as engine:
        found = await collect_all(engine, [request(n, ids, 20) for n, ids in prompts.items()])
    for n, ids in prompts.items():
        assert found[n].token_ids == greedy(model, ids, 20), n


async def test_adapters_on_transposed_layers(served_model: Callable[[str], Path]) -> None:
    """GPT-2 stores its weights (in, out)."""
    model_dir = served_model("gpt2")
    base = BaseModel(model_dir)
    tails = MemoryTails(base)
    adapter = make_deltas(base, "kasa@1", ("c_attn", "c_proj", "c_fc"), r=4, t=4, seed=1)
    want = greedy(load_adapted(model_dir, adapter, tails), prompt(9), 16)
    async with running(model_dir, tails, [adapter]) as engine:
        batched = await collect_all(
            engine, [request("base", prompt(9), 16), request("kasa", prompt(9), 16, "kasa@1")]
        )
        await engine.merge_adapter("kasa@1")
        merged = await collect_all(
            engine, [request("base", prompt(9), 16), request("kasa", prompt(9), 16, "kasa@1")]
        )
    assert want != greedy(load_model(model_dir), prompt(9), 16)
    for found in (batched, merged):
        assert found["kasa"].token_ids == want
        assert found["base"].token_ids == greedy(load_model(model_dir), prompt(9), 16)


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_would_come_out_wrong_is_refused(why: str, tmp_path: Path) -> None:
    model_dir = save_model(REFUSED[why], tmp_path)
    with pytest.raises(ModelError):
        TorchExecutor(model_dir, config())


async def test_starting_the_engine_raises_what_the_executor_does(tmp_path: Path) -> None:
    model_dir = save_model(REFUSED["attention sinks"], tmp_path)
    engine = NativeEngine(config(), lambda: TorchExecutor(model_dir, config()), None)
    with pytest.raises(ModelError, match="sinks"):
        await engine.start()
