"""kasa.v1.ModelService over the runtime."""

from __future__ import annotations

import asyncio
from typing import Any

from kasa.v1 import model_pb2

from kasa_runtime.runtime import Runtime
from server import convert
from server.access import Gate
from server.rpc import RpcCall, rpc


class ModelService:
    def __init__(self, runtime: Runtime, gate: Gate) -> None:
        self._runtime = runtime
        self.gate = gate

    @rpc
    async def GetModel(self, message: Any, call: RpcCall) -> Any:
        return model_pb2.GetModelResponse(model=convert.model(self._runtime.model))

    @rpc
    async def Tokenize(self, message: Any, call: RpcCall) -> Any:
        arguments = convert.tokenize_input(message)
        # In a thread: a text of megabytes would hold up every stream.
        token_ids = await asyncio.to_thread(self._runtime.tokenize, **arguments)
        return model_pb2.TokenizeResponse(token_ids=token_ids)
