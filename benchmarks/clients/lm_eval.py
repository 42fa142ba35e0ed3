"""EleutherAI's lm-eval, whose class `local-completions` knows nothing but OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONCURRENCY = 8
METRICS = {"acc": "accuracy", "exact_match": "exact match"}


@dataclass(frozen=True)
class Score:
    """What it found of one task. `likelihoods`: of each row's choices, in their order; none where
    text is written."""

    task: str
    metric: str
    value: float
    num_rows: int
    likelihoods: tuple[tuple[float, ...], ...] = ()


def command(
    python: Path, url: str, model: str, tokenizer: Path, tasks: Iterable[str], folder: Path
) -> list[str]:
    """Score `tasks`, whose configurations lie in `folder`; its results go there too."""
    server = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": CONCURRENCY,
        "max_retries": 1,  # an error is to be seen
    }
    arguments = ",".join(f"{name}={value}" for name, value in server.items())
    return [
        *(str(python), "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", arguments, "--tasks", ",".join(tasks)),
        *("--include_path", str(folder), "--output_path", str(folder / "results")),
        *("--log_samples", "--seed", "0"),
    ]


def read(folder: Path) -> list[Score]:
    """What a run wrote last."""
    results = max((folder / "results").rglob("results_*.json"), key=os.path.getmtime)
    stamp = results.stem.removeprefix("results_")
    found = json.loads(results.read_text())["results"]
    return [
        _score(task, figures, results.with_name(f"samples_{task}_{stamp}.jsonl"))
        for task, figures in sorted(found.items())
    ]


def _score(task: str, figures: Mapping[str, Any], samples: Path) -> Score:
    [(metric, value)] = [
        (name.partition(",")[0], value)
        for name, value in figures.items()
        if name.partition(",")[0] in METRICS
    ]
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    likelihoods: tuple[tuple[float, ...], ...] = ()
    if metric == "acc":
        # Of each choice: its likelihood, and whether it is what the model would have written.
        likelihoods = tuple(tuple(float(x[0]) for x in row["filtered_resps"]) for row in rows)
    return Score(task, METRICS[metric], value, len(rows), likelihoods)
