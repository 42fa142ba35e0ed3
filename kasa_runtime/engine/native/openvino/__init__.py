"""Importing OpenVINO would tell its makers that it is used; not from a server."""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails
