"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the real smollm2-135m, fetched on first use; for tests marked real_model."""
    from kasa_runtime.base_model.source import resolve

    return resolve("smollm2-135m")
