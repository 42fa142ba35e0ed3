"""`kasa train`: train an adapter from a run.toml."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the file, such as train.epochs=2. May be repeated.",
)
def command(run: Path, overrides: tuple[str, ...]) -> None:
    """Train an adapter as RUN (a run.toml) says, and write it to its output directory.

    Sections: [model], [data], [method], [train], [eval], [output]; examples are in
    examples/*/run.toml.
    """
    from kasa_runtime.training.reader import load

    config = load(run, overrides)  # before transformers, which takes seconds to import
    _quiet_libraries()
    from rich.console import Console

    from kasa_runtime.training.card import METRIC_NAMES
    from kasa_runtime.training.run import train

    console = Console(highlight=False)
    facts = train(config, console)
    for way, values in facts.metrics.items():
        shown = "  ".join(f"{METRIC_NAMES.get(k, k)} {v:.1f}" for k, v in values.items())
        console.print(f"{way}: {shown}")
    console.print(f"adapter: {config.output.dir}")


def _quiet_libraries() -> None:
    """The loading bar and notices of transformers say nothing about a run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
