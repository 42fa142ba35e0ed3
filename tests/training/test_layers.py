"""The trained layer against the closed form and against PEFT, and what it does to a model."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.kasa import Tail, compute_tail, merged_weight
from kasa_runtime.adapter.lora import ModuleWeights
from kasa_runtime.training import prepare
from kasa_runtime.training.config import (
    DataSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
)
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.layers import KasaLinear, attach, truncated
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.training.tasks import make_task
from kasa_runtime.types import AdapterMethod

from .adapting import PROJECTIONS, Linear4bit, attached, dense_weight, randomise, tails_of
from .making import make_model


def make_linear(kind: str, out_features: int = 16, in_features: int = 24) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        linear = Conv1D(out_features, in_features)
        nn.init.normal_(linear.bias)
        return linear
    if kind == "4bit":
        return Linear4bit(torch.randn(out_features, in_features) / 5, torch.randn(out_features))
    return nn.Linear(in_features, out_features, bias=kind == "bias")


LINEARS = ("bias", "no bias", "conv1d", "4bit")


def test_forward_by_hand() -> None:
    """W = diag(3, 1) without its smallest component is diag(3, 0); s B diag(d) A = 2 * 3 * [[1, 2],
    [-1, -2]]; at x = (1, 1): (3, 0) + (18, -18) + bias."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        linear.bias.copy_(torch.tensor([1.0, 2.0]))
    layer = KasaLinear(linear, 1, 2.0, tail=compute_tail(linear.weight, 1))
    a, b, d = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([3.0])
    layer.load(ModuleWeights(a, b, d))
    assert layer(torch.ones(2)).tolist() == [22.0, -16.0]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("diag", [True, False])
def test_loaded_values_are_the_same_update_with_and_without_a_diagonal(
    diag: bool, stored: bool
) -> None:
    layer = KasaLinear(nn.Linear(6, 5), 2, 1.5, diag=diag)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)  # whatever was there before must not stay
    a, b, d = torch.randn(2, 6), torch.randn(5, 2), torch.randn(2)
    layer.load(ModuleWeights(a, b, d if stored else None))
    core = torch.diag(d) if stored else torch.eye(2)
    x = torch.randn(3, 6)
    update = layer(x) - functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(update, x @ (1.5 * b @ core @ a).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("diag", [True, False])
@pytest.mark.parametrize("kind", LINEARS)
def test_forward_equals_the_closed_form(kind: str, diag: bool) -> None:
    linear = make_linear(kind)
    weight = dense_weight(linear)
    layer = KasaLinear(linear, 4, 2.5, tail=compute_tail(weight, 3), diag=diag)
    layer.reset(torch.Generator().manual_seed(1))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 24)

    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    world = u[:, :-3] @ torch.diag(s[:-3]) @ vh[:-3]
    core = torch.diag(layer.lora_diag.double()) if diag else torch.eye(4).double()
    delta = 2.5 * layer.lora_B.double() @ core @ layer.lora_A.double()
    bias = getattr(linear, "bias", None)
    want = x.double() @ (world + delta).T + (0.0 if bias is None else bias.double())

    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=0)
    assert torch.equal(dense_weight(linear), weight), "the base weight was changed"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_forward_is_a_product_with_the_merged_weight(data: st.DataObject) -> None:
    out_features, in_features = (data.draw(st.integers(2, 20), label=n) for n in ("out", "in"))
    k = min(out_features, in_features)
    r, t = data.draw(st.integers(1, k - 1), label="r"), data.draw(st.integers(0, k - 1), label="t")
    batch = data.draw(st.lists(st.integers(1, 3), max_size=3), label="batch")
    scale = data.draw(st.floats(0.1, 4), label="scale")
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    linear = nn.Linear(in_features, out_features, bias=False)
    weight = linear.weight.detach().clone()
    tail = compute_tail(weight, t)
    layer = KasaLinear(linear, r, scale, tail=tail)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*batch, in_features)

    merged = merged_weight(weight, layer.lora_A, scale * layer.lora_B * layer.lora_diag, tail)
    assert layer(x).shape == (*batch, out_features)
    torch.testing.assert_close(layer(x), x @ merged.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("init", list(DiagInit))
@pytest.mark.parametrize("kind", LINEARS)
def test_training_starts_at_the_truncated_base(kind: str, init: DiagInit) -> None:
    """To the bit: the update is zero, by B = 0 or by d = 0."""
    linear = make_linear(kind)
    weight, bias = dense_weight(linear), getattr(linear, "bias", None)
    tail = compute_tail(weight, 4)
    layer = KasaLinear(linear, 4, 2.0, tail=tail)
    layer.reset(torch.Generator().manual_seed(0), diag_init=init, tail=tail)
    x = torch.randn(3, 24)
    if kind == "4bit":
        base = functional.linear(x, weight, bias)
        want = base - functional.linear(functional.linear(x, tail.q), tail.p)
    else:
        assert torch.equal(layer.weight, truncated(weight, tail))
        # From the layer's own tensor: products round by how a matrix lies in memory, too.
        want = functional.linear(x, layer.weight, bias)
    assert torch.equal(layer(x), want)
    assert (want - functional.linear(x, weight, bias)).abs().max() > 1e-3, "nothing was cut off"


def test_diagonal_that_starts_at_zero_is_reached_by_the_gradient() -> None:
    """With d = 0 and B = 0 nothing would ever move."""
    layer = KasaLinear(make_linear("bias"), 4, 2.0)
    layer.reset(torch.Generator().manual_seed(0), diag_init=DiagInit.ZEROS)
    layer(torch.randn(3, 24)).square().sum().backward()
    assert layer.lora_diag.grad.abs().min() > 0
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


def test_diagonal_that_starts_random_lets_b_leave_zero() -> None:
    layer = KasaLinear(make_linear("bias"), 4, 2.0)
    layer.reset(torch.Generator().manual_seed(0))
    layer(torch.randn(3, 24)).square().sum().backward()
    assert layer.lora_B.grad.abs().max() > 0
    assert not layer.lora_A.grad.any() and not layer.lora_diag.grad.any()


def test_first_values_are_those_of_their_distributions() -> None:
    layer = KasaLinear(nn.Linear(400, 300), 100, 2.0)
    layer.reset(torch.Generator().manual_seed(0))
    assert 0.0499 < layer.lora_A.abs().max() <= 400**-0.5  # U(-1/sqrt(in), 1/sqrt(in))
    assert layer.lora_A.mean().abs() < 1e-3
    assert 0.8 < layer.lora_diag.std() < 1.2
    layer.reset(torch.Generator().manual_seed(0), diag_init=DiagInit.ZEROS)
    assert 300**-0.5 * 0.99 < layer.lora_B.abs().max() <= 300**-0.5


def test_orthonormal_start_keeps_the_update_at_zero() -> None:
    layer = KasaLinear(make_linear("bias"), 4, 2.0)
    generator = torch.Generator().manual_seed(0)
    layer.reset(generator, diag_init=DiagInit.ZEROS, orthonormal=True)
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4))
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4))
    assert not layer.lora_diag.any()


@pytest.mark.parametrize("kind", LINEARS)
def test_dropout_leaves_the_base_path_alone(kind: str) -> None:
    linear = make_linear(kind)
    layer = KasaLinear(linear, 4, 2.0, dropout=0.9).train()
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x))  # B is zero, so only the base speaks
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_new_layers_are_in_the_mode_of_the_old_ones(model: LlamaForCausalLM) -> None:
    assert not model.training
    attached(model, MethodSection(r=2, dropout=0.5))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_float32_and_the_base_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    layers = attached(model, MethodSection(r=4))
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} == {torch.float32}
    assert {layer.weight.dtype for layer in layers.values()} == {dtype}
    logits = model(torch.arange(8)[None]).logits
    assert logits.dtype is dtype
    logits.float().sum().backward()
    gradients = [p.grad for layer in layers.values() for p in layer.parameters()]
    assert {g.dtype for g in gradients} == {torch.float32}


def test_bfloat16_base_is_truncated_in_float32_and_rounded_once() -> None:
    linear = nn.Linear(24, 16, bias=False).bfloat16()
    wide = linear.weight.detach().float()
    tail = compute_tail(linear.weight.detach(), 4)
    layer = KasaLinear(linear, 4, 1.0, tail=tail)
    torch.testing.assert_close(layer.weight, (wide - tail.p @ tail.q).bfloat16(), atol=0, rtol=0)


def test_untruncated_weights_and_tails_are_freed(model: LlamaForCausalLM) -> None:
    handed_out: list[weakref.ref[torch.Tensor]] = []
    source = tails_of(model)

    def tails(path: str, t: int) -> Tail:
        tail = source(path, t)
        handed_out.extend((weakref.ref(tail.p), weakref.ref(tail.q)))
        return tail

    old = [weakref.ref(p) for name, p in model.named_parameters() if name.endswith("proj.weight")]
    sizes = [p.nbytes for p in model.parameters()]
    layers = attach(model, MethodSection(r=4), tails=tails, seed=0)
    gc.collect()
    assert len(old) == 14 and len(handed_out) == 28
    assert not [ref for ref in (*old, *handed_out) if ref() is not None]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    frozen += sum(b.nbytes for layer in layers.values() for b in layer.buffers())
    assert frozen == sum(sizes), "the base takes more memory than before"


def test_run_keeps_no_tail_in_memory(model_dir: Path) -> None:
    config = RunConfig(
        data=DataSection(train=model_dir / "none.jsonl"),
        output=OutputSection(dir=model_dir / "adapter"),
        model=ModelSection(name=str(model_dir)),
    )
    task = make_task(config)
    others = [thing for thing in gc.get_objects() if type(thing) is Tail]  # of other tests
    base, config = prepare.load_base(config, task, model_dir)
    layers = prepare.attach_layers(config, task, base)
    gc.collect()
    assert len(layers) == 14
    assert sum(type(thing) is Tail for thing in gc.get_objects()) == len(others)


def test_weight_that_is_not_truncated_is_not_copied() -> None:
    linear = nn.Linear(24, 16)
    layer = KasaLinear(linear, 4, 2.0)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()


def test_frozen_weights_are_in_no_checkpoint(model: LlamaForCausalLM) -> None:
    layers = attached(model, MethodSection(r=4))
    for layer in layers.values():
        assert set(layer.state_dict()) == {"lora_A", "lora_B", "lora_diag"}


@pytest.mark.parametrize("kind", list(AdapterMethod))
@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_equal_those_of_peft(kind: AdapterMethod, use_rslora: bool) -> None:
    method = MethodSection(
        kind=kind, r=4, alpha=12.0, target_modules=PROJECTIONS, use_rslora=use_rslora
    )
    ours = make_model()
    layers = attached(ours, method)
    randomise(layers)

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


def test_conv1d_of_gpt2_equals_the_same_model_of_merged_weights() -> None:
    """PEFT refuses KaSA on these."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    served = GPT2LMHeadModel(config).eval()
    trained = GPT2LMHeadModel(config).eval()
    trained.load_state_dict(served.state_dict())
    tails = tails_of(trained)
    layers = attached(trained, MethodSection(r=3, alpha=9.0))
    randomise(layers)
    assert len(layers) == 8
    ids = torch.arange(12)[None]
    with torch.no_grad():
        untouched = served(ids).logits
        for path, layer in layers.items():
            linear = served.get_submodule(path)
            b = layer.scaling * layer.lora_B * layer.lora_diag
            merged = merged_weight(linear.weight.T, layer.lora_A, b, tails(path, 3))
            linear.weight.copy_(merged.T)
        got, want = trained(ids).logits, served(ids).logits
    assert (want - untouched).abs().max() > 0.01
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_only_the_update_is_trained(model: LlamaForCausalLM) -> None:
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


def test_layers_draw_different_values(model: LlamaForCausalLM) -> None:
    layers = attached(model, MethodSection(r=2, target_modules=("q_proj",)))
    first, second = layers.values()
    assert not torch.equal(first.lora_A, second.lora_A)


def test_settings_of_the_start_reach_the_layers(model: LlamaForCausalLM) -> None:
    method = MethodSection(r=2, diag_init=DiagInit.ZEROS, ortho_form=OrthoForm.QR)
    for layer in attached(model, method).values():
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(2))


def test_diagonal_scaled_by_the_tail_takes_the_layers_own_values(model: LlamaForCausalLM) -> None:
    source = tails_of(model)
    method = MethodSection(r=3, truncation_rank=1, diag_init=DiagInit.TAIL)
    for path, layer in attached(model, method).items():
        values = source(path, 3).singular_values.float()
        torch.testing.assert_close(layer.lora_diag.detach(), values / values.mean())
