"""`kasa status`: the model of a running server, and how many adapters are where."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import click

from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import json_option, print_fields, print_json
from kasa_runtime.commands.server_address import address_option, connect


@click.command("status", cls=Command)
@json_option
@address_option
def command(address: str, as_json: bool) -> None:
    """Show which model a server runs, how, and how many adapters it has in which state."""
    with connect(address) as client:
        model, infos = asdict(client.get_model()), client.list_adapters()
    states = dict(Counter(info.state.value for info in infos))
    if as_json:
        print_json({"address": address, "model": model, "adapters": states})
        return
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    facts = {"address": address, "model": model.pop("name"), **model, "adapters": counts or "none"}
    print_fields(facts)
