from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_gguf import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from kasa_runtime.base_model.gguf import convert
from kasa_runtime.base_model.provenance import Origin
from kasa_runtime.errors import ModelError

ORIGIN = Origin("tiny", "0" * 64)


def converted(gguf: Path, directory: Path) -> Path:
    directory.mkdir()
    convert(gguf, directory, ORIGIN)
    return directory


def test_logits_equal_those_of_the_dequantised_model(tmp_path: Path) -> None:
    model = tiny_llama()
    gguf = write_gguf(tmp_path / "tiny.gguf", model)  # also rounds model's weights as the file does
    loaded = AutoModelForCausalLM.from_pretrained(converted(gguf, tmp_path / "out"))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_weights_have_ordinary_names_are_float32_and_tied_ones_stored_once(
    gguf: Path, tmp_path: Path
) -> None:
    out = converted(gguf, tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert names == set(tiny_llama().state_dict()) - {"lm_head.weight"}
    assert dtypes == {"F32"}


def test_same_file_converts_to_same_bytes(gguf: Path, tmp_path: Path) -> None:
    first, second = converted(gguf, tmp_path / "a"), converted(gguf, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_config_generation_config_and_provenance_carry_what_the_file_says(
    gguf: Path, tmp_path: Path
) -> None:
    out = converted(gguf, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["head_dim"] == 16
    assert config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    generation = json.loads((out / "generation_config.json").read_text())
    assert [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 2, 2]
    source = json.loads((out / "kasa_source.json").read_text())
    assert source["weights_sha256"] == ORIGIN.sha256
    assert source["licence"] == "apache-2.0"
    assert set(source["converter"]) == {"kasa-runtime", "transformers", "gguf"}


def test_smollm_tokenizer_cuts_every_digit_and_adds_no_bos(gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(gguf, tmp_path / "out"))
    ids = tokenizer("Hello 12345")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*("He", "l", "l", "o", "Ġ"), *"12345"]
    assert tokenizer.decode(ids) == "Hello 12345"
    assert tokenizer.model_max_length == 128


def test_chat_template_keeps_control_tokens_whole(gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(gguf, tmp_path / "out"))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer(chat)["input_ids"].count(1) == 1
    assert tokenizer(chat)["input_ids"].count(2) == 1


def test_bos_is_added_where_the_file_wants_it(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "bos.gguf", tiny_llama(), add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(converted(gguf, tmp_path / "out"))
    assert tokenizer("o")["input_ids"][0] == 1


def test_gpt2_splitting_is_kept_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf = write_gguf(tmp_path / "gpt2.gguf", tiny_llama(), pre="gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(converted(gguf, tmp_path / "out"))
    assert tokenizer.tokenize("12") == ["12"]
    assert "text splitting" not in caplog.text


def test_unknown_splitting_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gguf = write_gguf(tmp_path / "odd.gguf", tiny_llama(), pre="never-heard-of")
    with caplog.at_level(logging.WARNING):
        converted(gguf, tmp_path / "out")
    assert "'never-heard-of'" in caplog.text


@pytest.mark.parametrize("keep", [2, 100, 5000, -4096])
def test_torn_file_is_refused(gguf: Path, tmp_path: Path, keep: int) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        converted(torn, tmp_path / "out")


def test_missing_tensor_is_refused_instead_of_invented(tmp_path: Path) -> None:
    lacking = "model.layers.1.mlp.up_proj.weight"
    gguf = write_gguf(tmp_path / "lacking.gguf", tiny_llama(), leave_out=lacking)
    with pytest.raises(ModelError, match=lacking):
        converted(gguf, tmp_path / "out")


def test_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}
    gguf = write_gguf(tmp_path / "bias.gguf", tiny_llama(), extra=bias)
    with pytest.raises(ModelError, match="would not be the same model"):
        converted(gguf, tmp_path / "out")


def test_rope_scaling_is_refused_instead_of_dropped(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    gguf = write_gguf(tmp_path / "rope.gguf", tiny_llama(), extra=factors)
    with pytest.raises(ModelError, match="rotary"):
        converted(gguf, tmp_path / "out")


def test_conversion_writes_no_progress_bars_of_its_own(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted(gguf, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
