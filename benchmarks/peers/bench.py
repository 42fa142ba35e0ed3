"""One run of the benchmark: processes that stand ready and take turns, and records that grow."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.adapters import adapters_dir
from benchmarks.peers.cases import Case, Mix, cases
from benchmarks.peers.child import KV_CACHE_GIB
from benchmarks.peers.environments import PeerUnavailable, isolated
from benchmarks.peers.measures import Record, Spread
from benchmarks.peers.process import Process
from benchmarks.peers.report import Run
from benchmarks.peers.systems import System
from kasa_runtime.adapter.fingerprint import fingerprint


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how. `out` takes the results, `cache` keeps what can be used again."""

    model_dir: Path
    out: Path
    cache: Path
    mixes: Sequence[Mix]
    concurrencies: Sequence[int]
    prompt_tokens: Sequence[int]
    tokens: int  # new ones, of every request
    rounds: int
    threads: int
    timeout_s: float  # of one round of one case


class Bench:
    """Leaving its context ends the processes."""

    def __init__(self, config: BenchConfig, systems: Sequence[System]) -> None:
        self.config = config
        self.systems = tuple(systems)
        self.run = Run(machine(), config.model_dir.name, config.tokens, config.threads)
        self._cases = cases(config.mixes, config.concurrencies, config.prompt_tokens)
        self._fingerprint = fingerprint(config.model_dir)
        self._rounds_file = config.out / "rounds.jsonl"
        self._processes: dict[str, Process] = {}
        self._stack = ExitStack()
        config.cache.mkdir(parents=True, exist_ok=True)
        # Of the driver: the processes are killed and leave behind what they have.
        self._scratch_dir = self._stack.enter_context(TemporaryDirectory(dir=config.cache))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        self._stack.close()

    def measure(self) -> None:
        """Everything that `rounds.jsonl` does not have yet, round by round."""
        self._take_recorded()
        turns = self._turns()
        for system in self.systems:
            if any(system is due for due, _, _ in turns):
                self._start(system)
        for number, (system, case, round_) in enumerate(turns, 1):
            if system.name in self._processes:
                print(f"{number:3}/{len(turns)}", end=" ", flush=True)
                self._measure(system, case, round_)

    def _turns(self) -> list[tuple[System, Case, int]]:
        """Which system has to do which case of which round, in order. Every other round goes
        backwards through the systems, so that nobody always comes after the same one."""
        config, done = self.config, {(r.system, r.case, r.round) for r in self.run.records}
        return [
            (system, case, round_)
            for round_ in range(config.rounds)
            for case in self._cases
            for system in self.systems[:: -1 if round_ % 2 else 1]
            if case.mix in system.mixes and (system.name, case, round_) not in done
        ]

    def _start(self, system: System) -> None:
        print(f"starting {system.name}", flush=True)
        started_s = time.monotonic()
        try:
            process = self._process(system)
        except PeerUnavailable as error:
            self._drop(system, error)
            return
        print(f"started in {time.monotonic() - started_s:.0f} s", flush=True)
        self._stack.callback(process.close)
        self._processes[system.name] = process
        self.run.versions[system.name] = process.versions

    def _process(self, system: System) -> Process:
        config = self.config
        python, variables = Path(sys.executable), dict(os.environ)
        if system.environment is not None:
            python, variables = system.environment.python(config.cache), isolated()
        return Process(
            system.name,
            [str(python), "-m", system.module],
            variables | self._variables(),
            self._settings(system),
            config.out / f"{system.name}.log",
        )

    def _settings(self, system: System) -> dict[str, Any]:
        config = self.config
        count = max((case.num_held for case in self._cases if case.mix in system.mixes), default=0)
        adapters = adapters_dir(
            config.cache, config.model_dir, self._fingerprint, system.method, count
        )
        settings: dict[str, Any] = {
            "model": str(config.model_dir),
            "vocab_size": json.loads((config.model_dir / "config.json").read_text())["vocab_size"],
            "threads": config.threads,
            "adapters_dir": str(adapters),
            "num_adapters": count,
            "scratch_dir": self._scratch_dir,
            "max_concurrency": max(config.concurrencies),
            "max_model_len": max(config.prompt_tokens) + config.tokens,
            **system.settings,
        }
        if system.conversion is not None:
            converted = system.conversion.path(config.cache, config.model_dir, self._fingerprint)
            settings["converted"] = str(converted)
        return settings

    def _variables(self) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))[: self.config.threads]
        return {
            "OMP_NUM_THREADS": str(self.config.threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
        }

    def _measure(self, system: System, case: Case, round_: int) -> None:
        process = self._processes[system.name]
        try:
            record = process.measure(case, round_, self.config.tokens, self.config.timeout_s)
        except PeerUnavailable as error:
            del self._processes[system.name]
            self._drop(system, error)
            return
        self.run.records.append(record)
        line = {**self._conditions, "versions": process.versions, **record.to_json()}
        with self._rounds_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"round {round_ + 1}: {case.concurrency:2} x {case.prompt_tokens:3} "
            f"{system.name:20} {case.mix:7} {record.measures.decode_tokens_per_s:7.1f} tokens/s, "
            f"TTFT {1e3 * record.measures.ttft_s:6.0f} ms, "
            f"{record.measures.resident_bytes / 1e6:5.0f} MB",
            flush=True,
        )

    def _drop(self, system: System, error: PeerUnavailable) -> None:
        print(f"{system.name}: skipped from here on: {error}", flush=True)
        self.run.failures[system.name] = str(error)

    @property
    def _conditions(self) -> dict[str, Any]:
        """What all records of one report have in common."""
        return {
            "model": self._fingerprint,
            "tokens": self.config.tokens,
            "threads": self.config.threads,
            "machine": self.run.machine,
        }

    def _take_recorded(self) -> None:
        """What an earlier run into this directory measured under the same conditions."""
        if not self._rounds_file.exists():
            return
        for text in self._rounds_file.read_text().splitlines():
            line = json.loads(text)
            if {key: line.pop(key) for key in self._conditions} == self._conditions:
                self.run.versions[line["system"]] = line.pop("versions")
                self.run.records.append(Record.from_json(line))


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return f"{found[1] if found else platform.machine()}, {cores} cores"


def save(
    arguments: Namespace, rounds: object, spreads: Mapping[str, Spread], **more: object
) -> None:
    """What a script measured, as JSON in the file that `arguments.json` names, if it does."""
    if not arguments.json:
        return
    report = {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        **more,
        "rounds": rounds,
        "summary": {name: asdict(spread) for name, spread in spreads.items()},
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
