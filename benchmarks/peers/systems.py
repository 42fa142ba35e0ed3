"""Who is measured, in which cases, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.adapters import RANK
from benchmarks.peers.cases import Mix
from benchmarks.peers.environments import Conversion, Environment
from benchmarks.peers.measures import Pair, Side
from kasa_runtime.types import AdapterMethod

OURS = "benchmarks.peers.ours"
SERVED = "benchmarks.peers.served"
SERVED_HTTP = "benchmarks.peers.served_http"
OURS_ON_VLLM = "benchmarks.peers.ours_on_vllm"
LOGGING = ("--log-level", "info", "--log-format", "json")
TELEMETRY = "openvino-telemetry"  # without it, OpenVINO reports nothing
TRANSFORMERS = Environment("transformers")
VLLM = Environment("vllm", without=("torchvision", "torchaudio", "torchcodec"))
GENAI = Environment("openvino-genai", without=(TELEMETRY,))
EXPORT = Environment("openvino-export", without=("torchvision", TELEMETRY))
LLAMA_CPP = Environment("llama-cpp")
KASA_VLLM = Environment("kasa-vllm", without=VLLM.without)


@dataclass(frozen=True)
class System:
    """A process of its own that runs `module`, in `environment` (None: the one of the driver).
    `settings` are its own, beside those that all get. `method` is of its adapters."""

    name: str
    module: str
    mixes: tuple[Mix, ...] = (Mix.BASE,)
    environment: Environment | None = None
    conversion: Conversion | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: AdapterMethod = AdapterMethod.LORA


def ours(
    name: str, engine: Mapping[str, Any], method: AdapterMethod = AdapterMethod.KASA
) -> System:
    """Our engine with these fields of EngineConfig."""
    return System(name, OURS, tuple(Mix), settings={"engine": engine}, method=method)


def ours_on_vllm(name: str, engine: Mapping[str, Any], method: AdapterMethod) -> System:
    """Our runtime over vLLM, with these fields of EngineConfig."""
    settings = {"engine": engine}
    return System(name, OURS_ON_VLLM, tuple(Mix), KASA_VLLM, settings=settings, method=method)


def served(name: str, module: str, *flags: str, driver: str = SERVED) -> System:
    """Our server, with these flags of `kasa serve`; over gRPC if `driver` is not another."""
    settings = {"module": module, "flags": list(flags)}
    return System(name, driver, tuple(Mix), settings=settings, method=AdapterMethod.KASA)


SYSTEMS = {
    system.name: system
    for system in (
        ours("ours", {"executor": "openvino"}),
        ours("ours-torch", {"executor": "torch"}),
        ours("ours-lora", {"executor": "openvino"}, AdapterMethod.LORA),
        ours_on_vllm("ours-vllm", {"max_lora_rank": 2 * RANK}, AdapterMethod.KASA),  # r + t
        ours_on_vllm("ours-vllm-lora", {"max_lora_rank": RANK}, AdapterMethod.LORA),
        served("ours-grpc", "kasa_runtime.cli", *LOGGING),
        served("ours-grpc-every-token", "kasa_runtime.cli", *LOGGING, "--stream-interval", "1"),
        served("ours-http", "kasa_runtime.cli", *LOGGING, driver=SERVED_HTTP),
        served("ours-grpc-unobserved", "benchmarks.peers.unobserved", "--log-level", "error"),
        System("transformers", "benchmarks.peers.transformers", environment=TRANSFORMERS),
        System("peft", "benchmarks.peers.peft", (Mix.MIXED,), TRANSFORMERS),
        System("vllm", "benchmarks.peers.vllm", environment=VLLM),
        System("vllm-lora", "benchmarks.peers.vllm", (Mix.MIXED,), VLLM),
        System(
            "openvino-genai",
            "benchmarks.peers.openvino_genai",
            environment=GENAI,
            conversion=Conversion("benchmarks.peers.export_openvino", EXPORT, "float32"),
        ),
        System(
            "openvino-genai-int8",
            "benchmarks.peers.openvino_genai",
            environment=GENAI,
            conversion=Conversion("benchmarks.peers.export_openvino", EXPORT, "int8"),
        ),
        System(
            "llama.cpp",
            "benchmarks.peers.llama_cpp",
            (Mix.BASE, Mix.ONE),
            LLAMA_CPP,
            conversion=Conversion("benchmarks.peers.export_gguf", LLAMA_CPP, "float32", ".gguf"),
        ),
    )
}


def pairs(names: Iterable[str]) -> list[Pair]:
    """The comparisons that matter, for each variant of our engine among these systems."""
    return [pair for name in names if name.startswith("ours") for pair in _pairs_of(name)]


def _pairs_of(name: str) -> list[Pair]:
    base, merged, idle = Side(name, Mix.BASE), Side(name, Mix.MERGED), Side(name, Mix.IDLE)
    mixed, many = Side(name, Mix.MIXED), Side(name, Mix.MANY)
    genai = Side("openvino-genai", Mix.BASE)
    found = [
        Pair(base, genai),
        Pair(merged, genai),
        Pair(merged, base),
        Pair(idle, base),
        Pair(mixed, base, concurrencies=(8, 32)),
        Pair(mixed, Side("vllm-lora", Mix.MIXED)),
        Pair(mixed, Side("peft", Mix.MIXED)),
        Pair(many, mixed, concurrencies=(32,)),
        Pair(base, genai, (1,), (256,), measure="ttft_s"),
        Pair(base, Side("transformers", Mix.BASE)),
        Pair(mixed, Side("transformers", Mix.BASE)),
        Pair(base, Side("vllm", Mix.BASE)),
        Pair(base, Side("llama.cpp", Mix.BASE)),
        Pair(Side(name, Mix.ONE), Side("llama.cpp", Mix.ONE)),
        Pair(mixed, Side(f"{name}-lora", Mix.MIXED)),  # the cost of the tails
    ]
    if name == "ours-grpc":
        unobserved = Side("ours-grpc-unobserved", Mix.BASE)
        found += [Pair(base, unobserved), Pair(base, unobserved, measure="ttft_s")]
    if name != "ours":
        found += [Pair(base, Side("ours", Mix.BASE)), Pair(mixed, Side("ours", Mix.MIXED))]
    return found
