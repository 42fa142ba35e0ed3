"""A server whose caches are warm starts without what is slow to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter.making import ALL_LINEAR, write_adapter

from kasa_runtime.adapter.base import BaseModel

SERVE = """
import asyncio, json, sys
from pathlib import Path
import server.app
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import ChatMessage, GenerationRequest, SamplingParams

async def main(model, adapters):
    native = EngineConfig(executor="openvino", kv_cache_gib=0.01)
    config = RuntimeConfig(model=model, adapters_dir=Path(adapters), native=native)
    async with await Runtime.create(config) as runtime:
        chat, sampling = (ChatMessage("user", "fox"),), SamplingParams(max_tokens=4)
        request = GenerationRequest("1", "alpha", messages=chat, sampling=sampling)
        tokens = [t async for chunk in runtime.generate(request) for t in chunk.token_ids]
    print(json.dumps({"tokens": tokens, "modules": sorted(sys.modules)}))

asyncio.run(main(*sys.argv[1:]))
"""


def serve(model: Path, adapters: Path) -> dict[str, list[object]]:
    command = [sys.executable, "-c", SERVE, str(model), str(adapters)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_second_start_does_not_import_transformers(tiny_chat_model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    write_adapter(
        tmp_path / "adapters" / "alpha", BaseModel(tiny_chat_model), targets=ALL_LINEAR, r=4
    )
    first = serve(tiny_chat_model, tmp_path / "adapters")
    second = serve(tiny_chat_model, tmp_path / "adapters")
    assert any(name.startswith("transformers.models.llama.modeling") for name in first["modules"])
    slow = {"transformers", "httpx"}
    assert not [name for name in second["modules"] if str(name).partition(".")[0] in slow]
    assert second["tokens"] == first["tokens"]
    assert first["tokens"]
