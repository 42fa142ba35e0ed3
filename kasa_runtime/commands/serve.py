"""`kasa serve`: its flags are the fields of RuntimeConfig and ServerConfig."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import click

from kasa_runtime.commands.completion import model_names
from kasa_runtime.commands.flags import build, options
from kasa_runtime.runtime import RuntimeConfig, begin
from server.config import ServerConfig


@click.command("serve", context_settings={"auto_envvar_prefix": "KASA", "max_content_width": 100})
@options(RuntimeConfig, ServerConfig, model={"shell_complete": model_names})
def command(**values: Any) -> None:
    """Serve one base model and its adapters over gRPC, until SIGTERM.

    Every flag can be set as an environment variable too: --grpc-port as KASA_GRPC_PORT.
    """
    runtime_config, server_config = build(RuntimeConfig, values), build(ServerConfig, values)
    logging.basicConfig(
        level=server_config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    begun = begin(runtime_config)
    from server.app import serve  # here: `kasa serve --help` does not need gRPC

    sys.exit(asyncio.run(serve(runtime_config, server_config, begun)))
