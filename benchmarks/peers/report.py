"""What a run leaves beside `rounds.jsonl`: `results.json`, `report.md`, `plot.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from benchmarks.peers.cases import Case, Mix
from benchmarks.peers.measures import Measures, Ratio, Record, Spread, agreement, ratios, spreads
from benchmarks.peers.systems import pairs

REFERENCE = "transformers"
PLOTTED = {  # measure: title, scale
    "decode_tokens_per_s": ("decode, tokens/s", 1.0),
    "itl_p50_s": ("time between tokens, p50, ms", 1e3),
}


@dataclass
class Run:
    """Everything that is reported. `machine`, `model`, `tokens` and `threads` hold for all."""

    machine: str
    model: str
    tokens: int
    threads: int
    records: list[Record] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)  # by system
    failures: dict[str, str] = field(default_factory=dict)  # by system

    @property
    def title(self) -> str:
        return (
            f"{self.model}, {self.tokens} new tokens per request, CPU threads: {self.threads}, "
            f"{self.machine}"
        )

    @property
    def ratios(self) -> list[Ratio]:
        return ratios(self.records, pairs(dict.fromkeys(r.system for r in self.records)))


def write_report(run: Run, directory: Path) -> str:
    """Write all but `rounds.jsonl`; returns the text of `report.md`."""
    text = markdown(run)
    (directory / "report.md").write_text(text)
    (directory / "results.json").write_text(json.dumps(as_json(run), indent=2) + "\n")
    if run.records:
        plot(run, directory / "plot.png")
    return text


def as_json(run: Run) -> dict[str, object]:
    summary = [
        {"system": system, **asdict(case), "measure": measure.name, **asdict(spread)}
        for measure in fields(Measures)
        for (system, case), spread in spreads(run.records, measure.name).items()
    ]
    return {
        "machine": run.machine,
        "model": run.model,
        "tokens": run.tokens,
        "threads": run.threads,
        "versions": run.versions,
        "failures": run.failures,
        "summary": summary,
        "ratios": [asdict(ratio) for ratio in run.ratios],
        "agreement": agreement(run.records, REFERENCE),
    }


def markdown(run: Run) -> str:
    """Median (low to high) over the rounds."""
    lines = [f"# {run.title}", ""]
    lines += [
        f"- {system}: {', '.join(f'{name} {version}' for name, version in found.items())}"
        for system, found in run.versions.items()
    ]
    lines += [
        f"- {system}: not measured, or not to the end: {why}"
        for system, why in run.failures.items()
    ]
    for size in sizes(run.records):
        lines += ["", f"## {describe(*size)}", "", *_table(run, *size)]
    if run.ratios:
        lines += ["", "## Ratios, of rounds of this run", "", *_ratio_table(run.ratios)]
    lines += _agreement_lines(run)
    return "\n".join(lines) + "\n"


def sizes(records: Sequence[Record]) -> list[tuple[int, int]]:
    """(prompt_tokens, concurrency) of all that was measured."""
    return sorted({(r.case.prompt_tokens, r.case.concurrency) for r in records})


def describe(prompt_tokens: int, concurrency: int) -> str:
    requests = "1 request" if concurrency == 1 else f"{concurrency} requests at once"
    return f"{requests}, prompts of {prompt_tokens} tokens"


def _table(run: Run, prompt_tokens: int, concurrency: int) -> list[str]:
    size = (prompt_tokens, concurrency)
    records = [r for r in run.records if (r.case.prompt_tokens, r.case.concurrency) == size]
    found = {measure.name: spreads(records, measure.name) for measure in fields(Measures)}
    lines = [
        "| system | adapters | decode, tokens/s | TTFT, ms | ITL p50, ms | ITL p99, ms "
        "| resident, MB | peak RSS, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (system, case), decode in found["decode_tokens_per_s"].items():
        cells = [
            system,
            case.mix,
            show(decode),
            *(
                show(found[name][system, case], 1e3)
                for name in ("ttft_s", "itl_p50_s", "itl_p99_s")
            ),
            f"{found['resident_bytes'][system, case].median / 1e6:.0f}",
            f"{found['peak_rss_bytes'][system, case].high / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    measured = {record.system for record in records}
    lines += [
        f"| {system} | | not measured: {why} | | | | | |"
        for system, why in run.failures.items()
        if system not in measured
    ]
    return lines


def _ratio_table(found: Sequence[Ratio]) -> list[str]:
    lines = [
        "| ratio | of | prompt tokens | requests | median (low to high) | rounds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for ratio in found:
        pair = ratio.pair
        sides = [f"{side.system} {side.mix}" for side in (pair.ours, pair.other)]
        measure = {"decode_tokens_per_s": "decode", "ttft_s": "TTFT"}[pair.measure]
        lines.append(
            f"| {' / '.join(sides)} | {measure} | {ratio.prompt_tokens} | {ratio.concurrency} | "
            f"{show(ratio.spread, digits=2)} | {ratio.num_rounds} |"
        )
    return lines


def _agreement_lines(run: Run) -> list[str]:
    shares = agreement(run.records, REFERENCE)
    if not shares:
        return []
    text = ", ".join(f"{system} {share:.1%}" for system, share in shares.items())
    return ["", f"Tokens of the base before the first that differs from {REFERENCE}: {text}."]


def show(spread: Spread, scale: float = 1.0, digits: int = 1) -> str:
    median, low, high = (
        f"{value * scale:.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    return f"{median} ({low} to {high})"


def plot(run: Run, path: Path) -> None:
    """A column per size of batch and prompt, a bar per system and mix; lines are from the slowest
    round to the fastest. Above the decode throughput, below the time between tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = sizes(run.records)
    labels = list(dict.fromkeys((r.system, r.case.mix) for r in run.records))
    figure, axes = plt.subplots(
        len(PLOTTED),
        len(columns),
        figsize=(3 + 3 * len(columns), 1.5 + 0.5 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, (measure, (title, scale)) in zip(axes, PLOTTED.items(), strict=True):
        found = spreads(run.records, measure)
        for axis, (prompt_tokens, concurrency) in zip(row, columns, strict=True):
            for y, (system, mix) in enumerate(labels):
                spread = found.get((system, Case(mix, concurrency, prompt_tokens)))
                if spread is not None:
                    axis.barh(y, scale * spread.median, color=f"C{list(Mix).index(mix)}")
                    ends = [scale * spread.low, scale * spread.high]
                    axis.plot(ends, [y, y], color="black", linewidth=1)
            axis.set_title(describe(prompt_tokens, concurrency), fontsize=8)
            axis.set_xlabel(title)
    axes[0][0].set_yticks(range(len(labels)), [f"{system}: {mix}" for system, mix in labels])
    axes[0][0].invert_yaxis()
    figure.suptitle(run.title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
