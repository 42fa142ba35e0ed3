"""What is measured: the requests that a system gets at once, the same for all systems."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

NUM_MIXED = 8
NUM_MANY = 64
FIRST_TOKEN_ID = 100  # below are the special tokens


class Mix(StrEnum):
    """Which adapters the requests of a batch have, and which the system holds."""

    BASE = "base"  # none, and the system holds none
    MERGED = "merged"  # all the one that is merged into the weights
    ONE = "one"  # all the same, beside the weights
    IDLE = "idle"  # none, while the system holds NUM_MIXED
    MIXED = "mixed"  # NUM_MIXED in turn
    MANY = "many"  # drawn from NUM_MANY by Zipf's law


@dataclass(frozen=True)
class Case:
    """`concurrency` requests of `prompt_tokens` tokens each, sent at once."""

    mix: Mix
    concurrency: int
    prompt_tokens: int

    @property
    def num_held(self) -> int:
        """How many adapters the system holds."""
        many = {Mix.MERGED: 1, Mix.ONE: 1, Mix.IDLE: NUM_MIXED, Mix.MIXED: NUM_MIXED}
        return {**many, Mix.BASE: 0, Mix.MANY: NUM_MANY}[self.mix]

    def adapters(self, seed: int) -> list[str]:
        """The adapter of each request; "" is the base."""
        if self.mix in (Mix.BASE, Mix.IDLE):
            return [""] * self.concurrency
        if self.mix is Mix.MANY:
            chosen = zipf_choice(self.concurrency, NUM_MANY, self._random("adapters", seed))
        else:
            chosen = [i % self.num_held for i in range(self.concurrency)]
        return [adapter_name(i) for i in chosen]

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Random token ids, (concurrency, prompt_tokens). Other ones for every seed and case, so
        that no prefix cache can help anybody."""
        generator = self._random("prompts", seed)
        ids = range(FIRST_TOKEN_ID, vocab_size)
        return [generator.choices(ids, k=self.prompt_tokens) for _ in range(self.concurrency)]

    def _random(self, purpose: str, seed: int) -> random.Random:
        return random.Random(f"{purpose} {seed} {self.mix} {self.concurrency} {self.prompt_tokens}")


def adapter_name(i: int) -> str:
    return f"a{i}"


def zipf_choice(count: int, num_adapters: int, generator: random.Random) -> list[int]:
    """`count` of the numbers below `num_adapters`, number k with a probability as 1 / (k + 1)."""
    weights = [1 / (k + 1) for k in range(num_adapters)]
    return generator.choices(range(num_adapters), weights, k=count)


def cases(
    mixes: Sequence[Mix], concurrencies: Sequence[int], prompt_tokens: Sequence[int]
) -> list[Case]:
    """In the order of measuring: what is compared stands together. NUM_MANY adapters need a batch
    that can hold more than NUM_MIXED of them."""
    return [
        Case(mix, concurrency, length)
        for length in prompt_tokens
        for concurrency in concurrencies
        for mix in mixes
        if mix is not Mix.MANY or concurrency > NUM_MIXED
    ]
