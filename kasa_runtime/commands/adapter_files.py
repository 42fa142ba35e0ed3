"""`kasa adapters verify` and `export`: adapters on disk, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.completion import model_names
from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import json_option, print_json

if TYPE_CHECKING:
    from kasa_runtime.adapter.base import BaseModel

directory_argument = click.argument(
    "directory", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
model_option = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    shell_complete=model_names,
    help="the base model it was trained on",
)


@click.command(short_help="Check that an adapter can be applied exactly.")
@directory_argument
@model_option
@json_option
def verify(directory: Path, model: str, as_json: bool) -> None:
    """Check that DIRECTORY holds an adapter that can be applied exactly to the base model."""
    from kasa_runtime.adapter import checkpoint

    adapter = checkpoint.read(directory, _base(directory, model))
    facts = {
        "directory": str(directory),
        "method": adapter.method,
        "rank": adapter.config.r,
        "num_layers": len(adapter.modules),
        "saved_modules": sorted({name.rpartition(".")[0] for name in adapter.saved}),
        "truncation_rule": adapter.meta.truncation_rule,
        "truncation_rank": max(adapter.truncation.values(), default=0),
        "base_fingerprint": adapter.meta.base_fingerprint,
    }
    if as_json:
        print_json(facts)
    else:
        click.echo(_sentence(facts))


def _sentence(facts: dict[str, Any]) -> str:
    whole = "".join(f", {name} trained whole" for name in facts["saved_modules"])
    base = "checked" if facts["base_fingerprint"] else "not recorded, only shapes checked"
    return (
        f"{facts['directory']}: a {facts['method']} adapter of rank {facts['rank']} on "
        f"{facts['num_layers']} layers{whole}, truncation {facts['truncation_rule']} of rank "
        f"{facts['truncation_rank']}, base {base}"
    )


@click.command(
    cls=Command,
    short_help="Write an adapter as a LoRA, or a whole model, for other engines.",
    examples=(
        "kasa adapters export adapters/support support-lora --format lora",
        "kasa adapters export adapters/support support-model --format merged",
    ),
)
@directory_argument
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["lora", "merged"]), required=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="of the LoRA's tensors; a merged model keeps the base's",
)
@model_option
@json_option
def export(
    directory: Path, target: Path, *, form: str, dtype: str, model: str, as_json: bool
) -> None:
    """Write the adapter in DIRECTORY to TARGET in a form that other engines serve exactly.

    lora: a plain LoRA of rank r + t on the untouched base. merged: the whole model. A classifier's
    head stays with it in both.
    """
    import torch

    from kasa_runtime.adapter.export import export_lora, export_merged
    from kasa_runtime.adapter.tails import TailCache

    if target.exists():
        raise click.BadParameter(f"{target} exists", param_hint="TARGET")
    tails = TailCache(_base(directory, model))
    if form == "lora":
        export_lora(directory, target, tails, getattr(torch, dtype))
    else:
        export_merged(directory, target, tails)
    if as_json:
        print_json({"directory": str(target), "format": form})
    else:
        click.echo(str(target))


def _base(directory: Path, model: str) -> BaseModel:
    """The base model as what DIRECTORY was trained for sees it: a classifier has a head."""
    from kasa_runtime.adapter import checkpoint
    from kasa_runtime.adapter.base import BaseModel
    from kasa_runtime.base_model.source import resolve

    return BaseModel.for_task(resolve(model), checkpoint.task_type(directory))
