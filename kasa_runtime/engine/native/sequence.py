"""One request inside the native engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.native.executor import NO_SLOT


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output so far, and where its keys and values are. Step thread only.

    The cache holds the first `num_computed` tokens; a preempted sequence starts again from 0 and
    recomputes."""

    request: EngineRequest
    slot: int = NO_SLOT
    token_ids: list[int] = field(default_factory=list)  # prompt, then output
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    seed: int = 0
    scheduled_s: float | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        given = self.request.sampling.seed
        self.seed = secrets.randbits(63) if given is None else given

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache: the prompt's rest, or the one token sampled last."""
        return len(self.token_ids) - self.num_computed
