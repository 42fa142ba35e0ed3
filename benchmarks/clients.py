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
    base = model_dir.name
    tasks = [
        *tickets(TICKETS, args.limit),
        *(multiple_choice(file, args.limit) for file in args.data),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left
    report = Report(machine(), pinned())
    models = {base: None, args.adapter: args.adapters / args.adapter}
    recall(report, models, args)
    if {"score", "load"} & set(args.steps):
        with serving(args.model, args.adapters, args.serve, args.out / "server.log") as url:
            run(report, url, models, model_dir, tasks, args)
    if "verify" in args.steps:
        for model, adapter in models.items():
            verify(report, model, model_dir, adapter, tasks)
            report.write(args.out)
    print(report.write(args.out))


def recall(report: Report, models: Iterable[str], args: argparse.Namespace) -> None:
    """What earlier calls left in --out, of steps that are not done again."""
    for model in models:
        scored, loaded = args.out / f"lm-eval-{model}", args.out / f"guidellm-{model}"
        if "score" not in args.steps and (scored / COMMAND).exists():
            report.commands.append((scored / COMMAND).read_text())
            report.scores[model] = {found.task: found for found in lm_eval.read(scored)}
        if "load" not in args.steps and (loaded / COMMAND).exists():
            report.commands.append((loaded / COMMAND).read_text())
            report.loads.append(guidellm.read(loaded, model, args.concurrency))
    missing = [model for model in models if model not in report.scores]
    if "verify" in args.steps and "score" not in args.steps and missing:
        raise SystemExit(f"--steps verify: {args.out} has no scores of {missing[0]}")


def run(
    report: Report,
    url: str,
    models: Iterable[str],
    model_dir: Path,
    tasks: list[Task],
    args: argparse.Namespace,
) -> None:
    """The steps that the server is wanted for."""
    if "score" in args.steps:
        for model in models:
            score(report, url, model, model_dir, tasks, args)
            report.write(args.out)
    if "load" in args.steps:
        for model in models:
            load(report, url, model, model_dir, args)
            report.write(args.out)


def pinned() -> dict[str, str]:
    """The versions of what the environments are made of."""
    lines = [line for file in sorted(REQUIREMENTS.glob("*.txt")) for line in file.open()]
    return {name: version.strip() for name, _, version in (x.partition("==") for x in lines)}


def score(
    report: Report,
    url: str,
    model: str,
    model_dir: Path,
    tasks: list[Task],
    args: argparse.Namespace,
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
    note(report, command, python, model_dir, folder)
    report.scores[model] = {found.task: found for found in lm_eval.read(folder)}


def load(report: Report, url: str, model: str, model_dir: Path, args: argparse.Namespace) -> None:
    """Have guidellm send its requests."""
    folder = args.out.absolute() / f"guidellm-{model}"
    folder.mkdir(exist_ok=True)
    python = Environment("guidellm", folder=REQUIREMENTS).python(args.cache)
    command = guidellm.command(
        python, url, model, model_dir, folder, args.requests, args.concurrency
    )
    program.run(command, folder, folder / "guidellm.log", TIMEOUT_S)
    note(report, command, python, model_dir, folder)
    report.loads.append(guidellm.read(folder, model, args.concurrency))


def note(report: Report, command: list[str], python: Path, model_dir: Path, folder: Path) -> None:
    """A command that was run, without what is this machine's own."""
    text = shlex.join(command)
    for path in (folder, model_dir, python.parent):
        text = text.replace(str(path), path.name)
    (folder / COMMAND).write_text(text)
    report.commands.append(text)


def verify(
    report: Report, model: str, model_dir: Path, adapter: Path | None, tasks: list[Task]
) -> None:
    """Compute what lm-eval was told once more."""
    from benchmarks.clients.reference import Reference

    reference = Reference(model_dir, adapter)
    report.agreements[model] = {
        task.name: Agreement.of(
            report.scores[model][task.name],
            reference.score(task.rows),
            [row.gold for row in task.rows],
        )
        for task in tasks
        if task.is_choice
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
