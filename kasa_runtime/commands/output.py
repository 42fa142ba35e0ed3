"""What the commands print alike: tables for people; for programs, with `--json`, JSON, errors too.

docs/commands.md has the forms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from kasa_runtime.errors import reason

if TYPE_CHECKING:
    from rich.console import Console

AS_JSON = "kasa.as_json"
UNLIMITED = 10_000

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Decorator: `--json`, as the parameter `as_json`. Errors come as JSON then, too."""
    return click.option(
        "--json", "as_json", is_flag=True, callback=_remember, help="print JSON; errors too"
    )(command)


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    context.meta[AS_JSON] = value  # one for the contexts of the command and of all groups above
    return value


def print_json(result: object) -> None:
    """One JSON value on standard output."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False))


def table_console() -> Console:
    """Standard output for tables; where that is no terminal, no line is folded."""
    from rich.console import Console  # here: `--help` does not need it

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values, a line each, for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), Text(str(value)))
    table_console().print(table)


class Failure(click.ClickException):
    """An error that its message explains: one line, or JSON, on standard error; exit status 1."""

    def __init__(self, error: Exception, context: click.Context) -> None:
        super().__init__(str(error))
        self._error = error
        self._as_json = context.meta.get(AS_JSON, False)

    def show(self, file: IO[Any] | None = None) -> None:
        line = f"kasa: error: {self.message}"
        if self._as_json:
            line = json.dumps({"error": _facts(self._error)}, ensure_ascii=False)
        click.echo(line, file=file, err=True)


def _facts(error: Exception) -> dict[str, Any]:
    deadline = isinstance(error, TimeoutError)
    facts = {
        "reason": "DEADLINE_EXCEEDED" if deadline else reason(type(error)),
        "message": str(error),
        "adapter": getattr(error, "name", ""),
        "field": getattr(error, "field", ""),
        "retry_after_s": getattr(error, "retry_after_s", None),
    }
    return {key: value for key, value in facts.items() if value not in ("", None)}
