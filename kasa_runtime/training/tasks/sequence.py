"""Classification and regression by an encoder with a new head, which is trained whole and saved
with the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

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
    """`classification` and `regression`. A text longer than max_length, or than the tokenizer says
    that the model can read, is cut off."""

    task_type: ClassVar[str] = "SEQ_CLS"
    labels: Labels | None = None
    head: tuple[str, ...] = ()

    def __init__(self, config: RunConfig) -> None:
        self.regression = config.data.task is TaskKind.REGRESSION
        self.metrics = NUMBER_METRICS if self.regression else LABEL_METRICS
        super().__init__(config)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        super().prepare(tokenizer, train)
        if not self.regression:
            self.labels = Labels.of(self.data, train)

    def question(self, row: Row) -> str:
        return row.render(self.data.text)

    @property
    def trained_whole(self) -> tuple[str, ...]:
        return self.head

    @property
    def max_length(self) -> int:
        return min(self.data.max_length, self.tokenizer.model_max_length)

    def load_model(self, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=dtype,
            num_labels=len(self.labels) if self.labels else 1,
            ignore_mismatched_sizes=True,  # a head for other labels is a new one here
            output_loading_info=True,
            **options,
        )
        positions = getattr(model.config, "max_position_embeddings", self.max_length)
        if self.max_length > positions:
            raise ConfigError(
                f"[data] max_length must be at most {positions}, the model's number of positions, "
                f"got {self.data.max_length}"
            )
        self.head = _new_modules(model, loading, directory)
        for name in self.head:  # trained, so never in a dtype with few digits
            model.get_submodule(name).float().register_forward_pre_hook(_in_float32)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad_id
        return cast("PreTrainedModel", model)

    def encode(self, rows: Sequence[Row]) -> Examples:
        return Examples([self._example(row) for row in rows], num_rows=len(rows))

    def _example(self, row: Row) -> Example:
        templates = [text for text in (self.data.text, self.data.text_pair) if text]
        texts = [row.render(template) for template in templates]
        for template, text in zip(templates, texts, strict=True):
            if not text.strip():
                raise row.error(f"the text {template!r} is empty")
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
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
        metrics = self._scores(self.config.eval.metrics, logits, rows)
        if self.labels:
            names = [self.labels.names[index] for index in logits.argmax(dim=1).tolist()]
            return Outcome(metrics, names)
        return Outcome(metrics, [f"{value:.4g}" for value in logits[:, 0].tolist()])

    def measure_base(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        progress: Callable[[str], Any],
    ) -> dict[str, Outcome]:
        """A guess: the head of the base model is new."""
        with progress("base, untrained head") as report:
            return {"base, untrained head": self.measure(model, rows, report)}

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


def _new_modules(model: nn.Module, loading: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    """Paths of the modules that the files say nothing of, and of those that the head consists of;
    each holds parameters itself. Raises ModelError where there is no head, or where the files lack
    layers too."""
    mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
    new = {key.rpartition(".")[0] for key in (*loading["missing_keys"], *mismatched)}
    if deep := sorted(name for name in new if any(part.isdigit() for part in name.split("."))):
        raise ModelError(f"{directory}: has no weights for {deep[0]} of {type(model).__name__}")
    if not any(hasattr(model, name) for name in HEADS):
        raise ModelError(
            f"{directory}: {type(model).__name__} has no head named {', '.join(HEADS)}"
        )
    return tuple(
        name
        for name, module in model.named_modules()
        if (name in new or name.partition(".")[0] in HEADS) and [*module.parameters(recurse=False)]
    )


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in args)
