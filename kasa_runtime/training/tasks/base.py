"""The interface between a run and what it trains: five steps that differ from task to task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.examples import Examples
from kasa_runtime.training.metrics import check_packages
from kasa_runtime.training.rows import Row

Report = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of one model on held-out rows, and what it said to each."""

    metrics: Mapping[str, float]
    predictions: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """L1 of a batch, not yet divided: `total` over `count` tokens (causal) or rows (encoders)."""

    total: Tensor
    count: int


class Task(ABC):
    """One kind of task, for one run. `prepare` comes first: it takes the tokenizer and the training
    rows, and afterwards the task knows its labels."""

    metrics: tuple[str, ...]
    """The names that `[eval] metrics` may have."""
    task_type: ClassVar[str]
    """PEFT's name for it, in adapter_config.json."""
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, config: RunConfig) -> None:
        self.config, self.data = config, config.data
        for name in config.eval.metrics:
            if name not in self.metrics:
                raise ConfigError(
                    f"[eval] metrics: no metric {name!r} for task = {config.data.task}; known: "
                    f"{', '.join(self.metrics)}"
                )
        check_packages(config.eval.metrics)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, train: Sequence[Row]) -> None:
        """Learn what the training rows say about the task. Raises ConfigError, DataError."""
        self.tokenizer = tokenizer

    def question(self, row: Row) -> str:
        """What is asked about a row, as a person reads it."""
        return row.render(self.data.prompt)

    @property
    def pad_id(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else eos)

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Paths of modules that are trained whole and saved with the adapter: a new head."""
        return ()

    @abstractmethod
    def load_model(self, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        """The base model of this task. A head that the files lack is initialised by torch's
        generator."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Examples:
        """Tokenise rows. Raises DataError naming source and line."""

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse rows that `measure` could not use, before anything slow is done. Raises
        DataError."""
        self.encode(rows)

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """L1 of a batch of the Collator, in float32."""

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, rows: Sequence[Row], report: Report | None = None
    ) -> Outcome:
        """`[eval] metrics` of a model on rows, asked as it was trained to be."""

    def measure_base(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        progress: Callable[[str], Any],
    ) -> dict[str, Outcome]:
        """The same of the base model before training, by way to ask; `progress(name)` gives a
        context with a Report."""
        with progress("base") as report:
            return {"base": self.measure(model, rows, report)}

    @abstractmethod
    def held_out(self, model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
        """What is measured during training: "loss", the mean L1 over all that has a label, and what
        else costs no more than that."""
