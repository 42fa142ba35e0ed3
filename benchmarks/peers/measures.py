"""From the arrival times of tokens to figures, and from figures to ratios between systems."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from benchmarks.peers.cases import Case, Mix


@dataclass(frozen=True)
class Measures:
    """Figures of one round of one case."""

    decode_tokens_per_s: float  # of the whole batch
    ttft_s: float  # mean over the requests
    itl_p50_s: float  # over all gaps between two tokens of a request
    itl_p99_s: float
    peak_rss_bytes: int  # of all its processes, since the round began
    resident_bytes: int  # of all its processes, at the end of the round


def measures(
    token_s: Sequence[Sequence[float]], *, peak_rss_bytes: int, resident_bytes: int
) -> Measures:
    """`token_s`: when each token of each request came, in seconds since all were sent.

    Decoding counts from the moment when every request has its first token: the tokens that came
    after it, over the time from it to the last."""
    all_started_s = max(times[0] for times in token_s)
    end_s = max(times[-1] for times in token_s)
    num_decoded = sum(s > all_started_s for times in token_s for s in times)
    gaps_s = [after - before for times in token_s for before, after in pairwise(times)]
    return Measures(
        decode_tokens_per_s=num_decoded / (end_s - all_started_s),
        ttft_s=statistics.fmean(times[0] for times in token_s),
        itl_p50_s=float(np.percentile(gaps_s, 50)),
        itl_p99_s=float(np.percentile(gaps_s, 99)),
        peak_rss_bytes=peak_rss_bytes,
        resident_bytes=resident_bytes,
    )


@dataclass(frozen=True)
class Record:
    """One line of `rounds.jsonl`."""

    system: str
    case: Case
    round: int
    measures: Measures
    token_ids: list[list[int]]  # generated, by request

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Record:
        case = Case(**{**line["case"], "mix": Mix(line["case"]["mix"])})
        return cls(**{**line, "case": case, "measures": Measures(**line["measures"])})


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


def spreads(records: Iterable[Record], measure: str) -> dict[tuple[str, Case], Spread]:
    """Of one measure over the rounds, by system and case, in the order of the records."""
    values: dict[tuple[str, Case], list[float]] = {}
    for record in records:
        found = getattr(record.measures, measure)
        values.setdefault((record.system, record.case), []).append(found)
    return {key: Spread.of(found) for key, found in values.items()}


@dataclass(frozen=True)
class Side:
    system: str
    mix: Mix


@dataclass(frozen=True)
class Pair:
    """Two that are compared in the rounds that both have, where batch and prompts are of one
    size. Empty `concurrencies` or `prompt_tokens`: wherever both were measured."""

    ours: Side
    other: Side
    concurrencies: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    measure: str = "decode_tokens_per_s"

    def holds(self, case: Case) -> bool:
        return (not self.concurrencies or case.concurrency in self.concurrencies) and (
            not self.prompt_tokens or case.prompt_tokens in self.prompt_tokens
        )


@dataclass(frozen=True)
class Ratio:
    """`pair.ours` over `pair.other` in each round, of batches of one size."""

    pair: Pair
    concurrency: int
    prompt_tokens: int
    spread: Spread
    num_rounds: int


def ratios(records: Sequence[Record], pairs: Iterable[Pair]) -> list[Ratio]:
    """Of all pairs that have a round in common."""
    values = {(r.system, r.case, r.round): r.measures for r in records}
    sizes = sorted({(r.case.prompt_tokens, r.case.concurrency) for r in records})
    rounds = sorted({r.round for r in records})
    found = []
    for pair in pairs:
        for prompt_tokens, concurrency in sizes:
            ours = Case(pair.ours.mix, concurrency, prompt_tokens)
            other = Case(pair.other.mix, concurrency, prompt_tokens)
            both = [
                getattr(values[pair.ours.system, ours, i], pair.measure)
                / getattr(values[pair.other.system, other, i], pair.measure)
                for i in rounds
                if pair.holds(ours)
                and (pair.ours.system, ours, i) in values
                and (pair.other.system, other, i) in values
            ]
            if both:
                found.append(Ratio(pair, concurrency, prompt_tokens, Spread.of(both), len(both)))
    return found


def agreement(records: Sequence[Record], reference: str) -> dict[str, float]:
    """Per system: the share of its base tokens that come before the first difference from what
    `reference` generated for the same prompt."""
    wanted = {
        (r.case, r.round): r.token_ids
        for r in records
        if r.system == reference and r.case.mix is Mix.BASE
    }
    shares: dict[str, list[float]] = {}
    for record in records:
        if record.system == reference or (record.case, record.round) not in wanted:
            continue
        theirs = wanted[record.case, record.round]
        for ids, want in zip(record.token_ids, theirs, strict=True):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, want, strict=True))
            shares.setdefault(record.system, []).append(len(list(same)) / len(want))
    return {system: statistics.fmean(found) for system, found in shares.items()}
