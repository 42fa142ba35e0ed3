"""run.toml: what is read, what is refused, and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.reader import load
from kasa_runtime.types import AdapterMethod

MINIMAL = '[data]\ntrain = "train.jsonl"\n[output]\ndir = "out/mine"\n'


def read(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.data.train == tmp_path / "train.jsonl"
    assert config.output.dir == tmp_path / "out" / "mine"
    assert config.name == "mine"
    assert config.work_dir == tmp_path / "runs" / "mine"
    assert config.method.kind is AdapterMethod.KASA
    assert config.method.t == config.method.r == 8


def test_overrides_take_toml_values_bare_words_and_paths_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read(
        tmp_path,
        MINIMAL,
        "method.kind=lora",
        "method.truncation_rank=0",
        "train.epochs=2",
        'method.target_modules=["q_proj", "v_proj"]',
        "data.train=mine.jsonl",
    )
    assert config.method.kind is AdapterMethod.LORA
    assert config.method.t == 0
    assert config.train.epochs == 2.0
    assert config.method.target_modules == ("q_proj", "v_proj")
    assert config.data.train == tmp_path / "elsewhere" / "mine.jsonl"
    assert config.output.dir == tmp_path / "out" / "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tain]\n", r"unknown section \[tain\]; did you mean 'train'\?"),
        ("train = 3\n", r"train must be a section \[train\], got 3"),
        ("[train]\nepoch = 1\n", r"\[train\] unknown key 'epoch'; did you mean 'epochs'"),
        ("[train]\nepochs = 'x'\n", r"\[train\] epochs must be a number, got 'x'"),
        ("[train]\nbatch_size = 1.5\n", r"batch_size must be an integer, got 1.5"),
        ("[train]\nbatch_size = 0\n", r"batch_size must be at least 1, got 0"),
        ("[train]\nlearning_rate = inf\n", r"learning_rate must be more than 0, got inf"),
        ("[train]\nresume = 1\n", r"resume must be true or false, got 1"),
        ("[method]\ndropout = 1.0\n", r"dropout must be less than 1, got 1.0"),
        ("[method]\nkind = 'dora'\n", r"kind must be one of kasa, lora, got 'dora'"),
        ("[method]\ntarget_modules = [1]\n", r"target_modules must be a list of strings"),
        ("[eval]\nmetrics = [\n", "not valid TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_what_was_wanted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text if text.startswith("train =") else MINIMAL + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=1", "want section.key=value"),
        ("train.epochs", "want section.key=value"),
        ("trian.epochs=1", "did you mean 'train'"),
        ("train.epoch=1", "did you mean 'epochs'"),
    ],
)
def test_mistakes_in_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, MINIMAL, override)


def test_required_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[output\] needs the key 'dir'"):
        read(tmp_path, '[data]\ntrain = "x"\n')


def test_system_message_needs_chat(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="system needs chat = true"):
        read(tmp_path, MINIMAL, "data.system=Be brief.")


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["e2e", "snips", "tickets"])
def test_shipped_examples_are_valid(name: str) -> None:
    examples = Path(__file__).parents[2] / "examples"
    config = load(examples / name / "run.toml")
    assert config.name == name
    assert config.data.train.is_relative_to(examples / name)
