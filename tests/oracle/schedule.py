"""What happens in a run of the oracle: a list of actions, drawn from a seed alone.

An action says what is tried; what comes of it, such as which version a rollback finds, is up to the
state at its turn. Times are not part of it: two runs of one schedule interleave differently.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

NAMES = tuple(f"tenant-{i}" for i in range(6))
COPIED = ("copied-0", "copied-1")
NUM_CONTENTS = 8
MAX_TOKENS = 14
SALTS = ("", "a", "b")
VOCAB = range(3, 320)


class Kind(StrEnum):
    REQUEST = "request"
    UPLOAD = "upload"  # onto a new or an existing name
    COPY = "copy"  # into the adapters directory, by hand
    ROLLBACK = "rollback"
    DELETE = "delete"
    LOAD = "load"
    PIN = "pin"  # unloading ends it
    UNLOAD = "unload"
    MERGE = "merge"
    UNMERGE = "unmerge"


@dataclass(frozen=True)
class Action:
    """One line of a schedule. Fields that a kind does not use have their defaults."""

    index: int
    kind: Kind
    name: str = ""  # of an adapter; "": the base
    wait_tokens: int = 0  # first let the requests that run get this many tokens, all together
    content: int = 0  # which adapter to upload or copy
    version: int = -1  # which of the versions seen under the name; -1: the current one
    prompt: tuple[int, ...] = ()
    max_tokens: int = 1
    salt: str = ""
    cancel_after: int = 0  # tokens; 0: never
    deadline_s: float = 0.0  # 0: none


WEIGHTS: dict[Kind, float] = {
    Kind.REQUEST: 80,
    Kind.UPLOAD: 6,
    Kind.COPY: 1,
    Kind.ROLLBACK: 3,
    Kind.DELETE: 1.5,
    Kind.LOAD: 2,
    Kind.PIN: 1,
    Kind.UNLOAD: 2,
    Kind.MERGE: 2.5,
    Kind.UNMERGE: 1.5,
}


def make_schedule(seed: int, num_requests: int) -> list[Action]:
    """`num_requests` requests with all else between them. It begins with an upload of each name."""
    draw = random.Random(seed)
    stems = [tuple(draw.choices(VOCAB, k=draw.randint(6, 76))) for _ in range(6)]
    actions = [
        Action(i, Kind.UPLOAD, name, content=draw.randrange(NUM_CONTENTS))
        for i, name in enumerate(NAMES)
    ]
    while num_requests:
        kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        num_requests -= kind is Kind.REQUEST
        actions.append(_DRAWN[kind](draw, len(actions), kind, stems))
    return actions


def _request(draw: random.Random, index: int, kind: Kind, stems: list[tuple[int, ...]]) -> Action:
    own = draw.choices(VOCAB, k=draw.randint(1, 12))
    return Action(
        index,
        kind,
        draw.choice((*NAMES, *NAMES, *COPIED, "", "")),
        wait_tokens=draw.choice((0, 0, 1, 3, 20)),
        version=draw.randrange(6) if draw.random() < 0.2 else -1,
        prompt=(*draw.choice(stems), *own),
        max_tokens=draw.randint(1, MAX_TOKENS),
        salt=draw.choice(SALTS),
        cancel_after=draw.randint(1, 4) if draw.random() < 0.1 else 0,
        deadline_s=draw.choice((0.001, 0.02, 0.1)) if draw.random() < 0.05 else 0.0,
    )


def _change(draw: random.Random, index: int, kind: Kind, stems: list[tuple[int, ...]]) -> Action:
    return Action(
        index,
        kind,
        draw.choice(COPIED if kind is Kind.COPY else NAMES),
        wait_tokens=draw.choice((0, 1, 5)),
        content=draw.randrange(NUM_CONTENTS),
        version=draw.randrange(6),
    )


_Draw = Callable[[random.Random, int, Kind, list[tuple[int, ...]]], Action]
_DRAWN: dict[Kind, _Draw] = {kind: _change for kind in Kind} | {Kind.REQUEST: _request}
