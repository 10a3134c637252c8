"""T11: generations that no data asks for keep their distance, since a reader without a lock loses its own by two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import wait_until

import kvwal
from kvwal.events import Checkpoint, Listener
from kvwal.testing import SimulatedDisk

REST_S = 0.15


class Flips(Listener):
    """When each generation was made."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def checkpoint(self, event: Checkpoint) -> None:
        self.at_s.append(time.monotonic())

    def distances_s(self) -> list[float]:
        return [after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False)]


def test_an_idle_store_compacts_by_one_generation_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.engine.checkpoint.REST_S", REST_S)
    monkeypatch.setattr("kvwal.engine.background._IDLE_S", REST_S)
    flips = Flips()
    keys = [b"%06d" % (n * 7919 % 20_000) for n in range(20_000)]
    with kvwal.open(tmp_path / "db", durability="os", keep_history_bytes=0, listeners=[flips]) as db:
        for first in range(0, 20_000, 2_000):
            db.update((key, b"v" * 100) for key in keys[first : first + 2_000])
            db.checkpoint()
        # It stays in the memtable, and takes a generation of its own.
        db.put(b"last", b"commit")
        before, size = len(flips.at_s), db.stats().data_bytes
        with kvwal.follow(tmp_path / "db", pin=False) as live, live.snapshot() as then:
            engine: Any = live.engine
            began_s = time.monotonic()
            with pytest.raises(kvwal.SnapshotTooOld):
                while True:
                    # What is not in memory is asked for.
                    engine.state.cache.clear()
                    engine._pages.pager.cache.resize(0)
                    assert then.get(keys[0]) == b"v" * 100
            assert time.monotonic() - began_s > REST_S
            # The data, three to move what lies at the end, and the same again as long as that helps.
            wait_until(lambda: len(flips.at_s) >= before + 4 and db.stats().data_bytes < size)
            assert min(flips.distances_s()[before - 1 :]) >= 0.9 * REST_S
            live.refresh()
            assert len(live) >= 20_000


def test_a_close_leaves_the_last_checkpoint_alone_for_a_while() -> None:
    disk = SimulatedDisk()
    disk.make_directory("/store")
    options = {"files": disk, "background": False}

    def generation_after(rest_s: float, value_bytes: int, count: int = 3) -> int:
        with kvwal.open("/store", **options) as db:  # type: ignore[arg-type]  # the options are of several types
            db.checkpoint()
            db.put(b"before", bytes(1000))
            db.checkpoint()
            before = db.stats().generation
            for n in range(count):
                db.put(b"%d" % n, bytes(value_bytes))
            disk.pass_time(rest_s)
        with kvwal.open("/store", "r", **options) as db:  # type: ignore[arg-type]  # as above
            assert len(db.get(b"0", b"")) == value_bytes
            return db.stats().generation - before

    assert generation_after(0, 150_000) == 0
    # Another process, too: it is the generation that counts.
    assert generation_after(1.1, 150_000) == 1
    assert generation_after(1.1, 50_000) == 0
    # Opening is not to wait for the replay of more than that.
    assert generation_after(0, 1_000_000) == 1
