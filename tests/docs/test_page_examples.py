"""Every example of the README and of docs/, in a shell or in Python, is run, or says why not.

They run in a directory that looks like a checkout, against `kasa serve` with the tiny model in the
place of smollm2-135m and with adapters of the names that the repository ships. Answers of the model
are not compared; errors that a page shows are, word for word.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapter.making import ALL_LINEAR, write_adapter
from click.testing import CliRunner
from page_examples import Block, Command, blocks
from tiny import save_tiny_chat_model

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.base_model import provenance
from kasa_runtime.cli import cli
from kasa_runtime.client import Client
from server.app import Server

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "adapters" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
]
EXAMPLES = {str(path.relative_to(ROOT)): list(blocks(path.read_text("utf-8"))) for path in PAGES}
RUN = [name for name, found in EXAMPLES.items() if any(block.is_run for block in found)]
ADAPTERS = ("e2e", "snips", "tickets")
PLAIN = {"TERM": "dumb", "COLUMNS": "200"}


@dataclass
class Checkout:
    """A directory in which examples run, and the server that they talk to."""

    root: Path
    home: Path
    grpc_address: str
    http_address: str

    def run(self, command: Command) -> None:
        """Run it in bash. It has to succeed, or to fail as the page shows."""
        before = self.copied
        text = command.text.replace("localhost:8080", self.http_address)
        text = text.replace("127.0.0.1:50051", self.grpc_address)
        arguments = ["bash", "-c", f"set -o pipefail\n{text}"]
        done = subprocess.run(
            arguments, cwd=self.root, env=self.environment, capture_output=True, text=True
        )
        if command.output.startswith("kasa: error: "):
            assert (done.returncode, done.stderr.strip()) == (1, command.output)
        else:
            assert done.returncode == 0, f"{command.text}\n{done.stdout}{done.stderr}"
        if self.copied != before:
            self.settle(before)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.root / '.venv' / 'bin'}:{os.environ['PATH']}"
        served = {"KASA_HOME": str(self.home), "KASA_ADDRESS": self.grpc_address}
        return {**os.environ, **PLAIN, **served, "PATH": path}

    @property
    def copied(self) -> set[str]:
        """The adapters that lie in adapters/; an uploaded one does not."""
        return {path.parent.name for path in self.root.glob("adapters/*/adapter_config.json")}

    def settle(self, before: set[str]) -> None:
        """Until the server knows what came to adapters/ and what went since `before`: it sees a
        copy a moment later."""
        after = self.copied
        deadline_s = time.monotonic() + 600
        with Client(self.grpc_address) as client:
            while True:
                served = {info.name for info in client.list_adapters()}
                if after <= served and not (before - after) & served:
                    return
                assert time.monotonic() < deadline_s, (served, before, after)
                time.sleep(0.02)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KASA_HOME in which smollm2-135m is the tiny model."""
    home = tmp_path_factory.mktemp("home")
    model = save_tiny_chat_model(home / "models" / "smollm2-135m", max_position_embeddings=1024)
    provenance.write(model, provenance.Origin("smollm2-135m", "0" * 64), {})
    return home


@pytest.fixture(scope="module")
def root(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout has, as far as examples use it; `M` stands for any model."""
    root = tmp_path_factory.mktemp("checkout")
    model = home / "models" / "smollm2-135m"
    (root / "M").symlink_to(model)
    (root / "kasa.toml").write_text('[runtime]\nadapters_dir = "adapters"\n')
    base = BaseModel(model)
    for seed, name in enumerate(ADAPTERS):
        fingerprint = base.fingerprint
        write_adapter(
            root / "adapters" / name, base, ALL_LINEAR, seed=seed, base_fingerprint=fingerprint
        )
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("kasa", "-m kasa_runtime.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    return root


@pytest.fixture(scope="module")
def checkout(home: Path, root: Path) -> Iterator[Checkout]:
    flags = ["--grpc-port=0", "--http-port=0", "--executor=torch", "--threads=1"]
    flags += ["--poll-interval-s=0.05", "--log-level=warning"]
    command = [sys.executable, "-m", "kasa_runtime.cli", "serve", *flags]
    environment = {**os.environ, "KASA_HOME": str(home)}
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            grpc, http = re.findall(r"(?:grpc|http)=(\S+)", line)
            checkout = Checkout(root, home, grpc, http)
            checkout.settle(before=set())
            yield checkout
        finally:
            process.terminate()


@pytest.fixture
def start_and_stop(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """`kasa serve` as an example has it, but on loopback: it starts, listens and stops."""

    async def at_once(server: Server) -> int:
        assert server.grpc_port
        return 0

    monkeypatch.chdir(root)
    monkeypatch.setattr(Server, "run", at_once)
    settings = {"HOME": home, "GRPC_PORT": 0, "HTTP_PORT": 0, "EXECUTOR": "torch", "THREADS": 1}

    def run(arguments: list[str]) -> None:
        arguments = ["127.0.0.1" if each == "0.0.0.0" else each for each in arguments]
        environment = {f"KASA_{name}": str(value) for name, value in settings.items()}
        result = CliRunner().invoke(cli, arguments, env=environment)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert "listening grpc=" in result.output

    return run


@pytest.mark.parametrize("page", EXAMPLES)
def test_every_block_of_code_says_its_language(page: str) -> None:
    assert not [f"{page}:{block.line}" for block in EXAMPLES[page] if not block.language]


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page: str, checkout: Checkout, start_and_stop) -> None:
    commands = [c for block in EXAMPLES[page] if block.is_run for c in block.commands]
    assert commands
    if any(c.text.startswith("curl ") for c in commands) and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    for command in commands:
        serve = re.match(r"(?:\.venv/bin/)?kasa (serve\b.*)", command.text)
        if serve:
            start_and_stop(serve[1].split())
        else:
            checkout.run(command)


def test_a_reason_stands_right_before_its_block() -> None:
    text = "<!-- not run: takes hours -->\n```bash\na\n```\n\n```bash\nb \\\n  c\n# why\nd\n```\n"
    first, second = blocks(text)
    assert (first.reason, second.reason) == ("takes hours", None)
    assert second.commands == [Command("b \\\n  c"), Command("d")]


def test_a_session_has_commands_and_outputs() -> None:
    content = "$ a \\\n    b\nout\n\n$ c\n"
    assert Block(1, "console", content, None).commands == [
        Command("a \\\n    b", "out"),
        Command("c"),
    ]


def test_an_indented_block_has_no_language() -> None:
    [block] = blocks("text\n\n    $ kasa status\n")
    assert block.language == "" and not block.is_run


def test_python_runs_as_one_command() -> None:
    block = Block(1, "python", "print(1)\n", None)
    assert block.commands == [Command("python - <<'END'\nprint(1)\nEND")]
