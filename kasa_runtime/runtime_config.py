"""What a runtime serves, and how: the part of the configuration that the library owns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kasa_runtime.adapter.names import is_name
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import ConfigError
from kasa_runtime.limits import LimitsConfig
from kasa_runtime.merging import MergeConfig


@dataclass(frozen=True)
class RuntimeConfig:
    """What to serve, and how."""

    model: str = field(
        default="smollm2-135m",
        metadata={"help": "directory of safetensors, .gguf file, hub id, or smollm2-135m"},
    )
    adapters_dir: Path = field(
        default=Path("adapters"), metadata={"help": "where adapters are put and uploaded to"}
    )
    engine: Literal["native", "vllm"] = field(
        default="native",
        metadata={"help": "what generates: the embedded engine, or vLLM (a package of its own)"},
    )
    poll_interval_s: float = field(
        default=1.0,
        metadata={
            "help": "seconds that a directory of adapters has to stay as it is before it counts as "
            "complete; also between looks at it where polling is needed"
        },
    )
    watch: Literal["auto", "poll"] = field(
        default="auto",
        metadata={
            "help": "how changes of the adapters directory are noticed: the file system tells, or "
            "polling; auto polls on network mounts"
        },
    )
    keep_versions: int = field(
        default=5, metadata={"help": "versions of an adapter that are kept for rollback"}
    )
    start_wait_s: float = field(
        default=2.0,
        metadata={
            "help": "seconds that a start waits at most for adapters that no earlier one has "
            "checked; the rest is checked while others are served, what is asked for first"
        },
    )
    host_cache_gib: float = field(
        default=1.0,
        metadata={
            "help": "memory for adapters that are in no slot, in GiB: they come back without being "
            "read again; 0: none"
        },
    )
    pin: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "an adapter that always has a slot, whatever version the name stands for; may "
            "be given several times, at most max_slots - 1 times"
        },
    )
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    merging: MergeConfig = field(default_factory=MergeConfig)
    native: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ConfigError(f"keep_versions must be at least 1, got {self.keep_versions}")
        if not self.poll_interval_s > 0:
            raise ConfigError(f"poll_interval_s must be above 0, got {self.poll_interval_s}")
        for name in ("start_wait_s", "host_cache_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in self.pin:
            if not is_name(name):
                raise ConfigError(f"pin must be the name of an adapter, got {name!r}")
        if len(set(self.pin)) >= self.native.max_slots and self.pin:
            raise ConfigError(
                f"pin has {len(set(self.pin))} names, and of the {self.native.max_slots} slots at "
                "least one has to be left to others; pin fewer or raise max_slots"
            )
