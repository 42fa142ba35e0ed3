"""Certificates for tests, made by the program `openssl`."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    def replace_by(self, other: Pair) -> None:
        shutil.copy(other.key, self.key)
        shutil.copy(other.cert, self.cert)


class Authority:
    """Signs certificates for 127.0.0.1 and localhost."""

    def __init__(self, directory: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the program openssl")
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self._pair = self._make(name, "-addext", "basicConstraints=critical,CA:TRUE")
        self.cert = self._pair.cert

    def sign(self, name: str) -> Pair:
        signer = ("-CA", self._pair.cert, "-CAkey", self._pair.key)
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        return self._make(name, *signer, "-addext", names)

    def _make(self, name: str, *arguments: object) -> Pair:
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        files = ("-keyout", pair.key, "-out", pair.cert)
        command = [
            "openssl",
            "req",
            "-x509",
            *curve,
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
        ]
        done = subprocess.run([*command, *files, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return pair
