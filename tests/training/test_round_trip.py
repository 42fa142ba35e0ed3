"""What training writes is what was trained, for PEFT, as a plain LoRA and as a whole model; and
what others wrote can be trained further."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.cli import cli
from kasa_runtime.errors import ConfigError
from kasa_runtime.training import run as run_module
from kasa_runtime.training.config import (
    DataSection,
    Dtype,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
    TaskKind,
    TrainSection,
)
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.run import train
from kasa_runtime.training.targets import plan
from kasa_runtime.types import AdapterMethod

from .making import WriteRows, make_tokenizer

TOKENS = torch.arange(1, 41).reshape(2, 20)
Q_PROJ = "model.layers.0.self_attn.q_proj"  # (64, 64)
K_PROJ = "model.layers.0.self_attn.k_proj"  # (32, 64): the authors' rule cuts nothing
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_FEATURES, NONE = TruncationRule.IN_FEATURES, TruncationRule.NONE


@dataclass
class Trained:
    """An adapter directory, and the logits of the model in memory before and after training."""

    directory: Path
    model_dir: Path
    start: Tensor
    end: Tensor
    meta: dict[str, Any] = field(default_factory=dict)


Train = Callable[..., Trained]


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    model.eval()
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits.clone()


@pytest.fixture
def train_further(write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains a few steps, and records what the model in memory computes."""
    rows = [{"q": q, "a": a} for q, a in (("red", "stop"), ("green", "go"), ("blue", "wait"))]
    recorded: list[Tensor] = []
    optimise = run_module.optimise

    def recording(config: RunConfig, task: Any, base: Any, *rest: Any) -> Any:
        recorded.append(logits_of(base.model))
        training = optimise(config, task, base, *rest)
        recorded.append(logits_of(base.model))
        return training

    monkeypatch.setattr(run_module, "optimise", recording)

    def run(
        model_dir: Path, method: MethodSection, *, name: str = "trained", **data: Any
    ) -> Trained:
        recorded.clear()
        defaults = {"prompt": "{q} =>", "completion": " {a}"}
        config = RunConfig(
            path=tmp_path / "run.toml",
            model=ModelSection(name=str(model_dir)),
            data=DataSection(train=write_rows("rows.jsonl", rows), **(defaults | data)),
            method=method,
            train=TrainSection(max_steps=4, batch_size=3, learning_rate=2e-2, warmup_ratio=0),
            output=OutputSection(tmp_path / name, Dtype.FLOAT32, work_dir=tmp_path / "work" / name),
        )
        train(config, Console(quiet=True))
        meta = json.loads((config.output.dir / "kasa_meta.json").read_text())
        return Trained(config.output.dir, model_dir, *recorded, meta)

    return run


def export(trained: Trained, form: str) -> Path:
    """By the command, with the base named as a user names it."""
    target = trained.directory.with_name(form)
    arguments = ["adapters", "export", str(trained.directory), str(target), "--format", form]
    arguments += ["--model", str(trained.model_dir), "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"directory": str(target), "format": form}
    return target


def load_base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def with_peft(base: nn.Module, directory: Path) -> Tensor:
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(base, directory))


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


PEFTS = {
    "kasa": {},
    "some layers": {"target_modules": ("q_proj", "down_proj")},
    "regular expression": {"target_modules": r"model\.layers\.1\..*_proj"},
    "patterns": {
        "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 12},
        "alpha_pattern": {"v_proj": 40.0},
    },
    "rslora": {"use_rslora": True},
    "lora": {"kind": AdapterMethod.LORA},
    "no learnable values": {"diag": False},
    "the same truncation said": {"truncation_rank": 8},
}
EXPORTED = ("kasa", "patterns", "rslora", "lora", "no learnable values")
OURS = {
    "authors' rule": {"truncation_rule": IN_FEATURES},
    "no truncation": {"truncation_rule": NONE},
    "other truncation": {"truncation_rank": 3},
    "truncation of patterns": {
        "rank_pattern": {"k_proj": 3},
        "truncation_rank": 5,
        "truncation_rule": IN_FEATURES,
    },
}


class TestWritten:
    @pytest.mark.parametrize("options", PEFTS.values(), ids=PEFTS)
    def test_peft_serves_the_directory(
        self, model_dir: Path, train_further: Train, options: Mapping[str, Any]
    ) -> None:
        trained = train_further(model_dir, MethodSection(r=8, **options))
        assert (trained.end - trained.start).abs().max() > 1e-2
        assert_same(with_peft(load_base(model_dir), trained.directory), trained.end)

    @pytest.mark.parametrize("name", [*EXPORTED, *OURS])
    def test_exports_give_the_logits_of_what_was_trained(
        self, model_dir: Path, train_further: Train, name: str
    ) -> None:
        trained = train_further(model_dir, MethodSection(r=8, **(PEFTS | OURS)[name]))
        raw = json.loads((trained.directory / "adapter_config.json").read_text())
        assert raw["peft_type"] == ("LORA" if name in PEFTS else "KASA")  # which PEFT refuses
        assert_same(with_peft(load_base(model_dir), export(trained, "lora")), trained.end)
        assert_same(logits_of(load_base(export(trained, "merged"))), trained.end)

    @pytest.mark.parametrize(
        ("options", "ranks"),
        [
            ({}, (16, 16)),
            ({"truncation_rule": IN_FEATURES}, (16, 8)),
            ({"truncation_rank": 3, "rank_pattern": {"k_proj": 5}}, (11, 8)),
        ],
    )
    def test_exported_lora_has_rank_r_plus_t(
        self,
        model_dir: Path,
        train_further: Train,
        options: Mapping[str, Any],
        ranks: tuple[int, int],
    ) -> None:
        trained = train_further(model_dir, MethodSection(r=8, **options))
        tensors = load_file(export(trained, "lora") / "adapter_model.safetensors")
        found = [tensors[f"base_model.model.{p}.lora_A.weight"].shape[0] for p in (Q_PROJ, K_PROJ)]
        assert tuple(found) == ranks


class TestConv1D:
    """GPT-2 stores its weights (in, out)."""

    @pytest.fixture
    def gpt2_dir(self, tmp_path: Path, model_dir: Path) -> Path:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=257,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.1,
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        make_tokenizer().save_pretrained(tmp_path / "gpt2")
        return tmp_path / "gpt2"

    @pytest.mark.parametrize("kind", list(AdapterMethod))
    def test_exports_give_the_logits_of_what_was_trained(
        self, gpt2_dir: Path, train_further: Train, kind: AdapterMethod
    ) -> None:
        trained = train_further(gpt2_dir, MethodSection(kind=kind, r=4))
        assert_same(with_peft(load_base(gpt2_dir), export(trained, "lora")), trained.end)
        assert_same(logits_of(load_base(export(trained, "merged"))), trained.end)

    def test_plain_lora_is_served_by_peft_and_kasa_not_called_one(
        self, gpt2_dir: Path, train_further: Train
    ) -> None:
        lora = train_further(gpt2_dir, MethodSection(kind=AdapterMethod.LORA, r=4))
        raw = json.loads((lora.directory / "adapter_config.json").read_text())
        assert (raw["peft_type"], raw["fan_in_fan_out"]) == ("LORA", True)
        assert_same(with_peft(load_base(gpt2_dir), lora.directory), lora.end)
        kasa = train_further(gpt2_dir, MethodSection(r=4), name="kasa")
        raw = json.loads((kasa.directory / "adapter_config.json").read_text())
        assert (raw["peft_type"], raw["fan_in_fan_out"]) == ("KASA", True)


def classify(encoder_dir: Path, num_labels: int = 3) -> Any:
    torch.manual_seed(99)  # a head of its own, which the adapter's replaces
    return AutoModelForSequenceClassification.from_pretrained(encoder_dir, num_labels=num_labels)


CLASSES = {"task": TaskKind.CLASSIFICATION, "text": "{q}", "label": "a"}


class TestClassifier:
    @pytest.mark.parametrize("kind", list(AdapterMethod))
    def test_is_served_by_peft_and_exported_with_its_head(
        self, encoder_dir: Path, train_further: Train, kind: AdapterMethod
    ) -> None:
        trained = train_further(encoder_dir, MethodSection(kind=kind, r=4), **CLASSES)
        assert trained.end.shape == (2, 3)
        assert (trained.end - trained.start).abs().max() > 1e-3
        assert_same(with_peft(classify(encoder_dir), trained.directory), trained.end)
        assert_same(with_peft(classify(encoder_dir), export(trained, "lora")), trained.end)
        merged = AutoModelForSequenceClassification.from_pretrained(export(trained, "merged"))
        assert_same(logits_of(merged), trained.end)

    def test_no_layer_inside_the_head_is_adapted(self) -> None:
        config = RobertaConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = RobertaForSequenceClassification(config)
        planned = {item.path for item in plan(model, MethodSection(r=2), exclude=["classifier"])}
        assert "roberta.encoder.layer.0.attention.self.query" in planned
        assert not [path for path in planned if path.startswith("classifier")]

    def test_goes_on_with_its_head(self, encoder_dir: Path, train_further: Train) -> None:
        first = train_further(encoder_dir, MethodSection(r=4), **CLASSES)
        method = MethodSection(init_from=first.directory)
        again = train_further(encoder_dir, method, name="again", **CLASSES)
        assert_same(again.start, first.end)
        assert_same(with_peft(classify(encoder_dir), again.directory), again.end)

    def test_of_other_labels_is_refused(self, encoder_dir: Path, train_further: Train) -> None:
        first = train_further(encoder_dir, MethodSection(r=4), **CLASSES)
        method = MethodSection(init_from=first.directory)
        with pytest.raises(ConfigError, match=r"classifier\.\w+ has shape \(3.*want \(4.*labels"):
            labels = ("stop", "go", "wait", "turn")
            train_further(encoder_dir, method, name="again", labels=labels, **CLASSES)


def write_with_peft(model_dir: Path, directory: Path, **options: Any) -> Tensor:
    """An adapter with random values that PEFT saved, and its logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR, **options)
    torch.manual_seed(7)
    model = get_peft_model(load_base(model_dir), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return logits_of(model)


def write_as_the_authors(model_dir: Path, directory: Path, *, dense: bool) -> Tensor:
    """Their layout is PEFT's without `kasa_config`; the logits by their formula: keep
    `in_features - r` components, add s B core A."""
    write_with_peft(model_dir, directory, kasa_config={})
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kasa_config": None}))
    path, model = directory / "adapter_model.safetensors", load_base(model_dir)
    tensors = load_file(path)
    for key in [k for k in tensors if k.endswith("lora_diag")]:
        core = torch.diag(tensors[key])
        if dense:
            tensors[key] = core = core + 0.3 * torch.randn(4, 4)
        prefix = key.removesuffix("lora_diag")
        a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
        layer = model.get_submodule(prefix.removeprefix("base_model.model.").rstrip("."))
        u, s, vh = torch.linalg.svd(layer.weight.data.double(), full_matrices=False)
        keep = layer.in_features - 4
        world = (u[:, :keep] * s[:keep]) @ vh[:keep]
        layer.weight.data = (world + 2 * (b @ core @ a).double()).float()
    save_file(tensors, path)
    return logits_of(model)


class TestTrainedFurther:
    def test_adapter_of_peft(self, model_dir: Path, train_further: Train, tmp_path: Path) -> None:
        want = write_with_peft(model_dir, tmp_path / "peft", kasa_config={})
        trained = train_further(model_dir, MethodSection(init_from=tmp_path / "peft"))
        assert_same(trained.start, want)
        assert (trained.end - trained.start).abs().max() > 1e-2
        assert trained.meta["truncation_rule"] == "min_dim"
        raw = json.loads((trained.directory / "adapter_config.json").read_text())
        assert (raw["peft_type"], raw["r"], raw["lora_alpha"]) == ("LORA", 4, 8)
        assert_same(with_peft(load_base(model_dir), trained.directory), trained.end)

    def test_patterns_of_peft(self, model_dir: Path, train_further: Train, tmp_path: Path) -> None:
        options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
        want = write_with_peft(
            model_dir, tmp_path / "peft", use_rslora=True, kasa_config={}, **options
        )
        trained = train_further(model_dir, MethodSection(init_from=tmp_path / "peft"))
        assert_same(trained.start, want)
        assert_same(with_peft(load_base(model_dir), trained.directory), trained.end)

    def test_plain_lora_of_peft(
        self, model_dir: Path, train_further: Train, tmp_path: Path
    ) -> None:
        want = write_with_peft(model_dir, tmp_path / "peft")
        trained = train_further(model_dir, MethodSection(init_from=tmp_path / "peft"))
        assert_same(trained.start, want)
        assert trained.meta["truncation_rule"] == "none"
        assert_same(with_peft(load_base(model_dir), trained.directory), trained.end)

    @pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense core"])
    def test_adapter_of_the_authors(
        self, model_dir: Path, train_further: Train, tmp_path: Path, dense: bool
    ) -> None:
        want = write_as_the_authors(model_dir, tmp_path / "theirs", dense=dense)
        trained = train_further(model_dir, MethodSection(init_from=tmp_path / "theirs"))
        assert_same(trained.start, want)
        assert (trained.end - trained.start).abs().max() > 1e-2
        assert trained.meta["truncation_rule"] == "in_features"
        adapter = checkpoint.read(trained.directory, BaseModel(model_dir))
        assert (adapter.truncation[Q_PROJ], adapter.truncation[K_PROJ]) == (4, 0)
        assert_same(with_peft(load_base(model_dir), export(trained, "lora")), trained.end)

    @pytest.mark.parametrize("name", ["truncation of patterns", "no truncation"])
    def test_our_own(self, model_dir: Path, train_further: Train, name: str) -> None:
        first = train_further(model_dir, MethodSection(r=8, **OURS[name]))
        again = train_further(model_dir, MethodSection(init_from=first.directory), name="again")
        assert_same(again.start, first.end)
        shape = ("truncation_rule", "truncation_rank", "truncation_ranks", "base_fingerprint")
        assert [again.meta[key] for key in shape] == [first.meta[key] for key in shape]
        assert_same(logits_of(load_base(export(again, "merged"))), again.end)

    @pytest.mark.parametrize("diag", [False, True], ids=["kept so", "learnt from here on"])
    def test_our_own_without_learnable_values(
        self, model_dir: Path, train_further: Train, diag: bool
    ) -> None:
        first = train_further(model_dir, MethodSection(r=8, diag=False))
        method = MethodSection(init_from=first.directory, diag=diag)
        again = train_further(model_dir, method, name="again")
        assert_same(again.start, first.end)
        stored = load_file(again.directory / "adapter_model.safetensors")
        values = torch.cat([stored[key] for key in stored if key.endswith("lora_diag")])
        assert bool((values != 1).any()) is diag

    def test_learnable_values_may_be_given_up(
        self, model_dir: Path, train_further: Train, tmp_path: Path
    ) -> None:
        want = write_with_peft(model_dir, tmp_path / "peft", kasa_config={})
        method = MethodSection(init_from=tmp_path / "peft", diag=False)
        trained = train_further(model_dir, method)
        assert_same(trained.start, want)
        assert_same(with_peft(load_base(model_dir), trained.directory), trained.end)

    def test_what_method_repeats_is_taken(
        self, model_dir: Path, train_further: Train, tmp_path: Path
    ) -> None:
        want = write_with_peft(model_dir, tmp_path / "peft", kasa_config={})
        method = MethodSection(
            init_from=tmp_path / "peft",
            r=4,
            alpha=8.0,
            target_modules=tuple(LINEAR),
            truncation_rank=4,
        )
        assert_same(train_further(model_dir, method).start, want)


class TestRefusedStarts:
    @pytest.fixture
    def start(self, model_dir: Path, tmp_path: Path) -> Path:
        write_with_peft(model_dir, tmp_path / "start", kasa_config={})
        return tmp_path / "start"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 16}, r"\[method\] r = 16, but the adapter in init_from = .*start has 4; leave"),
            ({"alpha": 32.0}, "alpha = 32.0, but .* has 8"),
            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .*q_proj.* has {}"),
            ({"alpha_pattern": {"q_proj": 2.0}}, "alpha_pattern = .* has {}"),
            ({"use_rslora": True}, "use_rslora = True, but .* has False"),
            ({"truncation_rule": IN_FEATURES}, "truncation_rule = in_features, but .* has min_dim"),
            ({"truncation_rank": 2}, "truncation_rank = 2, but .* has 4"),
            ({"kind": AdapterMethod.LORA}, "kind = lora, but .* has kasa"),
            ({"ortho_form": OrthoForm.QR}, "ortho_form = qr, but .* not orthonormal"),
            ({"target_modules": ("q_proj",)}, r"other layers .* which has model\.layers\.0"),
            ({"target_modules": (*LINEAR, "lm_head")}, "other layers .* which lacks lm_head"),
        ],
    )
    def test_contradiction_is_named(
        self,
        model_dir: Path,
        train_further: Train,
        start: Path,
        options: Mapping[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            train_further(model_dir, MethodSection(init_from=start, **options))

    def test_no_such_directory(self, model_dir: Path, train_further: Train, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"init_from: .*nowhere: want adapter_model\.safe"):
            train_further(model_dir, MethodSection(init_from=tmp_path / "nowhere"))

    def test_damaged_tensors(self, model_dir: Path, train_further: Train, start: Path) -> None:
        path = start / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ConfigError, match=r"init_from: .*start: .* is torn"):
            train_further(model_dir, MethodSection(init_from=start))

    def test_diverged_values(self, model_dir: Path, train_further: Train, start: Path) -> None:
        path = start / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = math.nan
        save_file(tensors, path)
        with pytest.raises(ConfigError, match="holds NaN or infinite"):
            train_further(model_dir, MethodSection(init_from=start))

    def test_other_weights(
        self, model_dir: Path, train_further: Train, start: Path, tmp_path: Path
    ) -> None:
        base = BaseModel(model_dir)
        adapter = checkpoint.read(start, base)
        meta = AdapterMeta(TruncationRule.MIN_DIM, base_fingerprint="ab" * 32)
        checkpoint.write(start, replace(adapter, meta=meta))
        with pytest.raises(ConfigError, match=r"made for a base with fingerprint abab"):
            train_further(model_dir, MethodSection(init_from=start))

    def test_other_architecture(self, encoder_dir: Path, train_further: Train, start: Path) -> None:
        with pytest.raises(ConfigError, match=r"the base has no linear layer model\.layers"):
            train_further(encoder_dir, MethodSection(init_from=start), **CLASSES)

    def test_module_trained_whole_that_the_task_would_lose(
        self, model_dir: Path, train_further: Train, start: Path
    ) -> None:
        adapter = checkpoint.read(start, BaseModel(model_dir))
        config = replace(adapter.config, modules_to_save=("lm_head",))
        saved = {"lm_head.weight": torch.zeros(257, 64)}
        checkpoint.write(start, replace(adapter, config=config, saved=saved))
        with pytest.raises(ConfigError, match=r"holds lm_head\.weight, which .* does not train"):
            train_further(model_dir, MethodSection(init_from=start))
