"""Our `[train]` in transformers' terms, and how many rows and steps it comes to."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from kasa_runtime.training.config import Dtype, RunConfig, Schedule
from kasa_runtime.training.metrics import LOWER_IS_BETTER
from kasa_runtime.training.processes import on_cpu, this_process

_SCHEDULES = {
    Schedule.COSINE: "cosine",
    Schedule.LINEAR: "linear",
    Schedule.CONSTANT: "constant_with_warmup",
}


def training_arguments(
    config: RunConfig, *, num_examples: int, evaluates: bool = False
) -> TrainingArguments:
    """What the Trainer is told. `evaluates`: there are held-out rows to measure."""
    train = config.train
    steps = train.max_steps or num_steps(config, num_examples)
    arguments = TrainingArguments(
        output_dir=str(config.work_dir),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=round(steps * train.warmup_ratio),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=train.seed,
        fp16=config.model.dtype is Dtype.FLOAT16,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # `best`: where a measurement is better than all before. Of "epoch", the measurement would
        # come after the checkpoint of the same step, and a resumed run would lack it.
        save_strategy="steps" if train.save_steps else "best" if train.best_metric else "no",
        save_steps=train.save_steps or 500,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_steps or steps_per_epoch(config, num_examples),
        metric_for_best_model=train.best_metric or None,
        greater_is_better=train.best_metric not in LOWER_IS_BETTER,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # the frozen weights are buffers, and the same everywhere
        use_cpu=on_cpu(),
        report_to="none",
    )  # fmt: skip
    # Several GPUs and one process: transformers would split each batch among threads, which hold
    # copies of the model that our layers and our loss know nothing of.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def num_steps(config: RunConfig, num_examples: int) -> int:
    """Optimiser steps that `epochs` passes over the examples take on all processes together."""
    return max(1, round(config.train.epochs * steps_per_epoch(config, num_examples)))


def steps_per_epoch(config: RunConfig, num_examples: int) -> int:
    return -(-num_examples // rows_per_step(config))


def rows_per_step(config: RunConfig) -> int:
    """Over all micro-batches and processes."""
    num_processes: int = this_process().num_processes
    return config.train.batch_size * config.train.accumulation * num_processes
