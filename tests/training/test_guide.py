"""docs/training.md names every key of a run.toml, every value of a choice, and its true default."""

from __future__ import annotations

import dataclasses
import re
import typing
from enum import StrEnum
from pathlib import Path

import pytest

from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.experiments.grid import EXPERIMENTS

GUIDE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
PROSE = re.sub(r"(?ms)^```.*?^```$", "", GUIDE)
WORDS = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`]+)`", PROSE))))
SECTIONS = {
    item.name: typing.get_type_hints(RunConfig)[item.name]
    for item in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(typing.get_type_hints(RunConfig)[item.name])
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_and_every_choice_is_named(section: str) -> None:
    for key, hint in typing.get_type_hints(SECTIONS[section]).items():
        assert key in WORDS, f"[{section}] {key}"
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            missing = [member.value for member in hint if member.value not in WORDS]
            assert not missing, f"[{section}] {key}: {missing}"


def test_defaults_are_those_of_the_code() -> None:
    fields: dict[str, list[object]] = {}
    for cls in SECTIONS.values():
        for item in dataclasses.fields(cls):
            fields.setdefault(item.name, []).append(item.default)
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", GUIDE, re.MULTILINE)
    checked = 0
    for keys, defaults in rows:
        for key, text in zip(re.findall(r"\w+", keys), defaults.split(", "), strict=False):
            number = re.fullmatch(r"[\d.e-]+", text.strip())
            if number and all(isinstance(default, int | float) for default in fields[key]):
                assert float(text) in fields[key], key
                checked += 1
    assert checked >= 15


def test_the_experiments_of_the_example_exist() -> None:
    command = re.search(r"kasa experiment ([\w -]+?) --run", GUIDE)
    assert command is not None
    assert set(command[1].split()) <= EXPERIMENTS.keys()
