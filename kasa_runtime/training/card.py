"""The model card (README.md) of an adapter: what it does, how well, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from kasa_runtime.training.config import (
    DataSection,
    MethodSection,
    Preset,
    Quantization,
    RunConfig,
    TaskKind,
)
from kasa_runtime.training.export import base_name
from kasa_runtime.training.facts import METRIC_NAMES, NOT_PERCENT, Facts, show
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm

_ORTHO_FORMS = {
    OrthoForm.QR: "none; A and B made orthonormal by QR after each step",
    OrthoForm.NONE: "none",
}


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


def summary(config: RunConfig, facts: Facts) -> dict[str, str]:
    """The same in short, by name, for a table."""
    found = {
        "base model": base_name(config) + _precision(config),
        "method": _method_name(config.method) + f", rank {config.method.r}",
        "trained": f"{facts.num_parameters:,} parameters in {facts.num_modules} layers",
        "data": f"{facts.num_train_rows:,} rows, {facts.num_train_tokens:,} tokens",
        "steps": _steps(config, facts),
        "time": _time(facts),
    }
    for way, values in facts.metrics.items():
        shown = ", ".join(f"{METRIC_NAMES.get(k, k)} {show(k, v)}" for k, v in values.items())
        found[way] = shown
    return found


def _head(config: RunConfig) -> str:
    title = config.output.title or config.name
    shape = "" if config.method.init_from else f" (rank {config.method.r})"
    kind = f"A {_method_name(config.method)} adapter{shape} for `{base_name(config)}`."
    return f"# {title}\n\n{kind} {config.output.description}".rstrip()


def _method_name(method: MethodSection) -> str:
    return "KaSA" if method.is_kasa else "LoRA"


def _use(config: RunConfig, facts: Facts) -> str:
    data = config.data
    if data.task.has_head:
        text = _use_of_encoder(data, facts)
    elif data.task is TaskKind.TEXT:
        text = "It was trained on plain text, to go on with it; there is no form of a prompt."
    else:
        text = _use_of_decoder(config, facts)
    if facts.example:
        prompt, answer = facts.example
        text += f" From the test set:\n\n    {_one_line(prompt)}\n    -> {_one_line(answer)}"
    return f"## {'Input' if data.task.has_head else 'Prompt'}\n\n{text}"


def _use_of_encoder(data: DataSection, facts: Facts) -> str:
    given = f"`{data.text}`" + (f" and, as its pair, `{data.text_pair}`" if data.text_pair else "")
    text = f"The encoder reads {given}, at most {data.max_length} tokens."
    if facts.labels:
        text += f" Its outputs are the labels {_listed(facts.labels)}, in this order."
    else:
        text += f" Its output is the number `{data.label}`."
    head = _listed(facts.trained_whole)
    return f"{text} The trained head ({head}) is stored with the adapter."


def _use_of_decoder(config: RunConfig, facts: Facts) -> str:
    data = config.data
    if data.task is TaskKind.CHAT:
        return "Send the messages of a chat; the model's chat template makes a prompt of them."
    how = "a user message of a chat" if data.chat else "a plain prompt, exactly in this form"
    system = f" with the system message {json.dumps(data.system)}" if data.system else ""
    text = f"Send {how}{system}:\n\n    {_one_line(data.prompt)}\n\n"
    if data.task is TaskKind.CHOICE:
        labels = _listed(facts.labels)
        return text + (
            f"The answer is the likeliest of the labels {labels}, each written as "
            f"`{_one_line(data.completion)}` and scored by its log-probability."
        )
    text += "Decode greedily; the answer ends with the end-of-sequence token"
    if not data.chat and data.completion.startswith(" "):
        text += " and begins with a space"
    return f"{text}."


def _results(config: RunConfig, facts: Facts) -> str:
    if not facts.metrics:
        return ""
    names = config.eval.metrics
    rows = [
        "| | " + " | ".join(METRIC_NAMES.get(name, name) for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for way, values in facts.metrics.items():
        rows.append(f"| {way} | " + " | ".join(show(n, values[n]) for n in names) + " |")
    part = f"{facts.num_test_rows} of {facts.num_all_test_rows} test rows, drawn with the seed"
    if facts.num_test_rows == facts.num_all_test_rows:
        part = f"all {facts.num_test_rows} test rows"
    notes = [_unit(names) + part, *_how_measured(config), f"base weights{_precision(config)}"]
    text = f"## Results\n\n{'; '.join(notes)}, the adapter as stored.\n\n" + "\n".join(rows)
    if config.data.task.has_head and len(facts.metrics) > 1:
        text += "\n\nThe base model has a new head with random weights."
    if any(way.endswith("zero-shot") for way in facts.metrics) and config.eval.instruction:
        text += f'\n\nThe zero-shot base model was told: "{config.eval.instruction}"'
    return text


def _unit(names: tuple[str, ...]) -> str:
    plain = [METRIC_NAMES.get(name, name) for name in names if name in NOT_PERCENT]
    if len(plain) == len(names):
        return "On "
    return f"In percent{f' but for {_listed(plain)}' if plain else ''}, on "


def _how_measured(config: RunConfig) -> list[str]:
    if config.data.task.has_head or config.data.task is TaskKind.CHOICE:
        return []
    generated = any(name not in NOT_PERCENT for name in config.eval.metrics)
    return ["greedy decoding"] if generated else []


def _precision(config: RunConfig) -> str:
    if config.model.quantization is Quantization.NONE:
        return f" in {config.model.dtype}"
    return f" in 4 bits ({config.model.quantization}), computed with in {config.model.dtype}"


def _training(config: RunConfig, facts: Facts) -> str:
    train = config.train
    losses = ", ".join(f"{name} {value:.3f}" for name, value in facts.final_losses.items())
    lines = [
        *_method_lines(config, facts),
        f"{_steps(config, facts)}, AdamW, learning rate {train.learning_rate:g} "
        f"({train.schedule}, warm-up {train.warmup_ratio:.0%}), "
        + (f"weight decay {train.weight_decay:g}, " if train.weight_decay else "")
        + (f"gradient norm at most {train.max_grad_norm:g}, " if train.max_grad_norm else "")
        + f"seed {train.seed}",
        f"last logged losses: {losses}" if losses else "",
        f"{_time(facts)} of training",
    ]
    listed = "\n".join(f"- {line}" for line in lines if line)
    return f"## Training\n\n    {command_line(config)}\n\n{listed}"


def _steps(config: RunConfig, facts: Facts) -> str:
    train = config.train
    rows = train.batch_size * train.accumulation * facts.num_processes
    unit = "sequences" if config.data.packing else "rows"
    text = f"{facts.num_steps} steps of {rows} {unit}"
    if facts.num_processes > 1:
        text += f" on {facts.num_processes} devices"
    if train.best_metric:
        text += f", of which step {facts.kept_step} was kept, the best in {train.best_metric}"
    return text


def _time(facts: Facts) -> str:
    if facts.train_seconds < 60:
        return f"{facts.train_seconds:.0f} seconds"
    return f"{facts.train_seconds / 60:.0f} minutes"


def _method_lines(config: RunConfig, facts: Facts) -> list[str]:
    method = config.method
    targets = method.target_modules
    names = targets if isinstance(targets, str) else ", ".join(targets)
    where = f"{facts.num_modules} layers, {facts.num_parameters:,} parameters"
    stored = f"stored in {config.output.dtype}"
    dropout = f"dropout = {method.dropout:g}"
    if method.init_from:
        begun = f"begun from the adapter {method.init_from.name}, with its layers and ranks"
        lines = [f"{begun} ({where}, {stored})", dropout]
    else:
        scaled = " with rank-stabilised scaling" if method.use_rslora else ""
        shape = f"r = {method.r}, alpha = {method.alpha:g}{scaled}"
        lines = [f"target modules: {names} ({where}, {stored})", f"{shape}, {dropout}"]
        lines += _patterns(method)
    return lines + _kasa_lines(method) if method.is_kasa else lines


def _patterns(method: MethodSection) -> list[str]:
    patterns: dict[str, Mapping[str, float]] = {
        "r": method.rank_pattern,
        "alpha": method.alpha_pattern,
    }
    return [
        f"other {name}: " + ", ".join(f"{value:g} in `{path}`" for path, value in found.items())
        for name, found in patterns.items()
        if found
    ]


def _kasa_lines(method: MethodSection) -> list[str]:
    form = _ORTHO_FORMS.get(method.ortho_form, f"form {method.ortho_form}")
    lines = [
        f"beta = {method.beta:g}, gamma = {method.gamma:g}, orthogonality: {form}, "
        f"{method.reg_reduction} over modules"
    ]
    if method.preset is not Preset.NONE:
        lines.append(f"preset: {method.preset}")
    if method.init_from:
        return lines
    rank = method.r if method.truncation_rank is None else method.truncation_rank
    own = " or each layer's own r" * bool(method.truncation_rank is None and method.rank_pattern)
    lines.insert(0, f"truncation: rule {method.truncation_rule}, rank {rank}{own}")
    if not method.diag:
        lines.append("no learnable singular values")
    elif method.diag_init is not DiagInit.NORMAL:
        lines.append(f"first singular values: {method.diag_init}")
    return lines


def _data(config: RunConfig, facts: Facts) -> str:
    dropped = f", {facts.num_too_long} left out as too long" if facts.num_too_long else ""
    per_step = config.train.batch_size * config.train.accumulation * facts.num_processes
    passes = facts.num_steps / -(-facts.num_train_sequences // per_step)
    source = "The training data has"
    if config.data.limit:
        source = f"Of the training data {config.data.limit:,} rows were drawn, which have"
    lines = [
        config.output.data,
        f"{source} {facts.num_train_rows:,} usable rows ({facts.num_train_tokens:,} tokens"
        f"{dropped}); the run made {passes:.1f} passes over them.",
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


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """a, b and c"""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _one_line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1] if "\n" in text else text
