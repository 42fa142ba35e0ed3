"""A Python environment per system, built on demand and kept; and models converted with them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
BUILD_TIMEOUT_S = 3600.0
END_TIMEOUT_S = 20.0


class PeerUnavailable(Exception):
    """A system cannot run here, or stopped; the text says why."""


@dataclass(frozen=True)
class Environment:
    """What `<name>.txt` in `folder` pins, without the packages of `without`, which it declares but
    which do not work beside the others, or report to their makers."""

    name: str
    without: tuple[str, ...] = ()
    folder: Path = REQUIREMENTS

    @property
    def requirements(self) -> Path:
        return self.folder / f"{self.name}.txt"

    @property
    def digest(self) -> str:
        """Changes with what is installed."""
        content = self.requirements.read_bytes() + repr((self.without, sys.version)).encode()
        return hashlib.sha256(content).hexdigest()[:8]

    def python(self, cache: Path) -> Path:
        """Its interpreter; the environment is built under `cache` when it is not there yet. Raises
        PeerUnavailable."""
        home = cache / "environments" / f"{self.name}-{self.digest}"
        python, complete, log = home / "bin" / "python", home / "complete", home / "build.log"
        if not complete.exists():
            started_s = time.monotonic()
            print(f"building {home}; minutes, {log} says what it does", flush=True)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            run_logged([sys.executable, "-m", "venv", str(home)], log)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
            run_logged([*pip, "install", "--requirement", str(self.requirements)], log)
            if self.without:
                run_logged([*pip, "uninstall", "--yes", *self.without], log)
            complete.touch()
            print(f"built in {time.monotonic() - started_s:.0f} s", flush=True)
        return python


@dataclass(frozen=True)
class Conversion:
    """The model in a system's own format, made by `module` in `environment`."""

    module: str
    environment: Environment
    precision: str
    suffix: str = ""

    def path(self, cache: Path, model_dir: Path, fingerprint: str) -> Path:
        """The converted model under `cache`, made when it is not there yet. Raises
        PeerUnavailable."""
        format_ = self.module.rpartition(".")[2]
        key = f"{format_}-{self.precision}-{self.environment.digest}-{fingerprint[:12]}"
        converted = cache / "models" / f"{key}{self.suffix}"
        if not converted.exists():
            python = self.environment.python(cache)
            print(f"converting the model to {converted}", flush=True)
            converted.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
                made = Path(scratch) / f"model{self.suffix}"
                run_logged(
                    [
                        str(python),
                        "-m",
                        self.module,
                        str(model_dir),
                        str(made),
                        self.precision,
                    ],
                    converted.with_name(f"{key}.log"),
                )
                made.rename(converted)
        return converted


def run_logged(command: Sequence[str], log: Path) -> None:
    """Append its output to `log`. Raises PeerUnavailable with the end of it."""
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=isolated(),
            start_new_session=True,  # with the compilers that it starts
        )
    try:
        status = process.wait(BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise PeerUnavailable(f"not done in {BUILD_TIMEOUT_S:.0f} s ({log})") from None
    finally:
        end_group(process)
    if status:
        raise PeerUnavailable(f"{last_line(log)} (status {status}; {log})")


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its group, and all that it started: with SIGTERM, on which Python
    frees their shared memory, then with SIGKILL. Idempotent; also when they are stopped."""
    terminate_group(process)
    last_s = time.monotonic() + END_TIMEOUT_S
    while _signal_group(process, 0) and time.monotonic() < last_s:
        time.sleep(0.02)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def terminate_group(process: subprocess.Popen[Any]) -> None:
    """Tell it to end; does not wait."""
    _signal_group(process, signal.SIGTERM)
    _signal_group(process, signal.SIGCONT)


def _signal_group(process: subprocess.Popen[Any], number: int) -> bool:
    """Whether there was any process to get it."""
    process.poll()  # one that has ended is in its group until it is asked for
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def isolated() -> dict[str, str]:
    """Environment variables for a foreign Python: of this repository it sees the sources alone, and
    it reports nothing to anybody."""
    quiet = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
