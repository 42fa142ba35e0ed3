"""`kasa`: the console script. Sub-commands live in `kasa_runtime/commands/` and are imported when
called, so that `kasa --help` does not pay for torch.

Exit status: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime import __version__
from kasa_runtime.commands.output import Failure
from kasa_runtime.errors import KasaError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "serve": "Serve one base model and its adapters over gRPC and HTTP.",
    "status": "Show what a running server serves.",
    "generate": "Send a prompt to a running server.",
    "chat": "Talk with a running server, turn by turn.",
    "adapters": "List, upload, merge and otherwise manage adapters of a running server.",
    "token": "Make tokens that a server lets in.",
    "bench": "Load a running server and report latencies, throughput and errors.",
    "train": "Train an adapter from a run.toml.",
    "experiment": "Compare ways to train over several seeds.",
    "model": "Fetch, inspect and prepare base models.",
    "completion": "Print the script that completes commands in a shell.",
}


class LazyGroup(click.Group):
    """A group whose commands are `kasa_runtime.commands.<name>:command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"kasa_runtime.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]  # click itself looks for near names among commands that are imported
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = " or ".join(get_close_matches(name, COMMANDS))
            raise click.UsageError(
                f"no command {name!r}" + (f"; did you mean {near}?" if near else ""), ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        names = (name for name in COMMANDS if name.startswith(incomplete))
        commands = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KasaError, TimeoutError) as error:
            raise Failure(error, ctx) from error


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, package_name="kasa-runtime")
def cli() -> None:
    """Train, serve and operate KaSA adapters: one base model, many adapters, one batch."""


def main(argv: list[str] | None = None) -> None:
    """Run `kasa`; ends the process with its exit status."""
    cli.main(args=argv, prog_name="kasa")


if __name__ == "__main__":
    main()
