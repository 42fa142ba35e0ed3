"""guidellm, a load generator: streams of completions, so many at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32


@dataclass(frozen=True)
class Load:
    """Its figures of one run; pairs are the median and the 95th percentile."""

    model: str
    concurrency: int
    num_done: int
    num_failed: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: tuple[float, float]
    itl_ms: tuple[float, float]


def command(
    python: Path,
    url: str,
    model: str,
    tokenizer: Path,
    folder: Path,
    num_requests: int,
    concurrency: int,
) -> list[str]:
    """Prompts of its own making, cut to length by the model's tokenizer; streamed completions."""
    data = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    return [
        *(str(python.with_name("guidellm")), "run"),
        *(
            "--backend",
            f"kind=openai_http,target={url},model={model},request_format=/v1/completions",
        ),
        *("--profile", f"kind=concurrent,streams={concurrency}"),
        *("--constraint", f"kind=max_requests,count={num_requests}"),
        *("--constraint", "kind=max_errors,count=1"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", data, "--output", f"kind=json,path={folder / 'report.json'}"),
        "--disable-console",
    ]


def read(folder: Path, model: str) -> Load:
    """What a run wrote."""
    [benchmark] = json.loads((folder / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    return Load(
        model,
        benchmark["config"]["strategy"]["streams"],
        totals["successful"],
        totals["errored"] + totals["incomplete"],
        metrics["requests_per_second"]["successful"]["mean"],
        metrics["output_tokens_per_second"]["successful"]["mean"],
        _median_and_p95(metrics["time_to_first_token_ms"]),
        _median_and_p95(metrics["inter_token_latency_ms"]),
    )


def _median_and_p95(metric: Mapping[str, Any]) -> tuple[float, float]:
    percentiles = metric["successful"]["percentiles"]
    return percentiles["p50"], percentiles["p95"]
