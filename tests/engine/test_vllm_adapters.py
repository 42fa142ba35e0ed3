"""Adapters as files for vLLM, and weights with one merged. Needs no vLLM."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from engine.making import MemoryTails, load_adapted, load_model, logits_of, make_deltas, prompt
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.vllm_adapters import difference_rank, write_difference
from kasa_runtime.engine.vllm_worker import with_merged
from kasa_runtime.errors import CapacityExceeded
from kasa_runtime.home import kasa_home

IDS = prompt(12, seed=3)
TOLERANCE = 2e-4  # float32 sums in another order, through three layers


def merged_model(model_dir: Path, base: BaseModel, directory: Path | None, keys: Any) -> Any:
    """transformers' model with the weights that a worker would load."""
    model = load_model(model_dir)
    if directory is not None:
        stored = [(key, base.weight(name)) for key, name in keys.items()]
        weights = dict(with_merged(stored, directory, keys))
        for key, name in keys.items():
            model.get_submodule(name).weight.data.copy_(weights[key])
    return model


def keys_of(base: BaseModel, adapter: AdapterWeights | None) -> dict[str, str]:
    return {base.tensor_key(name): name for name in adapter.modules} if adapter else {}


def test_every_difference_is_exact_as_peft_applies_it(
    tiny_llama: Path, base: BaseModel, tails: MemoryTails, adapters: list[AdapterWeights]
) -> None:
    """Whatever is merged, whatever is asked for; the base too."""
    everybody: list[AdapterWeights | None] = [None, *adapters]
    for wanted, merged in product(everybody, repeat=2):
        plain = write_difference(merged, None, tails) if merged else None
        model = merged_model(tiny_llama, base, plain, keys_of(base, merged))
        adapted = PeftModel.from_pretrained(model, write_difference(wanted, merged, tails))
        want = load_model(tiny_llama) if wanted is None else load_adapted(tiny_llama, wanted, tails)
        torch.testing.assert_close(
            logits_of(adapted, IDS), logits_of(want, IDS), atol=TOLERANCE, rtol=0
        )


def test_tails_that_both_cut_cancel(base: BaseModel, adapters: list[AdapterWeights]) -> None:
    kasa, wide, lora = adapters  # r = 4 + 4, 8 + 6, 3 + 0
    assert difference_rank(kasa, None) == 8
    assert difference_rank(None, kasa) == 8
    assert difference_rank(wide, kasa) == 8 + 4 + 2
    assert difference_rank(lora, kasa) == 3 + 4 + 4
    assert difference_rank(None, None) == 0


def test_what_is_written_is_a_plain_lora_of_one_rank(
    base: BaseModel, tails: MemoryTails, adapters: list[AdapterWeights]
) -> None:
    directory = write_difference(adapters[2], adapters[0], tails)
    read = checkpoint.read(directory, base)
    assert {weights.a.shape[0] for weights in read.modules.values()} == {read.config.r} == {11}
    assert not any(read.truncation.values())
    assert all(read.config.scaling_of(name) == 1 for name in read.modules)


def test_a_version_is_written_once_and_no_other_is_mistaken_for_it(
    base: BaseModel, tails: MemoryTails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KASA_HOME", str(tmp_path))
    first = make_deltas(base, "a@1", ("q_proj",), r=2, t=2, seed=1)
    renamed = AdapterWeights("b@1", first.modules)
    other = make_deltas(base, "a@1", ("q_proj",), r=2, t=2, seed=2)
    deeper = make_deltas(base, "a@1", ("q_proj",), r=2, t=3, seed=1)
    directory = write_difference(first, None, tails)
    written = (directory / "adapter_model.safetensors").stat().st_mtime_ns
    assert write_difference(renamed, None, tails) == directory
    assert (directory / "adapter_model.safetensors").stat().st_mtime_ns == written
    found = {write_difference(a, m, tails) for a in (first, other, deeper) for m in (None, other)}
    assert len(found) == 6 and directory in found
    assert {path.name for path in (kasa_home() / "vllm").iterdir()} == {p.name for p in found}


def test_a_disk_that_cannot_be_written_is_an_error_that_says_so(
    tails: MemoryTails, adapters: list[AdapterWeights], monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "vllm").write_text("in the way")
    monkeypatch.setenv("KASA_HOME", str(tmp_path))
    with pytest.raises(CapacityExceeded, match="KASA_HOME"):
        write_difference(adapters[0], None, tails)


def test_merged_weights_are_not_rounded_to_the_checkpoints_dtype(
    base: BaseModel, tails: MemoryTails, adapters: list[AdapterWeights]
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    key = base.tensor_key(name)
    half = base.weight(name).to(torch.bfloat16)
    directory = write_difference(adapters[0], None, tails)
    untouched = torch.ones(2, dtype=torch.bfloat16)
    found = dict(with_merged([(key, half), ("norm", untouched)], directory, {key: name}))
    factors = checkpoint.read(directory, base).modules[name]
    assert found[key].dtype == torch.float32
    torch.testing.assert_close(found[key], half.float() + factors.b @ factors.a)
    assert found["norm"] is untouched
