"""vLLM on the CPU, with a LoRA adapter per request where there are adapters.

Its engine core and its worker are processes of their own, as always on the CPU. The driver binds
the worker's threads with VLLM_CPU_OMP_THREADS_BIND and sizes the KV cache with
VLLM_CPU_KVCACHE_SPACE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from benchmarks.peers.cases import adapter_name
from benchmarks.peers.child import Arrivals, Peer, serve


class Vllm(Peer):
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, settings: dict[str, Any]) -> None:
        num_adapters = settings["num_adapters"]
        lora = {"enable_lora": True, "max_loras": num_adapters, "max_lora_rank": 8}
        arguments = EngineArgs(
            settings["model"],
            dtype="float32",
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_concurrency"],
            enable_prefix_caching=False,
            **(lora if num_adapters else {}),  # with it, the base is slower too
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._loras = {
            adapter_name(i): LoRARequest(
                adapter_name(i), i + 1, str(Path(settings["adapters_dir"], adapter_name(i)))
            )
            for i in range(num_adapters)
        }

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            lora = self._loras[adapter] if adapter else None
            self._engine.add_request(
                str(i), {"prompt_token_ids": prompt}, sampling, lora_request=lora
            )
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                arrivals.add(int(output.request_id), list(output.outputs[0].token_ids))
        return arrivals


if __name__ == "__main__":
    serve(Vllm)
