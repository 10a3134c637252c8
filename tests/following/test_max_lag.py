"""Reads with a bound of age beside a writer that commits all the time, so that no look finds all of it on disk."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import PATH, WRITES
from store_fixtures import DEADLINE_S
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal.following import waiting
from kvwal.following.waiting import Freshness
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk

LAG_S = 1.0
RUN_S = 1.5
# Whether it has a pin, how the writer flushes, how long it pauses, and how it ends now and then.
BUSY: list[Any] = [
    (False, "interval", 0.01, ""),
    (True, "interval", 0.01, "is killed"),
    (True, "interval", 0.0, ""),
    (False, "interval", 0.0, "is killed"),
    (False, "commit", 0.01, "closes"),
    (True, "commit", 0.01, ""),
    (True, "commit", 0.0, "is killed"),
    (False, "commit", 0.0, ""),
]


class Busy:
    """A writer that puts numbers in a thread, and knows when each put had returned."""

    def __init__(self, path: Path, durability: Any, pause_s: float, ends: str) -> None:
        self._options: Any = {"durability": durability, "segment_bytes": 16 << 10}
        self._path, self._pause_s, self._ends = path, pause_s, ends
        self._db = kvwal.open(path, **self._options)
        self._db[b"n"] = b"0"
        self.made_s = [time.monotonic()]
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop:
            self._db[b"n"] = b"%d" % len(self.made_s)
            self.made_s.append(time.monotonic())
            if self._ends and len(self.made_s) % 20 == 0:
                if self._ends == "closes":
                    self._db.close()
                else:
                    self._db.engine.abandon()
                self._db = kvwal.open(self._path, **self._options)
            time.sleep(self._pause_s)

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        self._db.close()


@pytest.mark.parametrize(("pin", "durability", "pause_s", "ends"), BUSY)
def test_a_busy_writer_makes_no_read_stale(
    tmp_path: Path, pin: bool, durability: str, pause_s: float, ends: str
) -> None:
    path = tmp_path / "store"
    with Busy(path, durability, pause_s, ends) as busy, kvwal.follow(path, pin=pin, max_lag_s=LAG_S) as live:
        end_s = time.monotonic() + RUN_S
        while (began_s := time.monotonic()) < end_s:
            shown = int(live[b"n"])
            # The next one was made no longer ago than that.
            assert shown + 1 >= len(busy.made_s) or busy.made_s[shown + 1] > began_s - LAG_S
            time.sleep(0.005)


def test_a_read_that_comes_seldom_waits_for_what_is_about_to_be_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A flush may take longer than a read waits otherwise.
    monkeypatch.setattr(waiting, "_MOST_WAIT_S", DEADLINE_S)
    path, most_s = tmp_path / "store", 2.0
    with Busy(path, "interval", 0.01, "") as busy, kvwal.follow(path, pin=False, max_lag_s=most_s) as live:
        for _ in range(2):
            time.sleep(1.2 * most_s)
            began_s = time.monotonic()
            shown = int(live[b"n"])
            assert shown + 1 >= len(busy.made_s) or busy.made_s[shown + 1] > began_s - most_s


def test_a_look_that_ends_in_a_record_that_was_not_there_as_it_began_tells_what_there_was() -> None:
    """Each read of the log is followed by a commit: more than any look can pass."""
    disk = SimulatedDisk()
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"n"] = b"0"
        made = [0]

        class Chased(Wrapped):
            def pread(self, size: int, offset: int) -> bytes:
                found: bytes = self.there.pread(size, offset)
                if self.name.endswith(".log") and 0 < made[0] < 1000:
                    made[0] += 1
                    db[b"n"] = b"%d" % made[0]
                return found

        files: Any = WrappedFiles(disk, Chased)
        with kvwal.follow(PATH, pin=False, max_lag_s=3600, files=files) as live:
            made[0] = 1
            assert int(live[b"n"]) > 0
            assert made[0] < 1000


def test_where_waiting_does_not_help_the_next_read_does_not_wait(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path, pin=False, max_lag_s=3600) as live:
        db.put(b"n", b"0", durability="os")
        looks: list[int] = []
        freshness: Any = live.engine.progress.freshness  # type: ignore[attr-defined]  # it follows
        look = freshness._refresh
        freshness._refresh = lambda: (looks.append(1), look())
        for least, most in ((2, 10**6), (1, 1)):
            with pytest.raises(kvwal.StaleError, match="at no time known"):
                live.get(b"n")
            assert least <= len(looks) <= most
            looks.clear()


def test_of_threads_that_read_at_once_each_waits_for_what_is_about_to_be_on_disk() -> None:
    together = threading.Barrier(3)
    looks = Counter[int]()
    failures: list[BaseException] = []

    def look() -> None:
        looks[threading.get_ident()] += 1
        together.wait(DEADLINE_S)
        if looks[threading.get_ident()] == 2:
            freshness.found_all(time.monotonic(), Seqno(1))
            freshness.shows(Seqno(1))

    def read() -> None:
        try:
            freshness.ensure()
        except (kvwal.StaleError, threading.BrokenBarrierError) as error:
            failures.append(error)
            together.abort()

    freshness = Freshness(look)
    freshness.max_lag_s = 3600
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not failures
    assert [*looks.values()] == [2, 2, 2]


def test_what_a_recovery_cut_off_is_not_waited_for() -> None:
    freshness = Freshness(lambda: None)
    freshness.max_lag_s = math.inf
    freshness.found_all(1.0, Seqno(9))
    freshness.shows(Seqno(4))
    assert not freshness.holds()
    # Numbers up to 9 are not there any more: those that were before 1.0, and still are, end at 5.
    freshness.found_all(2.0, Seqno(5))
    freshness.shows(Seqno(5))
    assert freshness._current_s == 1.0
    assert freshness.holds()
    freshness.found_all(3.0, Seqno(5))
    freshness.shows(Seqno(5))
    assert freshness._current_s == 3.0
