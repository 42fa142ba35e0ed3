"""What llama.cpp gets is the model that everybody gets."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import export_gguf


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
