"""Classification and regression by an encoder with a new head, which is trained whole and saved
with the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kasa_runtime.errors import ConfigError, DataError, ModelError
from kasa_runtime.training.config import RunConfig, TaskKind
from kasa_runtime.training.examples import Collator, Example, Examples
from kasa_runtime.training.labels import Labels
from kasa_runtime.training.metrics import (
    LABEL_METRICS,
    NUMBER_METRICS,
    label_score,
    number_score,
)
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks.base import BatchLoss, Outcome, Report, Task

HEADS = ("classifier", "score", "classification_head")
"""Names that transformers' classes give the head, as in PEFT."""


class SequenceTask(Task):
    """`classification` and `regression`. A text longer than max_length is cut off."""

    metrics: ClassVar[tuple[str, ...]] = (*LABEL_METRICS, *NUMBER_METRICS)
    task_type: ClassVar[str] = "SEQ_CLS"
    labels: Labels | None = None
    head: str = ""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.regression = config.data.task is TaskKind.REGRESSION
        known = NUMBER_METRICS if self.regression else LABEL_METRICS
        if wrong := [name for name in config.eval.metrics if name not in known]:
            raise ConfigError(
                f"[eval] metrics: {wrong[0]} is not for task = {config.data.task}; known: "
                f"{', '.join(known)}"
            )
        if config.data.packing:
            raise ConfigError("[data] packing is for causal tasks, an encoder reads row by row")

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        super().prepare(tokenizer, train)
        if not self.regression:
            self.labels = Labels.of(self.data, train)

    def question(self, row: Row) -> str:
        return row.render(self.data.text)

    @property
    def trained_whole(self) -> tuple[str, ...]:
        return (self.head,) if self.head else ()

    def load_model(self, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=dtype, num_labels=len(self.labels) if self.labels else 1, **options
        )
        heads = [name for name in HEADS if hasattr(model, name)]
        if not heads:
            raise ModelError(
                f"{directory}: {type(model).__name__} has no head named {', '.join(HEADS)}"
            )
        self.head = heads[0]
        model.get_submodule(self.head).float()  # trained, so never in a dtype with few digits
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad_id
        return model

    def encode(self, rows: Sequence[Row]) -> Examples:
        return Examples([self._example(row) for row in rows], num_rows=len(rows))

    def _example(self, row: Row) -> Example:
        texts = [row.render(self.data.text)]
        if self.data.text_pair:
            texts.append(row.render(self.data.text_pair))
        if not texts[0].strip():
            raise row.error(f"the text {self.data.text!r} is empty")
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.data.max_length)
        kinds = tuple(encoded.get("token_type_ids", ())) if self.data.text_pair else ()
        return Example(tuple(encoded["input_ids"]), self._label(row), token_type_ids=kinds)

    def _label(self, row: Row) -> int | float:
        if self.labels:
            return self.labels.index(row)
        value = row.get(self.data.label)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise row.error(f"{self.data.label}: want a number, got {value!r}")
        return number

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """Cross-entropy over classes; squared error of the one output for regression."""
        total = self._total_loss(self._logits(model, inputs), inputs["labels"])
        return BatchLoss(total, len(inputs["labels"]))

    def _total_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.regression:
            return functional.mse_loss(logits[:, 0], labels.float(), reduction="sum")
        return functional.cross_entropy(logits, labels, reduction="sum")

    @staticmethod
    def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits: Tensor = model(**rest).logits.float()  # (batch, num_labels)
        return logits

    def measure(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Outcome:
        logits = self.predict(model, rows, report)
        if self.labels:
            predicted = logits.argmax(dim=1).tolist()
            return Outcome(
                self._scores(self.config.eval.metrics, logits, rows),
                [self.labels.names[index] for index in predicted],
            )
        values = [f"{value:.4g}" for value in logits[:, 0].tolist()]
        return Outcome(self._scores(self.config.eval.metrics, logits, rows), values)

    def held_out(self, model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
        logits = self.predict(model, rows)
        labels = torch.tensor([self._label(row) for row in rows])
        loss = self._total_loss(logits, labels).item() / len(rows)
        return {"loss": loss, **self._scores(self.config.eval.metrics, logits, rows)}

    def _scores(
        self, names: Sequence[str], logits: Tensor, rows: Sequence[Row]
    ) -> dict[str, float]:
        wanted = [self._label(row) for row in rows]
        if self.labels:
            predicted = logits.argmax(dim=1).tolist()
            return label_score(names, predicted, [int(x) for x in wanted], len(self.labels))
        return number_score(names, logits[:, 0].tolist(), wanted)

    @torch.inference_mode()
    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Tensor:
        """(num_rows, num_labels) float32 on the CPU."""
        model.eval()
        if not rows:
            raise DataError("want at least one row to predict, found none")
        examples, collate = self.encode(rows), Collator(self.pad_id)
        order = sorted(range(len(rows)), key=lambda i: len(examples.examples[i]))  # little padding
        outputs: list[Tensor] = [torch.empty(0)] * len(rows)
        size = self.config.eval.batch_size
        for start in range(0, len(rows), size):
            indices = order[start : start + size]
            batch = collate([examples[i] for i in indices])
            logits = self._logits(model, {k: v.to(model.device) for k, v in batch.items()})
            for index, row in zip(indices, logits.cpu(), strict=True):
                outputs[index] = row
            if report:
                report(start + len(indices), len(rows))
        return torch.stack(outputs)
