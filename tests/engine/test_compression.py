"""A base whose weights are integers: its logits, alone and with adapters, are those of transformers
with the weights that the integers stand for."""

from __future__ import annotations

import copy
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama
from torch import Tensor
from torch.nn.functional import linear, pad

from engine.architectures import SERVED
from engine.making import (
    MemoryTails,
    add_deltas,
    config,
    load_model,
    logits_of,
    prompt,
    save_model,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import merged_weight
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.factory import make_executor
from kasa_runtime.engine.native.executor import NO_SLOT, PackedBatch, SequenceSlice
from kasa_runtime.errors import ConfigError, ModelError

pytest.importorskip("openvino")
pytest.importorskip("nncf", reason="the extra `int8` is not installed")

from kasa_runtime.engine.native.openvino import compression, sensitivity, tracing
from kasa_runtime.engine.native.openvino.executor import OpenVinoExecutor
from kasa_runtime.engine.native.openvino.settings import ACTIVATION_GROUP

HAS_VNNI = "vnni" in Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else False

TOLERANCE = 2e-4  # float32 sums in another order, through three layers


def start(model_dir: Path, quantization: str, activations: str = "float32") -> OpenVinoExecutor:
    changes = {"quantization": quantization, "activations": activations}
    return OpenVinoExecutor(model_dir, config(executor="openvino", **changes))


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(
    quantization: str,
    tiny_llama: Path,
    session_home: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
) -> Any:
    """An executor whose slots 0, 1, 2 hold the adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KASA_HOME", str(session_home))
        return with_adapters(start(tiny_llama, quantization), adapters, tails)


@pytest.fixture
def rounding(
    quantization: str,
    tiny_llama: Path,
    session_home: Path,
    adapters: list[AdapterWeights],
    tails: MemoryTails,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """The same with activations in 8 bits."""
    monkeypatch.setenv("KASA_HOME", str(session_home))
    return with_adapters(start(tiny_llama, quantization, "int8"), adapters, tails)


def with_adapters(
    executor: OpenVinoExecutor, adapters: list[AdapterWeights], tails: MemoryTails
) -> OpenVinoExecutor:
    for slot, adapter in enumerate(adapters):
        executor.prepare_slots({slot: adapter}, tails)()
    return executor


@pytest.fixture(scope="module")
def rounded(loaded: Any, tiny_llama: Path) -> Any:
    """The tiny Llama in transformers, with the weights that the integers stand for."""
    model = load_model(tiny_llama)
    embedding = dict(compression.dense_weights(loaded._pristine.graph))
    with torch.no_grad():
        for name, weight in loaded.weights().items():
            model.get_submodule(name).weight.copy_(weight)
        codes = embedding["self.decoder.model.embed_tokens.weight"]
        model.model.embed_tokens.weight.copy_(torch.from_numpy(codes))
    return model


def float_layers(executor: Any) -> set[str]:
    """Those whose weights are no integers now."""
    return {*executor._graph.packed, *executor._merged_weights}


def assert_exact(executor: Any, rounded: Any, adapters: list[AdapterWeights], tails: Any) -> None:
    models = [rounded, *(add_deltas(copy.deepcopy(rounded), a, tails) for a in adapters)]
    for i, (found, model) in enumerate(zip(mixed_step(executor), models, strict=True)):
        assert float((found - logits_of(model, prompt(9))).abs().max()) < TOLERANCE, i


def mixed_step(executor: Any) -> tuple[Tensor, ...]:
    """Logits of one step: a prompt for the base, and the same one for the adapter in each slot."""
    slots = [NO_SLOT, 0, 1, 2]
    parts = [SequenceSlice(9, 0, range(3 * i, 3 * i + 3), slot) for i, slot in enumerate(slots)]
    logits = executor.run(PackedBatch.pack(prompt(9) * 4, parts, list(range(36))))
    return logits.clone().split(9)


def distance(weight: Tensor, *, levels: int, group: int) -> Tensor:
    """The distance of two neighbouring values of each weight (out, in), if `group` input features
    of an output feature share their range."""
    groups = weight.unflatten(1, (-1, group))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / levels
    return step.expand_as(groups).flatten(1)


def test_weights_are_the_nearest_of_the_values_that_integers_have(
    loaded: Any, base: BaseModel, quantization: str
) -> None:
    errors = list[Tensor]()
    for name, found in loaded.weights().items():
        want = base.weight(name)
        if name in float_layers(loaded):
            assert torch.equal(found, want)
            continue
        whole_rows = name == "lm_head" or want.shape[1] % compression.GROUP_SIZE
        if quantization == "int8" or whole_rows:
            step = distance(want, levels=255, group=want.shape[1])
        else:
            step = distance(want, levels=15, group=compression.GROUP_SIZE)
        errors.append(((found - want).abs() / step).max())
    assert all(0.4 < float(error) < 1.1 for error in errors), errors


def test_mixed_rows_have_the_logits_of_the_rounded_base_and_adapters_on_it(
    loaded: Any, rounded: Any, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    assert_exact(loaded, rounded, adapters, tails)


@pytest.mark.parametrize("slot", [0, 2])
def test_any_row_is_exact_while_an_adapter_is_merged(
    slot: int, loaded: Any, rounded: Any, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    before = loaded.weights()
    loaded.prepare_merge(slot, tails)()
    assert_exact(loaded, rounded, adapters, tails)
    merged, deltas = loaded.weights(), adapters[slot].modules
    loaded.prepare_unmerge()()
    assert_exact(loaded, rounded, adapters, tails)
    for name, weight in before.items():
        assert torch.equal(loaded.weights()[name], weight)
        if name in deltas:
            d = deltas[name]
            want = merged_weight(weight, d.a, d.b, tails.get(name, d.t))
            error = (merged[name] - want).abs().max()  # the terms are added one by one
            assert error < 1e-6 * want.abs().max()
        else:
            assert torch.equal(merged[name], weight)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_that_loses_most_stays_float32(
    layer: int, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of each output feature is so large that the others lose their last bits."""
    monkeypatch.setattr(sensitivity, "SHARE", 0.02)  # one of its kind
    model_dir = save_tiny_llama(tmp_path / "m")
    tensors = load_file(model_dir / "model.safetensors")
    worst = f"model.layers.{layer}.self_attn.v_proj"
    tensors[f"{worst}.weight"][:, 7] *= 50
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    executor = start(model_dir, "int8")
    assert float_layers(executor) == {worst}
    sizes = {name: weight.numel() for name, weight in executor.weights().items()}
    assert sizes[worst] <= sensitivity.SHARE * sum(sizes.values()) < 2 * sizes[worst]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors, other kernels")
def test_the_plugin_multiplies_by_integers_beside_the_branches(
    loaded: Any, quantization: str
) -> None:
    products = [
        node.input(1).get_source_output().get_element_type().get_type_name()
        for node in loaded._pristine.compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    integers = {"u8"} if quantization == "int8" else {"u8", "u4"}
    assert len(products) == len(loaded.weights().keys() - float_layers(loaded))
    assert set(products) == integers


def round_activations(
    model: Any, executor: Any, adapter: AdapterWeights | None, tails: MemoryTails
) -> None:
    """Make the model compute what the plugin does: products of integers and of activations in 8
    bits, in groups that share the scale of their largest; an adapter's delta is of the activations
    as they were, and so are products of float32 weights."""
    weights = executor.weights()
    for name in weights.keys() - float_layers(executor):
        delta = torch.zeros_like(weights[name])
        if adapter and name in adapter.modules:
            d = adapter.modules[name]
            delta = merged_weight(weights[name], d.a, d.b, tails.get(name, d.t)) - weights[name]

        def product(
            layer: Any, inputs: Any, _: Any, weight: Tensor = weights[name], delta: Tensor = delta
        ) -> Tensor:
            [x] = inputs
            return linear(in_groups(x), weight) + linear(x, delta)

        model.get_submodule(name).register_forward_hook(product)


def in_groups(x: Tensor) -> Tensor:
    num_features = x.shape[-1]
    groups = pad(x, (0, -num_features % ACTIVATION_GROUP)).unflatten(-1, (-1, ACTIVATION_GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(-2)[..., :num_features]


@pytest.mark.skipif(not HAS_VNNI, reason="the plugin rounds activations where VNNI is")
@pytest.mark.parametrize("merged_slot", [NO_SLOT, 0, 2])
def test_only_the_base_sees_activations_in_8_bits(
    merged_slot: int, loaded: Any, rounding: Any, rounded: Any, adapters: list[AdapterWeights],
    tails: MemoryTails,
) -> None:  # fmt: skip
    if merged_slot != NO_SLOT:
        rounding.prepare_merge(merged_slot, tails)()
    exact, found = (mixed_step(executor) for executor in (loaded, rounding))
    explained = []
    for adapter, e, f in zip((None, *adapters), exact, found, strict=True):
        model = copy.deepcopy(rounded)
        if adapter:
            add_deltas(model, adapter, tails)
        round_activations(model, rounding, adapter, tails)
        difference = f - logits_of(model, prompt(9))
        explained.append(difference.norm(dim=1) < 1e-3 * (f - e).norm(dim=1))
        assert float((f - e).abs().max()) > 10 * TOLERANCE
    # Not all: what lies between two of the 8-bit values goes up here and down there, and the tokens
    # from there on see it.
    assert torch.cat(explained).float().mean() > 0.7
    rounding.prepare_unmerge()()


@pytest.mark.parametrize("model", ["gpt2", "mixtral", "gemma3"])
def test_other_architectures_pass_their_own_check(model: str, served_model: Any) -> None:
    """Transposed weights, experts, a tied embedding: starting compares with transformers."""
    executor = start(served_model(model), "int8")
    assert (executor.name, executor.dtype) == ("openvino", "int8")


def test_a_graph_with_other_weights_than_it_should_have_is_refused(
    tiny_llama: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_round_weights", lambda *_: None)
    with pytest.raises(ModelError, match="other logits"):
        start(tiny_llama, "int8")


def test_each_quantization_is_kept_beside_the_float32_graph_it_was_made_of(
    tmp_path: Path,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model_dir = save_model(SERVED["llama"], tmp_path / "m")

    def kept() -> list[str]:
        return sorted(p.name for p in (own_home / "openvino").iterdir() if p.is_dir())

    start(model_dir, "int4")
    floating, int4 = kept()
    assert int4.startswith(f"{floating}-int4-")
    assert caplog.text.count("for OpenVINO, once") == 1
    start(model_dir, "int8")
    assert kept() == [floating, int4, int4.replace("int4", "int8")]
    assert caplog.text.count("for OpenVINO, once") == 1

    monkeypatch.setitem(sys.modules, "nncf", None)  # as if it were not installed
    caplog.clear()
    start(model_dir, "int8")
    assert "once" not in caplog.text


def test_compressing_without_nncf_says_what_to_install(
    tiny_llama: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ConfigError, match=r"pip install 'kasa-runtime\[int8\]'"):
        start(tiny_llama, "int8")


def test_auto_takes_openvino_and_torch_is_refused(tiny_llama: Path) -> None:
    assert make_executor(tiny_llama, config(executor="auto", quantization="int8")).dtype == "int8"
    with pytest.raises(ConfigError, match="computes in float32"):
        make_executor(tiny_llama, config(executor="auto", quantization="int8", dtype="bfloat16"))
    with pytest.raises(ConfigError, match="--executor openvino"):
        EngineConfig(executor="torch", quantization="int8")
    with pytest.raises(ConfigError, match="quantization must be one of"):
        EngineConfig(quantization="int5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="activations must be one of"):
        EngineConfig(activations="int4")  # type: ignore[arg-type]
