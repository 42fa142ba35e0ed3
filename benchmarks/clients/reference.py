"""Likelihoods of choices by another way: transformers' model, its adapter applied by PEFT, whole
sequences one by one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.clients.tasks import Row


class Reference:
    """The base model in float32, or with `adapter`, a directory, the model that it makes of it."""

    def __init__(self, model_dir: Path, adapter: Path | None) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    def score(self, rows: Iterable[Row]) -> list[list[float]]:
        """Of every row, the log-probability of each choice after the text."""
        return [[self._likelihood(row.text, choice) for choice in row.choices] for row in rows]

    @torch.inference_mode()
    def _likelihood(self, text: str, choice: str) -> float:
        before = len(self._tokenizer(text).input_ids)
        ids = torch.tensor([self._tokenizer(text + choice).input_ids])
        values = torch.log_softmax(self._model(input_ids=ids).logits[0], dim=-1)  # (tokens, vocab)
        rows, following = values[before - 1 : -1], ids[0, before:]
        return float(rows.gather(1, following[:, None]).sum())
