"""`kasa token`: tokens for clients of a server."""

from __future__ import annotations

import click

from kasa_runtime import tokens
from kasa_runtime.commands.help import Group
from kasa_runtime.commands.output import json_option, print_json
from kasa_runtime.tokens import Action


@click.group("token", cls=Group)
def command() -> None:
    """Make tokens that a server lets in."""


def _patterns(action: Action, help: str) -> click.Option:
    return click.Option([f"--{action}", action], multiple=True, metavar="PATTERN", help=help)


@command.command(
    examples=(
        "kasa token new alice --generate 'team-a-*' --upload 'team-a-*' >> tokens.toml",
        "kasa token new prometheus --observe '*' >> tokens.toml",
    )
)
@click.argument("name")
@json_option
def new(name: str, as_json: bool, **patterns: tuple[str, ...]) -> None:
    """Make a token called NAME. The line for the server's token file goes to standard output, the
    token itself, once, to standard error.

    PATTERN is of names of adapters, with a shell's wildcards; _base is the base model. Each flag
    may be given several times.
    """
    token = tokens.new_token()
    line = tokens.line(name, token, {Action(key): value for key, value in patterns.items()})
    if as_json:
        print_json({"token": token, "line": line})
        return
    click.echo(line)
    click.echo(f"token of {name}, shown this once: {token}", err=True)


new.params += [
    _patterns(Action.GENERATE, "adapters that it may generate with"),
    _patterns(Action.UPLOAD, "adapters that it may publish, replace, roll back and delete"),
    _patterns(Action.ADMINISTER, "adapters that it may load, pin, unload, merge and unmerge"),
    _patterns(Action.OBSERVE, "adapters that it may see; '*': the metrics, too"),
]
