"""Exports give the logits of the adapter to engines that know nothing of KaSA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_llama

from adapter.making import (
    ALL_LINEAR,
    LAYER,
    edit_json,
    load_base,
    logits_by_merging,
    logits_of,
    write_adapter,
)
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.checkpoint import CONFIG_FILE
from kasa_runtime.adapter.export import as_plain_lora, export_lora, export_merged
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod

OPTIONS = {
    "kasa": {},
    "authors' rule": {"rule": TruncationRule.IN_FEATURES},
    "other truncation": {"truncation_rank": 7},
    "patterns and rslora": {
        "rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 1.0},
        "use_rslora": True,
    },
    "lora": {"kasa": False},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def source(request, base, tmp_path) -> Path:
    return write_adapter(tmp_path / "source", base, ALL_LINEAR, **request.param)


def test_plain_lora_gives_the_same_logits_with_peft(base, tails, source, tmp_path):
    from peft import PeftModel

    export_lora(source, tmp_path / "lora", tails, torch.float32)
    assert json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())["kasa_config"] is None
    model = PeftModel.from_pretrained(load_base(base.directory), tmp_path / "lora")
    want = logits_by_merging(base.directory, checkpoint.read(source, base), tails)
    torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)


def test_plain_lora_reads_as_an_adapter_of_this_base(base, tails, source, tmp_path):
    export_lora(source, tmp_path / "lora", tails, torch.float32)
    exported = checkpoint.read(tmp_path / "lora", base)
    assert exported.method is AdapterMethod.LORA
    assert exported.meta.base_fingerprint == base.fingerprint
    want = logits_by_merging(base.directory, checkpoint.read(source, base), tails)
    got = logits_by_merging(base.directory, exported, tails)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_plain_lora_has_rank_r_plus_t_and_scaling_one(base, tails, tmp_path):
    source = write_adapter(tmp_path / "a", base, ALL_LINEAR, rule=TruncationRule.IN_FEATURES)
    exported = as_plain_lora(checkpoint.read(source, base), tails)
    k_proj = LAYER.replace("q_proj", "k_proj")
    assert exported.modules[LAYER].a.shape == (8, 64)
    assert exported.modules[k_proj].a.shape == (4, 64)  # the authors' rule cuts nothing here
    assert exported.config.rank_of(LAYER) == 8 and exported.config.rank_of(k_proj) == 4
    assert {exported.config.scaling_of(name) for name in exported.modules} == {1.0}


def test_plain_lora_in_a_smaller_dtype(base, tails, tmp_path):
    source = write_adapter(tmp_path / "a", base)
    export_lora(source, tmp_path / "lora", tails, torch.bfloat16)
    stored = load_file(tmp_path / "lora" / checkpoint.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_merged_model_gives_the_same_logits_alone(base, tails, source, tmp_path):
    export_merged(source, tmp_path / "merged", tails)
    want = logits_by_merging(base.directory, checkpoint.read(source, base), tails)
    torch.testing.assert_close(logits_of(load_base(tmp_path / "merged")), want, atol=1e-5, rtol=0)


def test_merged_model_leaves_the_base_and_other_tensors_as_they_were(base, tails, tmp_path):
    before = base.directory.joinpath("model.safetensors").read_bytes()
    export_merged(write_adapter(tmp_path / "a", base), tmp_path / "merged", tails)
    assert base.directory.joinpath("model.safetensors").read_bytes() == before
    old = load_file(base.directory / "model.safetensors")
    new = load_file(tmp_path / "merged" / "model.safetensors")
    assert old.keys() == new.keys()
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert changed == [f"{LAYER}.weight"]


def test_merged_model_of_shards(base, tails, tmp_path):
    load_base(base.directory).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    sharded = TailCache(BaseModel(tmp_path / "sharded"))
    source = write_adapter(tmp_path / "a", base, ALL_LINEAR)
    export_merged(source, tmp_path / "merged", sharded)
    want = logits_by_merging(base.directory, checkpoint.read(source, base), tails)
    torch.testing.assert_close(logits_of(load_base(tmp_path / "merged")), want, atol=1e-5, rtol=0)


def test_merging_into_tied_embeddings_is_refused(tmp_path):
    tied = BaseModel(save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
    source = write_adapter(tmp_path / "a", tied, ("lm_head",))
    with pytest.raises(AdapterInvalid, match=r"lm_head shares model\.embed_tokens\.weight"):
        export_merged(source, tmp_path / "merged", TailCache(tied))
    assert not (tmp_path / "merged").exists()
    export_lora(source, tmp_path / "lora", TailCache(tied), torch.float32)


def test_what_cannot_be_read_is_not_exported(base, tails, tmp_path):
    source = write_adapter(tmp_path / "a", base)
    edit_json(source / CONFIG_FILE, use_dora=True)
    for export in (
        lambda: export_lora(source, tmp_path / "out", tails, torch.float32),
        lambda: export_merged(source, tmp_path / "out", tails),
    ):
        with pytest.raises(AdapterInvalid, match="use_dora"):
            export()
    assert not (tmp_path / "out").exists()
