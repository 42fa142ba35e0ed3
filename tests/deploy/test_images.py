"""Dockerfile and compose.yaml, as far as they can be checked without building them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
STAGES = re.findall(r"(?m)^FROM \S+ AS (\S+)$", DOCKERFILE)


def program(name: str) -> str:
    """Its path, beside the interpreter or on PATH; the test is skipped where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def check(*arguments: str) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    check(program("hadolint"), "Dockerfile")


def test_yamllint_finds_nothing() -> None:
    check(program("yamllint"), "--strict", "deploy", "compose.yaml", "mkdocs.yml")


def test_what_is_copied_from_the_checkout_is_let_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", DOCKERFILE)
    names = {name.removeprefix("./") for line in copied for name in line.split()}
    assert names == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in names)


def test_torch_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [torch] = [line for line in project["dependencies"] if line.startswith("torch")]
    assert f"'{torch}'" in DOCKERFILE


def test_every_image_has_an_unprivileged_user_and_a_health_check() -> None:
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert re.search(r"(?m)^USER [1-9]\d*:[1-9]\d*$", runtime)
    assert "HEALTHCHECK" in runtime and not re.search(r"(?m)^USER (root|0)", runtime)
    for image in ("cpu", "gpu"):
        assert re.search(rf"(?m)^FROM runtime AS {image}$", DOCKERFILE)


def test_compose_builds_a_stage_and_leaves_time_to_drain() -> None:
    server = COMPOSE["services"]["kasa"]
    assert server["build"]["target"] in STAGES
    grace_s = float(server["stop_grace_period"].removesuffix("s"))
    assert grace_s >= float(server["environment"]["KASA_DRAIN_S"]) + 10


def test_compose_opens_ports_on_loopback_alone() -> None:
    services = COMPOSE["services"].values()
    ports = [port for service in services for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_named_volumes_are_declared() -> None:
    mounts = [m.split(":")[0] for s in COMPOSE["services"].values() for m in s["volumes"]]
    assert {name for name in mounts if not name.startswith(".")} == set(COMPOSE["volumes"])
