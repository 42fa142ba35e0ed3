"""The report of a load as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kasa_runtime.loadtest.load import Sample
from kasa_runtime.loadtest.report import Report, table

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 420, 260, 62, 42, 14
MAX_POINTS = 2000
NUM_TICKS = 5
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { margin: .5rem 1rem .5rem 0 } text { font: 12px system-ui, sans-serif }
"""


def make_page(report: Report, samples: Sequence[Sample]) -> str:
    """The page's HTML."""
    header, rows = table(report)
    settings = {key: value for key, value in report.settings.items() if value not in (None, "")}
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>kasa bench: {html.escape(report.model.name)}</title>
<style>{STYLE}</style>
<h1>{html.escape(report.model.name)} under load</h1>
{_table([], [[key, str(value)] for key, value in settings.items()])}
<h2>In all</h2>
{_table([], [list(item) for item in report.summary.items()])}
<h2>Per adapter</h2>
<p>Times in ms, measured at the client; TTFT and e2e count from when a request was due. Failed
requests have no part in them.</p>
{_table(header, rows)}
<h2>Distributions</h2>
{_plots(samples)}
</html>
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)] if header else []
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _plots(samples: Sequence[Sample]) -> str:
    good = [sample for sample in samples if not sample.error]
    ttfts_s = [sample.ttft_s for sample in good if sample.ttft_s is not None]
    plots = [
        _plot(_cumulative(ttfts_s), "TTFT in ms", "share of requests"),
        _plot(_cumulative([gap for s in good for gap in s.itl_s]), "ITL in ms", "share of tokens"),
        _plot(_cumulative([sample.e2e_s for sample in good]), "e2e in ms", "share of requests"),
        _plot(
            [(s.due_s, s.ttft_s * 1e3) for s in good if s.ttft_s is not None],
            "due at, in s",
            "TTFT in ms",
            dots=True,
        ),
        _plot(_tokens_per_s(samples), "at, in s", "output tokens per second"),
    ]
    return "".join(plots)


def _cumulative(values_s: Sequence[float]) -> Points:
    """Milliseconds, and the share of values that are no longer."""
    ordered = sorted(values_s)
    return [(value * 1e3, (i + 1) / len(ordered)) for i, value in enumerate(ordered)]


def _tokens_per_s(samples: Sequence[Sample]) -> Points:
    """Output tokens of every second of the load."""
    counts = [0] * (1 + int(max(sample.end_s for sample in samples)))
    for sample in samples:
        for at_s, count in sample.arrivals:
            counts[int(at_s)] += count
    return [(float(second), float(count)) for second, count in enumerate(counts)]


def _plot(points: Points, x_label: str, y_label: str, *, dots: bool = False) -> str:
    """An SVG with axes from 0; nothing of no points."""
    if not points:
        return ""
    x_axis, y_axis = (Axis.of([point[i] for point in points]) for i in (0, 1))
    shown = [*points[:-1][:: math.ceil(len(points) / MAX_POINTS)], points[-1]]
    places = [(x_axis.across(x), y_axis.up(y)) for x, y in shown]
    if dots:
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places)
    else:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks = f'<polyline points="{line}" fill="none" stroke="#2a6fb0" stroke-width="2"/>'
    grid = [_tick(x_axis.across(x), 0, x) for x in x_axis.ticks]
    grid += [_tick(0, y_axis.up(y), y) for y in y_axis.ticks]
    labels = _text(WIDTH / 2, HEIGHT - 6, x_label)
    labels += f'<g transform="rotate(-90)">{_text(-HEIGHT / 2, 13, y_label)}</g>'
    inside = f'{"".join(grid)}<g fill="#2a6fb0">{marks}</g>{labels}'
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{inside}</svg>\n'


@dataclass(frozen=True)
class Axis:
    """From 0 to `end`, with a tick every `step`."""

    step: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        largest = max(values) or 1.0
        rough = largest / NUM_TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return cls(step, step * math.ceil(largest / step))

    @property
    def ticks(self) -> list[float]:
        return [self.step * i for i in range(round(self.end / self.step) + 1)]

    def across(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - MARGIN) * value / self.end

    def up(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - MARGIN) * value / self.end


def _tick(x: float, y: float, value: float) -> str:
    """A line of the grid with its value: upright where y is 0, else level."""
    if y:
        line = f'x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}"'
        label = _text(LEFT - 6, y + 4, f"{value:g}", "end")
    else:
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN}" y2="{HEIGHT - BOTTOM}"'
        label = _text(x, HEIGHT - BOTTOM + 16, f"{value:g}")
    return f'<line {line} stroke="#ddd"/>{label}'


def _text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{html.escape(content)}</text>"
