"""`kasa experiment`: the paper's questions, asked on your data."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import click

from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import json_option, print_fields, print_json
from kasa_runtime.commands.train import quiet_libraries


@click.command(
    cls=Command,
    examples=(
        "kasa experiment",
        "kasa experiment versus-lora --run examples/tickets/run.toml --seeds 5",
        "kasa experiment versus-lora --run examples/tickets/run.toml --report-only",
    ),
)
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A run.toml with model, data and settings; its [data] eval is measured after each epoch. "
    "May be repeated.",
)
@click.option("--seeds", default=3, show_default=True, help="Runs of each cell: seeds 0, 1, ...")
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Cells whose label TEXT matches; * is any text."
)
@click.option(
    "--out",
    default=Path("runs/experiments"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results.jsonl, the tables and the plots go; what is in there is not run again.",
)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="As in train.")
@click.option("--report-only", is_flag=True, help="Run nothing; write tables and plots again.")
@json_option
def command(
    names: tuple[str, ...],
    runs: tuple[Path, ...],
    seeds: int,
    only: tuple[str, ...],
    out: Path,
    overrides: tuple[str, ...],
    report_only: bool,
    as_json: bool,
) -> None:
    """Train the cells of experiments over several seeds and compare them. Without a NAME, list
    them.

    An interrupted command goes on where it was when it is given again.
    """
    from kasa_runtime.training.experiments.grid import EXPERIMENTS

    if not names:
        questions = {experiment.name: experiment.question for experiment in EXPERIMENTS.values()}
        if as_json:
            print_json(questions)
        else:
            print_fields(questions)
        return
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise click.BadParameter(f"{unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")
    if not runs:
        raise click.UsageError("want at least one --run run.toml; examples/*/run.toml are some")
    quiet_libraries()
    warnings.filterwarnings("ignore", module="peft")
    from rich.console import Console

    from kasa_runtime.training.experiments.report import write_reports
    from kasa_runtime.training.experiments.runner import RESULTS_FILE, Results, run_cells
    from kasa_runtime.training.reader import load

    console = Console(highlight=False, stderr=as_json)
    results = Results(out / RESULTS_FILE)
    configs = [load(run, overrides) for run in runs]
    experiments = [EXPERIMENTS[name] for name in names]
    for config in configs:
        cells = [cell for e in experiments if e.fits(config) for cell in e.cells(config)]
        cells = [c for c in cells if not only or any(fnmatchcase(c.label, text) for text in only)]
        if not report_only:
            run_cells(config, cells, range(seeds), results, console)
    paths = [str(path) for path in write_reports(out, experiments, configs, results)]
    if as_json:
        print_json({"results": str(out / RESULTS_FILE), "reports": paths})
    else:
        click.echo("\n".join(paths))
