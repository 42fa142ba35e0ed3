"""The kernels of deltas against dense products in float64; interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; its interpreter needs no GPU")

from engine.making import MemoryTails, config, load_adapted, logits_of, prompt
from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import AdapterWeights, ModuleDelta
from kasa_runtime.engine.native import torch_executor
from kasa_runtime.engine.native.adapted_linear import LinearGroup, stack
from kasa_runtime.engine.native.cuda.lowrank import TritonDeltas
from kasa_runtime.engine.native.executor import (
    NO_SLOT,
    PackedBatch,
    SequenceSlice,
)

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest
NUM_SLOTS = 4


@pytest.fixture(autouse=True)
def interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bits, and its matrix product would take them for
    integers."""
    if ON_CUDA:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    plain = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest),
    )


@dataclass(frozen=True)
class Layer:
    deltas: Mapping[int, ModuleDelta]
    tail: Tail | None
    out_features: int
    in_features: int


def make_layer(
    in_features: int, out_features: int, ranks: Mapping[int, tuple[int, int]], seed: int
) -> Layer:
    """`ranks`: (r, t) by slot."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    deltas = {
        slot: ModuleDelta(normal(r, in_features), normal(out_features, r), t)
        for slot, (r, t) in ranks.items()
    }
    most = max((t for _, t in ranks.values()), default=0)
    tail = Tail(normal(out_features, most), normal(most, in_features), torch.zeros(most), 1.0)
    return Layer(deltas, tail if most else None, out_features, in_features)


def dense(layer: Layer, slot: int, dtype: torch.dtype) -> Tensor:
    """b a - P Q (out, in) in float64, of factors as they are kept in `dtype`."""
    if slot not in layer.deltas:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    delta = layer.deltas[slot]
    total = delta.b.to(dtype).double() @ delta.a.to(dtype).double()  # (out, r) @ (r, in)
    if delta.t:
        assert layer.tail is not None
        p, q = layer.tail.p[:, -delta.t :], layer.tail.q[-delta.t :]
        total -= p.to(dtype).double() @ q.to(dtype).double()
    return total


class Case:
    """A group of layers with the adapters' factors, and what a step makes of its input."""

    def __init__(self, in_features: int, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.deltas = TritonDeltas(NUM_SLOTS, 64, DEVICE)
        weights = [torch.zeros(layer.out_features, in_features, dtype=dtype) for layer in layers]
        group = LinearGroup([w.to(DEVICE) for w in weights], [None] * len(weights), self.deltas)
        self.group, self.in_features = group, in_features

    def load(self) -> None:
        parts = [(layer.deltas, layer.tail) for layer in self.layers]
        self.deltas.prepare([(self.group, stack(parts, self.group.like, {}))])()

    def check(self, slots: Sequence[int], num_tokens: Sequence[int], merged: int = NO_SLOT) -> None:
        """Rows far from zero before, so that what is added is not all there is."""
        draw = torch.Generator().manual_seed(len(slots))
        n = sum(num_tokens)
        x = torch.randn(1, n, self.in_features, generator=draw).to(self.dtype)
        y = torch.randn(1, n, sum(self.group.sizes), generator=draw).to(self.dtype)
        want = y.double()
        rows = [slot for slot, num in zip(slots, num_tokens, strict=True) for _ in range(num)]
        for i, slot in enumerate(rows):
            for layer, part in zip(self.layers, want[0, i].split(self.group.sizes), strict=True):
                delta = dense(layer, slot, self.dtype) - dense(layer, merged, self.dtype)
                part += delta @ x[0, i].double()
        self.deltas.set_merged(merged)
        self.deltas.begin(slots, num_tokens)
        found = self.deltas.add(y.to(DEVICE), x.to(DEVICE), self.group).cpu()
        assert found.dtype is self.dtype
        error = (found.double() - want).abs().max()
        assert float(error) <= TOLERANCE[self.dtype] * float(want.abs().max())
        same = [i for i, slot in enumerate(rows) if slot == merged]
        assert torch.equal(found[0, same], y[0, same])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_row_gets_its_own_adapters_delta(dtype: torch.dtype) -> None:
    """Two layers, in two splits of the inputs; ranks of no block's size, more rows than a tile."""
    case = Case(
        1100,
        [
            make_layer(1100, 70, {0: (5, 3), 2: (17, 0)}, seed=1),
            make_layer(1100, 24, {1: (2, 6)}, seed=2),
        ],
        dtype,
    )
    case.load()
    for merged in (NO_SLOT, 0, 1):
        case.check([0, NO_SLOT, 2, 1, 0, 3], [1, 4, 20, 1, 3, 1], merged)


RANKS = st.dictionaries(
    st.integers(0, NUM_SLOTS - 1), st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=3
)
SEQUENCES = st.lists(
    st.tuples(st.integers(NO_SLOT, NUM_SLOTS - 1), st.integers(1, 9)), min_size=1, max_size=5
)


@settings(max_examples=12, deadline=None)
@given(
    ranks=st.lists(RANKS, min_size=1, max_size=3),
    sequences=SEQUENCES,
    merged=st.integers(NO_SLOT, NUM_SLOTS - 1),
)
def test_any_ranks_any_rows(
    ranks: list[dict[int, tuple[int, int]]], sequences: list[tuple[int, int]], merged: int
) -> None:
    layers = [make_layer(33, 19 + i, own, seed=i) for i, own in enumerate(ranks)]
    case = Case(33, layers, torch.float32)
    case.load()
    slots, num_tokens = zip(*sequences, strict=True)
    case.check(slots, num_tokens, merged)


def test_what_a_captured_graph_reads_stays_where_it_is() -> None:
    """Loading, a larger rank, merging and unloading change what lies there only."""
    case = Case(20, [make_layer(20, 16, {0: (2, 1)}, seed=1)], torch.float32)
    deltas = case.deltas

    def addresses() -> list[int]:
        fixed = (
            deltas._factors[case.group],
            deltas._scratch_address,
            deltas._merged_line,
            deltas._tokens.order,
            deltas._tokens.lines,
        )
        return [tensor.data_ptr() for tensor in fixed]

    before = addresses()
    case.check([0], [3], merged=0)
    case.load()
    case.check([0, NO_SLOT], [3, 1])
    case.layers = [make_layer(20, 16, {0: (2, 1), 1: (40, 0)}, seed=2)]
    case.load()
    case.check([1, 0], [2, 2], merged=1)
    deltas.prepare([(case.group, None)])()
    case.layers = [make_layer(20, 16, {}, seed=2)]
    case.check([1, 0], [2, 2])
    assert addresses() == before


def test_rows_of_the_last_layer_are_those_of_the_logits() -> None:
    case = Case(20, [make_layer(20, 16, {0: (2, 1), 1: (3, 0)}, seed=1)], torch.float32)
    case.load()
    case.deltas.begin([0, NO_SLOT, 1], [4, 2, 3], torch.tensor([3, 5, 8]))
    x = torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(0))
    found = case.deltas.add(torch.zeros(1, 3, 16, device=DEVICE), x.to(DEVICE), case.group).cpu()
    for i, slot in enumerate((0, NO_SLOT, 1)):
        want = dense(case.layers[0], slot, torch.float32) @ x[0, i].double()
        assert torch.allclose(found[0, i].double(), want, rtol=1e-5, atol=1e-5)


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kasa_runtime.engine.native.cuda.kernels import _expand, _shrink

types = {name: "*i64" for name in ("factors", "hidden")}
types |= {name: "*i32" for name in ("order", "adapters", "merged")}
types |= {name: "*" + sys.argv[2] for name in "xy"}
sizes = {"SPLIT_IN": 1024, "BLOCK_IN": 128, "BLOCK_OUT": 64}
sizes |= {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16}
for kernel in (_shrink, _expand):
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]
"""


@pytest.mark.parametrize(("capability", "dtype"), [("80", "bf16"), ("90", "bf16"), ("75", "fp16")])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(capability: str, dtype: str) -> None:
    """What the interpreter takes need not be what the compiler takes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, capability, dtype]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])


def test_a_model_with_these_deltas_has_the_logits_of_the_adapted_one(
    tiny_llama: Path,
    bare: Any,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_executor, "_has_triton", lambda device: True)
    settings = config(device=DEVICE.type, cuda_graphs=False)
    executor = torch_executor.TorchExecutor(tiny_llama, settings)
    for slot, adapter in enumerate(adapters):
        executor.prepare_slots({slot: adapter}, tails)()
    models = [bare, *(load_adapted(tiny_llama, adapter, tails) for adapter in adapters)]
    slots = [1, NO_SLOT, 0, 2]
    parts = [SequenceSlice(3 + i, 0, range(2 * i, 2 * i + 2), s) for i, s in enumerate(slots)]
    ids = [prompt(part.num_tokens, seed=i) for i, part in enumerate(parts)]
    tokens = [token for own in ids for token in own]
    batch = PackedBatch.pack(tokens, parts, list(range(len(tokens))))
    for merged in (NO_SLOT, 2):
        if merged != NO_SLOT:
            executor.prepare_merge(merged, tails)()
        logits = executor.run(batch).cpu().split([len(own) for own in ids])
        for slot, found, own in zip(slots, logits, ids, strict=True):
            assert float((found - logits_of(models[slot + 1], own)).abs().max()) < 2e-4
