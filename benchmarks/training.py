"""Training KaSA: this trainer against PEFT's KaSA in the loop that a PEFT user writes. Same base,
rows, rank, layers, optimiser and number of steps; each side in a process of its own, taking turns,
so that noise hits both alike.

python benchmarks/training.py [--model M] [--rounds N] [--steps N] [--threads N] [--dtype D ...]
                              [--labels L ...] [--device cpu|cuda] [--json FILE]

Prints, for every dtype and share of labelled tokens: seconds a step (by the clock, and of the
processor, which other load disturbs less), peak memory, and seconds from the loaded base model to
one that is ready to train (our tails are in the cache by then), each with the ratio of ours to
PEFT's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, get_cosine_schedule_with_warmup, logging

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.base_model.source import resolve
from kasa_runtime.training.base import load_model, load_tokenizer, tails_of
from kasa_runtime.training.config import (
    DataSection,
    Dtype,
    MethodSection,
    ModelSection,
    OutputSection,
    Preset,
    RunConfig,
    TrainSection,
)
from kasa_runtime.training.examples import IGNORED, Collator, Example, Examples
from kasa_runtime.training.layers import attach
from kasa_runtime.training.loss import RegReduction
from kasa_runtime.training.tasks import make_task
from kasa_runtime.training.trainer import KasaTrainer

BATCH, LENGTH = 8, 128
RANK, ALPHA = 8, 16
LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0
LABELLED = {"half": LENGTH // 2, "all": LENGTH}


@dataclass(frozen=True)
class Case:
    """What both sides do in one comparison."""

    model_dir: Path
    dtype: Dtype
    labels: str
    device: str
    threads: int
    steps: int  # of one round
    rounds: int

    @property
    def num_steps(self) -> int:
        return self.steps * (self.rounds + 1)  # the first round warms up

    @property
    def config(self) -> RunConfig:
        """The `peft` preset, as `kasa train` would be told."""
        scratch = Path(tempfile.gettempdir()) / "kasa-benchmark"
        return RunConfig(
            data=DataSection(train=scratch),
            output=OutputSection(dir=scratch),
            model=ModelSection(name=str(self.model_dir), dtype=self.dtype),
            method=MethodSection(
                r=RANK, alpha=ALPHA, preset=Preset.PEFT, reg_reduction=RegReduction.SUM
            ),
            train=TrainSection(
                max_steps=self.num_steps,
                batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                max_grad_norm=MAX_GRAD_NORM,
                log_steps=self.num_steps,
            ),
        )


@dataclass
class Result:
    """What was measured of one side in one case."""

    ready_s: float = 0.0
    step_s: list[float] = field(default_factory=list)  # of each round
    step_cpu_s: list[float] = field(default_factory=list)  # of all threads; blind to other load
    peak_mib: float = 0.0  # of the whole process; on CUDA, of the tensors while training
    peak_above_base_mib: float = 0.0  # while training, over the loaded base


def make_examples(case: Case, vocabulary: int) -> list[Example]:
    """Rows of LENGTH tokens, a prompt and a labelled completion."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH * case.num_steps, LENGTH)
    start = LENGTH - LABELLED[case.labels]
    rows = torch.randint(100, vocabulary, shape, generator=generator).tolist()
    return [Example(tuple(r), (*[IGNORED] * max(1, start), *r[max(1, start) :])) for r in rows]


def serve_ours(pipe: Connection, case: Case) -> None:
    """Child process: `KasaTrainer`, one round for every message."""
    config, side = case.config, Side(pipe, case)
    task = make_task(config)
    task.prepare(load_tokenizer(case.model_dir), [])
    model = load_model(case.model_dir, config.model, task)
    with side.getting_ready():
        tails = tails_of(case.model_dir, model, config.model)
        layers = attach(model, config.method, tails=tails.get, seed=0)
        del tails
    rows = make_examples(case, model.config.vocab_size)
    trainer = KasaTrainer(
        model,
        config,
        task,
        list(layers.values()),
        train=Examples(rows, num_rows=len(rows)),
        callbacks=[_Turns(side)],
    )
    trainer.train()
    side.finish()


class _Turns(TrainerCallback):
    """Waits for its turn before each round."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.side.before_step(state.global_step)


def serve_peft(pipe: Connection, case: Case) -> None:
    """Child process: PEFT's KaSA in a plain loop, one round for every message."""
    from peft import KasaConfig, LoraConfig, get_peft_model

    config, side = case.config, Side(pipe, case)
    model = load_model(case.model_dir, config.model, make_task(config))
    method = config.method
    with side.getting_ready():
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules="all-linear",
            kasa_config=KasaConfig(beta=method.beta, gamma=method.gamma),
        )
        model = get_peft_model(model, lora)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, case.num_steps // 16, case.num_steps)
    for step, batch in enumerate(batches(case, model.config.vocab_size)):
        side.before_step(step)
        loss = model(**batch, use_cache=False).loss + model._get_kasa_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    side.finish()


def batches(case: Case, vocabulary: int) -> Iterator[dict[str, Tensor]]:
    collate, rows = Collator(pad_id=0), make_examples(case, vocabulary)
    for start in range(0, len(rows), BATCH):
        batch = collate([{"example": row} for row in rows[start : start + BATCH]])
        yield {name: tensor.to(case.device) for name, tensor in batch.items()}


class Side:
    """What a child process measures of itself, and its turns."""

    def __init__(self, pipe: Connection, case: Case) -> None:
        torch.set_num_threads(case.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.pipe, self.case, self.result = pipe, case, Result()
        self.gauge: Gauge = CudaGauge() if case.device == "cuda" else RssGauge()
        self._started = self._started_cpu = self._base_mib = 0.0

    def getting_ready(self) -> Side:
        return self

    def __enter__(self) -> None:
        self._base_mib = self.gauge.now_mib()
        self._started = self._time()

    def __exit__(self, *_: object) -> None:
        self.result.ready_s = self._time() - self._started
        self.result.peak_mib = self.gauge.reset_peak()
        self.pipe.send("ready")

    def before_step(self, step: int) -> None:
        if step % self.case.steps == 0:
            if step:
                self._end_round()
            self.pipe.recv()
            self._started, self._started_cpu = self._time(), time.process_time()

    def finish(self) -> None:
        self._end_round()
        peak = self.gauge.peak_mib()
        self.result.peak_mib = max(peak, self.result.peak_mib)
        self.result.peak_above_base_mib = peak - self._base_mib
        self.pipe.send(self.result)

    def _end_round(self) -> None:
        seconds = (self._time() - self._started) / self.case.steps
        self.result.step_s.append(seconds)
        cpu_s = (time.process_time() - self._started_cpu) / self.case.steps
        self.result.step_cpu_s.append(cpu_s)
        self.pipe.send(seconds)

    def _time(self) -> float:
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Gauge:
    """Memory in MiB: what is in use, and the most that was since `reset_peak`, which returns the
    peak up to then."""

    def now_mib(self) -> float:
        raise NotImplementedError

    def peak_mib(self) -> float:
        raise NotImplementedError

    def reset_peak(self) -> float:
        raise NotImplementedError


class RssGauge(Gauge):
    """Of this process, as Linux counts it."""

    def now_mib(self) -> float:
        return self._status("VmRSS")

    def peak_mib(self) -> float:
        return self._status("VmHWM")

    def reset_peak(self) -> float:
        peak = self.peak_mib()
        Path("/proc/self/clear_refs").write_text("5")
        return peak

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


class CudaGauge(Gauge):
    """Of the tensors on the device. What getting ready needed for a moment is left out."""

    def now_mib(self) -> float:
        return torch.cuda.memory_allocated() / 2**20

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20

    def reset_peak(self) -> float:
        torch.cuda.reset_peak_memory_stats()
        return 0.0


class Process:
    """A child process, idle between its rounds."""

    def __init__(self, serve: Callable[[Connection, Case], None], case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case))
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self) -> float:
        self.pipe.send("run")
        return float(self.pipe.recv())

    def result(self) -> Result:
        result: Result = self.pipe.recv()
        self.process.join()
        del result.step_s[0], result.step_cpu_s[0]
        return result


SIDES = {"ours": serve_ours, "PEFT": serve_peft}


def compare(case: Case) -> dict[str, Result]:
    """Both sides of a case; who goes first in a round alternates."""
    sides = {name: Process(serve, case) for name, serve in SIDES.items()}
    for index in range(case.rounds + 1):
        for name in sorted(sides, reverse=bool(index % 2)):
            seconds = sides[name].run()
            if index:
                print(f"  round {index}: {name} {seconds:7.3f} s a step", flush=True)
    return {name: side.result() for name, side in sides.items()}


def cache_tails(model_dir: Path) -> None:
    tails = TailCache(BaseModel(model_dir))
    for name in tails.modules():
        if not name.endswith("lm_head"):
            tails.get(name, RANK)


def ratios(results: dict[str, Result]) -> dict[str, float]:
    """Ours over PEFT's; of the time, the median of the ratios of the rounds."""
    ours, theirs = results["ours"], results["PEFT"]
    times = [a / b for a, b in zip(ours.step_s, theirs.step_s, strict=True)]
    cpu_times = [a / b for a, b in zip(ours.step_cpu_s, theirs.step_cpu_s, strict=True)]
    return {
        **_spread("time", times),
        **_spread("cpu_time", cpu_times),
        "peak_memory": ours.peak_mib / theirs.peak_mib,
        "memory_above_base": ours.peak_above_base_mib / theirs.peak_above_base_mib,
        "start_up_speed": theirs.ready_s / ours.ready_s,
    }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    return {name: middle, f"{name}_low": min(values), f"{name}_high": max(values)}


def machine() -> dict[str, str]:
    cpu = [x for x in _lines("/proc/cpuinfo") if x.startswith("model name")]
    facts = {
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.processor(),
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    names = ("torch", "transformers", "peft", "kasa-runtime")
    return facts | {name: importlib.metadata.version(name) for name in names}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(name: str, results: dict[str, Result]) -> str:
    sides, ratio = (results["ours"], results["PEFT"]), ratios(results)

    def row(label: str, pick: Callable[[Result], float], text: str) -> str:
        values = "".join(f"{pick(side):10.3f}" for side in sides)
        return f"{label:26}{values}  {text}"

    def with_spread(key: str) -> str:
        low, high = ratio[f"{key}_low"], ratio[f"{key}_high"]
        return f"{ratio[key]:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        f"{name:26}{'ours':>10}{'PEFT':>10}  ours / PEFT",
        row("s a step", lambda x: statistics.median(x.step_s), with_spread("time")),
        row("CPU s a step", lambda x: statistics.median(x.step_cpu_s), with_spread("cpu_time")),
        row("peak MiB", lambda x: x.peak_mib, f"{ratio['peak_memory']:.3f}"),
        row(
            "peak MiB above the base",
            lambda x: x.peak_above_base_mib,
            f"{ratio['memory_above_base']:.3f}",
        ),
        row("s to get ready", lambda x: x.ready_s, f"{ratio['start_up_speed']:.1f} times faster"),
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the child processes
    model_dir, facts = resolve(args.model), machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(
        f"{args.model}, r = {RANK}, all-linear, {BATCH} x {LENGTH} tokens, {args.threads} threads"
    )
    cache_tails(model_dir)
    measured: dict[str, Any] = {}
    tables = []
    for dtype, labels in itertools.product(args.dtype, args.labels):
        name = f"{dtype}, {labels} labelled"
        print(name, flush=True)
        results = compare(
            Case(model_dir, dtype, labels, args.device, args.threads, args.steps, args.rounds)
        )
        measured[name] = {side: asdict(result) for side, result in results.items()}
        measured[name]["ratios"] = ratios(results)
        tables.append(table(name, results))
    print("\n" + "\n\n".join(tables))
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items() if k != "json"}
        report = {"machine": facts, "settings": settings, "results": measured}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of one round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", nargs="+", type=Dtype, default=[Dtype.FLOAT32, Dtype.BFLOAT16])
    parser.add_argument("--labels", nargs="+", choices=LABELLED, default=list(LABELLED))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
