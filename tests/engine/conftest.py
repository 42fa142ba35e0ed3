from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.architectures import SERVED
from engine.making import MemoryTails, load_model, make_deltas, require_openvino, save_model
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.native.executor import Executor
from kasa_runtime.engine.native.torch_executor import TorchExecutor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of an architecture in SERVED; made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_model(SERVED[name], tmp_path_factory.mktemp("served") / name)
        return made[name]

    return get


@pytest.fixture(scope="module", params=["torch", "openvino"])
def executor_class(request: pytest.FixtureRequest) -> type[Executor]:
    """Each executor in turn."""
    if request.param == "torch":
        return TorchExecutor
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
