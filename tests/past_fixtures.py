"""A store on a simulated disk whose bases lie wherever there is log, and what the tests of its past look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from store_fixtures import TINY

import kvwal
from kvwal.engine import keeping
from kvwal.testing import SimulatedDisk

KEEP: dict[str, Any] = {"keep_history_s": 1e6, "keep_history_bytes": 1 << 30, "history_base_bytes": 0}
# No checkpoint by itself.
LATE = {"memtable_bytes": 1 << 30, "checkpoint_log_bytes": 1 << 30}


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, **LATE, "background": False, "durability": "os", **KEEP, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with opened(disk) as store:
        yield store


@pytest.fixture(autouse=True)
def bases_wherever_there_is_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)


def bases_of(db: kvwal.Store) -> list[int]:
    return [base.seqno for base in db.engine._keeping.bases]


def holds_of(db: kvwal.Store) -> list[str]:
    return sorted(hold.name for hold in db.engine._log.holds())


def works(function: Callable[[], object]) -> bool:
    try:
        function()
    except kvwal.DiskFullError:
        return False
    return True


def fill(db: kvwal.Store, model: list[dict[bytes, bytes]], bases: int) -> None:
    """Commits until the window has this number of bases; notes what there is after each, by seqno."""
    while len(bases_of(db)) < bases:
        number = len(model)
        db.put(b"%d" % (number % 7), b"%d" % number * 400)
        model.append(dict(db))
        if number % 5 == 0:
            db.checkpoint()
        assert number < 2000
