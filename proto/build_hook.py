"""Generates the Python stubs of `proto/kasa/v1` at every install, so that none are committed.

They go to `gen/kasa/`. An editable install finds them there (`dev-mode-dirs` in pyproject.toml has
`gen`); a wheel takes them in as the top-level package `kasa`. After a change of a .proto file,
install again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Run by hatchling before it collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is "editable" or "standard". A source distribution has no stubs."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        package = generate_stubs(root / "proto", root / "gen")
        if version != "editable":
            build_data["force_include"][str(package)] = "kasa"


def generate_stubs(proto_dir: Path, out_dir: Path) -> Path:
    """Write the package `kasa` of all protos to `out_dir`, in place of an older one."""
    # Imported here: a source distribution is built without grpcio-tools.
    import grpc_tools
    from grpc_tools import protoc

    package = out_dir / "kasa"
    shutil.rmtree(package, ignore_errors=True)
    out_dir.mkdir(exist_ok=True)
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    protos = [str(path) for path in sorted(proto_dir.glob("kasa/v1/*.proto"))]
    includes = [f"--proto_path={proto_dir}", f"--proto_path={well_known}"]
    outputs = [f"--{kind}_out={out_dir}" for kind in ("python", "grpc_python", "pyi")]
    if protoc.main(["protoc", *includes, *outputs, *protos]) != 0:
        raise RuntimeError(f"protoc refused {', '.join(protos)}; its messages are above")
    for folder in (package, package / "v1"):
        (folder / "__init__.py").touch()
        (folder / "py.typed").touch()
    return package
