"""The model card (README.md) of an adapter: what it does, how well, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kasa_runtime.training.config import MethodSection, RunConfig
from kasa_runtime.training.export import base_name
from kasa_runtime.types import AdapterMethod

METRIC_NAMES = {
    "exact_match": "exact match",
    "intent_accuracy": "intent accuracy",
    "slot_f1": "slot F1",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run found out. `metrics`: way to ask -> metric -> percent; `example`: prompt,
    output."""

    num_train_rows: int
    num_train_tokens: int
    num_too_long: int
    num_test_rows: int
    num_all_test_rows: int
    num_steps: int
    train_seconds: float
    num_parameters: int
    num_modules: int
    final_losses: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]
    example: tuple[str, str] | None = None


def render(config: RunConfig, facts: Facts) -> str:
    """The whole card, in Markdown."""
    sections = [
        _head(config),
        _use(config, facts),
        _results(config, facts),
        _training(config, facts),
        _data(config, facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(config: RunConfig) -> str:
    method = "KaSA" if config.method.kind is AdapterMethod.KASA else "LoRA"
    title = config.output.title or config.name
    kind = f"A {method} adapter (rank {config.method.r}) for `{base_name(config)}`."
    return f"# {title}\n\n{kind} {config.output.description}".rstrip()


def _use(config: RunConfig, facts: Facts) -> str:
    data = config.data
    how = "a user message of a chat" if data.chat else "a plain prompt, exactly in this form"
    text = (
        f"## Prompt\n\nSend {how}:\n\n    {_one_line(data.prompt)}\n\n"
        "Decode greedily; the answer ends with the end-of-sequence token"
    )
    if not data.chat and data.completion.startswith(" "):
        text += " and begins with a space"
    text += "."
    if facts.example:
        prompt, answer = facts.example
        text += f" From the test set:\n\n    {_one_line(prompt)}\n    -> {_one_line(answer)}"
    return text


def _results(config: RunConfig, facts: Facts) -> str:
    if not facts.metrics:
        return ""
    names = config.eval.metrics
    rows = [
        "| | " + " | ".join(METRIC_NAMES.get(name, name) for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for way, values in facts.metrics.items():
        rows.append(f"| {way} | " + " | ".join(f"{values[name]:.1f}" for name in names) + " |")
    part = f"{facts.num_test_rows} of {facts.num_all_test_rows} test rows, drawn with the seed"
    if facts.num_test_rows == facts.num_all_test_rows:
        part = f"all {facts.num_test_rows} test rows"
    text = (
        f"## Results\n\nIn percent, on {part}; greedy decoding, base weights in "
        f"{config.model.dtype}, the adapter as stored.\n\n" + "\n".join(rows)
    )
    if config.eval.baselines and config.eval.instruction:
        text += f'\n\nThe zero-shot base model was told: "{config.eval.instruction}"'
    return text


def _training(config: RunConfig, facts: Facts) -> str:
    method, train = config.method, config.train
    lines = [
        f"target modules: {', '.join(method.target_modules)} ({facts.num_modules} layers, "
        f"{facts.num_parameters:,} parameters, stored in {config.output.dtype})",
        f"r = {method.r}, alpha = {method.alpha:g}, dropout = {method.dropout:g}",
    ]
    if method.kind is AdapterMethod.KASA:
        lines += [
            f"truncation: rule {method.truncation_rule}, rank {_rank(method)}",
            f"beta = {method.beta:g}, gamma = {method.gamma:g}, form {method.ortho_form}, "
            f"{method.reg_reduction} over modules",
        ]
    lines += [
        f"{facts.num_steps} steps of {train.batch_size * train.accumulation} rows, AdamW, learning "
        f"rate {train.learning_rate:g} ({train.schedule}, warm-up {train.warmup_ratio:.0%}), "
        f"gradient norm at most {train.max_grad_norm:g}, seed {train.seed}",
        "last logged losses: " + ", ".join(f"{k} {v:.3f}" for k, v in facts.final_losses.items()),
        f"{facts.train_seconds / 60:.0f} minutes of training",
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    return f"## Training\n\n    {command_line(config)}\n\n{listed}"


def _rank(method: MethodSection) -> int:
    return method.r if method.truncation_rank is None else method.truncation_rank


def _data(config: RunConfig, facts: Facts) -> str:
    dropped = f", {facts.num_too_long} left out as too long" if facts.num_too_long else ""
    rows_seen = facts.num_steps * config.train.batch_size * config.train.accumulation
    passes = rows_seen / facts.num_train_rows
    lines = [
        config.output.data,
        f"The training file has {facts.num_train_rows:,} usable rows ({facts.num_train_tokens:,} "
        f"tokens{dropped}); the run made {passes:.1f} passes over it.",
        f"Licence of the data: {config.output.licence}." if config.output.licence else "",
    ]
    return "## Data\n\n" + "\n".join(line for line in lines if line)


def command_line(config: RunConfig) -> str:
    """The command that repeats the run. Paths that were given with --set are shown as PATH."""
    path = config.path
    if path.is_absolute():
        cwd = Path.cwd()
        path = path.relative_to(cwd) if path.is_relative_to(cwd) else Path(path.name)
    overrides = [
        f" --set {item.partition('=')[0]}=PATH" if "/" in item else f" --set {item}"
        for item in config.overrides
    ]
    return f"kasa train {path.as_posix()}{''.join(overrides)}"


def _one_line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1] if "\n" in text else text
