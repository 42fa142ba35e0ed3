"""Who may import whom, read from the source with `ast`; the rules are those of ARCHITECTURE.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "vllm"}
WIRE = {"grpc", "grpc_status", "grpc_health", "grpc_reflection", "google", "kasa"}
SPEAKS_THE_WIRE = {
    f"kasa_runtime/{name}.py"
    for name in ("client", "client_security", "client_upload", "client_wire")
}
# The commands are `main` programs: `kasa serve` starts the server, from the outside.
SERVER_IMPORTERS = {"kasa_runtime/commands/serve.py"}

# Which parts of kasa_runtime a part may import, beside itself and the common ground.
ALLOWED = {
    "adapter": set(),
    "base_model": set(),
    "engine": {"adapter", "base_model"},
    "training": {"adapter", "base_model"},
    "runtime": {"adapter", "base_model", "engine"},
}
COMMON = {"background", "errors", "types", "home", "base_model", "__version__"}
# Programs and clients, which stand on top. All other modules beside runtime.py are part of it.
ON_TOP = {
    "__init__",
    "cli",
    "client",
    "client_channel",
    "client_security",
    "client_upload",
    "client_wire",
    "commands",
    "loadtest",
}


def sources(*folders: str) -> list[str]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def imports_of(source: str) -> Iterator[str]:
    """Dotted names of the modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops_of(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(source)}


def part_of(module: str) -> str:
    """The part of kasa_runtime that a module is: "engine", "runtime", "errors"..."""
    name = module.split(".")[1]
    return name if {name} & (ALLOWED.keys() | COMMON | ON_TOP) else "runtime"


def module_of(source: str) -> str:
    return source.removesuffix(".py").replace("/", ".")


def parts_imported_by(source: str) -> set[str]:
    ours = (name for name in imports_of(source) if name.startswith("kasa_runtime."))
    return {part_of(name) for name in ours}


@pytest.mark.parametrize("source", sources("server"))
def test_server_does_not_import_what_computes(source):
    assert not tops_of(source) & HEAVY


@pytest.mark.parametrize("source", sources("kasa_runtime"))
def test_the_library_does_not_know_the_wire(source):
    if source not in SPEAKS_THE_WIRE:
        assert not tops_of(source) & WIRE
    if source not in SERVER_IMPORTERS:
        assert "server" not in tops_of(source)


@pytest.mark.parametrize(
    "source",
    [source for source in sources("kasa_runtime") if part_of(module_of(source)) in ALLOWED],
)
def test_arrows_go_one_way(source):
    part = part_of(module_of(source))
    assert not parts_imported_by(source) - COMMON - ALLOWED[part] - {part}


@pytest.mark.parametrize("source", sources("server"))
def test_server_knows_the_runtime_and_not_what_is_under_it(source):
    assert not parts_imported_by(source) & {"adapter", "base_model", "engine", "training"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kasa_runtime", {*HEAVY, *WIRE - {"google"}, "numpy", "click", "starlette"}),
        ("kasa_runtime.cli", {*HEAVY, *WIRE - {"google"}, "numpy", "starlette", "rich"}),
        ("kasa_runtime.client", {*HEAVY, "starlette"}),
        ("server.app", {*HEAVY, "opentelemetry"}),
        ("kasa_runtime.commands.serve", {*HEAVY, "grpc", "starlette"}),
        ("kasa_runtime.engine.factory", HEAVY),
        ("kasa_runtime.engine.native.torch_executor", {"kasa_runtime.engine.native.cuda"}),
    ],
)
def test_import_stays_light(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not absent & set(loaded.split())


def test_a_graph_is_compiled_without_torch():
    pytest.importorskip("openvino")
    test_import_stays_light("kasa_runtime.engine.native.openvino.graph", {*HEAVY, "scipy"})
