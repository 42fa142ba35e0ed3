"""What a run trains a model to do, by `[data] task`."""

from __future__ import annotations

from kasa_runtime.training.config import RunConfig, TaskKind
from kasa_runtime.training.tasks.base import Task


def make_task(config: RunConfig) -> Task:
    """The task of a run; it knows nothing of its data yet."""
    if config.data.task.has_head:
        from kasa_runtime.training.tasks.sequence import SequenceTask

        return SequenceTask(config)
    if config.data.task is TaskKind.CHOICE:
        from kasa_runtime.training.tasks.choice import ChoiceTask

        return ChoiceTask(config)
    from kasa_runtime.training.tasks.causal import CausalTask

    return CausalTask(config)
