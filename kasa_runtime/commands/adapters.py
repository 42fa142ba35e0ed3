"""`kasa adapters`: what a running server does with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from kasa_runtime.commands.adapter_files import export, verify
from kasa_runtime.commands.completion import adapter_names
from kasa_runtime.commands.help import Group
from kasa_runtime.commands.output import (
    json_option,
    print_fields,
    print_json,
    table_console,
)
from kasa_runtime.commands.server_address import address_option, connect
from kasa_runtime.types import AdapterInfo, AdapterState, AdapterVersion

COLORS = {
    AdapterState.RESIDENT: "green",
    AdapterState.MERGED: "cyan",
    AdapterState.LOADING: "yellow",
    AdapterState.QUARANTINED: "red",
}
VERSION_DIGITS = 12

name_argument = click.argument("name", shell_complete=adapter_names)


@click.group("adapters", cls=Group)
def command() -> None:
    """List, upload, merge and otherwise manage adapters of a running server."""


command.add_command(verify)
command.add_command(export)


@command.command("list")
@json_option
@address_option
def list_(address: str, as_json: bool) -> None:
    """List all adapters."""
    with connect(address) as client:
        infos = client.list_adapters()
    if as_json:
        print_json([asdict(info) for info in infos])
    else:
        _print_table(infos)


@command.command()
@name_argument
@json_option
@address_option
def show(name: str, address: str, as_json: bool) -> None:
    """Show one adapter: NAME or NAME@VERSION."""
    with connect(address) as client:
        _print(client.get_adapter(name), as_json)


@command.command(short_help="List an adapter's versions that are kept.")
@name_argument
@json_option
@address_option
def versions(name: str, address: str, as_json: bool) -> None:
    """List the versions of an adapter that NAME@VERSION and rollback can reach, latest first."""
    with connect(address) as client:
        found = client.list_adapter_versions(name)
    if as_json:
        print_json([asdict(version) for version in found])
    else:
        _print_versions(found)


@command.command(
    examples=(
        "kasa adapters upload runs/support",
        'kasa adapters upload runs/support --name support --expected-version ""',
    )
)
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
    console = Console(stderr=True)
    hidden = as_json or not console.is_terminal
    with connect(address) as client, Progress(*columns, console=console, disable=hidden) as bar:
        task = bar.add_task("uploading")
        info = client.upload(
            directory,
            name=name,
            expected_version=expected_version,
            progress=lambda sent, size: bar.update(task, completed=sent, total=size),
        )
    _print(info, as_json)


@command.command()
@name_argument
@json_option
@address_option
def delete(name: str, address: str, as_json: bool) -> None:
    """Delete an adapter with all its versions."""
    with connect(address) as client:
        client.delete_adapter(name)
    if as_json:
        print_json({"deleted": name})
    else:
        click.echo(f"deleted {name}")


@command.command()
@name_argument
@click.option("--version", default="", help="default: the one before the current")
@json_option
@address_option
def rollback(name: str, version: str, address: str, as_json: bool) -> None:
    """Make an older version of an adapter current."""
    with connect(address) as client:
        _print(client.rollback_adapter(name, version), as_json)


def _named(method: str, help: str) -> None:
    """A sub-command that takes a name: `merge` calls `Client.merge_adapter`."""

    @command.command(method, help=help)
    @name_argument
    @json_option
    @address_option
    def named(name: str, address: str, as_json: bool) -> None:
        with connect(address) as client:
            call: Callable[[str], AdapterInfo] = getattr(client, f"{method}_adapter")
            _print(call(name), as_json)


@command.command()
@name_argument
@click.option("--pin", is_flag=True, help="keep it there, and the versions that follow it")
@json_option
@address_option
def load(name: str, pin: bool, address: str, as_json: bool) -> None:
    """Bring an adapter into the engine ahead of its first request."""
    with connect(address) as client:
        _print(client.load_adapter(name, pin=pin), as_json)


_named("unload", "Take an adapter out of the engine.")
_named("merge", "Put an adapter inside the base weights.")


@command.command()
@json_option
@address_option
def unmerge(address: str, as_json: bool) -> None:
    """Put the pristine base weights back."""
    with connect(address) as client:
        client.unmerge_adapter()
    if as_json:
        print_json({"merged": ""})
    else:
        click.echo("the base weights are back")


def _print(info: AdapterInfo, as_json: bool) -> None:
    if as_json:
        print_json(asdict(info))
    else:
        print_fields(_fields(info))


def _fields(info: AdapterInfo) -> dict[str, str]:
    fields: dict[str, Any] = asdict(info) | {
        "target_modules": ", ".join(info.target_modules),
        "size": _size(info.size_bytes),
        "created": _time(info.create_time),
    }
    hidden = ("size_bytes", "create_time")
    shown = {name: value for name, value in fields.items() if name not in hidden}
    return {name: str(value) for name, value in shown.items() if value not in ("", None)}


def _print_table(infos: list[AdapterInfo]) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "version", "state", "tier", "method", box=None, pad_edge=False)
    for column in ("rank", "truncation", "size", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in infos:
        table.add_row(
            info.name,
            info.version[:VERSION_DIGITS],
            Text(info.state, COLORS.get(info.state, "default")),
            f"{info.tier}, pinned" if info.pinned else info.tier,
            info.method,
            str(info.rank or ""),
            f"{info.truncation_rank} {info.truncation_rule}" if info.truncation_rank else "",
            _size(info.size_bytes),
            str(info.in_flight),
        )
    console = table_console()
    console.print(table)
    for info in infos:
        if info.reason:
            console.print(f"{info.name}: {escape(info.reason)}", style="red")


def _print_versions(found: list[AdapterVersion]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "version", "created", "state", "tier", box=None, pad_edge=False)
    for column in ("size", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for version in found:
        table.add_row(
            "current" if version.current else "",
            version.version[:VERSION_DIGITS],
            _time(version.create_time),
            Text(version.state, COLORS.get(version.state, "default")),
            version.tier,
            _size(version.size_bytes),
            str(version.in_flight),
        )
    table_console().print(table)


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else ""
