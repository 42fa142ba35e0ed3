"""What is particular to the OpenVINO executor; what it shares with torch is tested beside it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_llama

from engine.architectures import REFUSED, SERVED
from engine.making import (
    MemoryTails,
    config,
    load_adapted,
    load_model,
    logits_of,
    make_deltas,
    prompt,
    require_openvino,
    save_model,
)
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import Tail
from kasa_runtime.adapter.lora import AdapterWeights, ModuleDelta
from kasa_runtime.engine.factory import make_executor
from kasa_runtime.engine.native.executor import NO_SLOT, PackedBatch, SequenceSlice
from kasa_runtime.errors import ConfigError, ModelError

pytest.importorskip("openvino")

from kasa_runtime.engine.native import huge_pages
from kasa_runtime.engine.native.openvino import attention
from kasa_runtime.engine.native.openvino import executor as executor_module
from kasa_runtime.engine.native.openvino.executor import OpenVinoExecutor

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _can_be_had() -> None:
    require_openvino()


def rows(executor: OpenVinoExecutor, length: int, slots: list[int]) -> list[torch.Tensor]:
    """Logits of the same prompt with each of these adapters, in one step."""
    width = -(-length // executor.block_size)
    parts = [
        SequenceSlice(length, 0, range(i * width, (i + 1) * width), slot)
        for i, slot in enumerate(slots)
    ]
    wanted = list(range(length * len(slots)))
    logits = executor.run(PackedBatch.pack(prompt(length) * len(slots), parts, wanted))
    return list(logits.clone().split(length))


def largest(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).abs().max())


# --- the converted model --------------------------------------------------------------------------


def test_a_converted_model_is_used_again_and_an_unreadable_one_made_anew(
    tmp_path: Path, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir = save_tiny_llama(tmp_path / "m", num_hidden_layers=1)
    caplog.set_level(logging.INFO)
    first = rows(OpenVinoExecutor(model_dir, config()), 9, [NO_SLOT])
    [made] = [path for path in (own_home / "openvino").iterdir() if path.is_dir()]
    assert caplog.text.count("for OpenVINO, once") == 1

    caplog.clear()
    second = rows(OpenVinoExecutor(model_dir, config()), 9, [NO_SLOT])
    assert torch.equal(first[0], second[0])
    assert "once" not in caplog.text

    for name in ("model.json", "model.xml", "model.bin", "probe.safetensors"):
        caplog.clear()
        (made / name).unlink()
        (made / name).write_bytes(b"torn")
        third = rows(OpenVinoExecutor(model_dir, config()), 9, [NO_SLOT])
        assert torch.equal(first[0], third[0])
        assert "converting this model again" in caplog.text


def test_other_settings_of_the_model_are_another_conversion(tmp_path: Path) -> None:
    model_dir = save_model(SERVED["llama"], tmp_path / "m")
    before = rows(OpenVinoExecutor(model_dir, config()), 9, [NO_SLOT])[0]
    path = model_dir / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    after = rows(OpenVinoExecutor(model_dir, config()), 9, [NO_SLOT])[0]
    assert (
        largest(after, logits_of(load_model(model_dir), prompt(9))) < 1e-4 < largest(after, before)
    )


@pytest.mark.parametrize("why", ["state in some layers", "no attention", "positions of its own"])
def test_a_model_that_would_come_out_wrong_is_refused(why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        OpenVinoExecutor(save_model(REFUSED[why], tmp_path), config())


# --- which executor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "taken", "why"),
    [
        ("llama", {}, "openvino", "float32 on the CPU"),
        ("llama", {"dtype": "bfloat16"}, "torch", "bfloat16"),
        ("gemma2", {}, "torch", "soft-capping"),
    ],
)
def test_auto_takes_openvino_where_it_can(
    model: str,
    changes: dict[str, str],
    taken: str,
    why: str,
    served_model: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    executor = make_executor(served_model(model), config(executor="auto", **changes))
    assert executor.name == taken
    assert f"executor {taken}: " in caplog.text and why in caplog.text


def test_auto_takes_torch_where_nothing_compiles(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert make_executor(tiny_llama, config(executor="auto")).name == "torch"
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ModelError, match="apt install g\\+\\+"):
        make_executor(tiny_llama, config(executor="openvino"))


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_what_it_cannot_do_is_refused(changes: dict[str, str], tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="use --executor torch"):
        make_executor(tiny_llama, config(executor="openvino", **changes))


def test_nothing_is_reported_to_the_makers_of_openvino() -> None:
    code = (
        "import kasa_runtime.engine.native.openvino.tracing, nncf\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "openvino.tools.ovc.telemetry_stub"


# --- adapters -------------------------------------------------------------------------------------


def test_tails_that_differ_between_layers_and_adapters(
    tiny_llama: Path, base: BaseModel, tails: MemoryTails
) -> None:
    """Shared by some, of another rank for others, only in some layers, or of two ranks in one
    adapter."""
    alike = [make_deltas(base, f"a{t}@1", LAYERS, r=4, t=t, seed=t) for t in (3, 7)]
    fewer = make_deltas(base, "few@1", ("q_proj", "down_proj"), r=2, t=5, seed=9, only="layers.1")
    mixed = make_deltas(base, "mixed@1", LAYERS, r=3, seed=11).modules
    uneven = AdapterWeights(
        "uneven@1",
        {n: ModuleDelta(d.a, d.b, i % 3 * 2) for i, (n, d) in enumerate(mixed.items())},
    )
    adapters = [*alike, fewer, uneven]
    executor = OpenVinoExecutor(tiny_llama, config())
    for slot, adapter in enumerate(adapters):
        executor.prepare_slots({slot: adapter}, tails)()
    executor.prepare_slots({0: None}, tails)()
    executor.prepare_slots({0: adapters[0]}, tails)()
    want = [logits_of(load_adapted(tiny_llama, a, tails), prompt(11)) for a in adapters]
    for slot, found in enumerate(rows(executor, 11, [0, 1, 2, 3])):
        assert largest(found, want[slot]) < 2e-4, adapters[slot].key
    executor.prepare_merge(3, tails)()
    for slot, found in enumerate(rows(executor, 11, [0, 1, 2, 3])):
        assert largest(found, want[slot]) < 2e-4, adapters[slot].key


def test_a_load_that_fails_leaves_nothing_behind(
    tiny_llama: Path, base: BaseModel, tails: MemoryTails
) -> None:
    """Neither in its slot, nor in what the graph is believed to hold."""

    class Failing:
        def get(self, module: str, t: int) -> Tail:
            if module.endswith("layers.1.mlp.up_proj"):
                raise OSError("the disk is gone")
            return tails.get(module, t)

    executor = OpenVinoExecutor(tiny_llama, config())
    broken = make_deltas(base, "a@1", (*LAYERS, "lm_head"), r=4, t=4, seed=1)
    with pytest.raises(OSError, match="gone"):
        executor.prepare_slots({0: broken}, Failing())
    other = make_deltas(base, "b@1", ("q_proj", "lm_head"), r=2, seed=2)
    executor.prepare_slots({0: other}, tails)()
    want = logits_of(load_adapted(tiny_llama, other, tails), prompt(9))
    assert largest(rows(executor, 9, [0])[0], want) < 2e-4


def test_an_adapted_output_embedding_leaves_the_tied_input_alone(tmp_path: Path) -> None:
    shape = SERVED["llama"].to_dict() | {"tie_word_embeddings": True}
    model_dir = save_model(type(SERVED["llama"])(**shape), tmp_path / "tied")
    base = BaseModel(model_dir)
    tails = MemoryTails(base)
    adapter = make_deltas(base, "head@1", ("lm_head", "v_proj"), r=4, seed=5)
    executor = OpenVinoExecutor(model_dir, config())
    executor.prepare_slots({0: adapter}, tails)()
    plain = logits_of(load_model(model_dir), prompt(9))
    head = adapter.modules["lm_head"]
    model = load_adapted(
        model_dir,
        AdapterWeights("v@1", {n: d for n, d in adapter.modules.items() if n != "lm_head"}),
        tails,
    )
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([prompt(9)]), use_cache=False)[0][0]
        adapted = model.lm_head(hidden) + hidden @ head.a.T @ head.b.T
    without = PackedBatch.pack(prompt(4), [SequenceSlice(4, 0, [0], 0)], [])
    assert executor.run(without).shape == (0, 128), "a chunk of a prompt"
    for change in (None, executor.prepare_merge(0, tails), executor.prepare_unmerge()):
        if change is not None:
            change()
        found = rows(executor, 9, [NO_SLOT, 0])
        assert largest(found[0], plain) < 2e-4 and largest(found[1], adapted) < 2e-4


@pytest.mark.parametrize("name", SERVED)
def test_adapters_on_every_layer_of_every_architecture(name: str, served_model: Any) -> None:
    """The plugin must not move the branches to where rows have another order."""
    model_dir = served_model(name)
    try:
        executor = OpenVinoExecutor(model_dir, config())
    except ModelError as error:
        pytest.skip(str(error))
    base = BaseModel(model_dir)
    tails = MemoryTails(base)
    paths = [path for path in executor.weights() if path != "lm_head"]
    layers = {path.rpartition(".")[2] for path in paths}
    made = make_deltas(base, "all@1", sorted(layers), r=3, t=2, seed=4, scale=0.1).modules
    adapter = AdapterWeights("all@1", {path: made[path] for path in paths})
    executor.prepare_slots({0: adapter}, tails)()
    parts = [SequenceSlice(5, 0, [0], NO_SLOT), SequenceSlice(9, 0, [1], 0)]
    found = executor.run(PackedBatch.pack(prompt(5) + prompt(9), parts, [4, 9, 13])).clone()
    plain = logits_of(load_model(model_dir), prompt(5))
    adapted = logits_of(load_adapted(model_dir, adapter, tails), prompt(9))
    assert largest(adapted, logits_of(load_model(model_dir), prompt(9))) > 0.05
    want = torch.cat([plain[4:], adapted[[4, 8]]])
    assert largest(found, want) < 2e-4 * max(1.0, float(want.std()))


def test_signals_arrive_after_an_executor_went_on_another_thread(tiny_llama: Path) -> None:
    program = f"""
import os, signal, threading
from pathlib import Path
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.openvino.executor import OpenVinoExecutor

signal.signal(signal.SIGTERM, lambda *_: print("arrived", flush=True))
held = [OpenVinoExecutor(Path({str(tiny_llama)!r}), EngineConfig(kv_cache_gib=0.01))]
unload = threading.Thread(target=held.clear)
unload.start()
unload.join()
os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "arrived\n"), ended.stderr


def test_the_cache_begins_zeroed_and_keeps_what_steps_write_while_it_is_made_present(
    tiny_llama: Path,
) -> None:
    executor = OpenVinoExecutor(tiny_llama, config())
    caches, memory = attention.allocate(executor._pristine.compiled, num_blocks=4096)
    for number, tensor in enumerate(caches.values(), 1):
        assert not tensor.data.any()
        tensor.data[...] = number
    huge_pages.populate(memory)
    for number, tensor in enumerate(caches.values(), 1):
        assert (tensor.data == number).all()
        assert tensor.data.ctypes.data % 64 == 0
    executor.close()


def test_that_prompts_may_be_split_is_found_out_once(tiny_llama: Path, own_home, monkeypatch):
    checked = []
    monkeypatch.setattr(executor_module, "require_split_prompts", lambda *_: checked.append(1))
    for _ in range(2):
        OpenVinoExecutor(tiny_llama, config()).close()
    assert len(checked) == 1
