"""The trained layer against the closed form and against PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from kasa_runtime.adapter.kasa import Tail, TruncationRule, compute_tail
from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import MethodSection
from kasa_runtime.training.layers import KasaLinear, attach, select
from kasa_runtime.types import AdapterMethod

from .making import make_model

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tails_of(model: nn.Module):
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }

    def get(path: str, t: int) -> Tail:
        return compute_tail(weights[path], t)

    return get


def attached(model: nn.Module, method: MethodSection, *, seed: int = 0) -> dict[str, KasaLinear]:
    layers = attach(model, method, tails=tails_of(model), seed=seed)
    return layers


def randomise_up(layers: dict[str, KasaLinear]) -> None:
    """B starts at zero, with which any error in A, d or s would hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_closed_form(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias=bias)
    weight = linear.weight.detach().clone()
    tail = compute_tail(weight, 3)
    layer = KasaLinear(linear, 4, 2.5, tail=tail, diag=True, dropout=0.0)
    layer.reset(torch.Generator().manual_seed(1))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 24)

    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    world = u[:, :-3] @ torch.diag(s[:-3]) @ vh[:-3]
    delta = (
        2.5 * layer.lora_B.double() @ torch.diag(layer.lora_diag.double()) @ layer.lora_A.double()
    )
    want = x.double() @ (world + delta).T + (linear.bias.double() if bias else 0.0)

    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=0)
    assert torch.equal(linear.weight, weight), "the base weight was changed"


def test_training_starts_at_the_truncated_base() -> None:
    linear = nn.Linear(24, 16)
    tail = compute_tail(linear.weight.detach(), 4)
    layer = KasaLinear(linear, 4, 2.0, tail=tail, diag=True, dropout=0.0)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x) - x @ tail.q.T @ tail.p.T, atol=1e-5, rtol=0)
    assert layer.lora_A.abs().max() <= 24**-0.5
    assert layer.lora_diag is not None and layer.lora_diag.std() > 0.1


def test_dropout_leaves_the_base_path_alone() -> None:
    linear = nn.Linear(24, 16)
    layer = KasaLinear(linear, 4, 2.0, tail=None, diag=True, dropout=0.9).train()
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x))  # B is zero, so only the base speaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_float32_and_outputs_have_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    layers = attached(model, MethodSection(r=4))
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} == {torch.float32}
    assert model(torch.arange(8)[None]).logits.dtype is dtype


@pytest.mark.parametrize("kind", list(AdapterMethod))
@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_equal_those_of_peft(kind: AdapterMethod, use_rslora: bool) -> None:
    method = MethodSection(
        kind=kind, r=4, alpha=12.0, target_modules=PROJECTIONS, use_rslora=use_rslora
    )
    ours = make_model()
    layers = attached(ours, method)
    randomise_up(layers)

    kasa = peft.KasaConfig() if kind is AdapterMethod.KASA else None
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=list(PROJECTIONS),
        use_rslora=use_rslora,
        kasa_config=kasa,
    )
    theirs = peft.get_peft_model(make_model(), config).eval()
    with torch.no_grad():
        for path, layer in layers.items():
            module = theirs.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.copy_(layer.lora_A)
            module.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.lora_diag is not None:
                module.lora_diag["default"].copy_(layer.lora_diag)

    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
        untouched = make_model()(ids).logits
    assert (want - untouched).abs().max() > 0.1, "the adapter does nothing, so this proves nothing"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_rule_of_the_authors_cuts_nothing_from_wide_layers(model: nn.Module) -> None:
    rule = TruncationRule.IN_FEATURES
    layers = attached(model, MethodSection(r=4, truncation_rule=rule))
    cut = {path.rpartition(".")[2]: layer.truncation_rank for path, layer in layers.items()}
    assert {name for name, t in cut.items() if t} == {"q_proj", "o_proj", "gate_proj", "up_proj"}
    assert set(cut.values()) == {0, 4}


def test_truncation_rank_is_independent_of_r(model: nn.Module) -> None:
    layers = attached(model, MethodSection(r=4, truncation_rank=1))
    assert {(layer.r, layer.truncation_rank) for layer in layers.values()} == {(4, 1)}


def test_only_the_update_is_trained(model: nn.Module) -> None:
    attached(model, MethodSection(r=2, target_modules=("q_proj",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = "model.layers.{}.self_attn.q_proj.lora_{}"
    assert trained == {prefix.format(i, part) for i in (0, 1) for part in ("A", "B", "diag")}


def test_same_seed_gives_the_same_start() -> None:
    starts = [attached(make_model(), MethodSection(r=2), seed=seed) for seed in (1, 1, 2)]
    first, second, third = (
        torch.cat([p.flatten() for layer in s.values() for p in layer.parameters()]) for s in starts
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_all_linear_leaves_out_the_output_embeddings(model: nn.Module) -> None:
    paths = select(model, ("all-linear",))
    assert len(paths) == 14
    assert "lm_head" not in paths


def test_suffixes_match_whole_parts_of_a_path(model: nn.Module) -> None:
    assert select(model, ("0.self_attn.q_proj",)) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ConfigError, match=r"no linear layer ends in 'proj'; known: .*q_proj"):
        select(model, ("proj",))


def test_rank_must_fit_the_smallest_layer(model: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"must be below 32, the smaller side of .*k_proj, got 32"
    ):
        attached(model, MethodSection(r=32))
