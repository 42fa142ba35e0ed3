"""`report.html`: a run's course as curves, in one file that needs nothing else.

Drawn from the journal in the work directory, so that a run that failed has a report too. Needs
matplotlib, of the extra `train`.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kasa_runtime.errors import TrainingError
from kasa_runtime.training.journal import METRICS_FILE, SPECTRA_FILE, read_lines

REPORT_FILE = "report.html"

Line = Mapping[str, Any]

_COLOURS = ("#1f5fa8", "#c2571a", "#2e7d4f", "#7b4a9e", "#a8861f", "#5f6770")
_LOSS_TITLES = {
    "loss": "Loss",
    "L1": "L1, the task",
    "L2": "L2, the singular values: Σ d²",
    "L3": "L3, orthogonality",
}
_NUM_LAYERS_SHOWN = 4


def write_report(
    work_dir: Path, *, title: str, facts: Mapping[str, str] = MappingProxyType({})
) -> Path | None:
    """Make `report.html` of the journal in `work_dir`; `facts` become a table at its head. None,
    and no file, without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    lines = read_lines(work_dir / METRICS_FILE)
    snapshots = read_lines(work_dir / SPECTRA_FILE)
    page = _PAGE.format(
        title=html.escape(title),
        facts=_table(facts),
        sections="".join(chain(_curves(lines), _held_out(lines), _spectra(snapshots))),
    )
    path = work_dir / REPORT_FILE
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error})") from error
    return path


def _curves(lines: Sequence[Line]) -> list[str]:
    logs = [line for line in lines if "loss" in line]
    if not logs:
        return ["<p>No step was logged.</p>"]
    terms = [name for name in _LOSS_TITLES if name in logs[0]]
    kasa = "L3" in terms
    sections = [
        _section(
            "Loss",
            "The loss and its terms before their coefficients, means since the last log."
            if kasa
            else "The mean since the last log.",
            _panels([(_LOSS_TITLES[name], {name: logs}) for name in terms]),
        )
    ]
    if kasa:
        panels = [
            ("||A Aᵀ - I||, mean over layers", {"defect_A": logs}),
            ("||Bᵀ B - I||, mean over layers", {"defect_B": logs}),
        ]
        sections.append(
            _section("Orthogonality", "How far the factors are from orthonormal.", _panels(panels))
        )
    panels = [
        ("Gradient norm, before clipping", {"grad_norm": logs}),
        ("Learning rate", {"learning_rate": logs}),
        ("Tokens per second", {"tokens_per_s": logs}),
    ]
    sections.append(_section("Optimisation", "", _panels(panels)))
    return sections


def _held_out(lines: Sequence[Line]) -> list[str]:
    measured = [line for line in lines if "eval_loss" in line]
    if not measured:
        return []
    names = [name for name in measured[0] if name.startswith("eval_")]
    panels = [(name.removeprefix("eval_"), {name: measured}) for name in names]
    return [_section("Held-out rows", "Measured during training.", _panels(panels, marker="o"))]


def _spectra(snapshots: Sequence[Line]) -> list[str]:
    if not snapshots:
        return []
    return [
        _section(
            "Singular values of the update",
            "Of s B diag(d) A, layer by layer. Top: the largest one of each layer, and how it is "
            "spread over layers. Bottom: all of them, in layers from the first to the last.",
            _layers_over_time(snapshots) + _values_over_time(snapshots),
        )
    ]


def _panels(panels: Sequence[tuple[str, Mapping[str, Sequence[Line]]]], *, marker: str = "") -> str:
    """One plot over steps for each title."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(10 if columns == 2 else 5.4, 2.7 * rows)
    for index, (name, series) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for key, lines in series.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(*_columns(points), color=_COLOURS[0], linewidth=1.4, marker=marker, ms=4)
        _label(axes, name, y=", ".join(series).removeprefix("eval_"))
    return _svg(figure)


def _layers_over_time(snapshots: Sequence[Line]) -> str:
    import numpy as np

    steps = [line["step"] for line in snapshots]
    paths = list(snapshots[0]["layers"])
    largest = np.array([[line["layers"][p]["values"][0] for p in paths] for line in snapshots])
    figure = _figure(10, max(3.0, min(7.0, 0.11 * len(paths) + 1.2)))
    axes = figure.add_subplot(1, 2, 1)
    # Snapshots are evenly spaced but for the last one, so their number is the x axis.
    image = axes.imshow(largest.T, aspect="auto", interpolation="nearest", cmap="viridis")
    shown = np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int)
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    named = np.linspace(0, len(paths) - 1, min(len(paths), 28)).round().astype(int)
    axes.set_yticks(named, [_short(paths[i]) for i in named], fontsize=6)
    figure.colorbar(image, ax=axes, pad=0.02)
    _label(axes, "Largest singular value of each layer", y="layer", grid=False)
    axes = figure.add_subplot(1, 2, 2)
    low, quarter, middle, upper, high = np.quantile(largest, [0, 0.25, 0.5, 0.75, 1], axis=1)
    axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.15, label="all layers")
    axes.fill_between(steps, quarter, upper, color=_COLOURS[0], alpha=0.3, label="middle half")
    axes.plot(steps, middle, color=_COLOURS[0], label="median")
    axes.legend(frameon=False, fontsize=7)
    _label(axes, "Largest singular value, over layers", y="singular value")
    return _svg(figure)


def _values_over_time(snapshots: Sequence[Line]) -> str:
    paths = list(snapshots[0]["layers"])
    count = min(_NUM_LAYERS_SHOWN, len(paths))
    chosen = [paths[round(i * (len(paths) - 1) / max(1, count - 1))] for i in range(count)]
    rows = -(-count // 2)
    figure = _figure(10, 2.7 * rows)
    for index, path in enumerate(chosen):
        axes = figure.add_subplot(rows, min(2, count), index + 1)
        curves = [line["layers"][path]["values"] for line in snapshots]
        steps = [line["step"] for line in snapshots]
        for rank, values in enumerate(zip(*curves, strict=True)):
            shade = 1 - 0.75 * rank / max(1, len(curves[0]) - 1)
            axes.plot(steps, values, color=_COLOURS[0], alpha=shade, linewidth=1.1)
        _label(axes, path, y="singular value")
    return _svg(figure)


def _short(path: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`"""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return ".".join([*numbers[:1], parts[-1]])


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(axes: Any, title: str, *, y: str, grid: bool = True) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    if grid:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)


def _svg(figure: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    # Text as text: smaller, and a reader can search it.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _section(title: str, text: str, body: str) -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{words}{body}</section>"


def _table(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>" if rows else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .3rem; border-top: 1px solid #dde1e5; padding-top: 1rem; }}
p {{ margin: .2rem 0 .6rem; color: #4a5158; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0; }}
th {{ font-weight: 500; color: #4a5158; white-space: nowrap; }}
figure {{ margin: .5rem 0; }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{facts}
{sections}
</body>
</html>
"""
