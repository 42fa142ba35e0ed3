"""Decode steps on fixed buffers, run without a graph on the CPU, and with graphs where there is a
GPU: they give what the executor gives without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.making import MemoryTails, config, prompt
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.native.cuda.attention import DecodePlan
from kasa_runtime.engine.native.cuda.decode import DecodeSteps, batch_sizes
from kasa_runtime.engine.native.executor import NO_SLOT, Executor, PackedBatch, SequenceSlice
from kasa_runtime.engine.native.paged_attention import AttentionPlan, KvCache
from kasa_runtime.engine.native.torch_executor import TorchExecutor

TABLES = [[3, 1], [7], [2, 0, 5]]
TOTAL_BLOCKS = 11


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float
) -> Tensor:
    """What flex_attention promises, in float64: a slot counts if its block is listed and the mask
    says so; a row without any gives 0."""
    n, heads, num_queries, _ = q.shape
    size = block_mask.BLOCK_SIZE[1]
    listed = torch.zeros(n, k.shape[2] // size, dtype=torch.bool)
    for row in range(n):
        num = int(block_mask.kv_num_blocks[row, 0, 0])
        listed[row, block_mask.kv_indices[row, 0, 0, :num].long()] = True
    shape = (n, heads, num_queries, k.shape[2])
    index = torch.meshgrid(*(torch.arange(length) for length in shape), indexing="ij")
    scores = q.double() @ k.double().transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, *index)
    visible = block_mask.mask_mod(*index) & listed[index[0], index[3] // size]
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return (weights @ v.double()).to(q.dtype)


@pytest.fixture
def plans() -> tuple[DecodePlan, AttentionPlan]:
    """The same three sequences for both; the decode plan has a fourth row that fills it up."""
    block_size = 4
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, TOTAL_BLOCKS * block_size, 2, 16, generator=draw)
    kv = KvCache([keys], [values], block_size)
    lengths = [6, 2, 9]
    batch = PackedBatch.pack(
        [1, 2, 3],
        [SequenceSlice(1, n - 1, t, NO_SLOT) for n, t in zip(lengths, TABLES, strict=True)],
        [],
    )
    tables = torch.full((4, TOTAL_BLOCKS), 5, dtype=torch.int32)  # what was there before
    for row, table in enumerate(TABLES):
        tables[row, : len(table)] = torch.tensor(table)
    plan = DecodePlan.make(
        kv,
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([*(n - 1 for n in lengths), 0]),
        tables,
        torch.tensor([*map(len, TABLES), 0], dtype=torch.int32),
        flex_attention=dense_attention,
    )
    return plan, AttentionPlan.make(batch, kv)


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_is_that_over_gathered_keys(
    plans: tuple[DecodePlan, AttentionPlan], window: int | None, softcap: float | None, heads: int
) -> None:
    plan, gathered = plans
    query = torch.randn(heads, 4, 16, generator=torch.Generator().manual_seed(1))
    settings = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    cache = (plan.cache.keys[0], plan.cache.values[0])
    found = plan.attend(query, *cache, **settings)
    want = gathered.attend(query[:, :3], *cache, **settings)
    assert float((found[:3] - want).abs().max()) < 1e-5
    assert not found[3].any()


def test_flex_attention_takes_what_the_plan_hands_it(
    plans: tuple[DecodePlan, AttentionPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its compiler, which needs minutes on a CPU."""
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    plan = plans[0]
    object.__setattr__(plan, "flex_attention", flex.flex_attention)
    query = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(1))
    cache = (plan.cache.keys[0], plan.cache.values[0])
    found = plan.attend(query, *cache, scaling=0.3, sliding_window=3, softcap=2.0)
    want = plans[1].attend(query[:, :3], *cache, scaling=0.3, sliding_window=3, softcap=2.0)
    assert float((found[:3] - want).abs().max()) < 1e-5


def test_batch_sizes_double_up_to_the_largest() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(2) == [1, 2]
    assert batch_sizes(16) == [1, 2, 4, 8, 16]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]


class Recorder:
    """A Capture without a graph, that tells how often each step ran."""

    def __init__(self) -> None:
        self.calls: list[int] = []  # batch sizes

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            logits = step()
            self.calls.append(len(logits))
            return logits

        return run


@pytest.fixture
def eager_steps(tiny_llama: Path) -> tuple[TorchExecutor, Recorder]:
    """An executor on the CPU whose decode steps go over the buffers."""
    executor, recorder = TorchExecutor(tiny_llama, config()), Recorder()
    executor._decode = DecodeSteps(
        executor._forward,
        executor._cache,
        executor._deltas,
        max_num_seqs=6,
        flex_attention=dense_attention,
        capture=recorder,
    )
    return executor, recorder


LENGTHS = [1, 3, 17, 40, 8, 5, 2]
SLOTS = [0, NO_SLOT, 2, 1, 1, NO_SLOT, 0]


def decode(executor: Executor, count: int) -> Tensor:
    """Logits of the last tokens of `count` sequences, of which the others are in the cache."""
    blocks = -(-(max(LENGTHS) + 1) // executor.block_size)
    ids = [prompt(length + 1, seed) for seed, length in enumerate(LENGTHS[:count])]
    tables = [list(range(blocks * i, blocks * (i + 1))) for i in range(count)]
    start = [
        SequenceSlice(len(own) - 1, 0, table, slot)
        for own, table, slot in zip(ids, tables, SLOTS, strict=False)
    ]
    executor.run(PackedBatch.pack([t for own in ids for t in own[:-1]], start, []))
    end = [SequenceSlice(1, s.num_tokens, s.block_table, s.slot) for s in start]
    wanted = list(range(count))[::2]
    return executor.run(PackedBatch.pack([own[-1] for own in ids], end, wanted)).cpu()


def load(executor: Executor, adapters: list[AdapterWeights], tails: MemoryTails) -> None:
    for slot, adapter in enumerate(adapters):
        executor.prepare_slots({slot: adapter}, tails)()


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_filled_up_steps_give_the_same_logits(
    count: int,
    size: int,
    eager_steps: tuple[TorchExecutor, Recorder],
    tiny_llama: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
) -> None:
    executor, recorder = eager_steps
    plain = TorchExecutor(tiny_llama, config())
    for change in (lambda e: None, lambda e: load(e, adapters, tails)):
        for each in (executor, plain):
            change(each)
        assert float((decode(executor, count) - decode(plain, count)).abs().max()) < 1e-4
    for each in (executor, plain):
        each.prepare_merge(1, tails)()
    assert float((decode(executor, count) - decode(plain, count)).abs().max()) < 1e-4
    assert set(recorder.calls) == {size, *([1] if count == 1 else [])}


def test_a_step_too_large_or_with_a_prompt_goes_the_other_way(
    eager_steps: tuple[TorchExecutor, Recorder], tiny_llama: Path
) -> None:
    executor, recorder = eager_steps
    plain = TorchExecutor(tiny_llama, config())
    assert torch.equal(decode(executor, 7), decode(plain, 7))
    assert recorder.calls == []


@pytest.mark.gpu
def test_captured_steps_outlive_changes_of_adapters(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {"device": "cuda", "max_num_seqs": 6, "block_size": 128, "kv_cache_gib": 0.1}
    captured = TorchExecutor(tiny_llama, config(**settings))
    plain = TorchExecutor(tiny_llama, config(**settings, cuda_graphs=False))
    assert captured._decode is not None
    weights = plain.weights()
    changes: list[Callable[[Executor], object]] = [
        lambda e: None,
        lambda e: load(e, adapters, tails),
        lambda e: e.prepare_merge(0, tails)(),
        lambda e: e.prepare_merge(2, tails)(),
        lambda e: e.prepare_unmerge()(),
        lambda e: e.prepare_slots({1: None}, tails)(),
        lambda e: e.prepare_slots({1: adapters[0]}, tails)(),
    ]
    for change in changes:
        for executor in (captured, plain):
            change(executor)
        for count in (1, 3, 6):
            found, want = decode(captured, count), decode(plain, count)
            assert float((found - want).abs().max()) < 2e-4
    for name, weight in captured.weights().items():
        assert torch.equal(weight, weights[name])
