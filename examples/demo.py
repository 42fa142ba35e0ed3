"""The whole life of an adapter in a minute: start a server on a real model, answer one mixed batch,
upload an adapter over the wire, merge one into the weights and take it out again, look at the
latencies, stop.

    make demo

Every claim is checked, and the exit status is 0 only if all of them held. Any free ports are used;
the adapters of this repository are served from a copy, so nothing in it changes.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kasa_runtime.client import Client
from kasa_runtime.types import Mode, SamplingParams, TokenChunk

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(max_tokens=64)
LATENCIES = ("kasa_time_to_first_token_seconds", "kasa_e2e_request_latency_seconds")

console = Console(width=110)


@dataclass(frozen=True)
class Question:
    """A prompt for an adapter, and a pattern that its answer matches if the adapter works."""

    adapter: str
    prompt: str
    expected: str


QUESTIONS = [
    Question("", "The capital of France is", r"Paris"),
    Question(
        "e2e",
        "name[Blue Spice], eatType[coffee shop], area[city centre] =>",
        r"Blue Spice.*city centre|city centre.*Blue Spice",
    ),
    Question(
        "snips",
        "book a table for four at a brasserie in Lyon tomorrow =>",
        r"^\s*BookRestaurant\(.+\)",
    ),
    Question(
        "tickets",
        "Hello, Tasklane charged my card twice this month. The invoice says INV-31113. I need it "
        "fixed before tomorrow noon. Many thanks, Sasha =>",
        r"team=billing.*product=Tasklane.*ref=INV-31113",
    ),
]


class Failed(Exception):
    """A claim of the demo did not hold."""


def check(claim: str, holds: bool) -> None:
    console.print(f"  [{'green' if holds else 'red'}]{'ok' if holds else 'FAILED'}[/]  {claim}")
    if not holds:
        raise Failed(claim)


@contextmanager
def server(adapters_dir: Path) -> Iterator[tuple[str, str]]:
    """A server in a process of its own; yields its gRPC and HTTP addresses, stops it with
    SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "kasa_runtime.cli",
        "serve",
        "--adapters-dir",
        str(adapters_dir),
    ]
    command += ["--grpc-port", "0", "--http-port", "0", "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((text for text in process.stdout if text.startswith("listening")), "")
        found = re.search(r"grpc=(\S+) http=(\S+)", line)
        if found is None:
            raise Failed("the server starts")
        yield found[1], found[2]
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    check(f"the server stopped on SIGTERM with status {status}", status == 0)


def show(answers: dict[str, TokenChunk], title: str) -> None:
    table = Table(
        "adapter", "mode", "answer", "first token", "tokens", title=title, title_justify="left"
    )
    for name, answer in answers.items():
        assert answer.timing is not None and answer.usage is not None
        text, ttft = answer.text.strip(), f"{answer.timing.ttft_s * 1000:.0f} ms"
        tokens = str(answer.usage.completion_tokens)
        table.add_row(name or "(base)", answer.mode.value, text, ttft, tokens)
    console.print(table)


def ask_all(client: Client, questions: list[Question]) -> dict[str, TokenChunk]:
    """All questions at once, so that they share the engine's batch."""

    def ask(q: Question) -> TokenChunk:
        return client.generate(q.prompt, adapter=q.adapter, sampling=GREEDY)

    with ThreadPoolExecutor(len(questions)) as pool:
        return dict(zip((q.adapter for q in questions), pool.map(ask, questions), strict=True))


def mixed_batch(client: Client) -> dict[str, TokenChunk]:
    answers = ask_all(client, QUESTIONS)
    show(answers, "One batch: the base model and three KaSA adapters")
    for q in QUESTIONS:
        works = re.search(q.expected, answers[q.adapter].text, re.DOTALL) is not None
        check(f"{q.adapter or 'the base'} answers in its own way", works)
    return answers


def upload(client: Client, before: dict[str, TokenChunk]) -> None:
    """A fourth adapter, over the wire: the files of `snips` under another name."""
    info = client.upload(ROOT / "adapters" / "snips", name="snips-uploaded")
    console.print(f"\nUploaded {info.name}@{info.version}: {info.method.value}, rank {info.rank}")
    snips = next(q for q in QUESTIONS if q.adapter == "snips")
    answer = client.generate(snips.prompt, adapter="snips-uploaded", sampling=GREEDY)
    show({"snips-uploaded": answer}, "The uploaded adapter")
    check("it answers as the adapter that it is a copy of", answer.text == before["snips"].text)


def merge(client: Client, before: dict[str, TokenChunk]) -> None:
    client.merge_adapter("tickets")
    answers = ask_all(client, QUESTIONS)
    show(answers, "tickets is merged into the weights; the others go on in the same batch")
    check("tickets is served from the weights", answers["tickets"].mode is Mode.MERGED)
    check("it answers as before", answers["tickets"].text == before["tickets"].text)
    client.unmerge_adapter()
    base = QUESTIONS[0]
    answer = client.generate(base.prompt, sampling=GREEDY)
    check("after unmerging the base answers as before", answer.text == before[""].text)


def latencies(http: str) -> None:
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    wanted = [line for line in lines if re.match(rf"({'|'.join(LATENCIES)})_(sum|count)", line)]
    console.print("\nLatency per adapter, from /metrics:")
    for line in wanted:
        console.print(f"  {line}", highlight=False)
    names = {name for line in wanted for name in re.findall(r'adapter="([^"]*)"', line)}
    check("every adapter has its own latencies", names >= {"_base", "e2e", "snips", "tickets"})


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        adapters_dir = Path(scratch) / "adapters"
        shutil.copytree(ROOT / "adapters", adapters_dir, ignore=shutil.ignore_patterns(".kasa"))
        console.print("Starting a server on smollm2-135m (the first time fetches 90 MB) ...")
        with server(adapters_dir) as (grpc, http), Client(grpc) as client:
            model = client.get_model()
            millions = model.num_parameters / 1e6
            console.print(f"{model.name}: {millions:.0f}M parameters, {model.dtype}, on {grpc}\n")
            for name in ("e2e", "snips", "tickets"):
                client.load_adapter(name)
            before = mixed_batch(client)
            upload(client, before)
            merge(client, before)
            latencies(http)
    console.print("\nAll of it held.")


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        console.print(f"\n[red]The demo failed:[/] {failure}")
        sys.exit(1)
