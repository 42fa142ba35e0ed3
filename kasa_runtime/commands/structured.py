"""Flags of commands that generate: the form of the text, StructuredOutput's fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kasa_runtime.commands.help import Option
from kasa_runtime.types import StructuredOutput

UNDER: dict[str, Any] = {"cls": Option, "section": "Form of the text"}


def structured_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: --json-schema, --regex, --choice and --grammar."""
    for option in reversed(
        (
            click.option(
                "--json-schema",
                **UNDER,
                metavar="FILE|JSON",
                help="the text is JSON that this schema validates",
            ),
            click.option("--regex", **UNDER, help="the whole text matches it"),
            click.option(
                "--choice",
                **UNDER,
                multiple=True,
                help="the text is one of these; give it several times",
            ),
            click.option(
                "--grammar",
                **UNDER,
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="file of a grammar in Lark's syntax, which the text follows",
            ),
        )
    ):
        command = option(command)
    return command


def structured_output_of(
    json_schema: str | None, regex: str | None, choice: tuple[str, ...], grammar: Path | None
) -> StructuredOutput | None:
    """What the flags say; None where there is none. Raises InvalidRequest where they say two
    things, and UsageError on a file that cannot be read."""
    if json_schema is None and regex is None and not choice and grammar is None:
        return None
    return StructuredOutput(
        json_schema=None if json_schema is None else _schema(json_schema),
        regex=regex,
        choice=choice,
        grammar=None if grammar is None else _read(grammar),
    )


def _schema(given: str) -> str:
    """JSON itself, which begins like that, or what a file says."""
    is_json = given.lstrip().startswith("{") or given.strip() in ("true", "false")
    return given if is_json else _read(Path(given))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"{path}: cannot be read: {error}") from error
