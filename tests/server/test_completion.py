"""What a shell gets to complete, from the very commands that it runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kasa_runtime.cli import cli

KASA = (sys.executable, "-W", "error", "-m", "kasa_runtime.cli")


def run(*command: str, **environment: str) -> str:
    """Standard output of a command that must say nothing on standard error."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    assert done.stderr == ""
    return done.stdout


def completed(words: str, **environment: str) -> list[str]:
    """What may stand for the last of the words."""
    asked = {"_KASA_COMPLETE": "bash_complete", "COMP_WORDS": words}
    asked |= {"COMP_CWORD": str(words.count(" ")), **environment}
    result = CliRunner().invoke(cli, [], prog_name="kasa", env=asked)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kasa st", ["status"]),
        ("kasa adapters un", ["unload", "unmerge"]),
        ("kasa generate --cache", ["--cache-salt"]),
        ("kasa completion ", ["bash", "zsh", "fish"]),
        ("kasa model info smol", ["smollm2-135m"]),
        ("kasa serve --model smol", ["smollm2-135m"]),
        ("kasa adapters verify x --model smol", ["smollm2-135m"]),
        ("kasa model info ./some", ["./some"]),
    ],
)
def test_commands_flags_and_models(words, expected):
    assert completed(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        *(f"kasa adapters {verb} st" for verb in ("show", "delete", "rollback", "load", "unload")),
        "kasa adapters merge st",
        "kasa generate --adapter st",
    ],
)
async def test_names_are_those_of_the_server(served, words):
    names = await asyncio.to_thread(completed, words, KASA_ADDRESS=served.address)
    assert names == ["style"]


async def test_names_of_the_server_that_the_command_names(served):
    words = f"kasa adapters show --address {served.address} "
    assert await asyncio.to_thread(completed, words) == ["broken", "style"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "junk::::", "nobody.invalid:50051", "''"])
def test_without_a_server_there_are_no_names_and_no_complaints(address):
    assert completed("kasa adapters show ", KASA_ADDRESS=address) == []
    assert completed(f"kasa adapters show --address {address} ") == []


def test_a_server_that_does_not_answer_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert completed("kasa adapters show ", KASA_ADDRESS=address) == []


async def test_bash_completes_with_the_script(served, tmp_path):
    kasa = tmp_path / "kasa"
    kasa.write_text(f'#!/bin/sh\nexec {sys.executable} -m kasa_runtime.cli "$@"\n')
    kasa.chmod(0o755)
    script = (
        'eval "$(kasa completion bash)"; complete -p kasa; '
        "COMP_WORDS=(kasa adapters show st); COMP_CWORD=3; "
        '_kasa_completion kasa; echo "${COMPREPLY[@]}"'
    )
    environment = {
        "KASA_ADDRESS": served.address,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    lines = await asyncio.to_thread(run, "bash", "-c", script, **environment)
    assert lines.splitlines() == ["complete -o nosort -F _kasa_completion kasa", "style"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_script(shell, tmp_path):
    script = run(*KASA, "completion", shell)
    assert f"_KASA_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        run(shell, "-n", str(tmp_path / "script"))
