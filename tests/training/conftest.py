"""Tiny models in memory and on disk, and a writer of data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .making import (
    WriteRows,
    make_encoder,
    make_encoder_tokenizer,
    make_model,
    make_tokenizer,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model on disk; tails and fingerprints go to a directory of the test."""
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    directory = tmp_path / "tiny"
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def encoder_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny encoder on disk, without a head."""
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    directory = tmp_path / "encoder"
    make_encoder().save_pretrained(directory)
    make_encoder_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows (dicts, or texts as they are) to a JSONL file."""

    def write(name: str, rows: list[Any]) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
