"""Which server a command talks to, and what it shows to be let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.help import Option

if TYPE_CHECKING:
    from kasa_runtime.client import Client

SECURITY = "kasa.security"
SECTION = "Server"


def address_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `--address`, of the server to talk to, and what `connect` shows it."""
    option = click.option(
        "--address",
        cls=Option,
        section=SECTION,
        default="127.0.0.1:50051",
        show_default=True,
        envvar="KASA_ADDRESS",
        show_envvar=True,
        help="the server's gRPC",
    )
    return option(security_options(command))


def security_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options of `SecurityOptions`. Not passed on, for `security_of` finds them."""
    file = click.Path(exists=True, dir_okay=False)
    options: list[tuple[str, dict[str, Any]]] = [
        ("token", {"help": "that the server lets in; rather set the variable"}),
        ("tls", {"is_flag": True, "help": "speak TLS, with the usual authorities"}),
        ("root-certificates", {"type": file, "help": "PEM: who may have signed the server's"}),
        ("certificate", {"type": file, "help": "PEM: the client's own"}),
        ("private-key", {"type": file, "help": "PEM: of that certificate"}),
    ]
    for name, settings in reversed(options):
        command = click.option(
            f"--{name}",
            cls=Option,
            section=SECTION,
            envvar=f"KASA_{name.replace('-', '_').upper()}",
            show_envvar=True,
            expose_value=False,
            callback=_remember,
            **settings,
        )(command)
    return command


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(SECURITY, {})[parameter.name] = value


def security_of(context: click.Context) -> Any:
    """What the options of a command say, as SecurityOptions."""
    return context.meta.get(SECURITY, {})


def connect(address: str, context: click.Context | None = None) -> Client:
    """A client of the server at an address. Where none answers, people are told at once. `context`:
    of the command, by default the current."""
    from kasa_runtime.client import Client  # here: `--help` does not need gRPC

    return Client(address, max_attempts=1, **security_of(context or click.get_current_context()))
