"""What one adapter may take: requests at the same time, and tokens per second."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kasa_runtime.errors import ConfigError, LimitExceeded
from kasa_runtime.types import BASE

BASE_NAME = "_base"
"""The base model in a setting, where an adapter would have its name."""

BURST_S = 1.0
"""Seconds of its rate that an adapter may save up."""

RETRY_S = 1.0
"""When to try again after a limit on concurrency: nobody knows when a request will end."""

SETTING = re.compile(
    r"(?P<name>_base|[a-z0-9][a-z0-9._-]{0,62})=(?P<concurrency>\d*)(:(?P<rate>\d*\.?\d*))?"
)


@dataclass(frozen=True)
class AdapterLimit:
    """0 is no limit."""

    max_concurrency: int = 0  # requests running or waiting
    tokens_per_s: float = 0.0  # of prompts and outputs


@dataclass(frozen=True)
class LimitsConfig:
    """Limits of all adapters and of some. Raises ConfigError on a value that cannot work."""

    adapter_max_concurrency: int = field(
        default=0,
        metadata={
            "help": "requests of one adapter, or of the base, that may run or wait at the same "
            "time; one more is refused with RetryInfo; 0: no limit"
        },
    )
    adapter_tokens_per_s: float = field(
        default=0.0,
        metadata={
            "help": "tokens of prompts and outputs that one adapter, or the base, gets per second; "
            "above it, requests are refused with RetryInfo; 0: no limit"
        },
    )
    adapter_limit: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "NAME=CONCURRENCY:TOKENS_PER_S, the two limits of one adapter (of the base: "
            "_base=...); one left out is that of all; may be given several times"
        },
    )
    max_prompt_tokens: int = field(
        default=0,
        metadata={"help": "most tokens of a prompt; 0: what the context holds"},
    )

    def __post_init__(self) -> None:
        for name in ("adapter_max_concurrency", "max_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.adapter_tokens_per_s < math.inf:
            raise ConfigError(
                f"adapter_tokens_per_s must be at least 0, got {self.adapter_tokens_per_s}"
            )
        names = [self._parse(setting)[0] for setting in self.adapter_limit]
        repeated = sorted({name or BASE_NAME for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"adapter_limit has {repeated[0]} twice; give both limits at once")

    @property
    def of_all(self) -> AdapterLimit:
        """The limit of adapters that have none of their own."""
        return AdapterLimit(self.adapter_max_concurrency, self.adapter_tokens_per_s)

    @property
    def by_name(self) -> dict[str, AdapterLimit]:
        return dict(map(self._parse, self.adapter_limit))

    def _parse(self, setting: str) -> tuple[str, AdapterLimit]:
        found = SETTING.fullmatch(setting)
        if found is None or found["rate"] == ".":
            raise ConfigError(
                "adapter_limit must be NAME=CONCURRENCY:TOKENS_PER_S, for example style=4:200, "
                f"style=4 or {BASE_NAME}=:200, got {setting!r}"
            )
        name = BASE if found["name"] == BASE_NAME else found["name"]
        concurrency = int(found["concurrency"] or self.adapter_max_concurrency)
        rate = float(found["rate"] or self.adapter_tokens_per_s)
        return name, AdapterLimit(concurrency, rate)


class TokenBucket:
    """Fills with `rate` tokens per second. What is taken is known only afterwards, so it may be
    overdrawn; nobody is let in until the debt is paid, and in the long run the rate holds."""

    def __init__(self, rate: float, now_s: float) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * BURST_S)
        self._level = self._capacity
        self._now_s = now_s

    def take(self, num_tokens: int, now_s: float) -> None:
        self._fill(now_s)
        self._level -= num_tokens

    def wait_s(self, now_s: float) -> float:
        """Seconds until there is a token; 0 if there is one now."""
        self._fill(now_s)
        return max(0.0, (1.0 - self._level) / self._rate)

    def _fill(self, now_s: float) -> None:
        filled = self._level + self._rate * (now_s - self._now_s)
        self._level, self._now_s = min(self._capacity, filled), now_s


class Limits:
    """What every adapter has left. Event loop only."""

    def __init__(self, config: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_all = config.of_all
        self._by_name = config.by_name
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}

    def require_place(self, adapter: str, num_in_flight: int) -> None:
        """Raises LimitExceeded if no request may be added to `num_in_flight`."""
        limit = self._of(adapter).max_concurrency
        if limit and num_in_flight >= limit:
            raise LimitExceeded(
                f"{num_in_flight} requests of {adapter or 'the base'} are running or waiting, its "
                f"limit is {limit}; try again later",
                retry_after_s=RETRY_S,
                name=adapter,
            )

    def require_tokens(self, adapter: str) -> None:
        """Raises LimitExceeded if it has no token left."""
        bucket = self._buckets.get(adapter)
        wait_s = bucket.wait_s(self._clock()) if bucket else 0.0
        if wait_s:
            raise LimitExceeded(
                f"{adapter or 'the base'} is limited to {self._of(adapter).tokens_per_s:g} tokens "
                f"per second; try again in {wait_s:.2f} s",
                retry_after_s=wait_s,
                name=adapter,
            )

    def take(self, adapter: str, num_tokens: int) -> None:
        rate = self._of(adapter).tokens_per_s
        if rate:
            now_s = self._clock()
            bucket = self._buckets.setdefault(adapter, TokenBucket(rate, now_s))
            bucket.take(num_tokens, now_s)

    def _of(self, adapter: str) -> AdapterLimit:
        return self._by_name.get(adapter, self._of_all)
