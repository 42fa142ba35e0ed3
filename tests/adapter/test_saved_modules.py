"""Adapters with modules that were trained whole, as a classifier's head: PEFT's layout both ways,
exports, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama
from torch import Tensor

from adapter.making import edit_json, edit_tensors, make_adapter
from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.export import export_merged
from kasa_runtime.adapter.kasa import TruncationRule, merged_weight
from kasa_runtime.adapter.lora import Adapter, fold
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.cli import cli
from kasa_runtime.errors import AdapterInvalid, ModelError
from kasa_runtime.types import AdapterMethod

NUM_LABELS = 3
TARGETS = ("query", "value", "dense")
QUERY = "bert.encoder.layer.0.attention.self.query"
TOKENS = torch.arange(1, 21).reshape(2, 10)
HEAD = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, with a file of a tokenizer beside it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("models") / "encoder"
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("[PAD]")
    return directory


@pytest.fixture
def bert(encoder: Path) -> BaseModel:
    return BaseModel.for_task(encoder, "SEQ_CLS")


def make_classifier(base: BaseModel, num_labels: int = NUM_LABELS, **options: Any) -> Adapter:
    adapter = make_adapter(
        base, TARGETS, task_type="SEQ_CLS", modules_to_save=("classifier",), **options
    )
    draw = torch.Generator().manual_seed(5)
    saved = {
        "classifier.weight": torch.randn(num_labels, 32, generator=draw),
        "classifier.bias": torch.randn(num_labels, generator=draw),
    }
    return replace(adapter, saved=saved)


@pytest.fixture(params=[True, False], ids=["kasa", "lora"])
def classifier(request, bert: BaseModel) -> Adapter:
    return make_classifier(bert, kasa=request.param)


@pytest.fixture
def written(bert: BaseModel, tmp_path: Path) -> Path:
    """A KaSA classifier on disk; to be damaged by tests."""
    checkpoint.write(tmp_path / "written", make_classifier(bert))
    return tmp_path / "written"


def load_classifier(directory: Path, num_labels: int = NUM_LABELS) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(99)  # a head of its own, which the adapter's replaces
    return AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=num_labels, dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def logits_by_hand(directory: Path, adapter: Adapter) -> Tensor:
    """W0 + the adapter's delta, and the adapter's head."""
    model = load_classifier(directory, len(adapter.saved["classifier.bias"]))
    base = BaseModel.for_task(directory, "SEQ_CLS")
    for name, delta in fold(adapter, "test@0").modules.items():
        layer, tail = model.get_submodule(name), TailCache(base).get(name, delta.t)
        layer.weight.data = merged_weight(layer.weight.data, delta.a, delta.b, tail)
    for name, tensor in adapter.saved.items():
        model.get_parameter(name).data = tensor
    return logits_of(model)


@pytest.fixture(params=[{}, None], ids=["kasa", "lora"])
def from_peft(request, encoder: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """What PEFT writes with random values, and PEFT's logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=8,
        target_modules=list(TARGETS),
        kasa_config=request.param,
    )
    model = get_peft_model(load_classifier(encoder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", logits_of(model.eval())


class TestBase:
    def test_a_task_with_a_head_has_the_class_with_the_head(self, bert):
        assert bert.architecture == "BertForSequenceClassification"
        assert bert.tensors["classifier.weight"] == (2, 32)
        assert QUERY in bert.modules and "classifier" in bert.modules

    def test_other_tasks_have_the_class_of_the_config(self, encoder, tiny_llama):
        assert "encoder.layer.0.attention.self.query" in BaseModel.for_task(encoder, "").modules
        assert BaseModel.for_task(tiny_llama, "CAUSAL_LM").model_class.__name__ == (
            "LlamaForCausalLM"
        )

    def test_layers_are_found_in_a_checkpoint_without_the_prefix(self, encoder, bert):
        stored = load_file(encoder / "model.safetensors")
        assert bert.tensor_key(QUERY) == QUERY.removeprefix("bert.") + ".weight"
        assert torch.equal(bert.weight(QUERY), stored[bert.tensor_key(QUERY)])

    def test_model_that_has_no_such_class_is_refused(self, tmp_path):
        from transformers import VitMatteConfig

        VitMatteConfig().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="no vitmatte for sequence classification"):
            BaseModel.for_task(tmp_path, "SEQ_CLS")


class TestTails:
    def test_are_shared_with_the_encoder(self, encoder, bert, monkeypatch, tmp_path):
        monkeypatch.setenv("KASA_HOME", str(tmp_path))
        tail = TailCache.for_model(encoder).get(QUERY.removeprefix("bert."), 4)
        cache = TailCache(bert)
        assert cache.cached_rank(QUERY) >= 4
        assert torch.equal(cache.get(QUERY, 4).p, tail.p)


class TestPeftsLayout:
    def test_is_what_peft_writes(self, bert, classifier, from_peft, tmp_path):
        checkpoint.write(tmp_path / "ours", classifier)
        ours, theirs = (load_file(d / WEIGHTS_FILE) for d in (tmp_path / "ours", from_peft[0]))
        ours, theirs = (
            {k: v.shape for k, v in x.items() if not k.endswith("diag")} for x in (ours, theirs)
        )
        assert ours == theirs
        raw = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
        assert (raw["task_type"], raw["modules_to_save"]) == ("SEQ_CLS", ["classifier"])

    def test_peft_loads_it_silently_and_computes_the_same(
        self, encoder, bert, classifier, tmp_path, caplog
    ):
        from peft import PeftModel

        checkpoint.write(tmp_path / "a", classifier)
        model = load_classifier(encoder)
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            caplog.clear()
            model = PeftModel.from_pretrained(model, tmp_path / "a")
        assert not caplog.records
        want = logits_by_hand(encoder, classifier)
        torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)

    def test_reads_what_peft_writes(self, encoder, bert, from_peft):
        directory, want = from_peft
        raw = json.loads((directory / CONFIG_FILE).read_text())
        assert set(raw["modules_to_save"]) == {"classifier", "score"}  # whatever the model has
        adapter = checkpoint.read(directory, bert)
        assert adapter.saved.keys() == {"classifier.weight", "classifier.bias"}
        assert "bert.pooler.dense" in adapter.modules and "classifier" not in adapter.modules
        torch.testing.assert_close(logits_by_hand(encoder, adapter), want, atol=1e-4, rtol=0)

    def test_reads_as_it_was_written(self, bert, classifier, tmp_path):
        checkpoint.write(tmp_path / "a", classifier)
        got = checkpoint.read(tmp_path / "a", bert)
        assert got.config == classifier.config
        assert got.saved.keys() == classifier.saved.keys()
        for name, tensor in classifier.saved.items():
            assert torch.equal(got.saved[name], tensor)

    def test_all_linear_leaves_the_head_to_modules_to_save(self, bert, tmp_path):
        adapter = make_adapter(
            bert, "all-linear", task_type="SEQ_CLS", modules_to_save=("classifier",)
        )
        assert "classifier" not in adapter.modules and "bert.pooler.dense" in adapter.modules
        checkpoint.write(tmp_path / "a", replace(adapter, saved=make_classifier(bert).saved))
        assert checkpoint.read(tmp_path / "a", bert).modules.keys() == adapter.modules.keys()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_head_keeps_its_digits_where_the_factors_are_rounded(self, bert, tmp_path, dtype):
        adapter = make_classifier(bert)
        checkpoint.write(tmp_path / "a", adapter, dtype=dtype)
        stored = load_file(tmp_path / "a" / WEIGHTS_FILE)
        assert stored.pop(HEAD).dtype == stored.pop(HEAD.replace("weight", "bias")).dtype
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        got = checkpoint.read(tmp_path / "a", bert).saved["classifier.weight"]
        assert torch.equal(got, adapter.saved["classifier.weight"])

    @pytest.mark.parametrize("num_labels", [1, 2, 7])
    def test_number_of_labels_is_the_adapters(self, bert, tmp_path, num_labels):
        checkpoint.write(tmp_path / "a", make_classifier(bert, num_labels))
        saved = checkpoint.read(tmp_path / "a", bert).saved
        assert saved["classifier.weight"].shape == (num_labels, 32)


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda ts: [ts.pop(key) for key in list(ts) if "classifier" in key],
                r"modules_to_save names classifier, but classifier\.weight is not among",
            ),
            (
                lambda ts: ts.pop(HEAD.replace("weight", "bias")),
                r"names classifier, but classifier\.bias is not among the tensors; the file is inc",
            ),
            (
                lambda ts: ts.update({HEAD: torch.ones(3, 31)}),
                r"classifier\.weight has shape \(3, 31\), want \(3, 32\)",
            ),
            (
                lambda ts: ts.update({HEAD.replace("weight", "bias"): torch.ones(4)}),
                r"classifier\.(weight|bias) has shape .*, want",
            ),
            (lambda ts: ts.update({HEAD: torch.tensor(1.0)}), r"has shape \(\), want \(3, 32\)"),
            (lambda ts: ts[HEAD].view(-1)[:1].fill_(torch.nan), f"{HEAD} holds NaN or infinite"),
            (lambda ts: ts.update({HEAD: ts[HEAD].to(torch.int8)}), "has dtype torch.int8"),
            (
                lambda ts: ts.update({HEAD.replace("weight", "scale"): torch.ones(3)}),
                r"the base has no tensor classifier\.scale",
            ),
            (
                lambda ts: ts.update({"classifier.weight": ts.pop(HEAD)}),
                r"unknown tensor classifier\.weight",
            ),
        ],
    )
    def test_names_the_tensor_and_what_was_wanted(self, bert, written, change, message):
        edit_tensors(written, change)
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(written, bert)

    def test_name_that_the_base_has_not(self, bert, written):
        edit_json(written / CONFIG_FILE, modules_to_save=["score"])
        edit_tensors(written, lambda ts: [ts.pop(key) for key in list(ts) if "classifier" in key])
        with pytest.raises(AdapterInvalid, match=r"is \['score'\], the base has no such module"):
            checkpoint.read(written, bert)

    def test_head_that_the_config_does_not_name(self, bert, written):
        edit_json(written / CONFIG_FILE, modules_to_save=None)
        with pytest.raises(AdapterInvalid, match=r"unknown tensor .*classifier\.(bias|weight)"):
            checkpoint.read(written, bert)

    def test_on_a_base_without_the_head(self, encoder, written):
        with pytest.raises(AdapterInvalid, match=r"the base has no linear layer bert\.encoder"):
            checkpoint.read(written, BaseModel(encoder))

    @pytest.mark.parametrize("on", ["encoder", "bert"])
    def test_no_engine_gets_it(self, request, encoder, bert, written, on):
        base = bert if on == "bert" else BaseModel(encoder)
        message = r"trained whole \(classifier\).*generates text and has no use for them"
        with pytest.raises(AdapterInvalid, match=message):
            checkpoint.read(written, base, to_serve=True)

    def test_an_engine_gets_what_has_none(self, base, tmp_path):
        checkpoint.write(tmp_path / "a", make_adapter(base))
        assert checkpoint.read(tmp_path / "a", base, to_serve=True).method is AdapterMethod.KASA


def kasa(*arguments: object) -> Result:
    words = ["adapters", *map(str, arguments)]
    return CliRunner().invoke(cli, words, catch_exceptions=False)


class TestCommands:
    def test_verify_knows_the_task_and_names_the_head(self, encoder, written):
        result = kasa("verify", written, "--model", encoder)
        assert result.exit_code == 0
        assert "a kasa adapter of rank 4 on 11 layers, classifier trained whole, trunc" in (
            result.output
        )
        facts = json.loads(kasa("verify", written, "--model", encoder, "--json").stdout)
        assert (facts["method"], facts["rank"], facts["num_layers"]) == ("kasa", 4, 11)
        assert facts["saved_modules"] == ["classifier"]

    @pytest.mark.parametrize("rule", [TruncationRule.MIN_DIM, TruncationRule.IN_FEATURES])
    def test_export_as_lora_keeps_the_head(self, encoder, bert, tmp_path, rule):
        from peft import PeftModel

        adapter = make_classifier(bert, rule=rule)
        checkpoint.write(tmp_path / "a", adapter)
        options = ("--format", "lora", "--dtype", "float32", "--model", encoder)
        assert kasa("export", tmp_path / "a", tmp_path / "lora", *options).exit_code == 0
        model = PeftModel.from_pretrained(load_classifier(encoder), tmp_path / "lora")
        want = logits_by_hand(encoder, adapter)
        torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)
        head = load_file(tmp_path / "lora" / WEIGHTS_FILE)[HEAD]
        assert torch.equal(head, adapter.saved["classifier.weight"])

    def test_export_merged_is_a_whole_classifier(self, encoder, classifier, tmp_path):
        from transformers import AutoModelForSequenceClassification

        checkpoint.write(tmp_path / "a", classifier)
        options = ("--format", "merged", "--model", encoder)
        assert kasa("export", tmp_path / "a", tmp_path / "merged", *options).exit_code == 0
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert (tmp_path / "merged" / "vocab.txt").is_file()
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        assert model.config.num_labels == NUM_LABELS
        want = logits_by_hand(encoder, classifier)
        torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=0)


class TestMerging:
    def test_keeps_the_bases_dtype(self, encoder, tmp_path):
        half = shutil.copytree(encoder, tmp_path / "half")
        tensors = load_file(half / "model.safetensors")
        tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(tensors, half / "model.safetensors", {"format": "pt"})
        edit_json(half / "config.json", dtype="bfloat16")
        base = BaseModel.for_task(half, "SEQ_CLS")
        checkpoint.write(tmp_path / "a", make_classifier(base))
        export_merged(tmp_path / "a", tmp_path / "merged", TailCache(base))
        stored = load_file(tmp_path / "merged" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    def test_refuses_to_make_weights_up(self, encoder, tmp_path):
        bare = shutil.copytree(encoder, tmp_path / "bare")
        tensors = load_file(bare / "model.safetensors")
        tensors = {k: v for k, v in tensors.items() if not k.startswith("pooler")}
        save_file(tensors, bare / "model.safetensors", {"format": "pt"})
        base = BaseModel.for_task(bare, "SEQ_CLS")
        adapter = make_classifier(base)
        modules = {k: v for k, v in adapter.modules.items() if "pooler" not in k}
        config = replace(adapter.config, exclude_modules=("pooler.dense",))
        checkpoint.write(tmp_path / "a", replace(adapter, modules=modules, config=config))
        with pytest.raises(AdapterInvalid, match=r"neither the base .* has bert\.pooler\.dense"):
            export_merged(tmp_path / "a", tmp_path / "merged", TailCache(base))
        assert not (tmp_path / "merged").exists()

    def test_output_embeddings_that_were_trained_whole(self, base, tails, tiny_llama, tmp_path):
        from transformers import AutoModelForCausalLM

        head = torch.randn(128, 64)
        adapter = make_adapter(base, modules_to_save=("lm_head",))
        checkpoint.write(tmp_path / "a", replace(adapter, saved={"lm_head.weight": head}))
        export_merged(tmp_path / "a", tmp_path / "merged", tails)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(model.lm_head.weight, head)

    def test_tied_output_embeddings_are_not_replaced(self, tmp_path):
        base = BaseModel(save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
        adapter = make_adapter(base, modules_to_save=("lm_head",))
        saved = {"lm_head.weight": torch.randn(128, 64)}
        checkpoint.write(tmp_path / "a", replace(adapter, saved=saved))
        with pytest.raises(AdapterInvalid, match=r"lm_head\.weight shares its matrix"):
            export_merged(tmp_path / "a", tmp_path / "merged", TailCache(base))
