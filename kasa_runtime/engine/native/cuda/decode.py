"""Decode steps on fixed buffers, replayed from CUDA graphs.

A step with one token of each sequence is filled up to the next of a few sizes, its inputs are
copied to where they always lie, and the forward captured for this size is replayed. There are two
captures of each size, as steps without adapters do without their kernels.

A change of adapters invalidates no capture, so nothing is captured while requests wait: kernels of
deltas read addresses from device memory (see kernels.py), and merged weights are written in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kasa_runtime.engine.native.adapted_linear import Deltas
from kasa_runtime.engine.native.cuda.attention import DecodePlan, compiled_flex_attention
from kasa_runtime.engine.native.executor import PackedBatch
from kasa_runtime.engine.native.paged_attention import KvCache

Forward = Callable[[Tensor, Tensor, DecodePlan], Tensor]
"""(token ids (n,), positions (n,), plan) -> logits (n, vocab) float32."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a function on fixed buffers one that does the same, and returns the same tensor each
time."""
MAX_COMPILED = 64
"""Versions of flex_attention: one per batch size and kind of layer; torch's own limit is 8."""


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest`."""
    return [*(2**i for i in range((largest - 1).bit_length())), largest]


def capture_decode_steps(
    forward: Forward, cache: KvCache, deltas: Deltas, max_num_seqs: int
) -> DecodeSteps:
    """Decode steps as CUDA graphs. Raises what torch's compiler, CUDA and the model may raise."""
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
        return DecodeSteps(
            forward,
            cache,
            deltas,
            max_num_seqs,
            flex_attention=compiled_flex_attention(),
            capture=GraphCapture(),
        )


class DecodeSteps:
    """Step thread only. `max_num_seqs` sequences at most."""

    def __init__(
        self,
        forward: Forward,
        cache: KvCache,
        deltas: Deltas,
        max_num_seqs: int,
        *,
        flex_attention: Callable[..., Tensor],
        capture: Capture,
    ) -> None:
        device = cache.keys[0].device
        self._forward = forward
        self._cache = cache
        self._deltas = deltas
        self._flex_attention = flex_attention
        self._total_blocks = cache.keys[0].shape[0] // cache.block_size
        self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._new_slots = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._num_blocks = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(
            max_num_seqs, self._total_blocks, dtype=torch.int32, device=device
        )
        self._sizes = batch_sizes(max_num_seqs)
        self._steps: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            for with_deltas in (True, False):
                self._prepare(size, with_deltas, capture)

    def takes(self, batch: PackedBatch) -> bool:
        """Whether `run` can run it."""
        few = len(batch.sequences) <= self._sizes[-1]
        return few and all(s.num_tokens == 1 for s in batch.sequences)

    def run(self, batch: PackedBatch) -> Tensor:
        """Logits (num_logits, vocab) float32 of one token of each sequence."""
        size = next(size for size in self._sizes if size >= len(batch.sequences))
        self._fill(batch, size)
        logits = self._steps[size, self._deltas.active]()
        return logits[batch.logit_rows.to(logits.device)]

    def _prepare(self, size: int, with_deltas: bool, capture: Capture) -> None:
        def step() -> Tensor:
            plan = DecodePlan.make(
                self._cache,
                self._new_slots[:size],
                self._positions[:size],
                self._block_tables[:size],
                self._num_blocks[:size],
                flex_attention=self._flex_attention,
            )
            return self._forward(self._token_ids[:size], self._positions[:size], plan)

        self._fill(PackedBatch.pack([], [], []), size)
        self._deltas.active = with_deltas
        self._steps[size, with_deltas] = capture(step)

    def _fill(self, batch: PackedBatch, size: int) -> None:
        """Put the batch into the buffers and fill it up to `size` with rows that see nothing, write
        to the block that is nobody's, and have no delta."""
        n = len(batch.sequences)
        nobodys_slot = (self._total_blocks - 1) * self._cache.block_size
        new_slots = [nobodys_slot] * size
        num_blocks = [0] * size
        block_size = self._cache.block_size
        for i, seq in enumerate(batch.sequences):
            block, offset = divmod(seq.num_computed, block_size)
            new_slots[i] = seq.block_table[block] * block_size + offset
            num_blocks[i] = block + 1
        longest = max(num_blocks)
        tables = torch.zeros(n, longest, dtype=torch.int32)
        for i, seq in enumerate(batch.sequences):
            own = seq.block_table[: num_blocks[i]]
            tables[i, : len(own)] = torch.tensor(own, dtype=torch.int32)
        self._token_ids[:n].copy_(batch.token_ids)
        self._token_ids[n:size].zero_()
        self._positions[:n].copy_(batch.positions)
        self._positions[n:size].zero_()
        self._new_slots[:size].copy_(torch.tensor(new_slots))
        self._num_blocks[:size].copy_(torch.tensor(num_blocks))
        self._block_tables[:n, :longest].copy_(tables)
        slots = [seq.slot for seq in batch.sequences]
        self._deltas.begin([*slots, *[self._deltas.merged_slot] * (size - n)], [1] * size)


class GraphCapture:
    """A Capture that replays a CUDA graph. All graphs share their memory, so the result of one is
    good until the next runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()  # compiles, and allocates what is allocated on first use
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
