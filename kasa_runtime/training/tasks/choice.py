"""Classification by a decoder: each label is a completion, and the likeliest one is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.training.cross_entropy import cross_entropy
from kasa_runtime.training.examples import Collator, Example
from kasa_runtime.training.labels import Labels
from kasa_runtime.training.metrics import LABEL_METRICS, label_score
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks.base import Outcome, Report, Task
from kasa_runtime.training.tasks.causal import CausalTask


class ChoiceTask(CausalTask):
    """`choice`: trained like a completion; asked by the log-probability of every label."""

    metrics = LABEL_METRICS
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

    def check(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._example(row)

    @torch.inference_mode()
    def scores(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Tensor:
        """log p(label | prompt) of every row and label, summed over the label's tokens and the
        end-of-sequence token, so that no label is the beginning of another: (num_rows,
        num_labels)."""
        model.eval()
        collate, size = Collator(self.pad_id), self.config.eval.batch_size
        asked = [example for row in rows for example in self._asked_with_each(row)]
        sums = []
        for start in range(0, len(asked), size):
            chunk = asked[start : start + size]
            batch = collate([{"example": example} for example in chunk])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits, targets, in_row = self.labelled_logits(model, batch)
            losses = cross_entropy(logits, targets)
            sums.append(-losses.new_zeros(len(chunk)).index_add(0, in_row, losses).cpu())
            if report:
                report((start + len(chunk)) // len(self.labels), len(rows))
        return torch.cat(sums).view(len(rows), len(self.labels))

    def _asked_with_each(self, row: Row) -> list[Example]:
        """The prompt with every label in turn."""
        prompt = self.prompt_ids(row)
        texts = [self._completion_of(row, index) for index in range(len(self.labels))]
        return [self._answered(prompt, self.answer_ids(text)) for text in texts]
