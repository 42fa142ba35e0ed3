"""`kasa bench`: load on a running server, and what came of it."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import print_fields, table_console
from kasa_runtime.commands.sampling import sampling_of, sampling_options
from kasa_runtime.commands.server_address import address_option, security_of
from kasa_runtime.errors import KasaError
from kasa_runtime.types import ChatMessage, ModelInfo, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kasa_runtime.client import AsyncClient, SecurityOptions
    from kasa_runtime.loadtest.load import Load, Request
    from kasa_runtime.loadtest.openai import OpenAiClient, ServedModel
    from kasa_runtime.loadtest.report import Report
    from kasa_runtime.types import TokenChunk

DEFAULT_DURATION_S = 30.0
SHOW_EVERY_S = 0.25
INTERRUPTED = 130
path = click.Path(dir_okay=False, path_type=Path)
positive = click.FloatRange(min=0, min_open=True)


@dataclass(frozen=True)
class Plan:
    """What to send, and how."""

    rate: float | None
    concurrency: int | None
    duration_s: float | None
    requests: int | None
    adapters: str
    zipf: float
    prompts: Path | None
    chat: bool
    warmup: int
    load_seed: int
    timeout_s: float
    sampling: SamplingParams


@click.command(
    "bench",
    cls=Command,
    examples=(
        "kasa bench --rate 4 --duration 60 --adapters all --zipf 1.1 --html load.html",
        "kasa bench --concurrency 8 --requests 200 --prompts prompts.txt --json load.json",
        "kasa bench --concurrency 8 --http http://127.0.0.1:8080",
    ),
)
@click.option("--rate", type=positive, help="open loop: requests per second, arriving by chance")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    help="closed loop: clients, each with one request at a time",
)
@click.option(
    "--duration",
    "duration_s",
    type=positive,
    help="seconds in which requests are sent; 30 by default, or with --requests no limit",
)
@click.option("--requests", type=click.IntRange(min=1), help="send so many at most")
@click.option(
    "--adapters",
    default="-",
    show_default=True,
    help="all, or names with commas between them; - is the base model",
)
@click.option(
    "--zipf",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="the k-th adapter is asked for in proportion to 1 / k^ZIPF; 0: all alike",
)
@click.option(
    "--prompts",
    type=path,
    help="one per line, or JSON lines with `prompt`; a few of our own by default",
)
@click.option("--chat", is_flag=True, help="send prompts as users' messages")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="requests before, which do not count",
)
@click.option(
    "--load-seed",
    type=int,
    default=0,
    show_default=True,
    help="of arrivals and of which adapter is asked",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=positive,
    default=120.0,
    show_default=True,
    help="of a request, in seconds; one that takes longer has failed",
)
@click.option("--json", "json_file", type=path, help="write the report there, as JSON")
@click.option("--html", "html_file", type=path, help="write it there as a page with plots")
@click.option("--http", "url", help="load the OpenAI-compatible API there instead of gRPC")
@sampling_options
@address_option
def command(
    *,
    address: str,
    url: str | None,
    json_file: Path | None,
    html_file: Path | None,
    **values: Any,
) -> None:
    """Load a running server, and report latencies, throughput and errors as clients see them.

    Give --rate for an open loop: requests arrive by a Poisson process whether or not the server
    keeps up, and their times count from when they were due. Give --concurrency for a closed loop:
    each client waits for its answer before it asks again. The exit status is 1 when requests
    failed.
    """
    plan = _plan(values)
    run = Run(url or address, plan, security_of(click.get_current_context()), http=bool(url))
    interrupted = False
    try:
        asyncio.run(run.run())
    except KeyboardInterrupt:
        interrupted = True
    report = run.report(interrupted=interrupted)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    if html_file is not None:
        from kasa_runtime.loadtest.page import make_page

        assert run.load is not None
        html_file.write_text(make_page(report, run.load.samples), encoding="utf-8")
    _print(report)
    if report.all.num_failed:
        errors = ", ".join(f"{count} {error}" for error, count in report.errors.items())
        raise KasaError(f"{report.all.num_failed} requests failed: {errors}")
    if interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _plan(values: dict[str, Any]) -> Plan:
    if (values["rate"] is None) == (values["concurrency"] is None):
        raise click.UsageError("give one of --rate (open loop) and --concurrency (closed loop)")
    if values["duration_s"] is None and values["requests"] is None:
        values["duration_s"] = DEFAULT_DURATION_S
    own = {name: values.pop(name) for name in Plan.__dataclass_fields__ if name in values}
    return Plan(**own, sampling=sampling_of(values))


class Run:
    """One load: `load` and `model` are there once it runs, also when it is interrupted."""

    def __init__(self, address: str, plan: Plan, security: SecurityOptions, *, http: bool) -> None:
        """`http`: the address is the URL of an OpenAI-compatible API."""
        self._address = address
        self._plan = plan
        self._security = security
        self._http = http
        self.load: Load | None = None
        self.model: ModelInfo | ServedModel | None = None

    async def run(self) -> None:
        """Raises KasaError where it cannot begin; failed requests are samples."""
        from kasa_runtime.loadtest.load import Load

        plan = self._plan
        async with self._client() as client:
            self.model = await client.get_model()
            requests = await self._requests(client)
            ask = partial(self._ask, client)
            if plan.warmup:
                warming = islice(requests, plan.warmup)
                await Load(ask).closed_loop(warming, plan.concurrency or 1, math.inf)
            self.load = Load(ask)
            async with _progress(self.load, plan):
                await self._send(self.load, islice(requests, plan.requests))

    def _client(self) -> AsyncClient | OpenAiClient:
        if self._http:
            from kasa_runtime.loadtest.openai import OpenAiClient

            return OpenAiClient(self._address, self._security)
        from kasa_runtime.client import AsyncClient

        return AsyncClient(self._address, max_attempts=1, **self._security)

    async def _requests(self, client: AsyncClient | OpenAiClient) -> Iterator[Request]:
        from kasa_runtime.loadtest import workload

        plan = self._plan
        prompts = workload.PROMPTS if plan.prompts is None else workload.read_prompts(plan.prompts)
        adapters = workload.choose_adapters(plan.adapters, await client.list_adapters())
        generator = Random(plan.load_seed)
        return workload.make_requests(prompts, adapters, plan.zipf, generator)

    def _ask(
        self, client: AsyncClient | OpenAiClient, request: Request
    ) -> AsyncIterator[TokenChunk]:
        chat = [ChatMessage("user", request.prompt)] if self._plan.chat else None
        return client.stream(
            None if chat else request.prompt,
            messages=chat,
            adapter=request.adapter,
            sampling=self._plan.sampling,
            timeout_s=self._plan.timeout_s,
        )

    async def _send(self, load: Load, requests: Iterator[Request]) -> None:
        plan = self._plan
        duration_s = math.inf if plan.duration_s is None else plan.duration_s
        if plan.rate is not None:
            arrivals = Random(plan.load_seed + 1)
            await load.open_loop(requests, plan.rate, duration_s, arrivals)
        else:
            assert plan.concurrency is not None
            await load.closed_loop(requests, plan.concurrency, duration_s)

    def report(self, *, interrupted: bool) -> Report:
        """Raises KasaError if no request came to an end."""
        from kasa_runtime.loadtest.report import Report

        if self.load is None or self.model is None or not self.load.samples:
            raise KasaError("no request came to an end; load the server for longer")
        settings = asdict(self._plan) | {"address": self._address}
        settings["prompts"] = str(self._plan.prompts or "")
        return Report.of(self.load, settings, self.model, interrupted=interrupted)


@asynccontextmanager
async def _progress(load: Load, plan: Plan) -> AsyncIterator[None]:
    """Show how far a load is, on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    hidden = not console.is_terminal
    with Progress(*columns, console=console, refresh_per_second=4, disable=hidden) as bar:
        task = bar.add_task("", total=1.0)

        async def show() -> None:
            while True:
                bar.update(task, completed=_share_done(load, plan), description=_state(load))
                await asyncio.sleep(SHOW_EVERY_S)

        showing = asyncio.create_task(show(), name="progress")
        try:
            yield
        finally:
            showing.cancel()
            with suppress(asyncio.CancelledError):
                await showing


def _share_done(load: Load, plan: Plan) -> float:
    of_requests = len(load.samples) / plan.requests if plan.requests else 0.0
    of_time = load.now_s / plan.duration_s if plan.duration_s else 0.0
    return min(1.0, max(of_time, of_requests))


def _state(load: Load) -> str:
    from statistics import median

    ttfts_s = [sample.ttft_s for sample in load.samples if sample.ttft_s is not None]
    ttft = f", TTFT p50 {median(ttfts_s) * 1e3:.0f} ms" if ttfts_s else ""
    return (
        f"{len(load.samples)} done, {load.in_flight} in flight, {load.num_failed} failed, "
        f"{load.num_tokens / load.now_s:.0f} tokens/s{ttft}"
    )


def _print(report: Report) -> None:
    from rich.table import Table

    from kasa_runtime.loadtest.report import table

    header, rows = table(report)
    shown = Table(header[0], box=None, pad_edge=False)
    for column in header[1:]:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    print_fields(report.summary)
    click.echo("\ntimes in ms")
    table_console().print(shown)
