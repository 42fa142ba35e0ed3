from __future__ import annotations

import os

import pytest

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.executor import NO_SLOT
from kasa_runtime.engine.native.slots import SlotTable
from kasa_runtime.errors import CapacityExceeded, ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("executor", "abacus"),
        ("dtype", "int8"),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("block_size", 0),
        ("max_slots", 0),
        ("max_rank", 0),
        ("max_lora_rank", 0),
        ("threads", -1),
        ("max_queue", -1),
        ("max_model_len", -1),
        ("max_prefill_tokens", -1),
        ("kv_cache_gib", 0.0),
        ("kv_cache_gib", float("nan")),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_a_step_must_have_a_token_for_every_request() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig(max_num_seqs=64, max_num_batched_tokens=63)


def test_derived_values() -> None:
    assert EngineConfig(threads=3).num_threads == 3
    assert EngineConfig().num_threads == len(os.sched_getaffinity(0))


def test_the_cache_holds_what_fits_and_no_more_than_requests_can_fill() -> None:
    config = EngineConfig(kv_cache_gib=2**-10, max_num_seqs=2)
    assert config.num_cache_blocks(16, 2**10, context_length=10**6) == 64
    assert config.num_cache_blocks(16, 2**10, context_length=33) == 2 * 3
    with pytest.raises(ConfigError, match="holds no block of 16 tokens"):
        config.num_cache_blocks(16, 2**20, context_length=33)


def test_slots_are_taken_lowest_first_and_reused() -> None:
    slots = SlotTable(2)
    assert (slots.take("a"), slots.take("b")) == (0, 1)
    assert (slots.find("a"), slots.find("b"), slots.find(None)) == (0, 1, NO_SLOT)
    with pytest.raises(CapacityExceeded, match="max_slots"):
        slots.take("c")
    assert slots.release("a") == 0
    assert "a" not in slots and "b" in slots
    with pytest.raises(KeyError):
        slots.find("a")
    assert slots.take("c") == 0
