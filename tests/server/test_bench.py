from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections import Counter

import pytest
from click.testing import CliRunner

from kasa_runtime.cli import cli
from kasa_runtime.errors import Overloaded
from kasa_runtime.types import SamplingParams


@pytest.fixture
def bench(served):
    async def run(*arguments, status=0):
        arguments = ["bench", *arguments, "--address", served.address]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return run


async def test_closed_loop(served, bench, tmp_path):
    prompts, page, file = (tmp_path / name for name in ("prompts", "load.html", "load.json"))
    prompts.write_text("one two\nthree four five\n")
    served.runtime.delay_s = 0.01
    arguments = ["--concurrency", "4", "--requests", "30", "--prompts", str(prompts)]
    arguments += ["--adapters", "style,-", "--zipf", "2", "--max-tokens", "2", "--warmup", "3"]
    result = await bench(*arguments, "--json", str(file), "--html", str(page))
    report = json.loads(file.read_text())
    counts = Counter(request.adapter for request in served.runtime.requests[3:])
    assert counts.total() == report["all"]["num_requests"] == 30
    assert counts["style"] > counts[""] > 0
    figures = {each["adapter"]: each for each in report["adapters"]}
    assert {name: each["num_requests"] for name, each in figures.items()} == counts
    assert report["all"]["output_tokens"] == 60
    assert report["max_in_flight"] == 4
    assert 0.01 <= report["all"]["ttft_s"]["p50"] <= report["all"]["e2e_s"]["p50"]
    assert report["settings"]["concurrency"] == 4
    assert report["settings"]["duration_s"] is None
    assert report["settings"]["sampling"]["max_tokens"] == 2
    assert (report["errors"], report["interrupted"]) == ({}, False)
    assert {request.prompt for request in served.runtime.requests} == {"one two", "three four five"}
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["requests", "30,", "0", "failed"]
    assert [line.split()[0] for line in lines[-3:]] == ["all", "style", "(base"]
    assert "<svg" in page.read_text()


async def test_open_loop(served, bench, tmp_path):
    file = tmp_path / "load.json"
    await bench("--rate", "100", "--duration", "0.5", "--chat", "--json", str(file))
    report = json.loads(file.read_text())
    assert 20 <= report["all"]["num_requests"] <= 90
    assert len(served.runtime.requests) == report["all"]["num_requests"]
    assert served.runtime.requests[0].messages[0].role == "user"
    assert len({request.messages for request in served.runtime.requests}) > 4


@pytest.mark.parametrize("chat", [[], ["--chat"]])
async def test_the_same_load_over_http(served, bench, tmp_path, chat):
    file = tmp_path / "load.json"
    arguments = ["--concurrency", "3", "--requests", "12", "--adapters", "style,-", *chat]
    arguments += ["--max-tokens", "2", "--ignore-eos", "--min-tokens", "1", "--top-k", "5"]
    await bench("--http", served.url(""), *arguments, "--json", str(file))
    report = json.loads(file.read_text())
    assert (report["all"]["num_requests"], report["errors"]) == (12, {})
    assert report["all"]["output_tokens"] == 24
    requests = served.runtime.requests
    counts = Counter(request.adapter for request in requests)
    assert {each["adapter"]: each["num_requests"] for each in report["adapters"]} == counts
    assert {request.messages is not None for request in requests} == {bool(chat)}
    assert {request.sampling for request in requests} == {
        SamplingParams(max_tokens=2, min_tokens=1, top_k=5, ignore_eos=True)
    }


async def test_failed_requests_are_counted_and_not_tried_again(served, bench, tmp_path):
    served.runtime.error = Overloaded("the queue is full", retry_after_s=1)
    file = tmp_path / "load.json"
    result = await bench("--concurrency", "2", "--requests", "6", "--json", str(file), status=1)
    assert result.stderr == "kasa: error: 6 requests failed: 6 OVERLOADED\n"
    report = json.loads(file.read_text())
    assert (report["errors"], report["all"]["ttft_s"]) == ({"OVERLOADED": 6}, None)
    assert len(served.runtime.requests) == 6


async def test_a_request_past_its_timeout_has_failed(served, bench):
    served.runtime.delay_s = 5.0
    result = await bench("--concurrency", "1", "--requests", "1", "--timeout", "0.1", status=1)
    assert "1 DEADLINE_EXCEEDED" in result.stderr


async def test_one_kind_of_loop_is_wanted(bench):
    for arguments in ([], ["--rate", "1", "--concurrency", "1"]):
        result = await bench(*arguments, status=2)
        assert "give one of --rate (open loop) and --concurrency" in result.stderr


async def test_adapters_must_be_there(served, bench):
    result = await bench("--rate", "1", "--adapters", "style,broken", status=1)
    assert result.stderr == "kasa: error: no adapter 'broken'; there are ['style']\n"
    assert served.runtime.requests == []


async def test_no_request_in_time_is_an_error(bench):
    result = await bench("--rate", "0.001", "--duration", "0.1", status=1)
    assert "no request came to an end" in result.stderr


def test_without_a_server_it_ends_at_once():
    result = CliRunner().invoke(cli, ["bench", "--rate", "1", "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "is `kasa serve` running there?" in result.stderr


async def test_ctrl_c_reports_what_was_answered(served, tmp_path):
    served.runtime.delay_s = 0.05
    file = tmp_path / "load.json"
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "kasa_runtime.cli", "bench", "--address", served.address]
    command += ["--concurrency", "2", "--duration", "600", "--json", str(file)]
    child = await asyncio.to_thread(subprocess.Popen, command, stdout=terminal, stderr=terminal)
    try:
        while len(served.runtime.requests) < 6:
            await asyncio.sleep(0.05)
        shown = ""
        while "in flight" not in shown:  # the live progress
            shown += (await asyncio.to_thread(os.read, master, 4096)).decode()
        child.send_signal(signal.SIGINT)
        reading = asyncio.create_task(asyncio.to_thread(drain, master))
        assert await asyncio.to_thread(child.wait) == 130
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
    await reading
    os.close(master)
    report = json.loads(file.read_text())
    assert report["interrupted"] and report["all"]["num_requests"] >= 4


def drain(master):
    """Read what comes until the other side is closed."""
    try:
        while os.read(master, 4096):
            pass
    except OSError:
        return
