"""`kasa adapters`: what a running server does with its adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.adapter_files import export, verify
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


command.add_command(verify)
command.add_command(export)


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

    columns = (*Progress.get_default_columns()[:3], DownloadColumn(), TransferSpeedColumn())
    with _client(address) as client, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("uploading")
        info = client.upload(
            directory,
            name=name,
            expected_version=expected_version,
            progress=lambda sent, size: bar.update(task, completed=sent, total=size),
        )
    _print(info, as_json)


@command.command()
@click.argument("name")
@address_option
def delete(name: str, address: str) -> None:
    """Delete an adapter with all its versions."""
    with _client(address) as client:
        client.delete_adapter(name)
    click.echo(f"deleted {name}")


@command.command()
@click.argument("name")
@click.option("--version", default="", help="default: the one before the current")
@json_option
@address_option
def rollback(name: str, version: str, address: str, as_json: bool) -> None:
    """Make an older version of an adapter current."""
    with _client(address) as client:
        _print(client.rollback_adapter(name, version), as_json)


def _named(method: str, help: str) -> None:
    """A sub-command that takes a name: `merge` calls `Client.merge_adapter`."""

    @command.command(method, help=help)
    @click.argument("name")
    @json_option
    @address_option
    def named(name: str, address: str, as_json: bool) -> None:
        with _client(address) as client:
            call: Callable[[str], AdapterInfo] = getattr(client, f"{method}_adapter")
            _print(call(name), as_json)


@command.command()
@click.argument("name")
@click.option("--pin", is_flag=True, help="keep it there, and the versions that follow it")
@json_option
@address_option
def load(name: str, pin: bool, address: str, as_json: bool) -> None:
    """Bring an adapter into the engine ahead of its first request."""
    with _client(address) as client:
        _print(client.load_adapter(name, pin=pin), as_json)


_named("unload", "Take an adapter out of the engine.")
_named("merge", "Put an adapter inside the base weights.")


@command.command()
@address_option
def unmerge(address: str) -> None:
    """Put the pristine base weights back."""
    with _client(address) as client:
        client.unmerge_adapter()
    click.echo("the base weights are back")


def _client(address: str) -> Client:
    from kasa_runtime.client import Client  # here: `--help` does not need gRPC

    return Client(address)


def _print(info: AdapterInfo, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        click.echo(json.dumps(asdict(info), indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in _fields(info).items():
        table.add_row(name, value)
    Console().print(table)


def _fields(info: AdapterInfo) -> dict[str, str]:
    fields: dict[str, Any] = asdict(info) | {
        "target_modules": ", ".join(info.target_modules),
        "size_bytes": _size(info.size_bytes),
        "create_time": _time(info.create_time),
    }
    return {name: str(value) for name, value in fields.items() if value not in ("", None)}


def _print_table(infos: list[AdapterInfo]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "version", "state", "tier", "method", box=None)
    for column in ("rank", "truncation", "size", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in infos:
        color = COLORS.get(info.state, "default")
        table.add_row(
            info.name,
            info.version[:VERSION_DIGITS],
            f"[{color}]{info.state}[/]",
            f"{info.tier}, pinned" if info.pinned else info.tier,
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
