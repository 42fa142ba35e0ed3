"""One request inside the native engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.native.block_manager import block_hash, root_hash
from kasa_runtime.engine.native.constraint import Constraint
from kasa_runtime.engine.native.executor import NO_SLOT
from kasa_runtime.engine.native.token_counts import TokenCounts
from kasa_runtime.types import TokenLogprobs

NOTHING = range(0)


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output so far, and where its keys and values are. Step thread only.

    The cache holds the first `num_computed` tokens, and others can find the first `num_published`
    blocks of them; a preempted sequence starts again from 0 and recomputes what it does not find.
    `num_merges` is the engine's at its arrival. `prompt_logprobs` are those of the prompt's first
    tokens, as far as they are known; empty where nobody asked for them."""

    request: EngineRequest
    slot: int = NO_SLOT
    num_merges: int = 0
    constraint: Constraint | None = None  # what its output has to follow
    token_ids: list[int] = field(default_factory=list)  # prompt, then output
    num_computed: int = 0
    num_published: int = 0
    num_cached_tokens: int = 0  # of the prompt, found when it was first scheduled
    block_table: list[int] = field(default_factory=list)
    seed: int = 0
    scheduled_s: float | None = None
    cancelled: bool = False
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    _counts: TokenCounts | None = None
    _hashes: list[bytes] = field(default_factory=list)  # of its blocks, as far as asked for

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        given = self.request.sampling.seed
        self.seed = secrets.randbits(63) if given is None else given
        if self.request.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # the first token follows nothing

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache: the prompt's rest, or the one token sampled last."""
        return len(self.token_ids) - self.num_computed

    @property
    def first_wanted(self) -> int:
        """Its first token whose logits are wanted: that before the first of the prompt whose
        log-probability is not known yet, else the last one."""
        num_known = len(self.prompt_logprobs)
        return (num_known if 0 < num_known < self.num_prompt_tokens else len(self.token_ids)) - 1

    def scoring(self, num_tokens: int) -> range:
        """Which of its tokens give log-probabilities of the prompt if its next `num_tokens` are
        computed: each that of the token after it."""
        if not self.prompt_logprobs:
            return NOTHING
        end = min(self.num_computed + num_tokens, self.num_prompt_tokens - 1)
        return range(self.first_wanted, end)

    def token_counts(self) -> TokenCounts:
        """Up to the last token; nothing is counted before it is asked for."""
        if self._counts is None:
            self._counts = TokenCounts(self.request.prompt_ids)
        self._counts.read(self.token_ids)
        return self._counts

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The hashes of its first `num_blocks` blocks, which its tokens fill."""
        for i in range(len(self._hashes), num_blocks):
            before = self._hashes[-1] if i else self._root_hash()
            block = self.token_ids[i * block_size : (i + 1) * block_size]
            self._hashes.append(block_hash(before, block))
        return self._hashes[:num_blocks]

    def _root_hash(self) -> bytes:
        return root_hash(self.request.adapter, self.num_merges, self.request.cache_salt)
