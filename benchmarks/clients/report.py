"""What the clients found, as JSON and as a page: figures alone, and no rows of the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.clients.guidellm import Load
from benchmarks.clients.lm_eval import Score


@dataclass(frozen=True)
class Agreement:
    """lm-eval's likelihoods against those of transformers and PEFT: the accuracy that these give,
    the largest difference, and how many of the choices made are the same."""

    accuracy: float
    max_difference: float
    num_same: int

    @classmethod
    def of(
        cls, score: Score, likelihoods: Sequence[Sequence[float]], golds: Sequence[int]
    ) -> Agreement:
        """`likelihoods` and `golds` of the rows that were scored."""
        pairs = list(zip(score.likelihoods, likelihoods, strict=True))
        chosen = [_best(own) for own in likelihoods]
        return cls(
            sum(c == gold for c, gold in zip(chosen, golds, strict=True)) / len(golds),
            max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
            sum(_best(a) == c for (a, _), c in zip(pairs, chosen, strict=True)),
        )


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass
class Report:
    """One run. `scores` and `agreements`: by model, then by task."""

    machine: str
    versions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    agreements: dict[str, dict[str, Agreement]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)

    def write(self, directory: Path) -> str:
        """`results.json` and `report.md`, whose text it returns."""
        (directory / "results.json").write_text(json.dumps(self._as_json(), indent=2) + "\n")
        text = self._markdown()
        (directory / "report.md").write_text(text)
        return text

    def _as_json(self) -> dict[str, Any]:
        found = asdict(self)
        for tasks in found["scores"].values():
            for score in tasks.values():
                del score["likelihoods"]
        return found

    def _markdown(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.machine}; {versions}", ""]
        if self.scores:
            lines += [
                "| model | task | rows | metric | lm-eval | transformers and PEFT | same choice "
                "| largest difference of log-probabilities |",
                "|---|---|---:|---|---:|---:|---:|---:|",
                *(
                    self._score_line(model, score)
                    for model, tasks in self.scores.items()
                    for score in tasks.values()
                ),
                "",
            ]
        if self.loads:
            lines += [*_load_lines(self.loads), ""]
        if self.commands:
            lines += ["Commands:", "", *(f"    {command}" for command in self.commands)]
        return "\n".join(lines) + "\n"

    def _score_line(self, model: str, score: Score) -> str:
        other = self.agreements.get(model, {}).get(score.task)
        checked = ["", "", ""]
        if other is not None:
            checked = [
                f"{100 * other.accuracy:.1f}",
                f"{other.num_same} of {score.num_rows}",
                f"{other.max_difference:.1e}",
            ]
        cells = [model, score.task, f"{score.num_rows}", score.metric, f"{100 * score.value:.1f}"]
        return f"| {' | '.join([*cells, *checked])} |"


def _load_lines(loads: Sequence[Load]) -> list[str]:
    return [
        "| model | requests at once | done | failed | requests/s | output tokens/s "
        "| time to first token, ms, p50 / p95 | between tokens, ms, p50 / p95 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {load.model} | {load.concurrency} | {load.num_done} | {load.num_failed} "
            f"| {load.requests_per_s:.2f} | {load.output_tokens_per_s:.0f} "
            f"| {load.ttft_ms[0]:.0f} / {load.ttft_ms[1]:.0f} "
            f"| {load.itl_ms[0]:.1f} / {load.itl_ms[1]:.1f} |"
            for load in loads
        ),
    ]
