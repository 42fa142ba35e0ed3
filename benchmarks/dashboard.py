"""The dashboard of deploy/grafana, drawn from a run: a server under load, scraped by Prometheus.

python benchmarks/dashboard.py [--model M] [--seconds S] [--clients N] [--out PNG]

Needs `prometheus` in PATH or beside python (`make prometheus`). The load is streams for the base
model, the adapters of this repository and some with random weights, more than there are slots;
meanwhile an adapter is merged and unmerged, one is quarantined, one cannot be loaded, and uploads
are rejected. What is drawn are the answers to the dashboard's own queries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml
from kasa.v1 import generation_pb2, generation_pb2_grpc

from kasa_runtime.client import AsyncClient
from kasa_runtime.errors import KasaError

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "kasa-runtime.json"
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RATE_INTERVAL_S = 10
PROMPT = "the quick brown fox jumps over the lazy dog, again " * 3
BESIDE_PYTHON = os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent)))


# --- the dashboard --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """One of a panel's. `legend` has labels in double braces."""

    panel: str
    expr: str
    legend: str

    def name(self, labels: dict[str, str]) -> str:
        """What the legend says of one series."""
        if not self.legend:
            return " ".join(labels.get(name, "") for name in ("adapter", "state"))
        return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), self.legend)


def panels() -> list[dict[str, Any]]:
    """Those that show something, in their order."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(panel: dict[str, Any]) -> list[Query]:
    """A panel's, with the values that Grafana would put in for "All" and short intervals."""
    values = {"$__rate_interval": f"{RATE_INTERVAL_S}s", "$instance": ".*", "$adapter": ".*"}
    found = []
    for target in panel["targets"]:
        expr = target["expr"]
        for variable, value in values.items():
            expr = expr.replace(variable, value)
        found.append(Query(panel["title"], expr, target["legendFormat"]))
    return found


# --- Prometheus and the server --------------------------------------------------------------------


def executable(name: str) -> str | None:
    """Of `prometheus` or `promtool`, where there is one."""
    return shutil.which(name, path=BESIDE_PYTHON)


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def served(
    model: Path | str, adapters_dir: Path, *flags: str, home: Path | None = None
) -> Iterator[tuple[str, str]]:
    """`kasa serve` in a process of its own. The addresses of gRPC and of HTTP."""
    places = ["--model", str(model), "--adapters-dir", str(adapters_dir)]
    ports = ["--grpc-port", "0", "--http-port", "0"]
    command = [sys.executable, "-m", "server", *places, *ports, *flags]
    environment = os.environ | ({"KASA_HOME": str(home)} if home else {})
    with running(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"listening grpc=(\S+) http=(\S+)", line):
                yield match[1], match[2]
                return
        raise RuntimeError("the server has not started; its log says why")


class Prometheus:
    """A running one's API."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=f"http://{address}", timeout=60.0)

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise ValueError(f"{parameters}: {answer['error']}")
        return answer["data"]

    def value(self, expr: str) -> float:
        """Of an expression with one series, now."""
        (series,) = self.get("query", query=expr)["result"]
        return float(series["value"][1])

    def over(self, expr: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """Series with `metric` (labels) and `values` (pairs of Unix seconds and value)."""
        found = self.get("query_range", query=expr, start=start_s, end=end_s, step=1)["result"]
        for series in found:
            series["values"] = [(t, float(v)) for t, v in series["values"]]
        return list(found)


@contextmanager
def scraping(target: str, directory: Path) -> Iterator[Prometheus]:
    """Prometheus, with the configuration of deploy/ but for the intervals, in `directory`."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = executable("prometheus")
    if command is None:
        raise FileNotFoundError("no prometheus in PATH or beside python; run `make prometheus`")
    flags = (
        f"--config.file={path}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    )
    with running([command, *flags]):
        prometheus = Prometheus(address)
        try:
            while not prometheus.ready():
                time.sleep(0.1)
            yield prometheus
        finally:
            prometheus.close()


# --- the load -------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What clients saw, in seconds, of the streams that ended well. `traces`: their trace ids."""

    ttft: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    traces: set[str] = field(default_factory=set)


@dataclass
class Load:
    """`names` are asked for at random, "" for the base model, the first ones most. It takes
    `seconds`, or longer until `num_streams` have ended well."""

    address: str
    names: list[str]
    seconds: float
    num_streams: int
    num_clients: int = 6
    max_tokens: int = 24
    measured: Measured = field(default_factory=Measured)

    async def run(self, scratch: Path, too_large: str) -> Measured:
        """What was measured. `too_large` is an adapter that cannot be loaded."""
        async with (
            grpc.aio.insecure_channel(self.address) as channel,
            AsyncClient(self.address) as client,
        ):
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            end_s = time.monotonic() + self.seconds
            clients = [
                self._client(stub, random.Random(index), end_s) for index in range(self.num_clients)
            ]
            operator = asyncio.create_task(self._operator(client, scratch, too_large))
            await asyncio.gather(*clients)
            operator.cancel()
            with suppress(asyncio.CancelledError):
                await operator
        return self.measured

    async def _client(self, stub: Any, draw: random.Random, end_s: float) -> None:
        weights = [1 / (1 + rank) for rank in range(len(self.names))]
        while time.monotonic() < end_s or len(self.measured.e2e) < self.num_streams:
            (name,) = draw.choices(self.names, weights)
            num_tokens = draw.randint(2, self.max_tokens)
            with suppress(grpc.RpcError):  # refused, and counted by the server
                await self._stream(stub, name, num_tokens, f"{draw.getrandbits(128):032x}")
            await asyncio.sleep(draw.uniform(0, 0.05))

    async def _stream(self, stub: Any, name: str, num_tokens: int, trace: str) -> None:
        sampling = {"max_tokens": num_tokens, "ignore_eos": True}
        request = generation_pb2.GenerateRequest(adapter=name, prompt=PROMPT, sampling=sampling)
        metadata = (("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
        start_s = last_s = time.monotonic()
        ttft, gaps = math.nan, []
        async for message in stub.GenerateStream(request, metadata=metadata):
            now_s, count = time.monotonic(), len(message.token_ids)
            if count and math.isnan(ttft):
                ttft = now_s - start_s
            elif count:
                gaps += [(now_s - last_s) / count] * count
            if count:
                last_s = now_s
        self.measured.ttft.append(ttft)
        self.measured.inter_token += gaps
        self.measured.e2e.append(time.monotonic() - start_s)
        self.measured.traces.add(trace)

    async def _operator(self, client: AsyncClient, scratch: Path, too_large: str) -> None:
        """Merge and unmerge, load what cannot be loaded, upload what is no adapter; for ever."""
        torn = scratch / "torn"
        torn.mkdir()
        (torn / "adapter_config.json").write_text("{}", encoding="utf-8")
        (torn / "adapter_model.safetensors").write_bytes(b"torn")
        adapter = next(name for name in self.names if name)
        pause_s = self.seconds / 10
        while True:
            await asyncio.sleep(pause_s)
            for call in (
                client.upload(torn, name="torn"),
                client.load_adapter(too_large, pin=True),
            ):
                with suppress(KasaError):
                    await call
            await client.merge_adapter(adapter)
            await asyncio.sleep(pause_s)
            await client.unmerge_adapter()


# --- the picture ----------------------------------------------------------------------------------

UNITS = {"s": "s", "percentunit": "ratio", "tokens/s": "tokens/s", "reqps": "1/s", "ops": "1/s"}


def draw(prometheus: Prometheus, start_s: float, end_s: float, out: Path) -> None:
    """Each panel's queries over the time from `start_s` to `end_s`, in Unix seconds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    start_s = math.floor(start_s)
    times = range(start_s, math.floor(end_s) + 1)
    shown = [panel for panel in panels() if panel["type"] == "timeseries"]
    columns, rows = 3, math.ceil(len(shown) / 3)
    figure, axes = pyplot.subplots(rows, columns, figsize=(21, 3.6 * rows), layout="constrained")
    for panel, ax in zip(shown, axes.flat, strict=False):
        lines = [
            (query.name(series["metric"]), values_at(times, series["values"]))
            for query in queries(panel)
            for series in prometheus.over(query.expr, start_s, end_s)
        ]
        draw_panel(ax, panel, sorted(lines))
        ax.set_xlim(0, len(times) - 1)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    figure.supxlabel("seconds", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=70)
    pyplot.close(figure)


def values_at(times: Sequence[int], values: list[tuple[float, float]]) -> list[float]:
    """NaN where there is none."""
    known = dict(values)
    return [known.get(t, math.nan) for t in times]


def draw_panel(ax: Any, panel: dict[str, Any], lines: list[tuple[str, list[float]]]) -> None:
    """`lines`: names, and a value for each second."""
    field = panel["fieldConfig"]["defaults"]
    names = [name.lstrip("_") for name, _ in lines]  # matplotlib hides labels that begin with it
    if "stacking" in field["custom"] and lines:
        heights = [[0.0 if math.isnan(v) else v for v in values] for _, values in lines]
        ax.stackplot(range(len(heights[0])), heights, labels=names, alpha=0.7)
    else:
        for name, (_, values) in zip(names, lines, strict=True):
            ax.plot(values, label=name, lw=1)
    ax.set_title(panel["title"], fontsize=11, loc="left")
    ax.set_ylabel(UNITS.get(field["unit"], ""), fontsize=9)
    ax.set_ylim(bottom=0)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    if names:
        ax.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def prepare(root: Path, model: str) -> list[str]:
    """Fill an adapters directory. The names that can be served, "" among them."""
    from benchmarks.registry import write_adapters
    from kasa_runtime.adapter.base import BaseModel
    from kasa_runtime.base_model.source import resolve

    ours = ("snips", "tickets", "e2e")
    for name in ours:
        shutil.copytree(ROOT / "adapters" / name, root / name)
    base = BaseModel(resolve(model))
    write_adapters(root, base, 3)
    write_adapters(root / "large", base, 1, rank=16)
    shutil.move(root / "large" / "adapter-00000", root / "too-large")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return ["snips", "", "tickets", "e2e", *(f"adapter-{index:05}" for index in range(3))]


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        names = prepare(scratch / "adapters", arguments.model)
        flags = ("--max-slots=4", "--max-rank=8", "--max-num-seqs=8", "--adapter-limit=_base=1")
        with (
            served(arguments.model, scratch / "adapters", *flags) as (grpc_address, http_address),
            scraping(http_address, scratch) as prometheus,
        ):
            load = Load(grpc_address, names, arguments.seconds, 1, arguments.clients)
            start_s = time.time()
            asyncio.run(load.run(scratch, "too-large"))
            draw(prometheus, start_s, time.time(), arguments.out)
    print(f"{len(load.measured.e2e)} streams; {arguments.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of `kasa serve`")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "dashboard.png")
    main(parser.parse_args())
