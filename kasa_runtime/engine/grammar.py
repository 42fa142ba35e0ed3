"""What structured output asks for, as a grammar in llguidance's words, on whichever engine follows
it. What llguidance would leave out or take to mean something else is refused here.

Imports llguidance where it is used: a start that nobody asks for structured output does without.
"""

from __future__ import annotations

import json
import re
from typing import Any

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import StructuredOutput

MAX_BYTES = 128 * 2**10
"""Of a schema, a regex, a grammar, or all choices together: half a second of compiling at most."""

MAX_REASON = 400  # characters of llguidance's words
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of JSON. Without an end, a small model fills its context with it."""


def kind_of(wanted: StructuredOutput) -> str:
    """Which of the fields is given: the one that errors are about."""
    kinds = ("json_schema", "regex", "choice", "grammar")
    return next(kind for kind in kinds if getattr(wanted, kind) not in (None, ()))


def refusal(wanted: StructuredOutput, message: str) -> InvalidRequest:
    """The error of a request whose structured output cannot be had, with llguidance's reason."""
    reason = re.split(r"\n<|<backtrace>", message)[0].strip()[:MAX_REASON]
    return InvalidRequest(f"structured_output.{kind_of(wanted)}", reason)


def grammar_of(wanted: StructuredOutput) -> str:
    """llguidance's form of it, for `LLMatcher`, which says whether it is right. Raises
    InvalidRequest on what is too long, or is no JSON."""
    from llguidance import LLMatcher

    given = getattr(wanted, kind_of(wanted))
    texts = (given,) if isinstance(given, str) else given
    size = sum(len(text.encode(errors="replace")) for text in texts)
    if size > MAX_BYTES:
        raise refusal(wanted, f"has {size} bytes, at most {MAX_BYTES} are taken; make it shorter")
    if wanted.json_schema is not None:
        return _of_schema(wanted, wanted.json_schema)
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    # One regex of all choices: as alternatives of a grammar, each would be a state of its own.
    return LLMatcher.grammar_from_regex("|".join(map(_literal, wanted.choice)))


def check(wanted: StructuredOutput) -> None:
    """Raises InvalidRequest unless a grammar can be made of it; of tokens it knows nothing.
    Takes milliseconds, so not on the event loop."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar_of(wanted), limits=limits())
    if failed or messages:
        raise refusal(wanted, messages[0])


def limits() -> Any:
    """llguidance's limits. An ambiguous grammar at its defaults takes seconds for one token, and
    the whole batch waits; at these tens of milliseconds. Schemas with hundreds of properties are
    well within them."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_max_items=3_000, max_lexer_states=50_000, verbose_errors=False)


def _of_schema(wanted: StructuredOutput, text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(wanted, f"must be JSON: {error}") from error
    if schema is True:
        schema, text = {}, "{}"
    if not isinstance(schema, dict):
        raise refusal(wanted, f"must be an object or true, got {text.strip()[:80]}")
    # llguidance's own key for leaving keywords out and for text that is no JSON.
    if "x-guidance" in schema:
        raise refusal(wanted, "x-guidance is no keyword of JSON Schema; leave it out")
    try:
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": WHITE_SPACE}
        )
    except ValueError as error:
        raise refusal(wanted, str(error)) from error


def _literal(text: str) -> str:
    """A regex that matches this text alone, in any engine's dialect."""
    return re.sub(r"[^0-9A-Za-z]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
