from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from adapter.bench import Bench
from adapter.making import ALL_LINEAR, PeftAdapter, make_with_peft, write_adapter
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.tails import TailCache

settings.register_profile("shared machine", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def base(tiny_llama: Path, session_home: Path) -> BaseModel:
    """The tiny Llama as adapters see it, its fingerprint and layers already known."""
    base = BaseModel(tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KASA_HOME", str(session_home))
        assert base.fingerprint and base.modules
    return base


@pytest.fixture
def tails(base: BaseModel) -> TailCache:
    return TailCache(base)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty KASA_HOME of the test's own."""
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def put(base, root: Path) -> Callable[..., str]:
    """Put an adapter into the directory, as people do; its version. `seed` changes its content."""

    def put(name: str, seed: int = 0, **options: object) -> str:
        return content_digest(write_adapter(root / name, base, seed=seed, **options))

    return put


@pytest.fixture
def start(root: Path, tails) -> Callable[..., object]:
    """`async with start(max_slots=2) as bench`: a manager that has taken in the directory."""

    @asynccontextmanager
    async def start(max_slots: int = 2, **options: Any) -> AsyncIterator[Bench]:
        bench = Bench(root, tails, max_slots, **options)
        async with asyncio.timeout(300):
            await bench.manager.start(bench.start_wait_s)
            try:
                yield bench
            finally:
                await bench.manager.close()
        assert bench.host.loaded.keys() == bench.manager._residency._resident.keys()

    return start


PEFT_OPTIONS = {
    "kasa": {"r": 4, "lora_alpha": 8, "target_modules": list(ALL_LINEAR), "kasa_config": {}},
    "kasa_rectangular": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["k_proj", "down_proj", "gate_proj"],
        "kasa_config": {},
    },
    "kasa_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ALL_LINEAR),
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"q_proj": 3, "^model.layers.2.self_attn.v_proj": 20},
        "kasa_config": {},
    },
    "kasa_rslora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ALL_LINEAR),
        "use_rslora": True,
        "kasa_config": {},
    },
    "kasa_some_layers": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 2],
        "kasa_config": {},
    },
    "kasa_regex": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj",
        "exclude_modules": r".*\.1\.mlp\.down_proj",
        "kasa_config": {},
    },
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}


@pytest.fixture(scope="session")
def peft_adapter(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PeftAdapter]:
    """Makes, once each, the adapter that PEFT makes with PEFT_OPTIONS of that name. Read only."""
    made: dict[str, PeftAdapter] = {}

    def get(name: str) -> PeftAdapter:
        if name not in made:
            directory = tmp_path_factory.mktemp("peft") / name
            made[name] = make_with_peft(tiny_llama, directory, PEFT_OPTIONS[name])
        return made[name]

    return get
