"""Programs that others wrote as clients of `kasa serve`: EleutherAI's lm-eval scores the base and
an adapter through OpenAI's completions, whose log-probabilities transformers and PEFT then compute
again; guidellm loads the server.

python benchmarks/clients.py [--steps score verify load] [--model M] [--adapters DIR]
                             [--adapter NAME] [--data FILE ...] [--limit N] [--requests N]
                             [--concurrency N] [--serve=FLAG ...] [--out DIR] [--cache DIR]

The tasks: the tickets of examples/tickets, as a choice of the team and as the whole routing line;
and of every --data, a JSON array in the form of LLM-Adapters' commonsense sets, the right answer.
Nothing is fetched but two environments from the package index, at the first use: minutes,
3.3 GB with a torch for CPUs.
Prints and writes into --out: report.md, results.json, and what the programs said. A call with the
same --out goes on with what is there.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.clients import guidellm, lm_eval, program
from benchmarks.clients.report import Agreement, Report
from benchmarks.clients.server import serving
from benchmarks.clients.tasks import Task, multiple_choice, tickets
from benchmarks.peers.bench import machine
from benchmarks.peers.environments import ROOT, Environment
from kasa_runtime.base_model.source import resolve
from kasa_runtime.home import kasa_home

TICKETS = ROOT / "examples" / "tickets" / "data" / "test.jsonl"
STEPS = ("score", "verify", "load")
REQUIREMENTS = Path(__file__).parent / "clients" / "requirements"
TIMEOUT_S = 3600.0
COMMAND = "command.txt"


def main(args: argparse.Namespace) -> None:
    model_dir = resolve(args.model)
    tasks = [
        *tickets(TICKETS, args.limit),
        *(multiple_choice(file, args.limit) for file in args.data),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left
    models = {model_dir.name: None, args.adapter: args.adapters / args.adapter}
    if {"score", "load"} & set(args.steps):
        with serving(args.model, args.adapters, args.serve, args.out / "server.log") as url:
            if "score" in args.steps:
                for model in models:
                    score(url, model, model_dir, tasks, args)
                    gathered(models, args.out).write(args.out)
            if "load" in args.steps:
                for model in models:
                    load(url, model, model_dir, args)
                    gathered(models, args.out).write(args.out)
    report = gathered(models, args.out)
    if "verify" in args.steps:
        for model, adapter in models.items():
            verify(report, model, model_dir, adapter, tasks)
            report.write(args.out)
    print(report.write(args.out))


def gathered(models: Iterable[str], out: Path) -> Report:
    """What the programs left in `out`, in this call or an earlier one."""
    report = Report(machine(), pinned())
    for model in models:
        folder = out / f"lm-eval-{model}"
        if (folder / COMMAND).exists():
            report.commands.append((folder / COMMAND).read_text())
            report.scores[model] = {score.task: score for score in lm_eval.read(folder)}
    for model in models:
        folder = out / f"guidellm-{model}"
        if (folder / COMMAND).exists():
            report.commands.append((folder / COMMAND).read_text())
            report.loads.append(guidellm.read(folder, model))
    return report


def pinned() -> dict[str, str]:
    """The versions of what the environments are made of."""
    files = sorted(REQUIREMENTS.glob("*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def score(
    url: str, model: str, model_dir: Path, tasks: list[Task], args: argparse.Namespace
) -> None:
    """Have lm-eval score every task."""
    folder = args.out.absolute() / f"lm-eval-{model}"
    folder.mkdir(exist_ok=True)
    for task in tasks:
        task.write(folder)
    python = Environment("lm-eval", folder=REQUIREMENTS).python(args.cache)
    names = [task.name for task in tasks]
    command = lm_eval.command(python, url, model, model_dir, names, folder)
    program.run(command, folder, folder / "lm-eval.log", TIMEOUT_S)
    (folder / COMMAND).write_text(shown(command, python, model_dir, folder))


def load(url: str, model: str, model_dir: Path, args: argparse.Namespace) -> None:
    """Have guidellm send its requests."""
    folder = args.out.absolute() / f"guidellm-{model}"
    folder.mkdir(exist_ok=True)
    python = Environment("guidellm", folder=REQUIREMENTS).python(args.cache)
    command = guidellm.command(
        python, url, model, model_dir, folder, args.requests, args.concurrency
    )
    program.run(command, folder, folder / "guidellm.log", TIMEOUT_S)
    (folder / COMMAND).write_text(shown(command, python, model_dir, folder))


def shown(command: list[str], python: Path, model_dir: Path, folder: Path) -> str:
    """Without what is this machine's own."""
    text = shlex.join(command)
    for path in (folder, model_dir, python.parent):
        text = text.replace(str(path), path.name)
    return text


def verify(
    report: Report, model: str, model_dir: Path, adapter: Path | None, tasks: list[Task]
) -> None:
    """Compute what lm-eval was told once more."""
    from benchmarks.clients.reference import Reference

    scores, choices = report.scores.get(model, {}), [task for task in tasks if task.is_choice]
    for task in choices:
        if task.name not in scores or scores[task.name].num_rows != len(task.rows):
            rows = f"{len(task.rows)} rows of {task.name}"
            raise SystemExit(f"verify: --out has no score of {model} in {rows}; take score too")
    reference = Reference(model_dir, adapter)
    report.agreements[model] = {
        task.name: Agreement.of(
            scores[task.name], reference.score(task.rows), [row.gold for row in task.rows]
        )
        for task in choices
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="others are as --out has them")
    add("--model", default="smollm2-135m", help="as of `kasa serve`")
    add("--adapters", type=Path, default=ROOT / "adapters", help="directory of adapters")
    add("--adapter", default="tickets", help="which of them")
    add("--data", nargs="+", type=Path, default=[], metavar="FILE", help="more questions")
    add("--limit", type=int, default=100, help="rows of each task")
    add("--requests", type=int, default=64, help="of guidellm, to each model")
    add("--concurrency", type=int, default=8, help="of guidellm")
    add("--serve", action="append", default=[], metavar="FLAG", help="more of `kasa serve`")
    add(
        "--out",
        type=Path,
        default=Path(f"benchmarks/results/clients-{time.strftime('%Y-%m-%d-%H%M%S')}"),
    )
    add("--cache", type=Path, default=kasa_home() / "benchmarks", help="where environments are")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
