"""Which server a command talks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kasa_runtime.client import Client


def address_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `--address`, of the server to talk to."""
    option = click.option(
        "--address",
        default="127.0.0.1:50051",
        show_default=True,
        envvar="KASA_ADDRESS",
        show_envvar=True,
        help="the server's gRPC",
    )
    return option(command)


def connect(address: str) -> Client:
    """A client of the server at an address. Where none answers, people are told at once."""
    from kasa_runtime.client import Client  # here: `--help` does not need gRPC

    return Client(address, max_attempts=1)
