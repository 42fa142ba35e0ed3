"""Layers and tensors of a base, remembered: the same as transformers says, and only of the same
configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import save_tiny_llama

from kasa_runtime.adapter import skeleton as skeleton_module
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.skeleton import classifier, meta_model, skeleton
from kasa_runtime.errors import ModelError

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Gets an entry whenever transformers builds a model."""
    calls: list[Path] = []
    build = skeleton_module.meta_model

    def count(directory: Path, architecture: str = ""):
        calls.append(directory)
        return build(directory, architecture)

    monkeypatch.setattr(skeleton_module, "meta_model", count)
    return calls


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestSkeleton:
    @pytest.mark.parametrize("architecture", ["", "LlamaForSequenceClassification", "LlamaModel"])
    def test_is_the_same_when_remembered(self, tiny_llama, built, architecture):
        first, second = (skeleton(tiny_llama, architecture) for _ in range(2))
        assert first == second
        assert len(built) == 1
        state = meta_model(tiny_llama, architecture).state_dict()
        assert second.tensors == {name: tuple(tensor.shape) for name, tensor in state.items()}

    def test_of_transposed_layers_is_the_same_when_remembered(self, tmp_path, built):
        (tmp_path / "config.json").write_text(json.dumps(GPT2))
        first, second = (skeleton(tmp_path) for _ in range(2))
        assert first == second
        assert second.modules["transformer.h.0.attn.c_attn"].transposed
        assert second.prefix == "transformer"
        assert len(built) == 1

    def test_does_not_depend_on_the_directory(self, tiny_llama, tmp_path, built):
        copy = shutil.copytree(tiny_llama, tmp_path / "copy")
        assert skeleton(copy) == skeleton(tiny_llama)
        assert len(built) == 1

    def test_depends_on_the_configuration(self, tmp_path):
        model = save_tiny_llama(tmp_path / "model")
        before = skeleton(model)
        change_config(model, intermediate_size=48)
        assert skeleton(model).modules["model.layers.0.mlp.up_proj"].out_features == 48
        assert before.modules["model.layers.0.mlp.up_proj"].out_features == 176

    def test_depends_on_the_class(self, tiny_llama):
        head = skeleton(tiny_llama, classifier(tiny_llama)).modules
        assert "score" in head
        assert "score" not in skeleton(tiny_llama).modules

    @pytest.mark.parametrize("package", ["transformers", "torch"])
    def test_depends_on_versions(self, tiny_llama, built, monkeypatch, package):
        skeleton(tiny_llama)
        found = skeleton_module.version
        monkeypatch.setattr(
            skeleton_module, "version", lambda name: found(name) + "1" * (name == package)
        )
        skeleton(tiny_llama)
        assert len(built) == 2

    def test_depends_on_the_schema(self, tiny_llama, built, monkeypatch):
        skeleton(tiny_llama)
        monkeypatch.setattr(skeleton_module, "VERSION", skeleton_module.VERSION + 1)
        skeleton(tiny_llama)
        assert len(built) == 2

    def test_broken_config_is_refused_after_a_good_one(self, tmp_path):
        model = save_tiny_llama(tmp_path / "model")
        skeleton(model)
        (model / "config.json").write_text("{")
        with pytest.raises(ModelError, match="transformers cannot build this model"):
            skeleton(model)

    def test_model_class_is_transformers_own(self, tiny_llama):
        from transformers import LlamaForCausalLM

        base = BaseModel(tiny_llama)
        assert base.modules  # remembered or not
        assert base.model_class is LlamaForCausalLM


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 32,
    "vocab_size": 64,
}
