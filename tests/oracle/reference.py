"""What an adapter's version gives when it is run alone, by means that share nothing with the
engine: transformers' model with W0 - U_t S_t V_t^T + s B diag(d) A in the place of W0, computed in
float64 from the tensors that were written, and a forward over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter.making import ALL_LINEAR, make_adapter
from engine.making import load_model, logits_of
from torch import Tensor

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.lora import Adapter
from oracle.schedule import NUM_CONTENTS

TIE = 1e-4
"""Logits this far below the largest one may win: of two ways to compute them in float32, either is
right."""

TARGETS = (
    ALL_LINEAR,
    ("q_proj", "down_proj"),
    ("v_proj", "up_proj"),
    ("k_proj", "o_proj", "gate_proj"),
)


@dataclass(frozen=True)
class Verdict:
    """Of one sequence: where its tokens were not the first choice but tied with it, and what is
    wrong with it ("": nothing)."""

    num_ties: int
    wrong: str = ""


class Reference:
    """The base and NUM_CONTENTS adapters, written below `root`; `contents` by version."""

    def __init__(self, model_dir: Path, root: Path) -> None:
        self._model_dir = model_dir
        base = BaseModel(model_dir)
        self.directories: list[Path] = []
        self._adapters: dict[str, Adapter] = {}
        for i in range(NUM_CONTENTS):
            directory = root / f"content-{i}"
            adapter = make_adapter(
                base, TARGETS[i % len(TARGETS)], r=2 + i % 5, seed=100 + i, kasa=i % 3 != 0
            )
            checkpoint.write(directory, adapter)
            self.directories.append(directory)
            self._adapters[content_digest(directory)] = adapter
        self._models: dict[str, Any] = {}

    @property
    def versions(self) -> list[str]:
        """By content."""
        return list(self._adapters)

    def check(self, version: str, prompt: Sequence[int], tokens: Sequence[int]) -> Verdict:
        """Whether greedy decoding after `prompt` gives `tokens`; version "" is the base. Each token
        is compared with the choice after those before it, so that after a tie the rest still
        counts."""
        if not tokens:
            return Verdict(0)
        logits = logits_of(self._model(version), [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        num_ties = 0
        for i, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            best = int(row.argmax())
            if token == best:
                continue
            behind = float(row[best] - row[token])
            if behind > TIE:
                return Verdict(num_ties, f"token {i} is {token}, want {best} ({behind:.1e} ahead)")
            num_ties += 1
        return Verdict(num_ties)

    def _model(self, version: str) -> Any:
        if version not in self._models:
            model = load_model(self._model_dir)
            if version:
                _merge(model, self._adapters[version])
            self._models[version] = model
        return self._models[version]


@torch.no_grad()
def _merge(model: Any, adapter: Adapter) -> None:
    for name, weights in adapter.modules.items():
        weight = model.get_submodule(name).weight
        scaling = adapter.config.lora_alpha / adapter.config.r
        b = weights.b if weights.diag is None else weights.b @ torch.diag(weights.diag)
        delta = scaling * b.double() @ weights.a.double()  # (out, r) @ (r, in)
        weight.copy_(_without_tail(weight.double(), adapter.truncation[name]) + delta)


def _without_tail(weight: Tensor, t: int) -> Tensor:
    """(out, in) without its t smallest singular components."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    keep = len(s) - t
    return u[:, :keep] * s[:keep] @ vh[:keep]
