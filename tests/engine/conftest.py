from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.architectures import SERVED
from engine.making import MemoryTails, load_model, make_deltas, require_openvino, save_model
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.executor import Executor, PackedBatch
from kasa_runtime.engine.native.torch_executor import TorchExecutor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What vLLM imports warns of its own code; those warnings are nobody's errors here."""
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of an architecture in SERVED; made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_model(SERVED[name], tmp_path_factory.mktemp("served") / name)
        return made[name]

    return get


class CudaExecutor(TorchExecutor):
    """The torch executor on a GPU, with results on the CPU; the settings' blocks, so no graphs."""

    def __init__(self, model_dir: Path, settings: EngineConfig) -> None:
        super().__init__(model_dir, replace(settings, device="cuda", cuda_graphs=False))

    def run(self, batch: PackedBatch) -> Tensor:
        return super().run(batch).cpu()

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.cpu() for name, weight in super().weights().items()}


@pytest.fixture(
    scope="module", params=["torch", "openvino", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def executor_class(request: pytest.FixtureRequest) -> type[Executor]:
    """Each executor in turn."""
    if request.param == "torch":
        return TorchExecutor
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return CudaExecutor
    require_openvino()
    from kasa_runtime.engine.native.openvino.executor import OpenVinoExecutor

    return OpenVinoExecutor


@pytest.fixture(scope="session")
def base(tiny_llama: Path) -> BaseModel:
    return BaseModel(tiny_llama)


@pytest.fixture(scope="session")
def tails(base: BaseModel) -> MemoryTails:
    return MemoryTails(base)


@pytest.fixture(scope="session")
def bare(tiny_llama: Path) -> Any:
    """The tiny Llama in transformers, untouched."""
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def adapters(base: BaseModel) -> list[AdapterWeights]:
    """KaSA everywhere, KaSA of another rank on some layers, plain LoRA of a third on others."""
    return [
        make_deltas(base, "kasa@1", ATTENTION + MLP, r=4, t=4, seed=1),
        make_deltas(base, "kasa-wide@1", ("q_proj", "k_proj", "down_proj"), r=8, t=6, seed=2),
        make_deltas(base, "lora@1", ("q_proj", *MLP), r=3, seed=3),
    ]
