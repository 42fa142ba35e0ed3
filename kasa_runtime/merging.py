"""`--mode auto`: which adapter, if any, should be in the weights, and who puts it there.

`MergePolicy` decides from the tokens of a sliding window; `AutoMerge` carries out what it decides.
A merged adapter costs nothing per token, all other requests pay for the difference, and a switch
empties the prefix cache and costs up to seconds of work beside the steps: so one adapter has to
dominate before it is merged, and to lose much of that before it goes again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kasa_runtime.errors import AdapterNotFound, ConfigError, EngineDead, KasaError
from kasa_runtime.types import BASE, Observer

logger = logging.getLogger(__name__)

NUM_BUCKETS = 10
MIN_TOKENS = 100
"""In a window with fewer, shares say nothing."""


@dataclass(frozen=True)
class MergeConfig:
    """Raises ConfigError on a value that cannot work."""

    mode: Literal["manual", "auto"] = field(
        default="manual",
        metadata={
            "help": "manual: an adapter is merged into the weights when somebody asks for it; "
            "auto: also while it has most of the traffic"
        },
    )
    merge_share: float = field(
        default=0.8, metadata={"help": "auto: merge an adapter with this share of the tokens"}
    )
    unmerge_share: float = field(
        default=0.5, metadata={"help": "auto: unmerge it when its share falls below this"}
    )
    merge_window_s: float = field(
        default=30.0, metadata={"help": "auto: seconds of traffic that shares are taken from"}
    )
    merge_dwell_s: float = field(
        default=60.0,
        metadata={"help": "auto: seconds that pass at least between a switch and the next one"},
    )

    def __post_init__(self) -> None:
        if self.mode not in ("manual", "auto"):
            raise ConfigError(f"mode must be manual or auto, got {self.mode!r}")
        if not 0 <= self.unmerge_share < self.merge_share <= 1:
            raise ConfigError(
                "want 0 <= unmerge_share < merge_share <= 1, got "
                f"{self.unmerge_share} and {self.merge_share}"
            )
        if not self.merge_window_s > 0:
            raise ConfigError(f"merge_window_s must be above 0, got {self.merge_window_s}")
        if not self.merge_dwell_s >= 0:
            raise ConfigError(f"merge_dwell_s must be at least 0, got {self.merge_dwell_s}")


class MergePolicy:
    """Keys are "name@version", BASE for the base model. `clock` gives seconds."""

    def __init__(self, config: MergeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._bucket_s = config.merge_window_s / NUM_BUCKETS
        self._buckets: deque[tuple[float, Counter[str]]] = deque()  # by when they began
        self._switched_s = float("-inf")

    def count(self, adapter: str, num_tokens: int) -> None:
        """Tokens of a prompt, or generated ones."""
        now_s = self._clock()
        if not self._buckets or now_s >= self._buckets[-1][0] + self._bucket_s:
            self._forget_old(now_s)
            self._buckets.append((now_s, Counter()))
        self._buckets[-1][1][adapter] += num_tokens

    def shares(self) -> dict[str, float]:
        """Of the window's tokens, 0 to 1; empty when there are too few to tell."""
        self._forget_old(self._clock())
        total: Counter[str] = Counter()
        for _, counts in self._buckets:
            total += counts
        num_tokens = total.total()
        if num_tokens < MIN_TOKENS:
            return {}
        return {adapter: count / num_tokens for adapter, count in total.items()}

    def decide(self, merged: str) -> str:
        """What should be merged, BASE for nothing, where `merged` is now."""
        shares = self.shares()
        if not shares or self._clock() < self._switched_s + self._config.merge_dwell_s:
            return merged
        if merged != BASE and shares.get(merged, 0.0) >= self._config.unmerge_share:
            return merged
        adapters = {adapter: share for adapter, share in shares.items() if adapter != BASE}
        first = max(adapters, key=adapters.__getitem__, default=BASE)
        return first if adapters.get(first, 0.0) >= self._config.merge_share else BASE

    def switched(self) -> None:
        """Something was merged or unmerged, by whomever, or could not be: the next decision waits
        for the dwell time."""
        self._switched_s = self._clock()

    def forget(self, adapter: str) -> None:
        """Leave it out: it is there no more."""
        for _, counts in self._buckets:
            del counts[adapter]

    def _forget_old(self, now_s: float) -> None:
        while self._buckets and self._buckets[0][0] <= now_s - self._config.merge_window_s:
            self._buckets.popleft()


class Merger(Protocol):
    """What of the adapter manager is needed."""

    @property
    def merged(self) -> str | None: ...
    def merge(self, spec: str) -> Awaitable[object]: ...
    def unmerge(self) -> Awaitable[object]: ...


class AutoMerge:
    """Asks the policy now and then and does what it says. Event loop only."""

    def __init__(
        self, config: MergeConfig, manager: Merger, observer: Observer, policy: MergePolicy
    ) -> None:
        self.policy = policy
        self._interval_s = config.merge_window_s / NUM_BUCKETS
        self._manager = manager
        self._observer = observer
        self._task = asyncio.create_task(self._run(), name="auto-merge")

    async def close(self) -> None:
        """A switch that has begun is carried through."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._follow_policy()
            except EngineDead:
                return
            except KasaError as error:
                logger.warning("auto mode could not switch: %s", error)
                self.policy.switched()

    async def _follow_policy(self) -> None:
        merged = self._manager.merged or BASE
        wanted = self.policy.decide(merged)
        if wanted == merged:
            return
        shares = self.policy.shares()
        logger.info(
            "auto mode: %s has %.0f %% of the tokens, %s %.0f %%; merging %s",
            *_spoken(merged, shares),
            *_spoken(wanted, shares),
            wanted or "nothing",
        )
        self._observer.merge_decided(wanted.partition("@")[0])
        if wanted == BASE:
            await self._manager.unmerge()
        else:
            try:
                await self._manager.merge(wanted)
            except AdapterNotFound:
                self.policy.forget(wanted)
                return
        self.policy.switched()


def _spoken(adapter: str, shares: dict[str, float]) -> tuple[str, float]:
    """For the log: who, and how many per cent."""
    return adapter or "the base", 100 * shares.get(adapter, 0.0)
