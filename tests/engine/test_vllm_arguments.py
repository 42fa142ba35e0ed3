"""Our settings in vLLM's words, and what is refused because vLLM would take it to mean something
else. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.vllm_arguments import (
    engine_arguments,
    sampling_arguments,
    structured_arguments,
)
from kasa_runtime.errors import ConfigError, InvalidRequest
from kasa_runtime.types import SamplingParams, StructuredOutput

MODEL = Path("/models/m")


def arguments(on_cpu: bool = True, **changes: Any) -> dict[str, Any]:
    return engine_arguments(MODEL, EngineConfig(**changes), num_loras=7, on_cpu=on_cpu)


def test_settings_become_arguments() -> None:
    found = arguments(
        max_lora_rank=20, kv_cache_gib=0.5, max_num_seqs=9, prefix_caching=False, max_model_len=99
    )
    assert found["max_lora_rank"] == 32, "the next that vLLM allows"
    assert (found["max_loras"], found["max_cpu_loras"]) == (7, 7)
    assert found["kv_cache_memory_bytes"] == 2**29
    assert (found["max_num_seqs"], found["max_model_len"]) == (9, 99)
    assert found["enable_prefix_caching"] is False
    assert found["model"] == str(MODEL)
    assert "block_size" not in found, "vLLM chooses it"
    assert arguments(block_size=32)["block_size"] == 32
    assert arguments()["seed"] != arguments()["seed"], "every server draws anew"


def test_log_probabilities_of_the_prompt_are_vllms_own() -> None:
    assert sampling_arguments(SamplingParams())["prompt_logprobs"] is None
    assert sampling_arguments(SamplingParams(logprobs=3), 0)["prompt_logprobs"] == 0


def test_float32_is_the_cpus_and_the_models_own_dtype_the_gpus() -> None:
    assert arguments()["dtype"] == "float32"
    assert arguments(on_cpu=False)["dtype"] == "auto"
    assert arguments(on_cpu=False, dtype="bfloat16")["dtype"] == "bfloat16"


def test_engine_args_are_passed_through() -> None:
    given = (
        "tensor_parallel_size=2",
        "--pipeline-parallel-size=3",
        "distributed_executor_backend=ray",
        "quantization=fp8",
        'compilation_config={"mode": 0}',
        "gpu_memory_utilization=0.5",
    )
    found = arguments(engine_arg=given)
    assert (found["tensor_parallel_size"], found["pipeline_parallel_size"]) == (2, 3)
    assert (found["distributed_executor_backend"], found["quantization"]) == ("ray", "fp8")
    assert found["compilation_config"] == {"mode": 0}
    assert found["gpu_memory_utilization"] == 0.5
    assert "kv_cache_memory_bytes" not in found, "the other way to size the cache"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_arg": ("tensor_parallel_size",)}, "must be name=value"),
        ({"engine_arg": ("=2",)}, "must be name=value"),
        ({"engine_arg": ("max-loras=2",)}, "max_loras is set by this engine; use --max-slots"),
        ({"engine_arg": ("enable_lora=false",)}, "enable_lora is set by this engine"),
        ({"engine_arg": ("skip_tokenizer_init=true",)}, "set by this engine"),
        ({"engine_arg": ("structured_outputs_config={}",)}, "set by this engine"),
        ({"max_lora_rank": 513}, "max_lora_rank must be at most 512"),
        ({"executor": "torch"}, "executor = 'torch' is for the native engine"),
        ({"quantization": "int8"}, "quantization = 'int8' is for the native engine"),
        ({"max_rank": 8}, "max_lora_rank"),
        ({"max_prefill_tokens": 64}, "max_num_batched_tokens"),
        ({"device": "cuda"}, "device must be auto or cpu"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(**changes)


def test_a_gpu_is_not_picked_by_number() -> None:
    assert arguments(on_cpu=False, device="cuda")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        arguments(on_cpu=False, device="cuda:1")


def test_sampling_parameters_keep_their_names_and_stop_strings_stay_above() -> None:
    sampling = SamplingParams(max_tokens=None, temperature=0.7, top_p=0.9, seed=4, stop=("end",))
    found = sampling_arguments(sampling)
    assert (found["temperature"], found["top_p"], found["seed"]) == (0.7, 0.9, 4)
    assert found["max_tokens"] is None and "stop" not in found


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", {"temperature": 0.005}),
        ("temperature", {"temperature": 2.5}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("frequency_penalty", {"frequency_penalty": -3.0}),
        ("min_p", {"temperature": 1.0, "min_p": 0.1, "top_p": 0.9}),
    ],
)
def test_a_parameter_that_would_mean_something_else_is_refused(
    field: str, values: dict[str, float]
) -> None:
    with pytest.raises(InvalidRequest, match=f"sampling.{field}.*on the vllm engine"):
        sampling_arguments(SamplingParams(**values))  # type: ignore[arg-type]


def test_filters_that_greedy_does_not_use_are_not_refused() -> None:
    assert sampling_arguments(SamplingParams(temperature=0.0, min_p=0.1, top_p=0.9))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (StructuredOutput(json_schema="{}"), {"json": "{}"}),
        (StructuredOutput(regex=""), {"regex": ""}),
        (StructuredOutput(choice=("a", "b")), {"choice": ["a", "b"]}),
        (StructuredOutput(grammar="start: /a/"), {"grammar": "start: /a/"}),
    ],
)
def test_structured_output_is_one_of_vllms_kinds(
    wanted: StructuredOutput, found: dict[str, Any]
) -> None:
    assert structured_arguments(wanted) == found


def test_vllm_has_the_tokenizer_that_structured_output_needs() -> None:
    assert not arguments().get("skip_tokenizer_init")
