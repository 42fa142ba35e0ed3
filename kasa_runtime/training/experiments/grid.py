"""The experiments: which cells each has. A cell is one way to train; a run of it is a cell and a
seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm

LEARNING_RATES = (0.3, 1.0, 3.0, 10.0)
"""Multiples of the run's own learning rate that the comparison with other methods sweeps."""


class Approach(StrEnum):
    """What is trained. All but the first two are baselines."""

    KASA = "kasa"
    LORA = "lora"
    DORA = "dora"
    PISSA = "pissa"
    ADALORA = "adalora"
    HEAD = "head"  # the new head alone: a lower bound of tasks that have one
    FULL = "full"  # every weight, at a tenth of the learning rate: an upper bound
    NOTHING = "nothing"  # measured as it is attached, not trained


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to train: an approach, and what it changes of the run's settings, by
    "section.key"."""

    label: str
    approach: Approach = Approach.KASA
    changes: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None  # its place on the x axis of a sweep
    series: str = ""  # the curve that it is a point of
    against: str = ""  # label of the cell that it is compared with

    @property
    def key(self) -> str:
        """What it is, whatever it is called: cells of two experiments with one key are one run."""
        return json.dumps([self.approach, dict(sorted(self.changes.items()))])


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question and the cells that answer it. `x` names the axis of a sweep."""

    name: str
    question: str
    cells: Callable[[RunConfig], Sequence[Cell]]
    x: str = ""
    causal_only: bool = False

    def fits(self, config: RunConfig) -> bool:
        """Whether a run's task can answer the question."""
        return not (self.causal_only and config.data.task.has_head)


def _truncation(config: RunConfig) -> list[Cell]:
    whole = "KaSA without truncation"
    return [
        Cell("KaSA", changes=_truncated(config, config.method.r), against=whole),
        Cell(whole, changes=_truncated(config, 0)),
    ]


def _truncation_rank(config: RunConfig) -> list[Cell]:
    r = config.method.r
    ranks = sorted({0, r // 2, r, 2 * r, 4 * r, 8 * r})
    return [
        Cell(f"t = {t}", changes=_truncated(config, t), x=t, series="KaSA", against="t = 0")
        for t in ranks
    ]


def _versus_lora(config: RunConfig) -> list[Cell]:
    cells = []
    for factor in LEARNING_RATES:
        rate = config.train.learning_rate * factor
        at = {} if factor == 1 else {"train.learning_rate": _tidy(rate)}
        ways = [
            ("KaSA", Approach.KASA, _truncated(config, config.method.r)),
            ("LoRA", Approach.LORA, {}),
            ("LoRA, rank r + t", Approach.LORA, _doubled(config)),
            ("DoRA", Approach.DORA, {}),
            ("PiSSA", Approach.PISSA, {}),
            ("AdaLoRA", Approach.ADALORA, {}),
        ]
        if config.data.task.has_head:
            ways.append(("head only", Approach.HEAD, {}))
        ways.append(("full fine-tuning", Approach.FULL, {}))
        for name, approach, changes in ways:
            label, against = f"{name}, lr {rate:g}", f"LoRA, lr {rate:g}"
            cells.append(Cell(label, approach, {**at, **changes}, rate, name, against))
    return cells


def _loss_terms(config: RunConfig) -> list[Cell]:
    beta, gamma = config.method.beta, config.method.gamma
    cells = []
    for t in (config.method.r, 0):
        for diag in (True, False):
            for b, g in ((0.0, 0.0), (beta, 0.0), (0.0, gamma), (beta, gamma)):
                if b and not diag:
                    continue  # L2 is of the diagonal
                whole = diag and b == beta and g == gamma
                changes = _truncated(config, t)
                changes |= {} if whole else {"method.beta": b, "method.gamma": g}
                changes |= {} if diag else {"method.diag": False}
                terms = "L1" + (" + L2" if b else "") + (" + L3" if g else "")
                label = f"{'cut' if t else 'whole'}, {'diagonal' if diag else 'no diagonal'}, "
                cells.append(Cell(label + terms, changes=changes, against=_WHOLE_METHOD))
    strong = {"method.beta": 1000 * beta, "method.gamma": 100 * gamma}
    strong |= _truncated(config, config.method.r)
    strongest = "cut, diagonal, L1 + 1000 L2 + 100 L3"
    cells.append(Cell(strongest, changes=strong, against=_WHOLE_METHOD))
    return cells


_WHOLE_METHOD = "cut, diagonal, L1 + L2 + L3"


def _initialisation(config: RunConfig) -> list[Cell]:
    base = _truncated(config, config.method.r)
    usual = config.method.diag_init
    return [
        Cell(
            how.value,
            against=usual.value,
            changes=base | ({} if how is usual else {"method.diag_init": how}),
        )
        for how in DiagInit
    ]


def _orthogonality(config: RunConfig) -> list[Cell]:
    base = _truncated(config, config.method.r)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("gram_r", {}),
        ("gram_r, 100 gamma", {"method.gamma": 100 * config.method.gamma}),
        ("gram_n", {"method.ortho_form": OrthoForm.GRAM_N}),
        ("gram_r_sq", {"method.ortho_form": OrthoForm.GRAM_R_SQ}),
        ("none", {"method.ortho_form": OrthoForm.NONE}),
        (
            "QR after each step",
            {"method.ortho_form": OrthoForm.QR, "method.diag_init": DiagInit.ZEROS},
        ),
        ("weight decay 0.1", {"method.ortho_form": OrthoForm.NONE, "train.weight_decay": 0.1}),
        ("dropout 0.1", {"method.ortho_form": OrthoForm.NONE, "method.dropout": 0.1}),
    ]
    return [Cell(label, changes=base | changes, against="gram_r") for label, changes in ways]


def _untrained(config: RunConfig) -> list[Cell]:
    ranks = (0, 1, 2, 4, 8, 16, 32, 64)
    return [
        Cell(f"t = {t}", Approach.NOTHING, _truncated(config, t), t, "truncated base")
        for t in ranks
    ]


def _truncated(config: RunConfig, t: int) -> dict[str, Any]:
    """The run's own setting is not written, so that it has one key everywhere."""
    own = config.method.truncation_rank
    usual = config.method.r if own is None else own
    return {} if t == usual else {"method.truncation_rank": t}


def _doubled(config: RunConfig) -> dict[str, Any]:
    """A LoRA that costs in serving what KaSA costs, at the same alpha / r."""
    own = config.method.truncation_rank
    r = config.method.r + (config.method.r if own is None else own)
    return {"method.r": r, "method.alpha": config.method.alpha * r / config.method.r}


def _tidy(value: float) -> float:
    return float(f"{value:.6g}")


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("truncation", "Does cutting the smallest components off help?", _truncation),
        Experiment(
            "truncation-rank",
            "How much may be cut off?",
            _truncation_rank,
            x="truncation rank t",
        ),
        Experiment(
            "versus-lora",
            "Is KaSA better than LoRA and others, and at which learning rates?",
            _versus_lora,
            x="learning rate",
        ),
        Experiment("loss-terms", "What does each part of the method add?", _loss_terms),
        Experiment("initialisation", "Where should the singular values start?", _initialisation),
        Experiment("orthogonality", "Is L3 better than its alternatives?", _orthogonality),
        Experiment(
            "untrained",
            "What does the base lose by truncation, before any training?",
            _untrained,
            x="truncation rank t",
            causal_only=True,
        ),
    )
}
