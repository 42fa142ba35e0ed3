"""OpenVINO's CPU plugin, and what the engine's settings mean to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import openvino as ov

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import ConfigError

ACTIVATION_GROUP = 32
"""Input features of a row that share a scale while they are multiplied by integers, as integers."""

FLOAT_ACTIVATIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


@cache
def core() -> Any:
    """The process's only `ov.Core`. The plugin gives the thread that loads it an alternate signal
    stack, and takes that memory away when it is unloaded, which may be on another thread: the next
    signal then ends the process. So it is never unloaded."""
    return ov.Core()


def plugin_options(config: EngineConfig) -> dict[str, Any]:
    """One stream: a step is one inference, which has all threads."""
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": config.num_threads,
    }
    is_rounded = config.quantization != "none" and config.activations == "int8"
    return options if is_rounded else {**options, **FLOAT_ACTIVATIONS}


def require_float32_on_cpu(config: EngineConfig) -> None:
    """Raises ConfigError for settings that are the torch executor's."""
    if config.device not in ("auto", "cpu"):
        raise ConfigError(
            f"the openvino executor runs on the CPU, got device {config.device!r}; "
            "use --executor torch"
        )
    if config.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"the openvino executor computes in float32, got dtype {config.dtype!r}; "
            "use --executor torch"
        )
