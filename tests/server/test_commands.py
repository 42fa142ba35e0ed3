from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from kasa_runtime.cli import cli
from kasa_runtime.commands import serve
from kasa_runtime.commands.flags import build, options
from kasa_runtime.runtime import RuntimeConfig
from server.config import ServerConfig


@pytest.fixture
def kasa(served):
    async def run(*args, status=0, **kwargs):
        arguments = [*args, "--address", served.address]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, **kwargs)
        if status == 0 and result.exception is not None:
            raise result.exception
        assert result.exit_code == status, result.output
        return result.stdout

    return run


async def test_generate(served, kasa):
    out = await kasa("generate", "--adapter", "style", "one two", "--temperature", "0.5")
    assert out == "one two \n"
    request = served.runtime.requests[0]
    assert request.adapter == "style"
    assert request.sampling.temperature == 0.5
    assert request.sampling.max_tokens == 256


async def test_generate_from_standard_input(kasa):
    assert await kasa("generate", "-", input="from a pipe") == "from a pipe \n"


async def test_generate_chat_stream_json(served, kasa):
    out = await kasa("generate", "hi", "--chat", "--system", "be brief", "--stream", "--json")
    chunks = [json.loads(line) for line in out.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == "hello there "
    assert chunks[-1]["finish_reason"] == "stop"
    roles = [message.role for message in served.runtime.requests[0].messages]
    assert roles == ["system", "user"]


async def test_generate_past_its_timeout(served, kasa):
    served.runtime.delay_s = 0.05
    await kasa("generate", "word " * 100, "--timeout", "0.1", status=1)


async def test_list_shows_states_and_reasons(kasa):
    out = await kasa("adapters", "list")
    assert "style" in out and "abc123" in out and "kasa" in out
    assert "broken: adapter_config.json: no r" in out
    listed = json.loads(await kasa("adapters", "list", "--json"))
    assert [info["state"] for info in listed] == ["quarantined", "ready"]


async def test_show(kasa):
    assert "q_proj, v_proj" in await kasa("adapters", "show", "style")
    assert json.loads(await kasa("adapters", "show", "style", "--json"))["rank"] == 8


async def test_upload(kasa, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    out = await kasa("adapters", "upload", str(tmp_path), "--name", "fresh", "--json")
    assert json.loads(out)["name"] == "fresh"


async def test_the_other_verbs(served, kasa):
    for verb, state in (("load", "resident"), ("merge", "merged"), ("unload", "ready")):
        assert json.loads(await kasa("adapters", verb, "style", "--json"))["state"] == state
    await kasa("adapters", "unmerge")
    out = await kasa("adapters", "rollback", "style", "--version", "abc", "--json")
    assert json.loads(out)["version"] == "abc"
    await kasa("adapters", "delete", "style")
    assert [info.name for info in served.runtime.list_adapters()] == ["broken"]


@dataclass(frozen=True)
class Inner:
    num_slots: int = field(default=8, metadata={"help": "adapters in the engine"})
    eager: bool = False


@dataclass(frozen=True)
class Outer:
    model: str
    kind: Literal["a", "b"] = "a"
    where: Path = Path("here")
    limit: float | None = None
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    derived: object = field(default=None, metadata={"flag": False})


def parse(*args):
    import click

    found = []

    @click.command()
    @options(Outer, kind={"help": "changed"})
    def command(**values):
        found.append(build(Outer, values))

    result = CliRunner().invoke(command, args)
    return found[0] if found else result.output


def test_flags_are_derived_from_fields():
    assert parse("--model", "m") == Outer(model="m")
    flags = ("--model=m", "--kind=b", "--where=/x", "--limit=2.5", "--num-slots=3", "--eager")
    assert parse(*flags, "--names=p", "--names=q") == Outer(
        "m", "b", Path("/x"), 2.5, ("p", "q"), Inner(3, True)
    )
    assert "Missing option '--model'" in parse()
    assert "'a', 'b'" in parse("--model=m", "--kind=c")
    help_text = parse("--help")
    assert "adapters in the engine" in help_text and "[default: 8]" in help_text
    assert "changed" in help_text and "--derived" not in help_text


def test_serve_passes_its_flags_on(monkeypatch):
    seen = []

    async def fake_serve(*configs):
        seen.extend(configs)
        return 3

    monkeypatch.setattr("server.app.serve", fake_serve)
    arguments = ["--model", "m", "--grpc-port", "0", "--adapters-dir", "a"]
    result = CliRunner().invoke(serve.command, arguments, env={"KASA_HTTP_PORT": "9"})
    assert result.exit_code == 3
    runtime_config, server_config, _ = seen
    assert isinstance(runtime_config, RuntimeConfig)
    assert (runtime_config.model, runtime_config.adapters_dir) == ("m", Path("a"))
    assert server_config == ServerConfig(grpc_port=0, http_port=9)
