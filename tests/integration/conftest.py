"""What the checks in other processes share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def environment() -> dict[str, str]:
    """This process's variables (offline, one thread, no cache of this machine's), and warnings on stderr."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
