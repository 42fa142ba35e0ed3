from __future__ import annotations

import asyncio
import json
import re
import socket
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner
from fake_runtime import MODEL, STYLE
from kasa.v1 import adapters_pb2

from kasa_runtime.cli import cli
from kasa_runtime.commands import adapters, serve
from kasa_runtime.commands.flags import build, options
from kasa_runtime.errors import Overloaded
from kasa_runtime.runtime import RuntimeConfig
from kasa_runtime.types import StructuredOutput
from server.config import ServerConfig


@pytest.fixture
def kasa(served):
    async def run(*args, status=0, **kwargs):
        """What it prints: on standard output, or on standard error if it should fail."""
        arguments = [*args, "--address", served.address]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, **kwargs)
        assert result.exit_code == status, (result.output, result.exception)
        if status:
            assert result.stdout == ""
        return result.stderr if status else result.stdout

    return run


async def test_generate(served, kasa):
    out = await kasa("generate", "--adapter", "style", "one two", "--temperature", "0.5")
    assert out == "one two \n"
    request = served.runtime.requests[0]
    assert request.adapter == "style"
    assert request.sampling.temperature == 0.5
    assert request.sampling.max_tokens == 256
    assert request.cache_salt == ""


async def test_generate_with_a_cache_salt(served, kasa):
    await kasa("generate", "one two", "--cache-salt", "tenant")
    assert served.runtime.requests[0].cache_salt == "tenant"


async def test_generate_with_log_probabilities_of_the_prompt(served, kasa):
    out = await kasa("generate", "one two", "--prompt-logprobs", "1", "--json")
    second = {"token_id": 1, "logprob": -0.25, "top": [[1, -0.25]]}
    assert json.loads(out)["prompt_logprobs"] == [None, second]
    await kasa("generate", "one two")
    assert [request.prompt_logprobs for request in served.runtime.requests] == [1, None]


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (("--json-schema", ' {"type": "null"}'), StructuredOutput(json_schema=' {"type": "null"}')),
        (("--json-schema", "@schema.json"), StructuredOutput(json_schema="[from a file]")),
        (("--regex", ""), StructuredOutput(regex="")),
        (("--choice", "a", "--choice", "b"), StructuredOutput(choice=("a", "b"))),
        (("--grammar", "@schema.json"), StructuredOutput(grammar="[from a file]")),
        ((), None),
    ],
)
async def test_generate_with_a_form(served, kasa, tmp_path, flags, want):
    (tmp_path / "schema.json").write_text("[from a file]")
    flags = [flag.replace("@", f"{tmp_path}/") for flag in flags]
    await kasa("generate", "one two", *flags)
    assert served.runtime.requests[0].structured_output == want


async def test_a_form_that_cannot_be_read_or_is_two(kasa):
    assert "nowhere.json" in await kasa("generate", "a", "--json-schema", "nowhere.json", status=2)
    both = await kasa("generate", "a", "--regex", "a", "--choice", "b", status=1)
    assert "must be one of json_schema, regex, choice, grammar, got regex and choice" in both


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
    out = await kasa("generate", "word " * 100, "--timeout", "0.1", "--json", status=1)
    assert json.loads(out)["error"]["reason"] == "DEADLINE_EXCEEDED"


async def test_list_shows_states_and_reasons(kasa):
    out = await kasa("adapters", "list")
    assert "style" in out and "abc123" in out and "kasa" in out
    assert "broken: adapter_config.json: no r" in out
    listed = json.loads(await kasa("adapters", "list", "--json"))
    assert [info["state"] for info in listed] == ["quarantined", "ready"]


async def test_show(kasa):
    assert "q_proj, v_proj" in await kasa("adapters", "show", "style")
    assert json.loads(await kasa("adapters", "show", "style", "--json"))["rank"] == 8


async def test_versions(kasa):
    header, current, older = (await kasa("adapters", "versions", "style")).splitlines()
    columns = ["version", "created", "state", "tier", "size", "in", "flight"]
    assert header.split() == columns
    assert current.split()[:2] == ["current", "abc123"]
    assert current.split()[-5:] == ["ready", "disk", "4.0", "KiB", "2"]
    assert older.split()[0] == "0ld"
    listed = json.loads(await kasa("adapters", "versions", "style", "--json"))
    assert [version["current"] for version in listed] == [True, False]
    assert listed[1] == {
        "version": "0ld",
        "current": False,
        "size_bytes": 1024,
        "create_time": 0.5,
        "state": "ready",
        "tier": "disk",
        "in_flight": 0,
    }


async def test_upload(kasa, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    out = await kasa("adapters", "upload", str(tmp_path), "--name", "fresh", "--json")
    assert json.loads(out)["name"] == "fresh"


async def test_the_other_verbs(served, kasa):
    for verb, state in (("load", "resident"), ("merge", "merged"), ("unload", "ready")):
        assert json.loads(await kasa("adapters", verb, "style", "--json"))["state"] == state
    assert await kasa("adapters", "unmerge") == "the base weights are back\n"
    assert json.loads(await kasa("adapters", "unmerge", "--json")) == {"merged": ""}
    out = await kasa("adapters", "rollback", "style", "--version", "abc", "--json")
    assert json.loads(out)["version"] == "abc"
    assert json.loads(await kasa("adapters", "delete", "style", "--json")) == {"deleted": "style"}
    assert [info.name for info in served.runtime.list_adapters()] == ["broken"]


async def test_tables_are_aligned_and_no_line_is_folded(served, kasa):
    served.runtime.put(replace(STYLE, name="long-" * 12 + "x", version="f" * 64))
    lines = (await kasa("adapters", "list")).splitlines()
    assert len(lines) == 5  # header, three adapters, why one is in quarantine
    states = ("state", "quarantined", "ready", "ready")
    assert len({line.index(s) for line, s in zip(lines[:4], states, strict=True)}) == 1
    shown = await kasa("adapters", "show", "long-" * 12 + "x")
    assert any(line.endswith("f" * 64) for line in shown.splitlines())


async def test_status(served, kasa):
    status = json.loads(await kasa("status", "--json"))
    assert status == {
        "address": served.address,
        "model": asdict(MODEL),
        "adapters": {"quarantined": 1, "ready": 1},
    }
    lines = (await kasa("status")).splitlines()
    assert any(line.split() == ["model", "fake"] for line in lines)
    assert lines[-1].endswith("1 quarantined, 1 ready")


ON_AN_ADAPTER = ("show", "versions", "delete", "rollback", "load", "unload", "merge")


@pytest.mark.parametrize("verb", ON_AN_ADAPTER)
async def test_an_unknown_adapter_is_an_error_for_people_and_for_programs(kasa, verb):
    line = await kasa("adapters", verb, "nobody", status=1)
    assert line == "kasa: error: no adapter 'nobody'\n"
    error = json.loads(await kasa("adapters", verb, "nobody", "--json", status=1))["error"]
    assert error == {
        "reason": "ADAPTER_NOT_FOUND",
        "message": "no adapter 'nobody'",
        "adapter": "nobody",
    }


async def test_an_error_says_which_field_and_when_to_retry(served, kasa):
    error = json.loads(await kasa("adapters", "load", "No", "--json", status=1))["error"]
    assert (error["reason"], error["field"]) == ("INVALID_REQUEST", "name")
    served.runtime.error = Overloaded("the queue is full", retry_after_s=1.5)
    error = json.loads(await kasa("generate", "hi", "--json", status=1))["error"]
    assert (error["reason"], error["retry_after_s"]) == ("OVERLOADED", 1.5)


async def test_a_server_that_is_not_there_is_a_failed_request(silent_address):
    arguments = ["adapters", "list", "--address", silent_address, "--json"]
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    assert result.exit_code == 1
    error = json.loads(result.stderr)["error"]
    assert error["reason"] == "UNREACHABLE"
    assert "is `kasa serve` running there?" in error["message"]


@pytest.fixture
def silent_address():
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


async def test_wrong_usage_has_a_status_of_its_own(kasa):
    for arguments in (["adapters", "show"], ["adapters", "list", "--colour"], ["adapter"]):
        assert "Usage: " in await kasa(*arguments, status=2)


def test_every_method_of_the_adapter_service_has_a_command():
    methods = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods
    named_otherwise = {"GetAdapter": "show", "ListAdapterVersions": "versions"}
    names = {
        named_otherwise.get(method.name, re.match("[A-Z][a-z]+", method.name)[0].lower())
        for method in methods
    }
    assert names <= set(adapters.command.commands)
    assert len(names) == len(methods) == 10


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
    monkeypatch.setattr(serve, "begin", lambda config: config.model)
    arguments = ["--model", "m", "--grpc-port", "0", "--adapters-dir", "a"]
    arguments += ["--adapter-limit", "style=4:200", "--adapter-limit", "few=1"]
    result = CliRunner().invoke(serve.command, arguments, env={"KASA_HTTP_PORT": "9"})
    assert result.exit_code == 3
    runtime_config, server_config, begun = seen
    assert begun == "m"
    assert isinstance(runtime_config, RuntimeConfig)
    assert (runtime_config.model, runtime_config.adapters_dir) == ("m", Path("a"))
    assert runtime_config.limits.adapter_limit == ("style=4:200", "few=1")
    assert server_config == ServerConfig(grpc_port=0, http_port=9)


@pytest.mark.parametrize(
    ("name", "said"),
    [("adpters", "no command 'adpters'; did you mean adapters?"), ("xyz", "no command 'xyz'\n")],
)
def test_an_unknown_command_is_told_near_names(name, said):
    result = CliRunner().invoke(cli, [name, "list"])
    assert result.exit_code == 2
    assert said in result.stderr
