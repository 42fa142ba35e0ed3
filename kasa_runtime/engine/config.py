"""Settings of the engine. Flags of `kasa serve` are derived from the fields."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from kasa_runtime.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Raises ConfigError on a value that cannot work."""

    executor: Literal["auto", "torch", "openvino"] = field(
        default="auto",
        metadata={
            "help": "what runs the model; auto: openvino on CPU in float32 where it can, else torch"
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "weights and activations; auto: float32 on CPU, the model's own on CUDA"},
    )
    quantization: Literal["none", "int8", "int4"] = field(
        default="none",
        metadata={
            "help": "the base's weights as integers of 8 or 4 bits, compressed once (openvino; "
            "needs nncf); adapters stay float32, and layers with a merged adapter become it"
        },
    )
    activations: Literal["int8", "float32"] = field(
        default="int8",
        metadata={
            "help": "what integer weights are multiplied by; int8: activations rounded to 8 bits "
            "on the way, in groups, the fast way on processors with VNNI (others take float32); "
            "float32: exact"
        },
    )
    device: str = field(
        default="auto", metadata={"help": "auto (CUDA when there is one), cpu, cuda or cuda:N"}
    )
    threads: int = field(
        default=0,
        metadata={"help": "CPU threads of the model; 0: one per core the process may use"},
    )
    max_num_seqs: int = field(
        default=64, metadata={"help": "requests that are in one step at the same time"}
    )
    max_queue: int = field(
        default=256, metadata={"help": "requests that may wait; one more is refused with RetryInfo"}
    )
    max_num_batched_tokens: int = field(
        default=512, metadata={"help": "token budget of a step; longer prompts take several steps"}
    )
    max_prefill_tokens: int = field(
        default=128,
        metadata={
            "help": "prompt tokens in a step in which others decode: with fewer, running streams "
            "go on more evenly; with more, new ones begin sooner; 0: all that the budget leaves"
        },
    )
    max_model_len: int = field(
        default=0, metadata={"help": "context length in tokens; 0: what the model allows"}
    )
    kv_cache_gib: float = field(default=1.0, metadata={"help": "memory for the KV cache, in GiB"})
    block_size: int = field(
        default=16,
        metadata={"help": "tokens per KV cache block; openvino chooses its own, graphs need 128"},
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={"help": "on CUDA, replay decode steps from graphs captured at start-up"},
    )
    prefix_caching: bool = field(
        default=True,
        metadata={"help": "reuse the KV cache of equal beginnings of prompts, per adapter version"},
    )
    max_slots: int = field(
        default=16, metadata={"help": "adapters that are in the engine at the same time"}
    )
    max_rank: int = field(default=256, metadata={"help": "largest rank r of an adapter's layer"})
    max_lora_rank: int = field(
        default=32,
        metadata={
            "help": "vllm: largest rank r + t of an adapter's layer; every adapter costs what one "
            "of this rank does"
        },
    )
    engine_arg: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "vllm: an argument of its engine as name=value, JSON or text, for example "
            "tensor_parallel_size=2; may be repeated"
        },
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("executor", "dtype", "quantization", "activations"):
            if getattr(self, name) not in (allowed := get_args(hints[name])):
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_slots",
            "max_rank",
            "max_lora_rank",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("threads", "max_queue", "max_model_len", "max_prefill_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.quantization != "none" and self.executor == "torch":
            raise ConfigError(
                f"quantization {self.quantization} is the openvino executor's, got executor torch; "
                "use --executor openvino, or --quantization none"
            )
        if not self.kv_cache_gib > 0:
            raise ConfigError(f"kv_cache_gib must be above 0, got {self.kv_cache_gib}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), else not every running request can step"
            )

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    def num_cache_blocks(self, block_size: int, token_bytes: int, context_length: int) -> int:
        """Blocks of `block_size` tokens that the KV cache has, no more than all requests can fill.
        Raises ConfigError where its memory holds none."""
        held = int(self.kv_cache_gib * 2**30) // (token_bytes * block_size)
        if held < 1:
            raise ConfigError(
                f"kv_cache_gib = {self.kv_cache_gib} holds no block of {block_size} "
                f"tokens of {token_bytes} bytes; raise it"
            )
        return min(held, -(-context_length // block_size) * self.max_num_seqs)
