"""Our server, driven over its OpenAI-compatible API: `kasa serve` in a process of its own, a client
in this one that does no more than it must."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from benchmarks.peers.child import Arrivals, serve
from benchmarks.peers.served import Served


class ServedHttp(Served):
    """Adapters are held and merged over gRPC."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._base = Path(settings["model"]).name

    async def _run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        loop = asyncio.get_running_loop()
        host, _, port = self._http_address.rpartition(":")

        async def one(i: int) -> None:
            asked = {
                "model": adapters[i] or self._base,
                "prompt": prompts[i],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
            }
            answer = Answer(arrivals, i, json.dumps(asked).encode())
            transport, _ = await loop.create_connection(lambda: answer, host, int(port))
            try:
                await answer.ended
            finally:
                transport.close()

        await asyncio.gather(*(one(i) for i in range(len(prompts))))
        return arrivals


class Answer(asyncio.Protocol):
    """Sends one request, and reads the events of its answer."""

    def __init__(self, arrivals: Arrivals, request: int, body: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals = arrivals
        self._request = request
        self._body = body
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
        transport.write(
            f"{head}\r\ncontent-length: {len(self._body)}\r\n\r\n".encode() + self._body
        )

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                [choice] = json.loads(line[6:])["choices"]
                self._arrivals.add(self._request, choice["token_ids"])
            elif line.startswith(b"data: [DONE]") and not self.ended.done():
                self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the answer has no end"))


if __name__ == "__main__":
    serve(ServedHttp)
