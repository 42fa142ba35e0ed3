"""docs/commands.md names every command, and every field that `--json` prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kasa_runtime.cli import cli
from kasa_runtime.loadtest.report import Figures, Percentiles, Report
from kasa_runtime.types import (
    AdapterInfo,
    AdapterMethod,
    AdapterState,
    AdapterTier,
    AdapterVersion,
    FinishReason,
    Mode,
    ModelInfo,
    TokenChunk,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
SHOWN = dict(
    re.findall(r"^    kasa ((?:adapters |model |token )?[a-z]+)( .*)", GUIDE, re.MULTILINE)
)


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")
        else:
            yield prefix + name, command


COMMANDS = dict(commands(cli))


def test_every_command_is_shown_and_every_one_that_is_shown_exists() -> None:
    assert SHOWN.keys() == COMMANDS.keys()


def test_every_flag_that_is_shown_exists() -> None:
    for name, line in SHOWN.items():
        known = {
            flag
            for parameter in COMMANDS[name].params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", line)) <= known, name


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"serve", "chat", "completion"}))
def test_every_command_with_a_result_has_it_as_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in COMMANDS[name].params)
    last = name.rpartition(" ")[2]
    assert re.search(rf"^\| .*\b{last}\b.* \|", GUIDE, re.MULTILINE)


EXAMPLES = [
    example for command in COMMANDS.values() for example in getattr(command, "examples", ())
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_is_a_command(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kasa.toml", "prompts.txt", "run.toml", "examples/tickets/run.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("runs/support", "adapters/support"):
        (tmp_path / name).mkdir(parents=True)
    program, *arguments = shlex.split(re.split(" >> | < ", example)[0])
    assert program == "kasa"
    command: click.Command | None = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
    assert command is not None
    command.make_context("kasa", arguments)


def test_help_has_options_under_headings_and_examples() -> None:
    help = CliRunner().invoke(cli, ["serve", "--help"]).output
    for table in ("[runtime]", "[runtime.native]", "[server.tls]"):
        assert f"\n{table}:\n" in help
    assert help.index("[server.tls]:") < help.index("--tls-cert") < help.index("[server.access]:")
    assert help.endswith(f"  {COMMANDS['serve'].examples[-1]}\n")


@pytest.mark.parametrize(
    ("title", "result", "enums"),
    [
        ("adapter", AdapterInfo, (AdapterState, AdapterMethod, AdapterTier)),
        ("version", AdapterVersion, ()),
        ("model", ModelInfo, ()),
        ("generation", TokenChunk, (FinishReason, Mode)),
        ("report", Report, ()),
        ("figures", Figures, ()),
        ("percentiles", Percentiles, ()),
    ],
)
def test_the_forms_are_those_that_are_printed(title: str, result: type, enums: tuple) -> None:
    (paragraph,) = re.findall(rf"^\*\*{title}\*\*: ((?:.+\n)+)", GUIDE, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", paragraph))
    values = {member.value for enum in enums for member in enum}
    assert named == {field.name for field in fields(result)} | values
