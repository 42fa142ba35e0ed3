"""What a load asks for: prompts in turn, adapters by Zipf's law."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from random import Random

from kasa_runtime.errors import AdapterNotFound, ConfigError
from kasa_runtime.loadtest.load import Request
from kasa_runtime.types import AdapterInfo, AdapterState

ALL = "all"
BASE = "-"
PROMPTS = (
    "Explain in three sentences how a bicycle stays upright.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "What is the difference between weather and climate?",
    "List five things to check before a long drive in winter.",
    "Summarize the story of Odysseus and the Cyclops.",
    "Write a Python function that returns the prime factors of an integer.",
    "Why does bread rise, and what happens if the yeast is dead?",
    "Translate into French: the train to the coast leaves at noon.",
)
"""Where no file is given."""


def read_prompts(path: Path) -> list[str]:
    """One per line, or JSON lines with `prompt`. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path} has no prompt; write one per line, or JSON lines with `prompt`")
    if not numbered[0][1].lstrip().startswith("{"):
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: want a JSON object with `prompt`, got {line[:80]!r}"
        ) from error
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: `prompt` must be a text that is not empty, got {prompt!r}")
    return prompt


def choose_adapters(wanted: str, known: Sequence[AdapterInfo]) -> list[str]:
    """`all` that are served, by name; or those of a list with commas: `-` is the base model, and
    any may be name@version. Raises AdapterNotFound."""
    served = sorted({info.name for info in known if info.state is not AdapterState.QUARANTINED})
    if wanted == ALL:
        if not served:
            raise AdapterNotFound("the server has no adapter; upload one, or use --adapters -")
        return served
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name != BASE and name.partition("@")[0] not in served:
            raise AdapterNotFound(f"no adapter {name!r}; there are {served}", name=name)
    return ["" if name == BASE else name for name in names]


def zipf_weights(num: int, exponent: float) -> list[float]:
    """Of the k-th adapter 1 / k^exponent, normalised. 0: all are equally likely."""
    weights = [k**-exponent for k in range(1, num + 1)]
    return [weight / sum(weights) for weight in weights]


def make_requests(
    prompts: Sequence[str], adapters: Sequence[str], exponent: float, generator: Random
) -> Iterator[Request]:
    """Without end: prompts in turn, adapters drawn, the first ones most often."""
    weights = zipf_weights(len(adapters), exponent)
    for prompt in cycle(prompts):
        yield Request(generator.choices(adapters, weights)[0], prompt)
