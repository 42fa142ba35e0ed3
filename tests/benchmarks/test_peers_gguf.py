"""What llama.cpp gets is the model that everybody gets."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.peers import export_gguf
from benchmarks.peers.adapters import RANK, adapters_dir
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.types import AdapterMethod


def test_the_gguf_file_has_the_weights_of_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers undoes the order of rows that llama.cpp wants."""
    export_gguf.main(str(tiny_llama), str(tmp_path / "model.gguf"), "float32")
    want = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert found.config.rope_parameters == want.config.rope_parameters
    assert found.config.rms_norm_eps == torch.tensor(want.config.rms_norm_eps).item()
    weights = found.state_dict()
    for name, tensor in want.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_the_adapter_adds_what_a_merged_model_has(tiny_llama: Path, tmp_path: Path) -> None:
    [adapter_dir] = adapters_dir(tmp_path, tiny_llama, "tiny", AdapterMethod.LORA, 1).iterdir()
    merged_dir = merged_copy(tiny_llama, adapter_dir, tmp_path / "merged")
    base, merged = (
        tensors_of_model(model_dir, tmp_path / f"{name}.gguf")
        for name, model_dir in (("base", tiny_llama), ("merged", merged_dir))
    )
    export_gguf.write_adapter(adapter_dir, str(tiny_llama), tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    adapter = {tensor.name: tensor.data for tensor in reader.tensors}
    scaling = reader.fields["adapter.lora.alpha"].contents() / RANK
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert {f"{name}.lora_{factor}" for name in changed for factor in "ab"} == set(adapter)
    for name in changed:
        delta = scaling * (adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"])
        np.testing.assert_allclose(base[name] + delta, merged[name], rtol=0, atol=1e-6)


def merged_copy(model_dir: Path, adapter_dir: Path, output: Path) -> Path:
    """The model with the adapter in its weights."""
    shutil.copytree(model_dir, output)
    [file] = output.glob("*.safetensors")
    weights = load_file(file)
    adapter = checkpoint.read(adapter_dir, BaseModel(model_dir))
    scaling = adapter.config.lora_alpha / adapter.config.r
    for name, module in adapter.modules.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scaling * (module.b @ module.a)
    save_file(weights, file)
    return output


def tensors_of_model(model_dir: Path, output: Path) -> dict[str, np.ndarray]:
    export_gguf.main(str(model_dir), str(output), "float32")
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(output).tensors}
