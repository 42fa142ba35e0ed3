"""KaSA Runtime's embedded engine, driven through `Runtime` as an application would."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

from benchmarks.peers.child import KV_CACHE_GIB, Arrivals, Peer, serve
from benchmarks.peers.holding import hold, own_copy
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import GenerationRequest, SamplingParams


class Ours(Peer):
    """Its own setting is `engine`, fields of EngineConfig."""

    packages: tuple[str, ...] = ("kasa-runtime", "openvino", "torch", "transformers")
    kind: Literal["native", "vllm"] = "native"

    def __init__(self, settings: dict[str, Any]) -> None:
        self._loop = asyncio.Runner()
        adapters_dir = own_copy(settings)
        native = EngineConfig(
            **{
                "threads": settings["threads"],
                "kv_cache_gib": KV_CACHE_GIB,
                "max_slots": max(1, settings["num_adapters"]),
                "prefix_caching": False,  # all rounds have the same prompts
                **settings["engine"],
            }
        )
        config = RuntimeConfig(settings["model"], adapters_dir, engine=self.kind, native=native)
        self._runtime = self._loop.run(Runtime.create(config))
        wait_until_settled()
        self._held = 0
        self._merged = False
        self._num_requests = 0

    def prepare(self, num_held: int, merged: bool) -> bool:
        if (num_held, merged) == (self._held, self._merged):
            return False
        self._loop.run(hold(self._runtime, self._held, num_held, merged))
        self._held, self._merged = num_held, merged
        wait_until_settled()
        return True

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        return self._loop.run(self._run(prompts, adapters, tokens))

    async def _run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

        async def one(i: int) -> None:
            self._num_requests += 1
            request = GenerationRequest(
                str(self._num_requests),
                adapters[i],
                token_ids=tuple(prompts[i]),
                sampling=sampling,
            )
            async for chunk in self._runtime.generate(request):
                arrivals.add(i, list(chunk.token_ids))

        await asyncio.gather(*(one(i) for i in range(len(prompts))))
        return arrivals


def wait_until_settled() -> None:
    """For what goes on beside the steps for a second or two after a start and after a merge."""
    for thread in threading.enumerate():
        if thread.name in ("kasa-huge-pages", "kasa-release"):
            thread.join()


if __name__ == "__main__":
    serve(Ours)
