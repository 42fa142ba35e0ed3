"""A task of the tiny model, ready to encode rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    OutputSection,
    RunConfig,
    TaskKind,
)
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks import make_task

MakeTask = Callable[..., Any]
"""Keys of [data], and `eval_` ones of [eval], to a prepared task."""


def row(**fields: Any) -> Row:
    return Row(Path("rows.jsonl"), 7, fields)


def make_config(settings: dict[str, Any]) -> RunConfig:
    data = {k: v for k, v in settings.items() if not k.startswith("eval_")}
    measured = {k.removeprefix("eval_"): v for k, v in settings.items() if k not in data}
    data["task"] = TaskKind(data.get("task", "completion"))
    return RunConfig(
        DataSection(**{"train": Path("rows.jsonl"), **data}),
        OutputSection(Path("out")),
        eval=EvalSection(**measured),
    )


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> MakeTask:
    def prepared(train: Sequence[Row] = (), tokenizer: Any = tokenizer, **settings: Any) -> Any:
        task = make_task(make_config(settings))
        task.prepare(tokenizer, train)
        return task

    return prepared
