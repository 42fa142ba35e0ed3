"""Tiny models of several architectures, adapters for them, and engines that run both."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import Tail, compute_tail
from kasa_runtime.adapter.lora import AdapterWeights, ModuleDelta
from kasa_runtime.engine.base import EngineOutput, EngineRequest
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.engine import NativeEngine
from kasa_runtime.engine.native.torch_executor import TorchExecutor
from kasa_runtime.errors import ModelError
from kasa_runtime.types import FinishReason, SamplingParams

BLOCK_BYTES = 4 * 2 * 3 * 2 * 16 * 4  # of the tiny Llama: four tokens, three layers, float32


def config(**changes: Any) -> EngineConfig:
    """Small blocks, so that every test crosses some; one thread."""
    small: dict[str, Any] = {"executor": "torch", "threads": 1, "device": "cpu"}
    small |= {"dtype": "float32", "block_size": 4, "kv_cache_gib": 0.01, "max_num_seqs": 16}
    return EngineConfig(**{**small, **changes})


def few_blocks(count: int) -> dict[str, float]:
    """The setting under which the tiny Llama gets `count` blocks of four tokens."""
    return {"kv_cache_gib": count * BLOCK_BYTES / 2**30}


def require_openvino() -> None:
    """Skip the test where the openvino executor cannot be had."""
    pytest.importorskip("openvino")
    from kasa_runtime.engine.native.openvino.native import find_compiler

    try:
        find_compiler()
    except ModelError as error:
        pytest.skip(str(error))


def save_model(model_config: PreTrainedConfig, directory: Path, *, seed: int = 0) -> Path:
    """A model with weights large enough for every part of it to show in the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
    model.save_pretrained(directory)
    return directory


def load_model(model_dir: Path) -> Any:
    """In transformers, with its own attention; the fused one leaves Gemma's soft-capping out."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def prompt(length: int, seed: int = 0, vocab: int = 128) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=draw).tolist()


@torch.no_grad()
def logits_of(model: Any, token_ids: Sequence[int]) -> Tensor:
    """transformers' own forward, no cache: (tokens, vocab)."""
    return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(model: Any, token_ids: Sequence[int], count: int) -> list[int]:
    """What transformers' own generate gives, up to and with the end of sequence."""
    ids = torch.tensor([list(token_ids)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return out[0, len(token_ids) :].tolist()


@dataclass
class MemoryTails:
    """A TailSource over a model directory that keeps nothing on disk."""

    base: BaseModel
    _known: dict[tuple[str, int], Tail] = field(default_factory=dict)

    def get(self, module: str, t: int) -> Tail:
        if (module, t) not in self._known:
            self._known[module, t] = compute_tail(self.base.weight(module), t)
        return self._known[module, t]


def make_deltas(
    base: BaseModel,
    key: str,
    targets: Sequence[str],
    *,
    r: int,
    t: int = 0,
    seed: int = 0,
    scale: float = 0.15,
    only: str = "",
) -> AdapterWeights:
    """A folded adapter on the layers whose path ends in one of `targets` and contains `only`.
    `t` is 0 for plain LoRA."""
    draw = torch.Generator().manual_seed(seed)
    modules: dict[str, ModuleDelta] = {}
    for name, shape in base.modules.items():
        if name.rpartition(".")[2] not in targets or only not in name:
            continue
        a = scale * torch.randn(r, shape.in_features, generator=draw)
        b = scale * torch.randn(shape.out_features, r, generator=draw)
        modules[name] = ModuleDelta(a, b, t)
    assert modules
    return AdapterWeights(key, modules)


def load_adapted(model_dir: Path, adapter: AdapterWeights, tails: MemoryTails) -> Any:
    """transformers' model with W + b a - P Q in the place of W."""
    return add_deltas(load_model(model_dir), adapter, tails)


@torch.no_grad()
def add_deltas(model: Any, adapter: AdapterWeights, tails: MemoryTails) -> Any:
    """The model itself, b a - P Q added to its weights in float64."""
    for name, delta in adapter.modules.items():
        layer = model.get_submodule(name)
        total = delta.b.double() @ delta.a.double()  # (out, r) @ (r, in)
        if delta.t:
            tail = tails.get(name, delta.t)
            total -= tail.p.double() @ tail.q.double()
        total = total.T if isinstance(layer, Conv1D) else total
        layer.weight.copy_(layer.weight.double() + total)
    return model


@asynccontextmanager
async def running(
    model_dir: Path,
    tails: Any = None,
    adapters: Sequence[AdapterWeights] = (),
    make: Any = TorchExecutor,
    tokenizer: Any = None,
    **changes: Any,
) -> AsyncIterator[NativeEngine]:
    """A started engine with these adapters loaded; closed at the end."""
    settings = config(**changes)
    tails = tails or MemoryTails(BaseModel(model_dir))
    engine = NativeEngine(settings, lambda: make(model_dir, settings), tails, tokenizer)
    await engine.start()
    try:
        for adapter in adapters:
            await engine.load_adapter(adapter)
        yield engine
    finally:
        await engine.close()


def request(
    name: str,
    token_ids: Sequence[int],
    count: int | None = 8,
    adapter: str | None = None,
    **fields: Any,
) -> EngineRequest:
    """`fields` are EngineRequest's own, and those of its SamplingParams."""
    names = {each.name for each in dataclasses.fields(EngineRequest)}
    own = {name: fields.pop(name) for name in names & fields.keys()}
    params = SamplingParams(max_tokens=count, **fields)
    return EngineRequest(name, tuple(token_ids), params, adapter, **own)


@dataclass
class Result:
    """All outputs of one request, joined."""

    outputs: list[EngineOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [t for o in self.outputs for t in o.token_ids]

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def modes(self) -> list[str]:
        return [o.mode.value for o in self.outputs]


async def collect(engine: NativeEngine, wanted: EngineRequest) -> Result:
    return Result([output async for output in engine.generate(wanted)])


async def collect_all(
    engine: NativeEngine, wanted: Sequence[EngineRequest]
) -> Mapping[str, Result]:
    """Run them at the same time; results by request id."""
    results = await asyncio.gather(*(collect(engine, w) for w in wanted))
    return {w.request_id: r for w, r in zip(wanted, results, strict=True)}


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait for something that happens on another thread."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
