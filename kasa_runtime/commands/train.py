"""`kasa train`: train an adapter from a run.toml."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import json_option, print_json

INTERRUPTED = 130


@click.command(
    cls=Command,
    examples=(
        "kasa train examples/tickets/run.toml",
        "kasa train run.toml --set train.epochs=2 --set method.r=16",
        "kasa train run.toml --resume",
    ),
)
@click.argument("run", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the file, such as train.epochs=2. May be repeated.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest checkpoint, if there is one, with the same settings. The adapter "
    "is the one that an unbroken run makes. Needs train.save_steps or train.best_metric.",
)
@json_option
@click.pass_context
def command(
    context: click.Context, run: Path, overrides: tuple[str, ...], resume: bool, as_json: bool
) -> None:
    """Train an adapter as RUN (a run.toml) says, and write it to its output directory.

    Sections: [model], [data], [method], [train], [eval], [output]; examples are in
    examples/*/run.toml. Curves and checkpoints go to output.work_dir; report.html there shows the
    course of the run. On several devices: torchrun --nproc-per-node N -m kasa_runtime.cli train
    RUN, or accelerate launch. With --json, standard output has the result alone.
    """
    from dataclasses import replace

    from kasa_runtime.training.reader import load

    config = load(run, overrides)  # before transformers, which takes seconds to import
    if resume:
        config = replace(config, train=replace(config.train, resume=True))
    quiet_libraries()

    from rich.console import Console

    from kasa_runtime.training.checkpoints import describe_newest
    from kasa_runtime.training.facts import METRIC_NAMES, show
    from kasa_runtime.training.processes import this_process
    from kasa_runtime.training.run import train

    quiet = not this_process().is_main_process
    console = Console(highlight=False, quiet=quiet, stderr=as_json)
    console.soft_wrap = not console.is_terminal  # a log is not folded
    try:
        facts = train(config, console)
    except KeyboardInterrupt:
        if not quiet:
            click.echo(f"kasa: interrupted; {describe_newest(config.work_dir)}", err=True)
        context.exit(INTERRUPTED)
    if as_json:
        if not quiet:
            metrics = {way: dict(values) for way, values in facts.metrics.items()}
            print_json({"directory": str(config.output.dir), "metrics": metrics})
        return
    for way, values in facts.metrics.items():
        shown = "  ".join(f"{METRIC_NAMES.get(k, k)} {show(k, v)}" for k, v in values.items())
        console.print(f"{way}: {shown}")
    console.print(f"adapter: {config.output.dir}")


def quiet_libraries() -> None:
    """The loading bar and notices of transformers say nothing about a run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
