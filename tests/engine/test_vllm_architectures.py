"""Architectures on vLLM: an adapter on all linear layers gives what the adapted model alone gives,
batched and merged."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from engine.architectures import SERVED, SIZES
from engine.making import (
    MemoryTails,
    collect_all,
    greedy,
    load_adapted,
    load_model,
    make_deltas,
    prompt,
    request,
    save_model,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.vllm_engine import VllmEngine
from kasa_runtime.errors import ModelError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDE_HEADS = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1}  # of 32: has kernels
ARCHITECTURES = {
    "qwen2": Qwen2Config(**WIDE_HEADS),  # biases beside packed weights
    "qwen3": Qwen3Config(**WIDE_HEADS, head_dim=32, tie_word_embeddings=True),
}
PROMPTS = [prompt(5 + 4 * i, seed=i) for i in range(3)]
COUNT = 12
SETTINGS = EngineConfig(max_num_seqs=8, kv_cache_gib=0.02, max_slots=2, cuda_graphs=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
async def test_adapters_are_exact(architecture: PreTrainedConfig, tmp_path: Path) -> None:
    model_dir = save_model(architecture, tmp_path / "model")
    tails = MemoryTails(BaseModel(model_dir))
    adapter = make_deltas(tails.base, "a@1", LINEAR, r=4, t=4, seed=1)
    models = {None: load_model(model_dir), "a@1": load_adapted(model_dir, adapter, tails)}
    for model in models.values():
        model.generation_config.eos_token_id = None
    want = {
        f"{key} {i}": greedy(model, ids, COUNT)
        for key, model in models.items()
        for i, ids in enumerate(PROMPTS)
    }
    engine = VllmEngine(model_dir, SETTINGS, tails)
    await engine.start()
    try:
        await engine.load_adapter(adapter)
        for change in (None, lambda: engine.merge_adapter("a@1"), engine.unmerge_adapter):
            if change is not None:
                await change()
            found = await collect_all(
                engine,
                [
                    request(f"{key} {i}", ids, COUNT, key, ignore_eos=True)
                    for key in models
                    for i, ids in enumerate(PROMPTS)
                ],
            )
            assert {name: result.token_ids for name, result in found.items()} == want
    finally:
        await engine.close()


async def test_a_model_to_which_vllm_knows_no_lora_is_refused(tmp_path: Path) -> None:
    model_dir = save_model(SERVED["gpt2"], tmp_path / "model")
    engine = VllmEngine(model_dir, SETTINGS, MemoryTails(BaseModel(model_dir)))
    with pytest.raises(ModelError, match="vLLM does not serve it"):
        await engine.start()
