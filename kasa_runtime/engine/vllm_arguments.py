"""Our settings and sampling parameters in vLLM's words. What vLLM would take to mean something else
is refused. Imports no vLLM."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import ConfigError, InvalidRequest
from kasa_runtime.types import MAX_LOGPROBS, SamplingParams, StructuredOutput

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's buffers have one of these ranks."""

WORKER_EXTENSION = "kasa_runtime.engine.vllm_worker.KasaWorker"

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MAX_PENALTY = 2.0

# Settings of the native engine that mean nothing to vLLM, and what to do instead.
_NATIVE = {
    "executor": "vLLM runs the model itself",
    "quantization": "vLLM's own is --engine-arg quantization=...",
    "activations": "vLLM has no such setting",
    "max_prefill_tokens": "vLLM mixes prompts into steps by max_num_batched_tokens",
    "max_rank": "vLLM's limit is max_lora_rank, of r + t",
}
# Arguments that follow from our settings, or on which this engine relies.
_OURS = {
    "model": "--model",
    "dtype": "--dtype",
    "enable_lora": "",
    "max_loras": "--max-slots",
    "max_cpu_loras": "--max-slots",
    "max_lora_rank": "--max-lora-rank",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_model_len": "--max-model-len",
    "enable_prefix_caching": "--prefix-caching",
    "logprobs_mode": "",
    "max_logprobs": "",
    "skip_tokenizer_init": "",
    "structured_outputs_config": "",
    "worker_extension_cls": "",
}


def engine_arguments(
    model_dir: Path, config: EngineConfig, *, num_loras: int, on_cpu: bool
) -> dict[str, Any]:
    """The fields of vLLM's engine arguments. Raises ConfigError naming the setting."""
    _refuse_native_settings(config)
    _require_device(config, on_cpu=on_cpu)
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": "float32" if on_cpu and config.dtype == "auto" else config.dtype,
        "max_model_len": config.max_model_len or -1,  # -1: what model and KV cache allow
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": not config.cuda_graphs,
        "enable_lora": True,
        "max_loras": num_loras,
        "max_cpu_loras": num_loras,
        "max_lora_rank": lora_rank(config),
        "max_logprobs": MAX_LOGPROBS,
        "use_tqdm_on_load": False,  # of every merge too
        "worker_extension_cls": WORKER_EXTENSION,
        "seed": secrets.randbits(31),  # of requests without one of their own
    }
    if config.block_size != _default(config, "block_size"):
        arguments["block_size"] = config.block_size
    given = _given(config)
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & given.keys():
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    return arguments | given


def lora_rank(config: EngineConfig) -> int:
    """The rank of vLLM's buffers: `max_lora_rank`, rounded up to what it allows."""
    allowed = [rank for rank in LORA_RANKS if rank >= config.max_lora_rank]
    if not allowed:
        raise ConfigError(
            f"max_lora_rank must be at most {LORA_RANKS[-1]}, got {config.max_lora_rank}"
        )
    return allowed[0]


def _default(config: EngineConfig, name: str) -> object:
    return next(field.default for field in fields(config) if field.name == name)


def _refuse_native_settings(config: EngineConfig) -> None:
    for name, instead in _NATIVE.items():
        value = getattr(config, name)
        if value != _default(config, name):
            raise ConfigError(f"{name} = {value!r} is for the native engine; {instead}")


def _require_device(config: EngineConfig, *, on_cpu: bool) -> None:
    want = "cpu" if on_cpu else "cuda"
    if config.device not in ("auto", want):
        raise ConfigError(
            f"device must be auto or {want} with this build of vLLM, got {config.device!r}; "
            "CUDA_VISIBLE_DEVICES picks a GPU"
        )


def _given(config: EngineConfig) -> dict[str, Any]:
    """The arguments of `engine_arg`."""
    given: dict[str, Any] = {}
    for text in config.engine_arg:
        name, sign, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not sign or not name:
            raise ConfigError(f"engine_arg must be name=value, got {text!r}")
        if name in _OURS:
            instead = f"; use {_OURS[name]}" if _OURS[name] else ""
            raise ConfigError(f"engine_arg: {name} is set by this engine{instead}")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given


def sampling_arguments(
    sampling: SamplingParams, prompt_logprobs: int | None = None
) -> dict[str, Any]:
    """The fields of vLLM's sampling parameters; stop strings are cut above the engine. Raises
    InvalidRequest where vLLM's would mean something else, or are not so wide."""
    t = sampling.temperature
    _require(
        t == 0 or MIN_TEMPERATURE <= t <= MAX_TEMPERATURE,
        "temperature",
        f"0, or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
        t,
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        wanted = f"from -{MAX_PENALTY:g} to {MAX_PENALTY:g}"
        _require(abs(value) <= MAX_PENALTY, name, wanted, value)
    # vLLM filters by min_p before top_p, so that the share of top_p is of other tokens.
    both = t > 0 and sampling.min_p > 0 and sampling.top_p < 1
    _require(not both, "min_p", "0 where top_p is below 1", sampling.min_p)
    same: Mapping[str, Any] = {
        name: getattr(sampling, name)
        for name in (
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "ignore_eos",
            "logprobs",
        )
    }
    return {**same, "prompt_logprobs": prompt_logprobs, "detokenize": False}


def structured_arguments(wanted: StructuredOutput) -> dict[str, Any]:
    """The fields of vLLM's parameters of structured output, whose backend is llguidance too."""
    if wanted.choice:
        return {"choice": list(wanted.choice)}
    given = {"json": wanted.json_schema, "regex": wanted.regex, "grammar": wanted.grammar}
    return {name: value for name, value in given.items() if value is not None}


def _require(ok: bool, field: str, wanted: str, found: object) -> None:
    if not ok:
        raise InvalidRequest(
            f"sampling.{field}", f"must be {wanted} on the vllm engine, got {found!r}"
        )
