from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_runtime.errors import ConfigError, LimitExceeded
from kasa_runtime.limits import AdapterLimit, Limits, LimitsConfig
from kasa_runtime.types import BASE


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_one_adapter_may_have_a_limit_of_its_own() -> None:
    own = ("style=4:200", "few=1", "slow=:0.5", "free=0:0", "_base=:7.")
    config = LimitsConfig(8, 50.0, own)
    assert config.of_all == AdapterLimit(8, 50.0)
    assert config.by_name == {
        "style": AdapterLimit(4, 200.0),
        "few": AdapterLimit(1, 50.0),
        "slow": AdapterLimit(8, 0.5),
        "free": AdapterLimit(0, 0.0),
        BASE: AdapterLimit(8, 7.0),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_max_concurrency": -1}, "adapter_max_concurrency must be at least 0, got -1"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens"),
        ({"adapter_tokens_per_s": -0.5}, "adapter_tokens_per_s must be at least 0, got -0.5"),
        ({"adapter_tokens_per_s": float("nan")}, "adapter_tokens_per_s"),
        ({"adapter_tokens_per_s": float("inf")}, "adapter_tokens_per_s"),
        ({"adapter_limit": ("style",)}, "NAME=CONCURRENCY:TOKENS_PER_S.*got 'style'"),
        ({"adapter_limit": ("style=x:1",)}, "style=x:1"),
        ({"adapter_limit": ("style=-1",)}, "style=-1"),
        ({"adapter_limit": ("style=1:-1",)}, "style=1:-1"),
        ({"adapter_limit": ("style=1:.",)}, "style=1:"),
        ({"adapter_limit": ("style=1:nan",)}, "style=1:nan"),
        ({"adapter_limit": ("Style=1",)}, "Style=1"),
        ({"adapter_limit": ("=1",)}, "'=1'"),
        ({"adapter_limit": ("style=1", "style=:2")}, "adapter_limit has style twice"),
        ({"adapter_limit": ("_base=1", "_base=:2")}, "_base twice"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LimitsConfig(**fields)  # type: ignore[arg-type]


def test_without_limits_nothing_is_refused() -> None:
    limits = Limits(LimitsConfig())
    limits.take("style", 10**9)
    limits.require_tokens("style")
    limits.require_place("style", 10**9)


def test_concurrency_is_limited_by_adapter() -> None:
    limits = Limits(LimitsConfig(2, adapter_limit=("style=1",)))
    limits.require_place("style", 0)
    limits.require_place("other", 1)
    for adapter, count, name in (("style", 1, "style"), ("other", 2, "other"), (BASE, 3, "base")):
        with pytest.raises(LimitExceeded, match=name) as caught:
            limits.require_place(adapter, count)
        assert caught.value.name == adapter and caught.value.retry_after_s > 0


def test_the_delay_is_that_after_which_there_is_a_token() -> None:
    clock = Clock()
    limits = Limits(LimitsConfig(adapter_tokens_per_s=20.0), clock)
    limits.take("style", 20 + 9)  # a second's tokens were there; nine are owed
    with pytest.raises(LimitExceeded) as caught:
        limits.require_tokens("style")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    limits.require_tokens("other")
    clock.now_s += caught.value.retry_after_s + 1e-9
    limits.require_tokens("style")
    limits.take("style", 1)
    with pytest.raises(LimitExceeded):
        limits.require_tokens("style")


def test_a_rate_below_a_token_per_second_lets_one_in_at_a_time() -> None:
    clock = Clock()
    limits = Limits(LimitsConfig(adapter_limit=("slow=:0.1",)), clock)
    limits.require_tokens("slow")
    limits.take("slow", 1)
    with pytest.raises(LimitExceeded) as caught:
        limits.require_tokens("slow")
    assert caught.value.retry_after_s == pytest.approx(10.0)


@settings(deadline=None, derandomize=True)
@given(
    st.floats(0.5, 1000.0),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 500)), min_size=1, max_size=60),
)
def test_in_the_long_run_the_rate_holds(rate: float, arrivals: list[tuple[float, int]]) -> None:
    clock = Clock()
    limits = Limits(LimitsConfig(adapter_tokens_per_s=rate), clock)
    start_s, taken = clock.now_s, 0
    for wait_s, num_tokens in arrivals:
        clock.now_s += wait_s
        try:
            limits.require_tokens("style")
        except LimitExceeded:
            continue
        saved = max(1.0, rate)  # a second's tokens, or one
        assert taken <= saved + rate * (clock.now_s - start_s) + 1e-6
        limits.take("style", num_tokens)
        taken += num_tokens
