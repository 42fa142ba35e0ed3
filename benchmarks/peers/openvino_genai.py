"""OpenVINO GenAI's continuous batching pipeline on the base model, stepped in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.child import KV_CACHE_GIB, Arrivals, Peer, serve


class OpenVinoGenAi(Peer):
    """Its own setting is `converted`, a directory with the model's IR."""

    packages = ("openvino-genai", "openvino")

    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.enable_prefix_caching = False
        # float32 as everybody else: the plugin's defaults are bfloat16 where the CPU has it, and an
        # 8-bit cache.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": settings["threads"],
        }
        self._pipeline = genai.ContinuousBatchingPipeline(
            settings["converted"], scheduler, "CPU", options
        )
        self._num_requests = 0

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        config = genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        for prompt in prompts:
            self._num_requests += 1
            ids = ov.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._num_requests, ids, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for i, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        arrivals.add(i, list(output.generated_ids))
        return arrivals


if __name__ == "__main__":
    serve(OpenVinoGenAi)
