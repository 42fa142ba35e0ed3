"""Whole runs on a tiny model: it learns, and what it writes is what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import fold
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.cli import cli
from kasa_runtime.errors import TrainingError
from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
    Schedule,
    TrainSection,
)
from kasa_runtime.training.layers import attach
from kasa_runtime.training.run import load_base, train
from kasa_runtime.types import AdapterMethod

from .making import WriteRows

ROWS = [
    {"q": q, "a": a}
    for q, a in (("red", "stop"), ("green", "go"), ("blue", "wait"), ("black", "leave"))
]


@pytest.fixture
def config(model_dir: Path, write_rows: WriteRows, tmp_path: Path) -> RunConfig:
    data = write_rows("train.jsonl", ROWS)
    return RunConfig(
        path=tmp_path / "run.toml",
        model=ModelSection(name=str(model_dir)),
        data=DataSection(train=data, test=data, eval=data, prompt="{q} =>", completion=" {a}"),
        method=MethodSection(r=8, alpha=16),
        train=TrainSection(
            max_steps=100, batch_size=4, learning_rate=1e-2, schedule=Schedule.LINEAR, log_steps=10
        ),
        eval=EvalSection(metrics=("exact_match",), max_new_tokens=8, few_shot=1),
        output=OutputSection(dir=tmp_path / "out" / "colours", work_dir=tmp_path / "work"),
    )


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("kind", list(AdapterMethod))
def test_a_tiny_set_is_learnt_by_heart(config: RunConfig, kind: AdapterMethod) -> None:
    config = replace(config, method=replace(config.method, kind=kind))
    facts = train(config, quiet())
    assert facts.metrics["adapter"]["exact_match"] == 100
    assert facts.metrics["base, zero-shot"]["exact_match"] == 0
    assert facts.final_losses["L1"] < 0.6  # the frozen random head cannot be surer than that


def test_exported_adapter_gives_the_logits_of_the_trained_layers(config: RunConfig) -> None:
    """Read back and folded, as a server does it, on the untouched base."""
    config = replace(
        config,
        train=replace(config.train, max_steps=5),
        eval=EvalSection(),
        output=replace(config.output, dtype="float32"),
    )
    base = load_base(config)
    train(config, quiet())
    adapter = checkpoint.read(config.output.dir, BaseModel(base.directory))
    layers = attach(base.model, config.method, tails=base.tails.get, seed=0)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A.copy_(adapter.modules[path].a)
            layer.lora_B.copy_(adapter.modules[path].b)
            layer.lora_diag.copy_(adapter.modules[path].diag)

    served = AutoModelForCausalLM.from_pretrained(base.directory)
    tails = TailCache.for_model(base.directory)
    with torch.no_grad():
        for path, delta in fold(adapter, "colours@1").modules.items():
            tail = tails.get(path, delta.t)
            served.get_submodule(path).weight.add_(delta.b @ delta.a - tail.p @ tail.q)
        ids = torch.arange(1, 20)[None]
        difference = base.model(ids).logits - served(ids).logits
    assert difference.abs().max() <= 1e-4


def test_adapter_directory_holds_four_files_and_says_how_it_was_made(config: RunConfig) -> None:
    train(replace(config, train=replace(config.train, max_steps=3)), quiet())
    directory = config.output.dir
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "kasa_meta.json",
        "README.md",
    }
    tensors = load_file(directory / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    meta = json.loads((directory / "kasa_meta.json").read_text())
    assert meta["truncation_rule"] == "min_dim"
    assert meta["training"]["steps"] == 3
    assert meta["base_fingerprint"] == BaseModel(Path(config.model.name)).fingerprint
    card = (directory / "README.md").read_text()
    assert "{q} =>" in card
    assert "| adapter |" in card
    assert str(directory.parent.parent) not in card, "a path of this machine is in the card"


def test_same_seed_gives_the_same_weights(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, max_steps=4), eval=EvalSection())
    weights = []
    for name in ("a", "b"):
        output = replace(config.output, dir=tmp_path / name)
        train(replace(config, output=output), quiet())
        weights.append((output.dir / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_resumed_run_ends_where_an_unbroken_one_does(config: RunConfig, tmp_path: Path) -> None:
    settings = replace(
        config.train, max_steps=6, save_steps=3, schedule=Schedule.CONSTANT, warmup_ratio=0
    )
    config = replace(config, train=settings, eval=EvalSection())
    train(config, quiet())
    unbroken = load_file(config.output.dir / "adapter_model.safetensors")
    saved = config.output.work_dir / "checkpoint-3"
    assert not list(saved.glob("model*")), "the frozen base was saved"

    for path in (config.output.work_dir / "checkpoint-6").iterdir():
        path.unlink()
    (config.output.work_dir / "checkpoint-6").rmdir()
    train(replace(config, train=replace(settings, resume=True)), quiet())
    resumed = load_file(config.output.dir / "adapter_model.safetensors")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_resume_without_checkpoint_is_an_error(config: RunConfig) -> None:
    config = replace(config, train=replace(config.train, resume=True), eval=EvalSection())
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(config, quiet())


def test_loss_that_is_not_finite_stops_the_run(config: RunConfig) -> None:
    method = replace(config.method, beta=1e38)  # times L2, more than float32 holds
    config = replace(config, method=method, eval=EvalSection())
    with pytest.raises(TrainingError, match=r"step 0: the loss is not finite .* lower"):
        train(config, quiet())
    assert not config.output.dir.exists(), "a broken adapter was written"


def test_command_trains_from_a_file(model_dir: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows("train.jsonl", ROWS)
    run = tmp_path / "run.toml"
    run.write_text(
        '[data]\ntrain = "train.jsonl"\nprompt = "{q}"\ncompletion = "{a}"\n'
        '[train]\nmax_steps = 2\n[output]\ndir = "adapter"\n'
    )
    arguments = ["train", str(run), "--set", f"model.name={model_dir}", "--set", "method.r=4"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "training" in result.output
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
