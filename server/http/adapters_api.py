"""`/kasa/v1`: the model and its adapters as JSON; what gRPC's AdapterService does."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.runtime import Runtime
from kasa_runtime.tokens import Action, Caller
from kasa_runtime.types import BASE, AdapterInfo, UploadManifest
from server import convert
from server.access import Gate
from server.adapters import Adapters
from server.http.calls import Endpoint, HttpCall
from server.http.multipart import ENVELOPE_BYTES, received_files
from server.metrics import OTHER_LABEL, Metrics
from server.recent import WINDOW_S

PREFIX = "/kasa/v1"
ADAPTER = "/adapters/{name}"


class AdaptersApi:
    """An adapter is answered with what `kasa adapters list --json` has, its latency of the last
    minutes, and what the caller may do with it."""

    def __init__(self, runtime: Runtime, adapters: Adapters, gate: Gate, metrics: Metrics) -> None:
        self._runtime = runtime
        self._adapters = adapters
        self._gate = gate
        self._metrics = metrics

    def routes(self) -> list[Route]:
        handlers = {
            ("GET", "/model"): self.model,
            ("GET", "/adapters"): self.list,
            ("GET", ADAPTER): self.get,
            ("GET", f"{ADAPTER}/versions"): self.versions,
            ("PUT", ADAPTER): self.upload,
            ("DELETE", ADAPTER): self.delete,
            ("POST", f"{ADAPTER}/load"): self.load,
            ("POST", f"{ADAPTER}/unload"): self.unload,
            ("POST", f"{ADAPTER}/merge"): self.merge,
            ("POST", f"{ADAPTER}/rollback"): self.rollback,
            ("POST", "/unmerge"): self.unmerge,
        }
        return [
            Route(PREFIX + path, Endpoint(self._gate, handle), methods=[method])
            for (method, path), handle in handlers.items()
        ]

    async def model(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        return JSONResponse(asdict(self._runtime.model))

    async def list(self, request: Request, call: HttpCall) -> Response:
        """With what of the base model and of the merged adapter the caller may see."""
        _query(request)
        caller = call.caller
        merged = self._runtime.stats().merged_adapter
        base = {"latency": self._latency(BASE), "may": _permitted(caller, BASE)}
        body = {
            "adapters": [self._adapter(caller, info) for info in self._adapters.visible(caller)],
            "base": base if caller.sees(BASE) else None,
            "merged": merged if merged and caller.sees(merged) else "",
            "window_s": WINDOW_S,
        }
        return JSONResponse(body)

    async def get(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        return self._answer(call, await self._adapters.get(call.caller, _name(request)))

    async def versions(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        versions = await self._adapters.versions(call.caller, _name(request))
        return JSONResponse({"versions": [asdict(version) for version in versions]})

    async def upload(self, request: Request, call: HttpCall) -> Response:
        """Refused as early as can be: nothing that is too large or not permitted is received."""
        name = _name(request)
        expected = _query(request, "expected_version").get("expected_version")
        with self._adapters.rejections():
            convert.adapter_name("name", name)
            announced = int(request.headers.get("content-length", 0)) - ENVELOPE_BYTES
            self._adapters.admit_upload(call.caller, call.client, name, max(0, announced))
        async with AsyncExitStack() as stack:
            with self._adapters.rejections():
                received = received_files(request, self._gate.require_upload_size)
                files = await stack.enter_async_context(received)
                entries = tuple(file.entry for file in files)
                self._gate.require_upload_size(sum(entry.size_bytes for entry in entries))
                manifest = convert.manifest(UploadManifest(name, entries, expected))
            upload = await stack.enter_async_context(self._runtime.upload(manifest))
            for file in files:
                async for offset, data in file.chunks():
                    await upload.write(file.entry.path, offset, data)
            return self._answer(call, await upload.commit(), status=201)

    async def delete(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        await self._adapters.delete(call.caller, _name(request))
        return Response(status_code=204)

    async def load(self, request: Request, call: HttpCall) -> Response:
        """`?pin=true`: and keep it."""
        pin = _query(request, "pin").get("pin", "false")
        if pin not in ("true", "false"):
            raise InvalidRequest("pin", f"must be true or false, got {pin[:80]!r}")
        info = await self._adapters.load(call.caller, _name(request), pin=pin == "true")
        return self._answer(call, info)

    async def unload(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        return self._answer(call, await self._adapters.unload(call.caller, _name(request)))

    async def merge(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        return self._answer(call, await self._adapters.merge(call.caller, _name(request)))

    async def rollback(self, request: Request, call: HttpCall) -> Response:
        """`?version=…`; without it, to the one before."""
        version = _query(request, "version").get("version", "")
        info = await self._adapters.rollback(call.caller, _name(request), version)
        return self._answer(call, info)

    async def unmerge(self, request: Request, call: HttpCall) -> Response:
        _query(request)
        await self._adapters.unmerge(call.caller)
        return Response(status_code=204)

    def _answer(self, call: HttpCall, info: AdapterInfo, status: int = 200) -> Response:
        call.facts["adapter"] = f"{info.name}@{info.version}"
        return JSONResponse(self._adapter(call.caller, info), status)

    def _adapter(self, caller: Caller, info: AdapterInfo) -> dict[str, Any]:
        readable = bool(info.rank)
        fields = asdict(info) | {"method": info.method if readable else None}
        latency = self._latency(info.name)
        return {**fields, "latency": latency, "may": _permitted(caller, info.name)}

    def _latency(self, adapter: str) -> dict[str, Any] | None:
        """None for one that is not counted by itself."""
        label = self._metrics.label(adapter)
        return None if label == OTHER_LABEL else asdict(self._metrics.recent.latency(label))


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _query(request: Request, *known: str) -> dict[str, str]:
    """The parameters of the address. Raises InvalidRequest for others than `known`."""
    given = dict(request.query_params)
    if unknown := sorted(given.keys() - set(known)):
        wanted = f"want {', '.join(known)}" if known else "want none"
        raise InvalidRequest(unknown[0][:80], f"is no parameter of this address; {wanted}")
    return given


def _permitted(caller: Caller, adapter: str) -> list[str]:
    return [action for action in Action if caller.may(action, adapter)]
