"""A base in 4 bits: it trains, and its tail is that of what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import compute_tail
from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import EvalSection, ModelSection, Quantization, RunConfig
from kasa_runtime.training.layers import KasaLinear
from kasa_runtime.training.prepare import attach_layers, load_base, load_data
from kasa_runtime.training.run import train
from kasa_runtime.training.tasks import make_task

from .making import WriteRows
from .runs import ROWS, make_run, quiet


@pytest.fixture(params=[Quantization.NF4, Quantization.FP4])
def config(
    request: pytest.FixtureRequest, tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> RunConfig:
    data = write_rows("rows.jsonl", ROWS)
    run = make_run(tmp_path, model_dir, data, max_steps=40, batch_size=11)
    return replace(run, model=replace(run.model, quantization=request.param))


def needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")


def attached(config: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, KasaLinear]]:
    """The weights before, and the layers after."""
    from kasa_runtime.training.quantised import dense_weight
    from kasa_runtime.training.targets import plan

    task, directory = make_task(config), Path(config.model.name)
    load_data(config, task, directory)
    base, config = load_base(config, task, directory)
    paths = [item.path for item in plan(base.model, config.method)]
    dense = {path: dense_weight(base.model.get_submodule(path)) for path in paths}
    return dense, attach_layers(config, task, base)


def test_the_tail_is_cut_from_the_dequantised_weight(config: RunConfig) -> None:
    needs_bitsandbytes()
    dense, layers = attached(config)
    assert len(layers) == 14
    for path, layer in layers.items():
        tail = compute_tail(dense[path], layer.r)
        x = torch.randn(3, dense[path].shape[1])
        want = x @ (dense[path] - tail.p @ tail.q).T  # B is zero, so this is all
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-4)
        stored = BaseModel(Path(config.model.name)).weight(path)
        assert (dense[path] - stored).abs().max() > 1e-3, "the weights were not quantised"


def test_training_lowers_the_loss_and_writes_an_adapter_of_the_base(config: RunConfig) -> None:
    needs_bitsandbytes()
    data = replace(config.data, test=config.data.train)
    config = replace(config, data=data, eval=EvalSection(metrics=("perplexity",)))
    facts = train(config, quiet())
    before, after = (values["perplexity"] for values in facts.metrics.values())
    assert after < before / 4
    adapter = checkpoint.read(config.output.dir, BaseModel(Path(config.model.name)))
    assert len(adapter.modules) == 14
    assert "in 4 bits" in (config.output.dir / "README.md").read_text()


def test_its_tails_are_kept_apart_from_those_of_the_files(config: RunConfig) -> None:
    needs_bitsandbytes()
    task, directory = make_task(config), Path(config.model.name)
    load_data(config, task, directory)
    base, _ = load_base(config, task, directory)
    assert base.tails.directory.name.endswith(f"-{config.model.quantization}")
    plain = replace(config, model=ModelSection(name=config.model.name))
    base, _ = load_base(plain, task, directory)
    assert not base.tails.directory.name.endswith(f"-{config.model.quantization}")


def test_without_bitsandbytes_the_message_names_the_extra(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'kasa-runtime\[quantized\]'"):
        train(config, quiet())
