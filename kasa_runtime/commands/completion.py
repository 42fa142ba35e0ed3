"""`kasa completion`, and what shells complete beside commands and flags.

Completing must be quick and quiet: a server that does not answer at once has no names.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem, get_completion_class

from kasa_runtime.base_model.catalog import CATALOG
from kasa_runtime.commands.server_address import connect
from kasa_runtime.errors import KasaError

TIMEOUT_S = 0.5
VARIABLE = "_KASA_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that completes `kasa` in SHELL: commands, flags, names of adapters and
    models.

    \b
    bash, in ~/.bashrc:              eval "$(kasa completion bash)"
    zsh, in ~/.zshrc after compinit: eval "$(kasa completion zsh)"
    fish:    kasa completion fish > ~/.config/fish/completions/kasa.fish

    Names of adapters are those of the server at --address or KASA_ADDRESS.
    """
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    root = context.find_root().command
    click.echo(completion_class(root, {}, "kasa", VARIABLE).source())


def adapter_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Adapters of the server that the command would talk to, with their states."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it logs would land on the command line
    try:
        with connect(context.params["address"], context) as client:
            infos = client.list_adapters(timeout_s=TIMEOUT_S)
    except (KasaError, TimeoutError):
        return []
    states = {info.name: info.state for info in infos if info.name.startswith(incomplete)}
    return [CompletionItem(name, help=state) for name, state in states.items()]


def model_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the catalog, else paths."""
    known = [CompletionItem(name) for name in CATALOG if name.startswith(incomplete)]
    return known or [CompletionItem(incomplete, type="file")]
