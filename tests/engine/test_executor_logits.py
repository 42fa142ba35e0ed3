"""Both executors against transformers' own forward: packed, in chunks, from the cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.architectures import SERVED
from engine.making import config, load_model, logits_of, prompt
from kasa_runtime.engine.native.executor import NO_SLOT, Executor, PackedBatch, SequenceSlice
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import ConfigError, ModelError

TOLERANCE = 2e-5
LENGTH = 26  # more than three windows of the models that have one


def executor_of(model_dir: Path, **changes: object) -> TorchExecutor:
    return TorchExecutor(model_dir, config(**changes))


def run(executor: Executor, *parts: tuple[list[int], int, list[int]]) -> list[Tensor]:
    """One step of (tokens, first position, block table) parts; all logits, part by part."""
    tokens = [token for ids, _, _ in parts for token in ids]
    slices = [SequenceSlice(len(ids), first, table, NO_SLOT) for ids, first, table in parts]
    logits = executor.run(PackedBatch.pack(tokens, slices, list(range(len(tokens)))))
    return list(logits.split([len(ids) for ids, _, _ in parts]))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype is torch.float32
    assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_transformers(
    name: str, served_model: Callable[[str], Path], executor_class: Any
) -> None:
    if (name, executor_class.name) == ("gemma2", "openvino"):
        with pytest.raises(ModelError, match=r"no soft-capping of scores; use --executor torch"):
            executor_class(served_model(name), config())
        return
    executor = executor_class(served_model(name), config())
    model = load_model(served_model(name))
    one, two, three = (prompt(LENGTH, seed) for seed in range(3))
    want = {1: logits_of(model, one), 2: logits_of(model, two), 3: logits_of(model, three)}
    table = {1: [7, 2, 9, 30, 4, 11, 12], 2: [3, 5, 6, 8, 10, 13, 14], 3: list(range(20, 27))}

    [whole] = run(executor, (one, 0, table[1]))
    assert_close(whole, want[1])

    for first, last in pairwise([0, 5, 6, 14, 15, LENGTH]):  # chunks, some of one token
        [chunk] = run(executor, (two[first:last], first, table[2]))
        assert_close(chunk, want[2][first:last])

    run(executor, (three[:9], 0, table[3]), (one[:20], 0, table[1]), (two[:1], 0, table[2]))
    mixed = run(  # a chunk between two decodes, then a fresh prefill of another length
        executor,
        (one[20:21], 20, table[1]),
        (three[9:15], 9, table[3]),
        (two[1:2], 1, table[2]),
        (one[:4], 0, [31]),
    )
    assert_close(mixed[0], want[1][20:21])
    assert_close(mixed[1], want[3][9:15])
    assert_close(mixed[2], want[2][1:2])
    assert_close(mixed[3], want[1][:4])


def test_only_the_asked_rows_get_logits(
    tiny_llama: Path, bare: object, executor_class: Any
) -> None:
    ids = prompt(9)
    batch = PackedBatch.pack(ids, [SequenceSlice(9, 0, [1, 2, 3], NO_SLOT)], [8, 2])
    executor = executor_class(tiny_llama, config())
    assert_close(executor.run(batch), logits_of(bare, ids)[[8, 2]])
    without = PackedBatch.pack(ids, [SequenceSlice(9, 0, [1, 2, 3], NO_SLOT)], [])
    assert executor.run(without).shape == (0, 128)
    assert_close(executor.run(batch), logits_of(bare, ids)[[8, 2]])


def test_decoding_long_and_short_sequences_together(
    tiny_llama: Path, bare: object, executor_class: Any
) -> None:
    executor = executor_class(tiny_llama, config(max_num_seqs=64))
    lengths = [1, 3, 17, 40, 8]
    ids = [prompt(length + 1, seed) for seed, length in enumerate(lengths)]
    tables = [list(range(16 * i, 16 * i + 12)) for i in range(len(lengths))]
    run(executor, *((own[:-1], 0, table) for own, table in zip(ids, tables, strict=True)))
    found = run(
        executor,
        *((own[-1:], len(own) - 1, table) for own, table in zip(ids, tables, strict=True)),
    )
    for logits, own in zip(found, ids, strict=True):
        assert_close(logits, logits_of(bare, own)[-1:])


def test_half_precision_stays_near_float32(tiny_llama: Path, bare: object) -> None:
    executor = executor_of(tiny_llama, dtype="bfloat16")
    assert executor.dtype == "bfloat16"
    ids = prompt(12)
    [logits] = run(executor, (ids, 0, [1, 2, 3]))
    want = logits_of(bare, ids)
    assert float((logits - want).abs().max()) < 0.1 * float(want.std())


def test_limits_come_from_the_model_and_the_settings(tiny_llama: Path) -> None:
    executor = executor_of(tiny_llama, max_model_len=60, max_num_seqs=2)
    assert (executor.context_length, executor.vocab_size, executor.num_layers) == (60, 128, 3)
    assert executor.num_blocks == 30  # two sequences of 60 tokens, four tokens a block
    assert executor.eos_ids == {2}
    assert executor.num_parameters == sum(p.numel() for p in load_model(tiny_llama).parameters())


def test_a_context_longer_than_the_models_is_refused(tiny_llama: Path, executor_class: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 129 .* 128"):
        executor_class(tiny_llama, config(max_model_len=129))


def test_a_cache_without_room_for_a_block_is_refused(tiny_llama: Path, executor_class: Any) -> None:
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        executor_class(tiny_llama, config(kv_cache_gib=1e-9))


def test_a_device_that_is_none_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="device must be"):
        executor_of(tiny_llama, device="abacus")


def test_a_directory_without_a_model_is_refused(tmp_path: Path, executor_class: Any) -> None:
    with pytest.raises(ModelError, match=r"cannot load|want \*\.safetensors"):
        executor_class(tmp_path, config())


def test_an_encoder_is_refused_rather_than_given_a_random_head(
    tmp_path: Path, executor_class: Any
) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, intermediate_size=32, **shape)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks \d+ tensors of BertLMHeadModel, .* generates text"
    ):
        executor_class(tmp_path, config())
