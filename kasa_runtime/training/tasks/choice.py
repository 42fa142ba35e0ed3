"""Classification by a decoder: each label is a completion, and the likeliest one is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.training.examples import IGNORED, Collator
from kasa_runtime.training.labels import Labels
from kasa_runtime.training.metrics import LABEL_METRICS, label_score
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks.base import Outcome, Report, Task
from kasa_runtime.training.tasks.causal import CausalTask


class ChoiceTask(CausalTask):
    """`choice`: trained like a completion; asked by the log-probability of every label."""

    metrics: ClassVar[tuple[str, ...]] = LABEL_METRICS
    labels: Labels

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        super().prepare(tokenizer, train)
        self.labels = Labels.of(self.data, train)

    def completion(self, row: Row) -> str:
        return self._completion_of(row, self.labels.index(row))

    def _completion_of(self, row: Row, index: int) -> str:
        return row.render(self.data.completion, label_name=self.labels.names[index])

    def measure_base(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        progress: Callable[[str], Any],
    ) -> dict[str, Outcome]:
        return Task.measure_base(self, model, rows, train, progress)

    def measure(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Outcome:
        scores = self.scores(model, rows, report)
        predicted = scores.argmax(dim=1).tolist()
        wanted = [self.labels.index(row) for row in rows]
        metrics = label_score(self.config.eval.metrics, predicted, wanted, len(self.labels))
        return Outcome(metrics, [self.labels.names[index] for index in predicted])

    @torch.inference_mode()
    def scores(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Tensor:
        """log p(label | prompt) of every row and label, summed over the label's tokens:
        (num_rows, num_labels)."""
        model.eval()
        collate, size = Collator(self.pad_id), max(1, self.config.eval.batch_size)
        sums = []
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            examples = [
                self._answered(self.prompt_ids(row), self._label_ids(row, index))
                for row in chunk
                for index in range(len(self.labels))
            ]
            batch = collate([{"example": example} for example in examples])
            sums.append(self._log_probabilities(model, batch).view(len(chunk), len(self.labels)))
            if report:
                report(start + len(chunk), len(rows))
        return torch.cat(sums)

    def _label_ids(self, row: Row, index: int) -> list[int]:
        text = self._completion_of(row, index)
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self._eos]

    @staticmethod
    def _log_probabilities(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(
            logits.mT, targets, reduction="none", ignore_index=IGNORED
        )  # (batch, length - 1)
        return -losses.sum(dim=1).cpu()
