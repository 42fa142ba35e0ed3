"""What is begun before torch is imported, and who gets it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.making import config, require_openvino
from kasa_runtime.engine import factory
from kasa_runtime.engine.factory import begin, make_executor
from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home

pytest.importorskip("openvino")


@pytest.fixture(scope="module", autouse=True)
def _can_be_had() -> None:
    require_openvino()


@pytest.fixture
def converted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(factory, "_may_have_gpu", lambda: False)
    make_executor(tiny_llama, config(executor="openvino")).close()
    return tiny_llama


@pytest.mark.parametrize("executor", ["auto", "openvino"])
def test_a_converted_model_is_begun_and_taken(converted: Path, executor: str, monkeypatch) -> None:
    settings = config(executor=executor)
    begun = begin(converted, settings)
    assert begun is not None
    from kasa_runtime.engine.native.openvino import executor as module

    monkeypatch.setattr(module, "AdaptedGraph", lambda *_: pytest.fail("built again"))
    made = make_executor(converted, settings, begun)
    assert made.name == "openvino"
    made.close()


@pytest.mark.parametrize(
    "changes",
    [{"executor": "torch"}, {"device": "cuda"}, {"dtype": "bfloat16"}, {"quantization": "int4"}],
    ids=str,
)
def test_what_will_not_be_wanted_or_is_not_converted_is_not_begun(
    converted: Path, changes: dict[str, str], monkeypatch
) -> None:
    from kasa_runtime.engine.native.openvino import compression

    monkeypatch.setattr(compression, "VERSION", 0)  # whatever other tests have converted
    assert begin(converted, config(**({"executor": "auto"} | changes))) is None


def test_nothing_is_begun_where_there_may_be_a_gpu(converted: Path, monkeypatch) -> None:
    monkeypatch.setattr(factory, "_may_have_gpu", lambda: True)
    assert begin(converted, config(executor="auto", device="auto")) is None
    assert begin(converted, config(executor="auto", device="cpu")) is not None


def test_nothing_is_begun_of_a_model_that_is_new(tiny_llama: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KASA_HOME", str(tmp_path))
    assert begin(tiny_llama, config(executor="auto")) is None
    assert not (kasa_home() / "openvino").exists()


def test_its_failure_is_the_takers(converted: Path, monkeypatch) -> None:
    from kasa_runtime.engine.native.openvino import graph

    def refuse(*_: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(graph.LowRank, "add", refuse)
    for executor in ("auto", "openvino"):
        begun = begin(converted, config(executor=executor))
        if executor == "openvino":
            with pytest.raises(ModelError, match="no such operation"):
                make_executor(converted, config(executor=executor), begun)
        else:
            assert make_executor(converted, config(executor=executor), begun).name == "torch"


def test_a_damaged_conversion_is_made_again(converted: Path, tmp_path, monkeypatch) -> None:
    home = shutil.copytree(kasa_home(), tmp_path / "home", symlinks=True)
    monkeypatch.setenv("KASA_HOME", str(home))
    for file in (home / "openvino").glob("*/model.xml"):
        file.write_text("<torn")
    settings = config(executor="openvino")
    made = make_executor(converted, settings, begin(converted, settings))
    assert made.name == "openvino"
    made.close()
