"""The base as adapters see it: layers by name, shapes and pristine weights, read from disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama

from adapter.making import load_base
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.skeleton import LinearShape
from kasa_runtime.errors import ModelError


@pytest.fixture
def own_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


class TestModules:
    def test_are_the_linear_layers_with_their_shapes(self, base):
        assert base.modules["model.layers.0.self_attn.q_proj"] == LinearShape(64, 64)
        assert base.modules["model.layers.1.self_attn.k_proj"] == LinearShape(32, 64)
        assert base.modules["model.layers.2.mlp.gate_proj"] == LinearShape(176, 64)
        assert base.modules["model.layers.2.mlp.down_proj"] == LinearShape(64, 176)
        assert base.modules["lm_head"] == LinearShape(128, 64)
        assert "model.embed_tokens" not in base.modules

    def test_need_no_weights(self, own_copy):
        (own_copy / "model.safetensors").unlink()
        assert len(BaseModel(own_copy).modules) == 22

    def test_conv1d_counts_as_a_transposed_linear_layer(self, tmp_path):
        model = save_tiny_gpt2(tmp_path / "gpt2")
        layer = "transformer.h.0.attn.c_attn"
        base = BaseModel(model)
        assert base.modules[layer] == LinearShape(96, 32, transposed=True)
        stored = load_base(model).get_submodule(layer).weight
        assert base.weight(layer).shape == (96, 32)
        assert torch.equal(base.weight(layer), stored.T)


def save_tiny_gpt2(directory: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=32,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(directory)
    return directory


class TestWeight:
    def test_is_the_weight_of_the_model(self, base):
        model = load_base(base.directory)
        for name in base.modules:
            assert torch.equal(base.weight(name), model.get_submodule(name).weight)

    def test_keeps_the_dtype_in_which_it_is_stored(self, own_copy):
        rewrite(own_copy, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
        assert BaseModel(own_copy).weight("lm_head").dtype == torch.bfloat16

    def test_tied_output_embedding_is_the_input_embedding(self, tmp_path):
        tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
        stored = load_file(tied / "model.safetensors")
        assert "lm_head.weight" not in stored
        assert torch.equal(BaseModel(tied).weight("lm_head"), stored["model.embed_tokens.weight"])

    def test_checkpoint_of_the_bare_decoder_lacks_the_prefix(self, base, own_copy):
        rewrite(own_copy, lambda ts: {k.removeprefix("model."): v for k, v in ts.items()})
        layer = "model.layers.0.mlp.up_proj"
        assert torch.equal(BaseModel(own_copy).weight(layer), base.weight(layer))

    def test_is_found_in_its_shard(self, base, own_copy):
        model = load_base(base.directory)
        shutil.rmtree(own_copy)
        model.save_pretrained(own_copy, max_shard_size="100KB")
        assert len(list(own_copy.glob("*.safetensors"))) > 1
        for name in base.modules:
            assert torch.equal(BaseModel(own_copy).weight(name), base.weight(name))
        assert BaseModel(own_copy).fingerprint == base.fingerprint


class TestRefusals:
    def test_directory_without_a_config(self, tmp_path):
        with pytest.raises(ModelError, match=r"want a config\.json, found none"):
            _ = BaseModel(tmp_path).modules

    @pytest.mark.parametrize(
        "config",
        ["", "{", "[]", "{}", '{"model_type": "no-such-model"}'],
        ids=["empty", "torn", "list", "nothing", "unknown type"],
    )
    def test_config_that_transformers_cannot_build(self, tmp_path, config):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=str(tmp_path)):
            _ = BaseModel(tmp_path).modules

    def test_model_that_generates_nothing(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
        with pytest.raises(ModelError, match=str(tmp_path)):
            _ = BaseModel(tmp_path).modules

    def test_layer_without_a_tensor(self, own_copy):
        layer = "model.layers.0.mlp.up_proj"
        rewrite(own_copy, lambda ts: {k: v for k, v in ts.items() if layer not in k})
        with pytest.raises(ModelError, match=rf"want a tensor {layer}\.weight"):
            BaseModel(own_copy).weight(layer)

    def test_torn_weights(self, own_copy):
        path = own_copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors"):
            BaseModel(own_copy).weight("lm_head")
