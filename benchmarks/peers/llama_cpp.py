"""llama.cpp through its C interface, on the base model: prompts in batches of BATCH_TOKENS, then
one batch per decode step with a token of every request."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.child import Arrivals, Peer, serve

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
