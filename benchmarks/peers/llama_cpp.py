"""llama.cpp through its C interface: prompts in batches of BATCH_TOKENS, then one batch per decode
step with a token of every request. An adapter holds for all rows of a batch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.cases import adapter_name
from benchmarks.peers.child import Arrivals, Peer, serve
from benchmarks.peers.export_gguf import write_adapter

BATCH_TOKENS = 512
CONTEXT_STEP = 256  # what llama.cpp pads a sequence's context to


class LlamaCpp(Peer):
    """Its own setting is `converted`, the GGUF file."""

    packages = ("llama-cpp-python",)

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            settings["converted"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['converted']}; see the log")
        num_seqs = settings["max_concurrency"]
        length = -(-settings["max_model_len"] // CONTEXT_STEP) * CONTEXT_STEP
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = num_seqs * length
        options.n_seq_max = num_seqs
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = settings["threads"]
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(
                f"llama.cpp refuses a context of {options.n_ctx} tokens; see the log"
            )
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, num_seqs), 0, 1)
        self._adapter = self._load_adapter(settings) if settings["num_adapters"] else None
        self._held = 0

    def _load_adapter(self, settings: dict[str, Any]) -> Any:
        path = Path(settings["scratch_dir"], f"{adapter_name(0)}.gguf")
        write_adapter(Path(settings["adapters_dir"], adapter_name(0)), settings["model"], path)
        adapter = llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp cannot load {path}; see the log")
        return adapter

    def prepare(self, num_held: int, merged: bool) -> bool:
        if num_held == self._held:
            return False
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if status := llama_cpp.llama_set_adapters_lora(self._context, adapters, num_held, scales):
            raise RuntimeError(f"llama_set_adapters_lora returned {status}")
        self._held = num_held
        return True

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        arrivals = Arrivals(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        last = [0] * len(prompts)

        def step(rows: list[tuple[int, int, int]]) -> None:
            for request, token_id in self._decode(rows, prompts):
                arrivals.add(request, [token_id])
                last[request] = token_id

        flat = [(i, j, token) for i, ids in enumerate(prompts) for j, token in enumerate(ids)]
        for start in range(0, len(flat), BATCH_TOKENS):
            step(flat[start : start + BATCH_TOKENS])
        for generated in range(tokens - 1):
            step([(i, len(ids) + generated, last[i]) for i, ids in enumerate(prompts)])
        return arrivals

    def _decode(
        self, rows: list[tuple[int, int, int]], prompts: list[list[int]]
    ) -> list[tuple[int, int]]:
        """One batch of (request, position, token id); the most likely next token of each request
        whose prompt is at its end."""
        batch = self._batch
        batch.n_tokens = len(rows)
        wanted = []
        for row, (request, position, token_id) in enumerate(rows):
            batch.token[row], batch.pos[row] = token_id, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, request
            batch.logits[row] = position >= len(prompts[request]) - 1
            if batch.logits[row]:
                wanted.append((row, request))
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [(request, self._greedy(row)) for row, request in wanted]

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
