"""What is in deploy/ against a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from adapter.making import write_adapter

from benchmarks.dashboard import (
    CONFIG,
    ROOT,
    Load,
    Measured,
    Prometheus,
    draw,
    executable,
    panels,
    queries,
    scraping,
    served,
)
from kasa_runtime.adapter.base import BaseModel
from server.metrics import FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS, TOKEN_BUCKETS

RULES = CONFIG.parent / "kasa-rules.yml"
FLAGS = (
    *("--executor", "torch", "--threads", "1", "--kv-cache-gib", "0.01", "--max-num-seqs", "4"),
    *("--max-slots", "3", "--max-rank", "8", "--adapter-limit", "_base=1", "--vllm-metrics"),
)
needs_prometheus = pytest.mark.skipif(
    executable("prometheus") is None or executable("promtool") is None,
    reason="no prometheus and promtool in PATH or beside python; `make prometheus` puts them there",
)


def promtool(*arguments: str, text: str | None = None) -> str:
    """What it says. Raises CalledProcessError, with that in its notes."""
    tool = executable("promtool")
    assert tool is not None
    done = subprocess.run([tool, *arguments], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- rules ----------------------------------------------------------------------------------------


def alerts() -> dict[str, dict[str, dict[str, str]]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


@needs_prometheus
def test_rules_and_configuration_are_valid() -> None:
    promtool("check", "rules", str(RULES))
    promtool("check", "config", str(CONFIG))


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_else() -> None:
    promtool("test", "rules", str(RULES.with_suffix(".test.yml")))


def test_every_alert_is_tested_and_has_a_runbook() -> None:
    tests = yaml.safe_load(RULES.with_suffix(".test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == alerts().keys()
    books = {path.name for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    named = {Path(rule["annotations"]["runbook"]) for rule in alerts().values()}
    assert {path.name for path in named} == books - {"README.md"}
    for path in named:
        assert (ROOT / path).read_text().startswith("# ")


def test_runbooks_name_metrics_and_alerts_that_exist() -> None:
    known = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    for name, rule in alerts().items():
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert name in text
        for metric in re.findall(r"\bkasa_[a-z0-9_]+", text):
            assert re.sub(r"_(total|bucket|sum|count|info)$", "", metric) in known, metric


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """A load that is over; Prometheus still scrapes. Times are in Unix seconds."""

    prometheus: Prometheus
    http: str
    measured: Measured
    start_s: float
    end_s: float


@pytest.fixture(scope="module")
def run(
    tiny_chat_model: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    scratch = tmp_path_factory.mktemp("monitoring")
    adapters, base = scratch / "adapters", BaseModel(tiny_chat_model)
    names = ["first", "second", "third", "fourth"]
    for seed, name in enumerate([*names, "too-large"]):
        rank = 16 if name == "too-large" else 4
        options = {"seed": seed, "r": rank, "base_fingerprint": base.fingerprint}
        write_adapter(adapters / name, base, ("q_proj", "down_proj"), **options)
    (adapters / "broken").mkdir()
    (adapters / "broken" / "adapter_config.json").write_text("{}")
    with (
        served(tiny_chat_model, adapters, *FLAGS, home=session_home) as (grpc_address, http),
        scraping(http, scratch) as prometheus,
    ):
        start_s = time.time()
        load = Load(grpc_address, ["first", "", *names[1:]], seconds=15.0, num_streams=200)
        measured = asyncio.run(load.run(scratch, "too-large"))
        time.sleep(2.5)  # until all of it has been scraped
        yield Run(prometheus, http, measured, start_s, time.time())


@needs_prometheus
def test_quantiles_are_within_a_bucket_of_what_clients_measured(run: Run) -> None:
    measured = run.measured
    for name, values, buckets in (
        ("time_to_first_token", measured.ttft, FIRST_TOKEN_BUCKETS),
        ("inter_token_latency", measured.inter_token, TOKEN_BUCKETS),
        ("e2e_request_latency", measured.e2e, REQUEST_BUCKETS),
    ):
        metric = f"kasa_{name}_seconds"
        assert run.prometheus.value(f"sum({metric}_count)") == pytest.approx(len(values), rel=0.05)
        for quantile in (0.5, 0.9, 0.95):
            expr = f"histogram_quantile({quantile}, sum by (le) ({metric}_bucket))"
            theirs = sorted(values)[math.ceil(quantile * len(values)) - 1]
            ours = run.prometheus.value(expr)
            distance = bisect_left(buckets, ours) - bisect_left(buckets, theirs)
            assert abs(distance) <= 1, f"{metric} p{quantile}: {ours}, clients saw {theirs}"


@needs_prometheus
def test_phases_add_up_to_what_the_client_waits_for(run: Run) -> None:
    phases = ("request_queue", "request_adapter_load", "request_prefill")
    split = sum(run.prometheus.value(f"sum(kasa_{phase}_time_seconds_sum)") for phase in phases)
    whole = run.prometheus.value("sum(kasa_time_to_first_token_seconds_sum)")
    assert 0.5 * whole <= split <= whole


@needs_prometheus
def test_every_query_of_the_dashboard_has_data(run: Run) -> None:
    for panel in panels():
        for query in queries(panel):
            found = run.prometheus.over(query.expr, run.start_s, run.end_s)
            values = [value for series in found for _, value in series["values"]]
            assert any(math.isfinite(value) for value in values), query


@needs_prometheus
def test_alerts_see_what_was_wrong(run: Run) -> None:
    found = run.prometheus.get("rules", type="alert")["groups"]
    rules = {rule["name"]: rule for group in found for rule in group["rules"]}
    assert rules.keys() == alerts().keys()
    assert all(rule["health"] == "ok" for rule in rules.values()), rules
    states = {name: rule["state"] for name, rule in rules.items()}
    assert states["KasaAdapterLoadFailing"] == "firing"
    assert states["KasaAdapterQuarantined"] != "inactive"
    assert "firing" not in (states["KasaServerDown"], states["KasaHighErrorRate"])


@needs_prometheus
def test_exemplars_lead_to_the_traces_of_the_calls(run: Run) -> None:
    found = run.prometheus.get(
        "query_exemplars",
        query="kasa_time_to_first_token_seconds_bucket",
        start=run.start_s,
        end=run.end_s,
    )
    traces = {e["labels"]["trace_id"] for series in found for e in series["exemplars"]}
    assert traces
    assert traces <= run.measured.traces


@needs_prometheus
def test_names_and_help_are_as_prometheus_wants_them(run: Run) -> None:
    for path in ("/metrics", "/metrics/vllm"):
        page = httpx.get(f"http://{run.http}{path}").text
        if path == "/metrics":
            promtool("check", "metrics", text=page)
        else:
            assert "vllm:lora_requests_info{" in page


@needs_prometheus
def test_the_dashboard_is_drawn(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(run.prometheus, run.start_s, run.end_s, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "kasa-runtime.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "instance", "adapter"}
    for panel in panels():
        assert panel["description"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
