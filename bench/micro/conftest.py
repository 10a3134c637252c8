"""A store for the micro-benchmarks, and short measurements: the whole suite takes under a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.data import key, pairs

COUNT = 20_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every one is measured for a fifth of a second."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=1000))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A store without sync, all of its keys in the pages, reopened. Only read."""
    import kvwal

    path: Path = tmp_path_factory.mktemp("micro") / "store"
    _fill(path)
    with kvwal.open(path, durability="os") as db:
        yield db


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Any]:
    """The same for one benchmark alone, which writes to it."""
    import kvwal

    _fill(tmp_path / "store")
    with kvwal.open(tmp_path / "store", durability="os") as db:
        yield db


def _fill(path: Path) -> None:
    import kvwal

    with kvwal.open(path, durability="os") as db:
        db.update(pairs(list(range(COUNT)), 100))
        db.checkpoint()


@pytest.fixture(scope="module")
def keys() -> list[bytes]:
    """All keys of `filled`."""
    return [key(n) for n in range(COUNT)]
