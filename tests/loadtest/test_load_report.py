from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from kasa_runtime.loadtest.load import Load, Sample
from kasa_runtime.loadtest.page import Axis, make_page
from kasa_runtime.loadtest.report import Percentiles, Report, table
from kasa_runtime.types import ModelInfo

MODEL = ModelInfo("<m>", "f", "A", "float32", 64, 100, 2, 10, "native", "torch", True)


def sample(adapter, due_s, *, error="", ttft_s=0.1, gap_s=0.05):
    first_s = due_s + ttft_s
    arrivals = [] if error else [(first_s, 1), (first_s + gap_s, 1)]
    end_s = first_s + gap_s
    found = Sample(adapter, due_s, due_s + 0.01, end_s, arrivals, error=error)
    found.prompt_tokens, found.cached_prompt_tokens = (0, 0) if error else (10, 4)
    return found


@pytest.fixture
def load():
    load = Load(None)
    load.samples = [
        *(sample("style", float(i), ttft_s=0.1 * (i + 1)) for i in range(4)),
        sample("", 4.0),
        sample("", 4.5, error="OVERLOADED"),
    ]
    load.max_in_flight = 2
    return load


@pytest.fixture
def report(load):
    return Report.of(load, {"rate": 1.0, "prompts": "<p>"}, MODEL, interrupted=False)


def test_percentiles():
    assert Percentiles.of([]) is None
    found = Percentiles.of([float(i) for i in range(1, 102)])
    assert (found.mean, found.p50, found.p90, found.p95, found.p99, found.max) == (
        pytest.approx(51),
        *(pytest.approx(want) for want in (51, 91, 96, 100, 101)),
    )


def test_figures_are_of_all_and_of_each_adapter(report):
    assert report.duration_s == pytest.approx(4.65)
    assert report.requests_per_s == pytest.approx(5 / 4.65)
    assert report.cached_prompt_share == pytest.approx(0.4)
    assert report.send_lag_s.max == pytest.approx(0.01)
    assert report.errors == {"OVERLOADED": 1}
    assert (report.all.adapter, report.all.num_requests, report.all.num_failed) == (None, 6, 1)
    assert report.all.output_tokens == 10
    assert report.all.output_tokens_per_s == pytest.approx(10 / 4.65)
    style, base = report.adapters
    assert (style.adapter, style.num_requests, style.num_failed) == ("style", 4, 0)
    assert style.ttft_s.p50 == pytest.approx(0.25)
    assert style.ttft_s.max == pytest.approx(0.4)
    assert style.e2e_s.mean == pytest.approx(0.3)
    assert style.itl_s.p99 == pytest.approx(0.05)
    assert (base.adapter, base.num_requests, base.num_failed) == ("", 2, 1)
    assert base.ttft_s.max == pytest.approx(0.1)  # the failed one has no part in it


def test_where_all_failed_there_are_no_times():
    load = Load(None)
    load.samples = [sample("", 0.0, error="UNREACHABLE")]
    report = Report.of(load, {}, MODEL, interrupted=False)
    assert (report.all.ttft_s, report.all.itl_s, report.all.e2e_s) == (None, None, None)
    assert table(report)[1][0][4:] == [""] * 9
    assert "UNREACHABLE" in make_page(report, load.samples)


def test_report_is_json(report):
    read = json.loads(json.dumps(asdict(report)))
    assert read["adapters"][0]["ttft_s"]["max"] == report.adapters[0].ttft_s.max
    assert read["model"]["name"] == "<m>"


def test_table_has_times_in_milliseconds(report):
    header, rows = table(report)
    assert header[:5] == ["adapter", "requests", "failed", "tokens/s", "TTFT p50"]
    assert [row[0] for row in rows] == ["all", "style", "(base model)"]
    assert rows[1][1:5] == ["4", "0", f"{8 / 4.65:.1f}", "250.0"]
    assert all(len(row) == len(header) for row in rows)


class Tags(HTMLParser):
    """Counts tags, and requires that each is closed."""

    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)


def test_page_needs_nothing_else_and_shows_all(load, report):
    page = make_page(report, load.samples)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("svg") == 5
    assert tags.seen.count("circle") == 5  # the failed one has no TTFT
    assert not re.search(r"https?://|<script|src=|href=", page)
    assert "&lt;m&gt; under load" in page and "&lt;p&gt;" in page and "<m>" not in page
    assert "250.0" in page


@pytest.mark.parametrize("largest", [0.0, 0.0003, 0.7, 1.0, 5.0, 1234.5])
def test_axis_holds_all_values_with_a_few_round_ticks(largest):
    axis = Axis.of([0.0, largest])
    assert axis.end >= largest
    assert axis.end <= 2 * (largest or 1.0)
    assert 3 <= len(axis.ticks) <= 7
    assert axis.ticks[0] == 0 and axis.ticks[-1] == pytest.approx(axis.end)
    assert f"{axis.step:e}"[0] in "125"
