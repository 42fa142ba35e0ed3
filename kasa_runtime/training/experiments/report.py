"""Tables and plots of experiments' results: `<experiment>.md` and one picture for each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import RunConfig
from kasa_runtime.training.experiments.grid import Cell, Experiment
from kasa_runtime.training.experiments.runner import Result, Results
from kasa_runtime.training.metrics import LOWER_IS_BETTER


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one cell, a value for each seed, by seed."""

    cell: Cell
    results: Mapping[int, Result]
    metric: str

    def last(self) -> dict[int, float]:
        """The metric after the last epoch."""
        return {s: r.curve[-1][self.metric] for s, r in self.results.items() if r.curve}

    def best(self) -> dict[int, float]:
        """The metric after the epoch in which it was best: what papers often report."""
        pick = min if self.metric in LOWER_IS_BETTER else max
        return {
            seed: pick(point[self.metric] for point in result.curve)
            for seed, result in self.results.items()
            if result.curve
        }


def write_reports(
    out: Path, experiments: Sequence[Experiment], configs: Sequence[RunConfig], results: Results
) -> list[Path]:
    """Write what can be said of the results so far; returns the files. Raises ConfigError without
    matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for experiment in experiments:
        sections = [f"# {experiment.name}: {experiment.question}\n"]
        for config in configs:
            rows = rows_of(experiment, config, results)
            if not rows:
                continue
            picture = out / f"{experiment.name}-{config.name}.png"
            plot(picture, experiment, config, rows)
            sections.append(_section(experiment, config, rows, picture))
            paths.append(picture)
        if len(sections) > 1:
            path = out / f"{experiment.name}.md"
            path.write_text("\n".join(sections), encoding="utf-8")
            paths.append(path)
    return paths


def rows_of(experiment: Experiment, config: RunConfig, results: Results) -> list[Row]:
    """The cells of an experiment that have results."""
    if not experiment.fits(config):
        return []
    metric = metric_of(config)
    rows = []
    for cell in experiment.cells(config):
        found = results.of_cell(config, cell)
        if found:
            rows.append(Row(cell, found, metric))
    return rows


def metric_of(config: RunConfig) -> str:
    """What cells are compared by: the first metric of a task with a head, else the held-out
    loss."""
    return config.eval.metrics[0] if config.data.task.has_head and config.eval.metrics else "loss"


def _section(experiment: Experiment, config: RunConfig, rows: Sequence[Row], picture: Path) -> str:
    metric = rows[0].metric
    better = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    seeds = sorted({seed for row in rows for seed in row.results})
    train = config.train
    finals = list(dict.fromkeys(n for row in rows for r in row.results.values() for n in r.final))
    head = [
        "cell", "parameters", "seeds", f"{metric}, best epoch", f"{metric}, last epoch",
        "last, less its reference", *[f"test {name}" for name in finals], "gradient norm",
        "‖AAᵀ-I‖", "‖BᵀB-I‖", "stopped",
    ]  # fmt: skip
    lines = [
        f"## {config.name}\n",
        f"{config.data.limit or 'all'} training rows, {train.epochs:g} epochs of batches of "
        f"{train.batch_size * train.accumulation}, learning rate {train.learning_rate:g} where a "
        f"cell says no other, r = {config.method.r}, {len(seeds)} seeds: mean ± standard deviation "
        f"over seeds; {metric}: {better}. The difference is taken seed by seed.\n",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    by_label = {row.cell.label: row for row in rows}
    for row in rows:
        reference = by_label.get(row.cell.against)
        values = [
            row.cell.label,
            f"{next(iter(row.results.values())).num_parameters:,}",
            str(len(row.results)),
            spread(list(row.best().values())),
            spread(list(row.last().values())),
            _difference(row, reference),
            *[spread([r.final[n] for r in row.results.values() if n in r.final]) for n in finals],
            spread(_present(row, "grad_norm_mean")),
            spread(_present(row, "defect_A")),
            spread(_present(row, "defect_B")),
            str(sum(bool(r.failure) for r in row.results.values()) or ""),
        ]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join([*lines, "", f"![{experiment.question}]({picture.name})", ""])


def _present(row: Row, name: str) -> list[float]:
    values = [getattr(result, name) for result in row.results.values()]
    return [value for value in values if value is not None]


def _difference(row: Row, reference: Row | None) -> str:
    if reference is None or reference is row:
        return ""
    ours, theirs = row.last(), reference.last()
    return spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs], signed=True)


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean ± sample standard deviation, in digits that mean something."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 20 else 2 if abs(mean) >= 2 else 3
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def plot(path: Path, experiment: Experiment, config: RunConfig, rows: Sequence[Row]) -> None:
    """A curve for each series of a sweep, a bar for each cell of anything else."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5 if experiment.x else 1 + 0.32 * len(rows)))
    if experiment.x:
        _curves(axes, rows, experiment.x)
    else:
        _bars(axes, rows)
    axes.set_title(f"{experiment.question}  ({config.name})", fontsize=10)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axes: Any, rows: Sequence[Row], x_name: str) -> None:
    for series in dict.fromkeys(row.cell.series for row in rows):
        points = sorted((r for r in rows if r.cell.series == series), key=lambda r: r.cell.x or 0)
        lasts = [list(row.last().values()) for row in points]
        axes.errorbar(
            [row.cell.x for row in points],
            [statistics.fmean(values) if values else float("nan") for values in lasts],
            yerr=[statistics.stdev(values) if len(values) > 1 else 0 for values in lasts],
            label=series, marker="o", markersize=4, capsize=3,
        )  # fmt: skip
    axes.set_xlabel(x_name)
    axes.set_ylabel(f"{rows[0].metric}, last epoch")
    axes.set_xscale("log" if x_name == "learning rate" else "symlog")
    axes.legend(fontsize=8)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    labels = [row.cell.label for row in rows]
    lasts = [list(row.last().values()) or [float("nan")] for row in rows]
    axes.errorbar(
        [statistics.fmean(values) for values in lasts],
        labels,
        xerr=[statistics.stdev(values) if len(values) > 1 else 0 for values in lasts],
        fmt="o", capsize=3,
    )  # fmt: skip
    for y, values in enumerate(lasts):
        axes.plot(values, [y] * len(values), ".", color="0.6", zorder=0)
    axes.invert_yaxis()
    axes.set_xlabel(f"{rows[0].metric}, last epoch; grey: single seeds")


def _pyplot() -> Any:
    try:
        import_module("matplotlib").use("Agg")
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib; pip install 'kasa-runtime[train]', then give the command again "
            "with --report-only"
        ) from error
