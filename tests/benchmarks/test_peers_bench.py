"""The driver and its processes, with a system that generates at once."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.bench import Bench, BenchConfig
from benchmarks.peers.cases import Case, Mix
from benchmarks.peers.environments import Environment, PeerUnavailable, run_logged
from benchmarks.peers.process import Process
from benchmarks.peers.report import write_report
from benchmarks.peers.systems import System

FAKE = "tests.benchmarks.fake_peer"
CASE = Case(Mix.BASE, 2, 4)


class Starter:
    """Makes processes of the fake system, and ends them."""

    def __init__(self, log_dir: Path, stack: ExitStack) -> None:
        self.log_dir, self.stack = log_dir, stack

    def __call__(self, **settings: Any) -> Process:
        command = [sys.executable, "-m", FAKE]
        settings |= {"vocab_size": 1000}
        log = self.log_dir / "fake.log"
        process = Process("fake", command, dict(os.environ), settings, log)
        self.stack.callback(process.close)
        return process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    with ExitStack() as stack:
        yield Starter(tmp_path, stack)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_round_is_measured(start: Starter) -> None:
    record = start().measure(CASE, 5, tokens=3, timeout_s=30)
    assert (record.system, record.case, record.round) == ("fake", CASE, 5)
    assert record.token_ids == [[0, 1, 2]] * 2
    assert record.measures.decode_tokens_per_s > 0
    assert record.measures.peak_rss_bytes > 2**20
    assert 0 < record.measures.resident_bytes <= record.measures.peak_rss_bytes


def test_a_process_that_is_not_asked_is_stopped(start: Starter) -> None:
    process = start()
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(process.pid) == "T"
    process.measure(CASE, 0, tokens=2, timeout_s=30)  # and it goes on when it is


def test_memory_is_that_of_all_processes_of_a_system(start: Starter) -> None:
    alone, with_child = (
        start(child_bytes=num_bytes).measure(CASE, 0, tokens=2, timeout_s=30).measures
        for num_bytes in (0, 2**27)
    )
    assert with_child.resident_bytes > alone.resident_bytes + 2**27
    assert with_child.peak_rss_bytes > alone.peak_rss_bytes + 2**27


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", r"want 3 tokens for every request, got \[2\]"),
        ("exit", "it ended: a library says something on standard output"),
        ("hang", "no answer in 1 s"),
    ],
)
def test_a_system_that_fails_is_ended_and_says_why(
    start: Starter, fault: str, message: str
) -> None:
    process = start(fault=fault)
    with pytest.raises(PeerUnavailable, match=message):
        process.measure(CASE, 0, tokens=3, timeout_s=1 if fault == "hang" else 60)
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_system_that_cannot_load_says_why(start: Starter) -> None:
    with pytest.raises(PeerUnavailable, match="ValueError: no such model"):
        start(fault="load")


def test_all_processes_of_a_system_die_with_their_driver(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "fake.log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    group = int(driver.stdout.readline())
    processes = [os.pidfd_open(pid) for pid in pids_of(group)]
    driver.kill()
    driver.communicate()
    assert len(processes) == 2
    for process in processes:
        assert select.select([process], [], [], 30)[0]  # readable once it has ended
        os.close(process)


def pids_of(group: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if os.getpgid(pid) == group]


DRIVER = f"""
import os, sys, time
from pathlib import Path
from benchmarks.peers.process import Process
command = [sys.executable, "-m", {FAKE!r}]
settings = {{"vocab_size": 1000, "child_bytes": 1}}
process = Process("fake", command, dict(os.environ), settings, Path(sys.argv[1]))
print(process.pid, flush=True)
time.sleep(60)
"""


def bench(model_dir: Path, out: Path, rounds: int, *systems: System) -> Bench:
    config = BenchConfig(
        model_dir=model_dir,
        out=out,
        cache=out / "cache",
        mixes=[Mix.BASE, Mix.MIXED],
        concurrencies=[1, 2],
        prompt_tokens=[4],
        tokens=3,
        rounds=rounds,
        threads=1,
        timeout_s=30,
    )
    return Bench(config, systems)


def system(name: str, mixes: tuple[Mix, ...] = (Mix.BASE,), **settings: Any) -> System:
    return System(name, FAKE, mixes, settings=settings)


def test_a_run_goes_on_where_an_earlier_one_ended(tiny_llama: Path, tmp_path: Path) -> None:
    one, both = system("one"), (Mix.BASE, Mix.MIXED)
    with bench(tiny_llama, tmp_path, 1, one) as first:
        first.measure()
    with bench(tiny_llama, tmp_path, 2, one, system("two", both)) as second:
        second.measure()
    assert second.run.records[:2] == first.run.records
    measured = [(r.system, r.case, r.round) for r in second.run.records]
    assert len(measured) == len(set(measured)) == 2 * 2 + 2 * 4
    assert set(second.run.versions) == {"one", "two"}


def test_other_conditions_start_anew(tiny_llama: Path, tmp_path: Path) -> None:
    with bench(tiny_llama, tmp_path, 1, system("one")) as first:
        first.measure()
    other = bench(tiny_llama, tmp_path, 1, system("one"))
    other.config = replace(other.config, tokens=4)
    with other:
        other.measure()
    assert [len(ids) for r in other.run.records for ids in r.token_ids] == [4, 4, 4]


def test_systems_take_turns(tiny_llama: Path, tmp_path: Path) -> None:
    with bench(tiny_llama, tmp_path, 2, system("one"), system("two")) as run:
        run.measure()
    assert [r.system for r in run.run.records] == ["one", "two"] * 2 + ["two", "one"] * 2


def test_a_system_that_fails_leaves_the_others_alone(tiny_llama: Path, tmp_path: Path) -> None:
    systems = [system("bad", fault="short"), system("worse", fault="load"), system("good")]
    with bench(tiny_llama, tmp_path, 2, *systems) as run:
        run.measure()
    assert {r.system for r in run.run.records} == {"good"}
    assert set(run.run.failures) == {"bad", "worse"}
    report = write_report(run.run, tmp_path)
    assert "- worse: not measured, or not to the end: ValueError: no such model" in report
    assert report.count("| worse | | not measured: ValueError: no such model") == 2  # tables


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such package\\n'); raise SystemExit(1)"]
    with pytest.raises(PeerUnavailable, match="no such package"):
        run_logged(command, tmp_path / "build.log")


def test_other_requirements_make_another_environment(tmp_path: Path) -> None:
    digests = set()
    for version in ("1.0", "1.1"):
        (tmp_path / "peer.txt").write_text(f"peer=={version}\n")
        for without in ((), ("torchvision",)):
            digests.add(Environment("peer", without, tmp_path).digest)
    assert len(digests) == 4


def test_a_report_has_threads_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    with bench(tiny_llama, tmp_path, 1, system("one")) as run:
        run.measure()
    report = write_report(run.run, tmp_path)
    assert "CPU threads: 1" in report
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["threads"] == 1
    assert {entry["system"] for entry in results["summary"]} == {"one"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
