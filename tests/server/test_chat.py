from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from fake_runtime import MODEL

from kasa_runtime.cli import cli
from kasa_runtime.errors import Overloaded
from kasa_runtime.types import ChatMessage


@pytest.fixture
def chat(served):
    async def run(*lines, arguments=(), status=0):
        """What it prints when these lines are typed in, and what the runtime was asked."""
        arguments = ["chat", *arguments, "--address", served.address]
        typed = "".join(f"{line}\n" for line in lines)
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, input=typed)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return run


def said(request):
    return [(message.role, message.content) for message in request.messages]


async def test_what_was_said_is_sent_along(served, chat):
    result = await chat("one", "", "two", arguments=["--system", "be brief", "--max-tokens", "9"])
    assert result.stdout == "hello there \n" * 2
    first, second = served.runtime.requests
    assert said(first) == [("system", "be brief"), ("user", "one")]
    assert said(second) == [*said(first), ("assistant", "hello there "), ("user", "two")]
    assert second.sampling.max_tokens == 9


async def test_adapter_is_switched_and_what_was_said_stays(served, chat):
    lines = ("one", "/adapter style", "two", "/adapter nobody", "three", "/adapter", "four")
    result = await chat(*lines)
    assert [request.adapter for request in served.runtime.requests] == ["", "style", "style", ""]
    assert len(served.runtime.requests[-1].messages) == 7
    assert result.stderr == "kasa: error: no adapter 'nobody'\n"


async def test_reset_forgets_all_but_the_system_message(served, chat):
    await chat("one", "/reset", "two", arguments=["--system", "be brief", "--adapter", "style"])
    assert said(served.runtime.requests[1]) == [("system", "be brief"), ("user", "two")]
    assert served.runtime.requests[1].adapter == "style"


async def test_what_failed_was_not_said_and_the_session_goes_on(served, chat):
    generate = served.runtime.generate

    def fail_on_two(request):
        two = request.messages[-1] == ChatMessage("user", "two")
        served.runtime.error = Overloaded("the queue is full", retry_after_s=1) if two else None
        return generate(request)

    served.runtime.generate = fail_on_two
    result = await chat("one", "two", "three")
    assert result.stdout == "hello there \n" * 2
    assert result.stderr == "kasa: error: the queue is full\n"
    roles_and_words = [("user", "one"), ("assistant", "hello there "), ("user", "three")]
    assert said(served.runtime.requests[-1]) == roles_and_words


async def test_unknown_commands_are_not_sent(served, chat):
    result = await chat("/adapters", "/help")
    assert "no command /adapters; there are /adapter, /reset, /help" in result.stderr
    assert "Ctrl-D leaves" in result.stdout
    assert served.runtime.requests == []


async def test_a_model_without_a_template_is_refused(served, chat):
    served.runtime.model = replace(MODEL, has_chat_template=False)
    result = await chat("one", status=1)
    assert "fake has no chat template; try `kasa generate`" in result.stderr


async def read_until(master: int, wanted: str) -> str:
    found = ""
    while wanted not in found:
        found += (await asyncio.to_thread(os.read, master, 4096)).decode()
    return found


async def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(served):
    served.runtime.delay_s = 0.2
    served.runtime.answer = "word " * 1000
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "kasa_runtime.cli", "chat", "--address", served.address]
    child = await asyncio.to_thread(
        subprocess.Popen, command, stdin=terminal, stdout=terminal, stderr=terminal
    )
    try:
        await read_until(master, "> ")
        os.write(master, b"one\n")
        await read_until(master, "word word ")
        child.send_signal(signal.SIGINT)
        await read_until(master, "stopped")
        await served.runtime.ended.wait()
        assert not served.runtime.running
        served.runtime.answer = "good"
        os.write(master, b"two\n")
        await read_until(master, "good \r\n> ")
        os.write(master, b"\x04")
        assert await asyncio.to_thread(child.wait) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)
        os.close(terminal)
    stopped = served.runtime.requests[1].messages[1]
    assert stopped.role == "assistant"
    assert 2 <= len(stopped.content.split()) < 1000


async def test_generate_streams_to_a_terminal(served):
    served.runtime.delay_s = 0.2
    served.runtime.answer = "word " * 1000
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "kasa_runtime.cli", "generate", "--address", served.address]
    child = await asyncio.to_thread(
        subprocess.Popen, [*command, "--chat", "one"], stdout=terminal, stderr=terminal
    )
    try:
        await read_until(master, "word word ")
        assert served.runtime.running
    finally:
        child.kill()
        child.wait()
        os.close(master)
        os.close(terminal)
