"""Structured output in the native engine: what a sequence carries, and what makes it.

A constraint is compiled once per grammar, off the step thread, and copied for every request. In a
step it says which tokens may come next, as bits, and is told which one came.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Set
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from kasa_runtime.background import done_in_background
from kasa_runtime.engine.grammar import grammar_of, limits, refusal
from kasa_runtime.engine.native.vocabulary import Vocabulary
from kasa_runtime.errors import InvalidRequest, ModelError
from kasa_runtime.types import StructuredOutput

MAX_KNOWN = 64
"""Grammars that are kept compiled."""

BUDGET_S, BUDGET_PER_TOKEN_S = 0.5, 0.002
"""Of the step thread, for one request: the others wait meanwhile. A usual token takes less than a
tenth of a millisecond; llguidance's own limits leave room for grammars that take a second."""

Words = NDArray[np.int32]
"""(vocab / 32, rounded up): a bit for each token, the lowest one first."""


class Constraint:
    """What one sequence's output has to follow, and how far it has. Step thread only.

    Nothing is raised where the grammar leads nowhere or takes too much: `fill` then allows the end
    of sequence, and `take` says why the sequence has to be ended."""

    def __init__(self, matcher: Any, wanted: StructuredOutput, not_eos: Words) -> None:
        self._matcher = matcher
        self._wanted = wanted
        self._not_eos = not_eos
        self._left_s = BUDGET_S

    @property
    def num_words(self) -> int:
        return len(self._not_eos)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def fill(self, words: Words, *, go_on: bool) -> None:
        """Set the bits of the tokens that may follow, those of the end of sequence among them where
        the output may end. There is always one. `go_on`: not to end while something else may
        follow."""
        began_s = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._left_s -= time.thread_time() - began_s
        if go_on and (others := words & self._not_eos).any():
            words[:] = others

    def take(self, token: int) -> InvalidRequest | None:
        """Go on by the token that came. Returns why it cannot, if so."""
        began_s = time.thread_time()
        taken = self._matcher.consume_token(token)
        self._left_s += BUDGET_PER_TOKEN_S - (time.thread_time() - began_s)
        if not taken or self._matcher.is_error():
            return refusal(self._wanted, self._matcher.get_error())
        if self._left_s < 0:
            return refusal(
                self._wanted, "is too complex: it takes too long to find what may follow"
            )
        return None


class ConstraintMaker:
    """Compiled grammars over one tokenizer. `tokenizer` None: the engine was given none. Event loop
    only; what takes time runs in the background, one piece at a time."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer | None, vocab_size: int, eos_ids: Set[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = {token for token in eos_ids if token < vocab_size}
        self._not_eos = _all_but(self._eos_ids, vocab_size)
        self._tokens: Any = None  # an LLTokenizer, made when it is first needed
        self._known: OrderedDict[StructuredOutput, Any] = OrderedDict()  # last used last
        self._turn = asyncio.Lock()

    async def make(self, wanted: StructuredOutput) -> Constraint:
        """A constraint at its beginning. Raises InvalidRequest."""
        async with self._turn:
            matcher = await done_in_background(self._matcher, wanted)
        return Constraint(matcher, wanted, self._not_eos)

    def _matcher(self, wanted: StructuredOutput) -> Any:
        if wanted not in self._known:
            self._known[wanted] = self._compile(wanted)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(wanted)
        return self._known[wanted].deep_copy()

    def _compile(self, wanted: StructuredOutput) -> Any:
        from llguidance import LLMatcher

        grammar = grammar_of(wanted)
        if self._tokens is None:
            self._tokens = self._read_tokens()
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits())
        matcher.compute_bitmask()  # some find only here that nothing can follow at all
        if matcher.is_error():
            raise refusal(wanted, matcher.get_error())
        # A warning says what of a schema inside a grammar would be left out.
        if warnings := matcher.get_grammar_warnings():
            raise refusal(wanted, warnings[0])
        return matcher

    def _read_tokens(self) -> Any:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            raise InvalidRequest("structured_output", "this engine was started without a tokenizer")
        if not self._eos_ids:
            raise InvalidRequest(
                "structured_output",
                "this model has no end-of-sequence token, by which an output could end",
            )
        try:
            vocabulary: Any = Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
        except ModelError as error:
            raise InvalidRequest("structured_output", f"not with this model: {error}") from error
        eos = sorted(self._eos_ids)
        return LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=eos)


def _all_but(tokens: Set[int], vocab_size: int) -> Words:
    bits = np.ones(-(-vocab_size // 32) * 32, np.uint8)
    bits[sorted(tokens)] = 0
    return np.packbits(bits, bitorder="little").view(np.int32)
