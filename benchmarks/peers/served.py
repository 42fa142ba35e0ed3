"""Our server, driven over gRPC: `kasa serve` in a process of its own, its client in this one."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from typing import Any

from benchmarks.peers.child import KV_CACHE_GIB, Arrivals, Peer, serve
from benchmarks.peers.holding import hold, own_copy
from kasa_runtime.client import AsyncClient
from kasa_runtime.types import SamplingParams

SETTLED_S = 5.0
"""What goes on beside the steps after a start and after a merge has ended by then."""


class Served(Peer):
    """Its own settings are `module`, which serves, and `flags`, more of `kasa serve`."""

    packages = ("kasa-runtime", "grpcio", "openvino", "torch", "transformers")

    def __init__(self, settings: dict[str, Any]) -> None:
        self._loop = asyncio.Runner()
        command = [sys.executable, "-m", settings["module"], "serve", *settings["flags"]]
        command += ["--model", settings["model"], "--adapters-dir", str(own_copy(settings))]
        command += ["--host", "127.0.0.1", "--grpc-port", "0", "--http-port", "0"]
        command += ["--threads", str(settings["threads"]), "--kv-cache-gib", str(KV_CACHE_GIB)]
        command += ["--max-slots", str(max(1, settings["num_adapters"])), "--no-prefix-caching"]
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        found = re.search(r"grpc=(\S+) http=(\S+)", self._server.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start; see its log")
        self._client = self._loop.run(_open(found[1]))
        self._http_address = found[2]
        self._held = 0
        self._merged = False
        time.sleep(SETTLED_S)

    def prepare(self, num_held: int, merged: bool) -> bool:
        if (num_held, merged) == (self._held, self._merged):
            return False
        self._loop.run(hold(self._client, self._held, num_held, merged))
        self._held, self._merged = num_held, merged
        time.sleep(SETTLED_S)
        return True

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        return self._loop.run(self._run(prompts, adapters, tokens))

    async def _run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

        async def one(i: int) -> None:
            stream = self._client.stream(
                token_ids=prompts[i], adapter=adapters[i], sampling=sampling
            )
            async for chunk in stream:
                arrivals.add(i, list(chunk.token_ids))

        await asyncio.gather(*(one(i) for i in range(len(prompts))))
        return arrivals


async def _open(address: str) -> AsyncClient:
    return AsyncClient(address)  # on the loop that it is used on


if __name__ == "__main__":
    serve(Served)
