"""Which layers are adapted, and with which rank and scaling, against PEFT's own choice."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.adapter.lora import Adapter, ModuleWeights
from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import MethodSection
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.layers import attach
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.targets import LayerPlan, plan
from kasa_runtime.types import AdapterMethod

from .adapting import PROJECTIONS, tails_of
from .making import make_model


def make_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    )


def planned(model: nn.Module, **settings: Any) -> dict[str, LayerPlan]:
    return {item.path: item for item in plan(model, MethodSection(**{"r": 2, **settings}))}


def chosen_by_peft(model: PreTrainedModel, **settings: Any) -> dict[str, tuple[int, float]]:
    """r and scaling by path."""
    targets = settings.pop("target_modules", "all-linear")
    targets = list(targets) if isinstance(targets, tuple) else targets
    fan_in_fan_out = isinstance(model, GPT2LMHeadModel)
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 16, **settings},
        target_modules=targets,
        fan_in_fan_out=fan_in_fan_out,
    )
    wrapped = peft.get_peft_model(model, config)
    modules = wrapped.base_model.model
    names = wrapped.targeted_module_names
    found = {name: modules.get_submodule(name) for name in names}
    return {n: (m.r["default"], m.scaling["default"]) for n, m in found.items()}


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ("q_proj",),
        ("v_proj", "q_proj"),
        ("0.self_attn.q_proj", "down_proj"),
        ("model.layers.1.mlp.gate_proj",),
        ("lm_head", "k_proj"),
        r".*\.(q|v)_proj",
        r"model\.layers\.1\..*_proj",
        r".*(mlp\.up_proj|lm_head)",
        "lm_head",
    ],
)
def test_same_layers_as_peft_on_a_llama(targets: str | tuple[str, ...]) -> None:
    assert planned(make_model(), target_modules=targets).keys() == (
        chosen_by_peft(make_model(), target_modules=targets).keys()
    )


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",), ("attn.c_proj",), r".*c_fc"])
def test_same_layers_as_peft_on_a_gpt2(targets: str | tuple[str, ...]) -> None:
    ours = planned(make_gpt2(), target_modules=targets)
    assert ours.keys() == chosen_by_peft(make_gpt2(), target_modules=targets).keys()
    assert "lm_head" not in ours


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 5}, {}),
        ({}, {"q_proj": 5}),
        ({"q_proj": 5, "self_attn.q_proj": 7}, {"v_proj": 3}),  # the first that matches
        ({"layers.1.mlp.up_proj": 9}, {"layers.1.mlp.up_proj": 1, "up_proj": 4}),
        ({r"layers\.0\..*": 3, r".*mlp.*": 6}, {r".*\.0\..*_proj": 8}),
        ({r"(q|k)_proj": 4, "model.layers.0.self_attn.o_proj": 11}, {r"[kv]_proj": 2.5}),
    ],
)
def test_same_ranks_and_scalings_as_peft(
    ranks: dict[str, int], alphas: dict[str, float], use_rslora: bool
) -> None:
    settings = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": use_rslora}
    ours = planned(make_model(), alpha=12.0, **settings)
    theirs = chosen_by_peft(make_model(), lora_alpha=12, **settings)
    assert {path: item.r for path, item in ours.items()} == {p: r for p, (r, _) in theirs.items()}
    for path, (_, scaling) in theirs.items():
        assert ours[path].scaling == pytest.approx(scaling), path


def test_layers_are_in_the_order_of_the_model(model: LlamaForCausalLM) -> None:
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert list(planned(model)) == expected
    assert list(planned(model, target_modules=tuple(reversed(PROJECTIONS)))) == expected


def test_trained_heads_are_left_out(model: LlamaForCausalLM) -> None:
    everything = MethodSection(r=2, target_modules=r".*")
    assert "lm_head" in {item.path for item in plan(model, everything)}
    assert "lm_head" not in {item.path for item in plan(model, everything, exclude=["lm_head"])}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj", "query"),
            r"no linear layer matches 'query'; names of linear layers: down_proj",
        ),
        (("q_pro",), r"matches 'q_pro'; near it: q_proj, .*all names: down_proj, gate_proj, .*"),
        (("self_attn.q_prj",), r"matches 'self_attn.q_prj'; near it: q_proj"),
        (("proj",), r"matches 'proj'; near it: .*_proj"),  # names match whole parts only
        ("up_proj", r"matches 'up_proj'; near it: up_proj"),  # a text is for whole paths
        (("embed_tokens",), r"matches 'embed_tokens'"),
        ("(", r"'\(' is not a regular expression"),
    ],
)
def test_names_that_match_nothing_are_refused(
    model: LlamaForCausalLM, targets: str | tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^\[method\] .*{message}"):
        planned(model, target_modules=targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 32}, r"below 32, the smaller side of model\.layers\.0\.self_attn\.k_proj, got 32"),
        ({"truncation_rank": 40}, r"below 32, .*layers\.0\.self_attn\.k_proj, got 40"),
        ({"rank_pattern": {"1.mlp.up_proj": 64}}, r"below 64, .*layers\.1\.mlp\.up_proj, got 64"),
        ({"kind": AdapterMethod.LORA, "r": 33}, r"below 32, .*k_proj, got 33"),
        ({"rank_pattern": {"(": 3}}, r"is not a regular expression"),
        ({"rank_pattern": {"proj": 3}}, r"rank_pattern: no adapted layer matches 'proj'; near it"),
        ({"alpha_pattern": {"lm_head": 3}}, r"alpha_pattern: no adapted layer matches 'lm_head'"),
        ({"ortho_form": OrthoForm.QR}, r"ortho_form = qr needs diag = true and diag_init = zeros"),
        (
            {"ortho_form": OrthoForm.QR, "diag_init": DiagInit.ZEROS, "diag": False},
            r"ortho_form = qr needs diag = true",
        ),
        ({"target_modules": ("none",)}, r"no linear layer matches"),
    ],
)
def test_refused_settings_change_nothing_of_the_model(
    model: LlamaForCausalLM, settings: dict[str, Any], message: str
) -> None:
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = MethodSection(**{"r": 2, **settings})
    with pytest.raises(ConfigError, match=message):
        attach(model, method, tails=tails_of(model), seed=0)
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_rank_just_below_the_smaller_side_fits(model: LlamaForCausalLM) -> None:
    assert planned(model, r=31)["model.layers.0.self_attn.k_proj"].t == 31


def test_rule_of_the_authors_cuts_nothing_from_wide_layers(model: LlamaForCausalLM) -> None:
    """64 x 64: r; 32 x 64 and 64 x 176: nothing; 176 x 64: r."""
    layers = planned(model, r=4, truncation_rule=TruncationRule.IN_FEATURES)
    cut = {path.rpartition(".")[2]: item.t for path, item in layers.items()}
    assert {name for name, t in cut.items() if t} == {"q_proj", "o_proj", "gate_proj", "up_proj"}
    assert set(cut.values()) == {0, 4}


def test_rule_of_the_authors_cuts_part_of_slightly_wide_layers() -> None:
    """out < in < out + r: r - (in - out)."""
    model = nn.ModuleDict({"a": nn.Linear(10, 8)})
    rule = TruncationRule.IN_FEATURES
    (item,) = plan(model, MethodSection(r=5, truncation_rule=rule))
    assert item.t == 3


@pytest.mark.parametrize(
    ("settings", "t"),
    [
        ({}, 4),
        ({"truncation_rank": 1}, 1),
        ({"truncation_rank": 9}, 9),
        ({"truncation_rank": 0}, 0),
        ({"truncation_rule": TruncationRule.NONE, "truncation_rank": 3}, 0),
        ({"kind": AdapterMethod.LORA, "truncation_rank": 3}, 0),
    ],
)
def test_truncation_rank_is_independent_of_r(
    model: LlamaForCausalLM, settings: dict[str, Any], t: int
) -> None:
    layers = planned(model, r=4, **settings).values()
    assert {(item.r, item.t) for item in layers} == {(4, t)}


def test_truncation_follows_the_rank_of_each_layer(model: LlamaForCausalLM) -> None:
    layers = planned(model, r=4, rank_pattern={"q_proj": 7}).values()
    assert {(item.r, item.t) for item in layers} == {(4, 4), (7, 7)}


@pytest.mark.parametrize(
    ("settings", "diag"),
    [({}, True), ({"diag": False}, False), ({"kind": AdapterMethod.LORA}, False)],
)
def test_only_kasa_has_a_diagonal(
    model: LlamaForCausalLM, settings: dict[str, Any], diag: bool
) -> None:
    assert {item.diag for item in planned(model, **settings).values()} == {diag}


class TestFromAnAdapter:
    """Where training goes on from an adapter, it says the shapes."""

    path = "model.layers.1.self_attn.q_proj"

    def start(self, path: str) -> Adapter:
        config = AdapterConfig(r=3, lora_alpha=12, target_modules=(path,))
        weights = ModuleWeights(torch.ones(3, 64), torch.ones(64, 3), torch.arange(3.0))
        meta = AdapterMeta(TruncationRule.MIN_DIM)
        return Adapter(config, meta, {path: weights}, {path: 5})

    def test_its_layers_are_planned(self, model: LlamaForCausalLM) -> None:
        (item,) = plan(model, MethodSection(r=8), start=self.start(self.path))
        assert item == LayerPlan(self.path, r=3, scaling=4.0, t=5, diag=True)

    def test_its_values_are_taken(self, model: LlamaForCausalLM) -> None:
        start = self.start(self.path)
        layers = attach(model, MethodSection(), tails=tails_of(model), seed=0, start=start)
        layer = layers[self.path]
        assert layer.lora_diag.tolist() == [0, 1, 2]
        assert layer.lora_A.eq(1).all() and layer.lora_B.eq(1).all()
        assert layer.truncation_rank == 5

    def test_a_layer_that_the_model_lacks_is_named(self, model: LlamaForCausalLM) -> None:
        with pytest.raises(ConfigError, match=r"init_from: the model has no linear layer h\.0\.x"):
            plan(model, MethodSection(), start=self.start("h.0.x"))
