"""`/v1/models`, and vLLM's two endpoints that load and unload an adapter."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kasa_runtime.errors import AdapterNotFound, InvalidRequest
from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import not_found
from kasa_runtime.types import BASE, AdapterInfo, AdapterState
from server import convert
from server.adapters import Adapters
from server.http.body import read_json
from server.http.calls import HttpCall
from server.http.openai.conversion import adapter_of
from server.http.openai.parsing import parse
from server.http.openai.requests import LoadAdapter, UnloadAdapter

OWNER = "kasa"


class Models:
    """The base model, and every adapter that is served and that the caller may see."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._created_s = time.time()

    async def list(self, request: Request, call: HttpCall) -> Response:
        models = [self._base()] if call.caller.sees(BASE) else []
        models += [
            self._adapter(info.name, info)
            for info in self._runtime.list_adapters()
            if info.state is not AdapterState.QUARANTINED and call.caller.sees(info.name)
        ]
        return JSONResponse({"object": "list", "data": models})

    async def get(self, request: Request, call: HttpCall) -> Response:
        name = request.path_params["model"]
        adapter = adapter_of(name, self._runtime.model.name)
        if not call.caller.sees(adapter):
            raise AdapterNotFound(not_found(name), name=name)
        if adapter == BASE:
            return JSONResponse(self._base())
        info = await self._runtime.get_adapter(adapter)
        if info.state is AdapterState.QUARANTINED:
            raise AdapterNotFound(f"{name} is in quarantine: {info.reason}", name=info.name)
        return JSONResponse(self._adapter(name, info))

    def _base(self) -> dict[str, Any]:
        name = self._runtime.model.name
        return self._model(name, self._created_s, root=name, parent=None)

    def _adapter(self, name: str, info: AdapterInfo) -> dict[str, Any]:
        base = self._runtime.model.name
        model = self._model(name, info.create_time, root=base, parent=base)
        return {**model, "version": info.version}

    def _model(self, name: str, created_s: float, **fields: Any) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(created_s),
            "owned_by": OWNER,
            **fields,
            "max_model_len": self._runtime.model.context_length,
        }


class LoraAdapters:
    """Adapters come from the adapters directory, and from nowhere else."""

    def __init__(self, adapters: Adapters, adapters_dir: Path, max_bytes: int) -> None:
        self._adapters = adapters
        self._adapters_dir = adapters_dir
        self._max_bytes = max_bytes

    async def load(self, request: Request, call: HttpCall) -> Response:
        """Bring an adapter into memory ahead of its first request. One that is there already is no
        error, as it is in vLLM: requests load adapters, too."""
        asked = parse(LoadAdapter, await read_json(request, self._max_bytes))
        name = convert.adapter_name("lora_name", asked.lora_name)
        self._check_path(name, asked.lora_path)
        await self._adapters.load(call.caller, name, pin=False)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request, call: HttpCall) -> Response:
        """Free its place. It is served still, and comes back with its next request."""
        asked = parse(UnloadAdapter, await read_json(request, self._max_bytes))
        name = convert.adapter_name("lora_name", asked.lora_name)
        await self._adapters.unload(call.caller, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_path(self, name: str, path: str) -> None:
        """Compares names and looks at no file, so it tells nothing about those of the machine."""
        given = os.path.abspath(path) if os.sep in path else path
        if given not in (name, os.path.abspath(self._adapters_dir / name)):
            raise InvalidRequest(
                "lora_path",
                f"must be {name!r} or that directory under the adapters directory, for this server "
                "takes adapters from nowhere else; upload it, or copy it there",
            )
