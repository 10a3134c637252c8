"""A store that is followed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvwal


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def db(path: str) -> Iterator[kvwal.Store]:
    """A writer that does nothing by itself."""
    with kvwal.open(path, background=False) as store:
        yield store
