"""Fixtures for pytest. Put `pytest_plugins = ["kvwal.testing.plugin"]` into the topmost conftest.py."""

from __future__ import annotations

import pytest

from kvwal.testing.disk import SimulatedDisk

__all__ = ["simulated_disk"]


@pytest.fixture
def simulated_disk() -> SimulatedDisk:
    """An empty disk; cut its power with `crash`, let it fail with `fail`."""
    return SimulatedDisk(seed=0)
