"""Compiles `lowrank.cpp` for this machine, once: kept under KASA_HOME, for every version of the
source, of OpenVINO, of the compiler and every kind of processor."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import openvino as ov

from kasa_runtime.base_model.cache import build_once
from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home

logger = logging.getLogger(__name__)

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("lowrank.cpp", "product.hpp"))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


def compiled_library() -> Path:
    """The shared library. Raises ModelError where it cannot be built."""
    compiler = find_compiler()
    version = _run([compiler, "--version"])
    parts = (
        SOURCE.read_text(),
        HEADER.read_text(),
        ov.__version__,
        version,
        _processor(),
        " ".join(FLAGS),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    final = kasa_home() / "native" / f"lowrank-{digest}"
    library = final / f"liblowrank{sysconfig.get_config_var('SHLIB_SUFFIX')}"

    def build(to: Path) -> None:
        logger.info("compiling the low-rank operation for this processor, once")
        package = Path(ov.__file__).parent
        names = ("libopenvino.so.*", "libtbb.so.*")
        needed = [path for name in names for path in (package / "libs").glob(name)]
        paths = ("-isystem", package / "include", "-o", to / library.name, SOURCE, *needed)
        _run([compiler, *FLAGS, *map(str, paths)])

    build_once(final, build, is_complete=lambda path: path.is_dir(), say=logger.info)
    return library


def find_compiler() -> str:
    """CXX, or what is found on the path. Raises ModelError where there is none."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise ModelError(
        "the openvino executor compiles one small operation and found no C++ compiler "
        f"({', '.join(COMPILERS)}, or $CXX); install one (Debian: apt install g++), or use "
        "--executor torch"
    )


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.machine())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ModelError(f"{command[0]} does not run ({error}); use --executor torch") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise ModelError(
            f"{command[0]} cannot compile {SOURCE.name} for OpenVINO {ov.__version__} "
            f"({errors[0].strip()}); install a newer compiler, or use --executor torch"
        )
    return done.stdout
