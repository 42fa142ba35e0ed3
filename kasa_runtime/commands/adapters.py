"""`kasa adapters`: what a running server does with its adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.generate import address_option
from kasa_runtime.types import AdapterInfo, AdapterState

if TYPE_CHECKING:
    from kasa_runtime.client import Client

COLORS = {
    AdapterState.RESIDENT: "green",
    AdapterState.MERGED: "cyan",
    AdapterState.LOADING: "yellow",
    AdapterState.QUARANTINED: "red",
}
VERSION_DIGITS = 12

json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


@click.group("adapters")
def command() -> None:
    """List, upload, merge and otherwise manage adapters of a running server."""


@command.command("list")
@json_option
@address_option
def list_(address: str, as_json: bool) -> None:
    """List all adapters."""
    with _client(address) as client:
        infos = client.list_adapters()
    if as_json:
        click.echo(json.dumps([asdict(info) for info in infos], indent=2))
    else:
        _print_table(infos)


@command.command()
@click.argument("name")
@json_option
@address_option
def show(name: str, address: str, as_json: bool) -> None:
    """Show one adapter: NAME or NAME@VERSION."""
    with _client(address) as client:
        _print(client.get_adapter(name), as_json)


@command.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="default: the directory's")
@click.option("--expected-version", help='only onto this version; "": only if the name is new')
@json_option
@address_option
def upload(
    directory: Path, name: str | None, expected_version: str | None, address: str, as_json: bool
) -> None:
    """Upload the adapter in DIRECTORY, and make it current."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    table = Table("name", "version", "state", "method", box=None)
    for column in ("rank", "truncation", "size", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in infos:
        color = COLORS.get(info.state, "default")
        table.add_row(
            info.name,
            info.version[:VERSION_DIGITS],
            f"[{color}]{info.state}[/]",
            info.method,
            str(info.rank or ""),
            f"{info.truncation_rank} {info.truncation_rule}" if info.truncation_rank else "",
            _size(info.size_bytes),
            str(info.in_flight),
        )
    console = Console()
    console.print(table)
    for info in infos:
        if info.reason:
            console.print(f"{info.name}: {escape(info.reason)}", style="red")


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else ""
