"""`kasa serve`: its flags are the fields of ServeConfig."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from kasa_runtime.commands.completion import model_names
from kasa_runtime.commands.config_file import check_environment, config_option, show
from kasa_runtime.commands.flags import build, options
from kasa_runtime.commands.help import Command
from kasa_runtime.runtime import begin
from server import logs
from server.config import ServeConfig


@click.command(
    "serve",
    cls=Command,
    context_settings={"auto_envvar_prefix": "KASA"},
    examples=(
        "kasa serve --pin support",
        "kasa serve --model ./my-model --adapters-dir /srv/adapters --max-slots 32",
        "kasa serve --config kasa.toml --print-config",
        "kasa serve --host 0.0.0.0 --tls-cert a.pem --tls-key a.key --tokens-file tokens.toml",
    ),
)
@config_option(ServeConfig)
@click.option(
    "--print-config", is_flag=True, help="print all settings, and where from, as TOML; serve none"
)
@options(ServeConfig, model={"shell_complete": model_names})
@click.pass_context
def command(context: click.Context, /, print_config: bool, **values: Any) -> None:
    """Serve one base model and its adapters over gRPC and HTTP, until SIGTERM.

    Every flag can be set as an environment variable too, --grpc-port as KASA_GRPC_PORT, or in the
    TOML file of --config, in the table that is its heading here.
    """
    check_environment(ServeConfig)
    config = build(ServeConfig, values)
    if print_config:
        click.echo(show(config, context))
        return
    logs.configure(config.server.log_level, config.server.log_format)
    begun = begin(config.runtime)
    from server.app import serve  # here: `kasa serve --help` does not need gRPC

    sys.exit(asyncio.run(serve(config.runtime, config.server, begun)))
