"""Shared by all tests: eight virtual CPU devices, and the folder of the golden data."""

import os
from pathlib import Path

import chex
import pytest

ROOT = Path(__file__).resolve().parent.parent

chex.set_n_cpu_devices(8)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The root of the golden and real data; each test skips only where its own folder is absent."""
    return Path(os.environ.get("GGEM_SHARED", ROOT / ".." / "shared")).resolve()
