"""Whole runs on a tiny model: it learns, what it writes is what was trained, and a run that fails
leaves something to go on from."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import fold
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.cli import cli
from kasa_runtime.errors import ConfigError, TrainingError
from kasa_runtime.training import checkpoints
from kasa_runtime.training import trainer as trainer_module
from kasa_runtime.training.config import (
    Dtype,
    EvalSection,
    RunConfig,
    Schedule,
    TaskKind,
)
from kasa_runtime.training.export import load_into
from kasa_runtime.training.journal import METRICS_FILE, read_lines
from kasa_runtime.training.prepare import attach_layers, load_base, load_data
from kasa_runtime.training.run import train
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.tasks.causal import CausalTask
from kasa_runtime.types import AdapterMethod

from .making import WriteRows
from .runs import (
    COLOURS,
    ROWS,
    finished,
    kasa_train,
    make_run,
    quiet,
    weights,
    with_output,
    with_train,
    write_toml,
)


@pytest.fixture
def config(model_dir: Path, write_rows: WriteRows, tmp_path: Path) -> RunConfig:
    data = write_rows("train.jsonl", COLOURS)
    run = make_run(tmp_path, model_dir, data, max_steps=100, log_steps=10, schedule=Schedule.LINEAR)
    return replace(
        run,
        data=replace(run.data, test=data),
        eval=EvalSection(metrics=("exact_match",), max_new_tokens=8, few_shot=1),
    )


def short(config: RunConfig, **settings: Any) -> RunConfig:
    """Some steps, and nothing measured at the end."""
    settings = {"max_steps": 6, "log_steps": 1, **settings}
    return replace(with_train(config, **settings), eval=EvalSection())


@pytest.mark.parametrize("kind", list(AdapterMethod))
def test_a_tiny_set_is_learnt_by_heart(config: RunConfig, kind: AdapterMethod) -> None:
    config = replace(config, method=replace(config.method, kind=kind))
    facts = train(config, quiet())
    assert facts.metrics["adapter"]["exact_match"] == 100
    assert facts.metrics["base, zero-shot"]["exact_match"] == 0
    assert facts.final_losses["L1"] < 0.6  # the frozen random head cannot be surer than that


@pytest.mark.parametrize("packing", [False, True])
def test_plain_text_is_learnt(config: RunConfig, *, packing: bool) -> None:
    data = replace(config.data, task=TaskKind.TEXT, text="{q} {a}", packing=packing, max_length=64)
    config = replace(config, data=data, eval=EvalSection(metrics=("perplexity",)))
    before, after = (v["perplexity"] for v in train(config, quiet()).metrics.values())
    assert after < before / 10


def test_exported_adapter_gives_the_logits_of_the_trained_layers(config: RunConfig) -> None:
    """Read back and folded, as a server does it, on the untouched base."""
    config = short(replace(config, output=replace(config.output, dtype=Dtype.FLOAT32)))
    train(config, quiet())
    task, directory = make_task(config), Path(config.model.name)
    load_data(config, task, directory)
    base, _ = load_base(config, task, directory)
    adapter = checkpoint.read(config.output.dir, BaseModel(directory))
    load_into(base.model, attach_layers(config, task, base), adapter)

    served = AutoModelForCausalLM.from_pretrained(directory)
    tails = TailCache.for_model(directory)
    with torch.no_grad():
        for path, delta in fold(adapter, "colours@1").modules.items():
            tail = tails.get(path, delta.t)
            served.get_submodule(path).weight.add_(delta.b @ delta.a - tail.p @ tail.q)
        ids = torch.arange(1, 20)[None]
        difference = base.model(ids).logits - served(ids).logits
    assert difference.abs().max() <= 1e-4


def test_adapter_directory_holds_four_files_and_says_how_it_was_made(config: RunConfig) -> None:
    train(with_train(config, max_steps=3), quiet())
    directory = config.output.dir
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "kasa_meta.json",
        "README.md",
    }
    assert {tensor.dtype for tensor in weights(directory).values()} == {torch.bfloat16}
    meta = json.loads((directory / "kasa_meta.json").read_text())
    assert meta["training"]["steps"] == meta["training"]["kept_step"] == 3
    assert meta["training"]["metrics"].keys() == {"base, zero-shot", "base, 1-shot", "adapter"}
    assert meta["base_fingerprint"] == BaseModel(Path(config.model.name)).fingerprint
    card = (directory / "README.md").read_text()
    assert "{q} =>" in card
    assert "| base, zero-shot |" in card and "| adapter |" in card
    assert str(directory.parent.parent) not in card, "a path of this machine is in the card"


def test_work_directory_holds_the_course_and_no_base_weights(config: RunConfig) -> None:
    train(with_train(config, max_steps=3, save_steps=2), quiet())
    names = {path.name for path in config.work_dir.iterdir()}
    assert {"metrics.jsonl", "spectra.jsonl", "report.html", "results.json", "run.json"} <= names
    saved = config.work_dir / "checkpoint-2"
    assert (saved / checkpoints.MARK).is_file()
    assert sum(path.stat().st_size for path in saved.iterdir()) < 500_000
    report = (config.work_dir / "report.html").read_text()
    assert "exact match" in report and "<svg" in report


def test_same_seed_gives_the_same_weights(config: RunConfig, tmp_path: Path) -> None:
    config = short(config)
    made = []
    for name in ("a", "b"):
        output = replace(config.output, dir=tmp_path / name)
        train(replace(config, output=output), quiet())
        made.append((output.dir / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Make the held-out loss of each measurement what the test says."""
    left = iter(losses)
    monkeypatch.setattr(CausalTask, "held_out", lambda *_: {"loss": next(left), "perplexity": 1.0})


def test_the_best_step_is_kept_though_later_checkpoints_push_it_out(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, [3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    config = short(config, save_steps=1, keep_checkpoints=1, eval_steps=1, best_metric="loss")
    config = replace(config, output=replace(config.output, dtype=Dtype.FLOAT32))
    facts = train(config, quiet())
    assert (facts.num_steps, facts.kept_step) == (6, 2)
    kept = {path.name for path in config.work_dir.glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-6"}
    saved = load_file(config.work_dir / "checkpoint-2" / trainer_module.CHECKPOINT_FILE)
    written = weights(config.output.dir)
    key = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(saved[key], written[f"base_model.model.{key}.weight"])
    assert "step 2 was kept, the best in loss" in (config.output.dir / "README.md").read_text()


def test_a_run_without_save_steps_keeps_its_best_step_too(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [3.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    facts = train(short(config, eval_steps=1, best_metric="loss"), quiet())
    assert facts.kept_step == 3


def test_patience_ends_a_run_that_gets_no_better(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.1, float("nan"), 1.0, 1.0])
    facts = train(short(config, eval_steps=1, best_metric="loss", patience=2), quiet())
    assert (facts.num_steps, facts.kept_step) == (4, 2)


@pytest.mark.parametrize(
    ("train_keys", "message"),
    [
        ({"patience": 2}, "patience needs best_metric"),
        ({"best_metric": "acuracy"}, "one of loss, perplexity, got 'acuracy'"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_before_training(
    config: RunConfig, train_keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(short(config, **train_keys), quiet())
    assert not config.work_dir.exists()


def test_loss_that_is_not_finite_stops_the_run(config: RunConfig) -> None:
    method = replace(config.method, beta=1e38)  # times L2, more than float32 holds
    config = replace(short(config), method=method)
    with pytest.raises(TrainingError, match=r"step 0: the loss is not finite .* lower"):
        train(config, quiet())
    assert not config.output.dir.exists(), "a broken adapter was written"


def test_a_loss_that_becomes_nan_leaves_the_last_good_checkpoint(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer_module.KasaTrainer._penalties

    def breaking(self: Any) -> dict[str, torch.Tensor]:
        factor = float("nan") if self.state.global_step == 5 else 1.0
        return {name: value * factor for name, value in whole(self).items()}

    monkeypatch.setattr(trainer_module.KasaTrainer, "_penalties", breaking)
    with pytest.raises(TrainingError, match=r"step 5: .* last good checkpoint is .*checkpoint-4"):
        train(short(config, save_steps=2), quiet())
    assert checkpoints.newest(config.work_dir) == config.work_dir / "checkpoint-4"
    assert (config.work_dir / "report.html").is_file(), "a failed run has a report too"
    assert not config.output.dir.exists()


@pytest.mark.parametrize("writer", ["weights", "optimiser"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    module, name = {"weights": (trainer_module, "save_file"), "optimiser": (torch, "save")}[writer]
    whole = getattr(module, name)

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path, *rest)

    monkeypatch.setattr(module, name, full)
    config = short(config, save_steps=2)
    with pytest.raises(TrainingError, match=r"checkpoint-4: .*No space left.*checkpoint-2"):
        train(config, quiet())
    assert checkpoints.newest(config.work_dir) == config.work_dir / "checkpoint-2"
    assert not (config.work_dir / "checkpoint-4").exists(), "the torn checkpoint takes up space"

    monkeypatch.undo()
    monkeypatch.setenv("KASA_HOME", str(config.path.parent / "home"))
    assert train(with_train(config, resume=True), quiet()).num_steps == 6


def test_an_output_directory_that_cannot_be_is_refused_before_training(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(TrainingError, match=r"taken/.*: cannot be written .*output"):
        train(with_output(config, tmp_path / "taken"), quiet())
    assert not config.work_dir.exists()


def test_command_says_what_to_do_when_files_may_not_grow(
    model_dir: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """A real limit of the system: the optimiser's state does not fit under it."""
    run = toml_of(tmp_path, model_dir, write_rows)
    limit = 100_000

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # The first run computes the tails, which are larger than that.
    finished(kasa_train(run, "--set", "train.max_steps=1", "--set", "train.save_steps=0"))
    process = kasa_train(run, "--set", "method.r=16", preexec_fn=limited)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "this checkpoint cannot be written" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "runs").glob("*/checkpoint-*"))


def toml_of(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> Path:
    write_rows("train.jsonl", ROWS)
    return write_toml(
        tmp_path / "run.toml",
        {
            "model": {"name": str(model_dir)},
            "data": {"train": "train.jsonl", "prompt": "{q}", "completion": "{a}"},
            "train": {"max_steps": 400, "batch_size": 4, "log_steps": 1, "save_steps": 2},
            "output": {"dir": "adapter"},
        },
    )


def test_interrupting_the_command_says_how_to_go_on(
    model_dir: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    process = kasa_train(toml_of(tmp_path, model_dir, write_rows))
    metrics = tmp_path / "runs" / "adapter" / METRICS_FILE
    while process.poll() is None and len(read_lines(metrics)) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "kasa: interrupted; the last good checkpoint is" in output
    assert "Traceback" not in output


def test_command_trains_from_a_file(model_dir: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    run = toml_of(tmp_path, model_dir, write_rows)
    arguments = ["train", str(run), "--set", "train.max_steps=4", "--set", "method.r=4"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "training" in result.output and "step 4/4" in result.output
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    work_dir = tmp_path / "runs" / "adapter"
    shutil.rmtree(tmp_path / "adapter")
    arguments += ["--resume", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert f"going on from {work_dir / 'checkpoint-4'}" in result.stderr
    assert json.loads(result.stdout)["directory"] == str(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
