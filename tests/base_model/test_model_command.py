from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from kasa_runtime.cli import cli


def kasa(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["model", *arguments], catch_exceptions=False)


def test_fetch_prints_the_directory_as_last_line_of_stdout(gguf: Path, home: Path) -> None:
    result = kasa("fetch", str(gguf))
    directory = Path(result.stdout.splitlines()[-1])
    assert (directory / "model.safetensors").is_file()
    assert directory.parent == (home / "models").resolve()
    assert "Converting" in result.stderr
    assert json.loads(kasa("fetch", str(gguf), "--json").stdout) == {"directory": str(directory)}


def test_info_describes_model_and_layers(gguf: Path) -> None:
    facts = json.loads(kasa("info", str(gguf), "--json").stdout)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["dtype"], facts["context_length"], facts["num_layers"]) == ("float32", 128, 2)
    assert facts["has_chat_template"] is True
    assert len(facts["fingerprint"]) == 64
    rows = {row["name"]: row for row in facts["modules"]}
    assert rows["k_proj"]["count"] == 2
    assert (rows["k_proj"]["out_features"], rows["k_proj"]["in_features"]) == (32, 64)
    assert rows["k_proj"]["num_cached_tails"] == 0


def test_info_without_json_names_the_fingerprint(gguf: Path) -> None:
    lines = kasa("info", str(gguf)).stdout.splitlines()
    assert any(line.startswith("fingerprint") for line in lines)
    assert any(line.split()[:4] == ["q_proj", "2", "of", "64"] for line in lines)


def test_prepare_caches_tails_of_the_chosen_layers(gguf: Path) -> None:
    result = kasa("prepare", str(gguf), "--tail-rank", "4", "--target-modules", "q_proj,k_proj")
    assert result.stdout.splitlines()[-1] == "4 tails of rank 4 are cached"
    facts = json.loads(kasa("info", str(gguf), "--json").stdout)
    cached = {row["name"]: row["num_cached_tails"] for row in facts["modules"]}
    assert cached["q_proj"] == cached["k_proj"] == 2
    assert cached["o_proj"] == 0


def test_prepare_without_choice_takes_the_blocks_and_not_the_head(gguf: Path) -> None:
    result = kasa("prepare", str(gguf), "--tail-rank", "4")
    assert result.stdout.splitlines()[-1] == "14 tails of rank 4 are cached"
    again = kasa("prepare", str(gguf), "--tail-rank", "4", "--json")
    assert json.loads(again.stdout) == {"num_modules": 14, "tail_rank": 4}


def test_prepare_refuses_an_unknown_layer(gguf: Path) -> None:
    result = kasa("prepare", str(gguf), "--tail-rank", "4", "--target-modules", "query")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("kasa: error: no linear layer is called 'query'; this model has: ")
    assert "q_proj" in error


def test_prepare_refuses_a_rank_that_a_layer_cannot_have(gguf: Path) -> None:
    result = kasa("prepare", str(gguf), "--tail-rank", "32", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    error = json.loads(result.stderr.splitlines()[-1])["error"]
    assert error["reason"] == "MODEL_ERROR"
    assert "rank below 32, asked for 32" in error["message"]
