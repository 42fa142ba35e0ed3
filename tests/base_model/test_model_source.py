from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from kasa_runtime.base_model.source import resolve
from kasa_runtime.errors import ModelError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2, 2)}, directory / "model.safetensors")
    return directory


def test_directory_of_safetensors_is_returned_as_is(model_dir: Path) -> None:
    assert resolve(str(model_dir)) == model_dir


def test_pickle_only_directory_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickle \(pytorch_model\.bin\)"):
        resolve(str(model_dir))


def test_directory_with_only_a_gguf_points_at_the_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"give the file: .*m\.gguf"):
        resolve(str(model_dir))


def test_directory_without_config_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(model_dir))


def test_directory_that_lacks_a_shard_is_refused(model_dir: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        resolve(str(model_dir))


def test_gguf_is_converted_once(gguf: Path, home: Path) -> None:
    first = resolve(str(gguf))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(gguf)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert first.parent == home / "models"
    assert first.name.startswith("gguf-")


def test_failed_conversion_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        resolve(str(tmp_path / "torn.gguf"))
    assert all(path.suffix == ".lock" for path in (home / "models").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_that_cannot_be_written_names_kasa_home(gguf: Path, home: Path) -> None:
    home.mkdir(mode=0o500)
    with pytest.raises(ModelError, match="KASA_HOME"):
        resolve(str(gguf))


def test_home_that_is_a_file_is_a_model_error(gguf: Path, home: Path) -> None:
    home.write_text("")
    with pytest.raises(ModelError, match="home"):
        resolve(str(gguf))


def test_other_kind_of_file_is_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"not a \.safetensors file"):
        resolve(str(model_dir / "model.safetensors"))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean smollm2-135m\?"):
        resolve("smollm-135m")


def test_missing_gguf_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(ModelError, match=r"no model 'some/where\.gguf'"):
        resolve("some/where.gguf")


def test_local_file_for_anything_but_a_catalog_name_is_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="stands in for one of smollm2-135m"):
        resolve(str(model_dir), from_file=model_dir / "config.json")


def test_hub_id_takes_safetensors_and_never_pickle(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("org/name") == model_dir
    assert asked["name"] == "org/name"
    assert not {"*.bin", "*.pt", "*"} & set(asked["allow_patterns"])  # type: ignore[call-overload]


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE.*smollm2-135m"):
        resolve("org/name")


@pytest.mark.real_model
def test_smollm2_tokenizes_as_the_original(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("Hello 12345")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Hello", "Ġ", *"12345"]
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(prompt)["input_ids"][0] == 1
    assert tokenizer(prompt)["input_ids"].count(2) == 2


@pytest.mark.real_model
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == 2  # ended by itself, at the end of the message
