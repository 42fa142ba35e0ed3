"""Adapters of layers that are stored (in, out), as GPT-2's are: PEFT's `fan_in_fan_out`."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter.making import load_base, logits_of, make_adapter, make_with_peft
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.checkpoint import CONFIG_FILE
from kasa_runtime.adapter.export import export_lora, export_merged
from kasa_runtime.adapter.kasa import TruncationRule, merged_weight
from kasa_runtime.adapter.lora import Adapter, fold
from kasa_runtime.adapter.tails import TailCache

TARGETS = ("c_attn", "c_proj", "c_fc")
C_ATTN = "transformer.h.0.attn.c_attn"


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def gpt2(gpt2_dir: Path) -> BaseModel:
    return BaseModel(gpt2_dir)


def logits_by_hand(base: BaseModel, adapter: Adapter) -> Tensor:
    model, tails = load_base(base.directory), TailCache(base)
    for name, delta in fold(adapter, "test@0").modules.items():
        layer = model.get_submodule(name)
        new = merged_weight(layer.weight.data.T, delta.a, delta.b, tails.get(name, delta.t))
        layer.weight.data = new.T.contiguous()
    return logits_of(model)


def load_with_peft(directory: Path, adapter: Path, caplog: Any) -> Any:
    """PEFT has nothing to warn of."""
    from peft import PeftModel

    model = load_base(directory)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        caplog.clear()
        model = PeftModel.from_pretrained(model, adapter)
    assert not caplog.records
    return model


@pytest.mark.parametrize("kasa", [True, False], ids=["kasa", "lora"])
def test_reads_as_it_was_written(gpt2, tmp_path, kasa):
    adapter = make_adapter(gpt2, TARGETS, kasa=kasa, fan_in_fan_out=True)
    checkpoint.write(tmp_path / "a", adapter)
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["fan_in_fan_out"] is True
    got = checkpoint.read(tmp_path / "a", gpt2)
    assert got.config == adapter.config
    assert got.modules[C_ATTN].a.shape == (4, 32) and got.modules[C_ATTN].b.shape == (96, 4)


def test_the_base_says_how_its_weights_are_stored(base, gpt2, tmp_path):
    checkpoint.write(tmp_path / "a", make_adapter(gpt2, TARGETS, fan_in_fan_out=False))
    assert checkpoint.read(tmp_path / "a", gpt2).config.fan_in_fan_out is True
    checkpoint.write(tmp_path / "b", make_adapter(base, fan_in_fan_out=True))
    assert checkpoint.read(tmp_path / "b", base).config.fan_in_fan_out is False


def test_peft_loads_a_plain_lora_silently_and_computes_the_same(gpt2, tmp_path, caplog):
    adapter = make_adapter(gpt2, TARGETS, kasa=False, fan_in_fan_out=True)
    assert checkpoint.peft_can_serve(adapter)
    checkpoint.write(tmp_path / "a", adapter)
    model = load_with_peft(gpt2.directory, tmp_path / "a", caplog)
    want = logits_by_hand(gpt2, adapter)
    torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)


def test_reads_what_peft_writes(gpt2, tmp_path):
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "fan_in_fan_out": True}
    made = make_with_peft(gpt2.directory, tmp_path / "peft", options)
    adapter = checkpoint.read(made.directory, gpt2)
    torch.testing.assert_close(logits_by_hand(gpt2, adapter), made.logits, atol=1e-4, rtol=0)


def test_kasa_is_not_called_lora_as_peft_has_none_here(gpt2, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = make_adapter(gpt2, TARGETS, fan_in_fan_out=True)
    assert not checkpoint.peft_can_serve(adapter)
    checkpoint.write(tmp_path / "a", adapter)
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["peft_type"] == "KASA"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(load_base(gpt2.directory), tmp_path / "a")
    with pytest.raises(ValueError):  # the reason; once it can, so may we
        config = LoraConfig(r=4, target_modules=list(TARGETS), fan_in_fan_out=True, kasa_config={})
        get_peft_model(load_base(gpt2.directory), config)


@pytest.mark.parametrize("rule", [TruncationRule.MIN_DIM, TruncationRule.IN_FEATURES])
def test_exported_kasa_is_a_plain_lora_that_peft_serves(gpt2, tmp_path, caplog, rule):
    adapter = make_adapter(gpt2, TARGETS, rule=rule, fan_in_fan_out=True)
    checkpoint.write(tmp_path / "a", adapter)
    export_lora(tmp_path / "a", tmp_path / "lora", TailCache(gpt2), torch.float32)
    model = load_with_peft(gpt2.directory, tmp_path / "lora", caplog)
    want = logits_by_hand(gpt2, adapter)
    assert (want - logits_of(load_base(gpt2.directory))).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "without the prefix"])
def test_merged_model_gives_the_same_logits(gpt2, tmp_path, bare):
    base = gpt2
    if bare:  # as the original checkpoint is stored
        base = BaseModel(tmp_path / "bare")
        load_base(gpt2.directory).save_pretrained(base.directory)
        path = base.directory / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    adapter = make_adapter(base, TARGETS, fan_in_fan_out=True)
    checkpoint.write(tmp_path / "a", adapter)
    export_merged(tmp_path / "a", tmp_path / "merged", TailCache(base))
    want = logits_by_hand(base, adapter)
    torch.testing.assert_close(logits_of(load_base(tmp_path / "merged")), want, atol=1e-5, rtol=0)
