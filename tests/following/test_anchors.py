"""RocksDB's tests of its secondary instances, and issues of facebook/rocksdb about them, restated.

Each test names what it restates: a test of `db/db_secondary_test.cc` at 0220bb6, or an issue. What is a flush there is
a checkpoint here, a column family a table, the WAL the log, and catching up is `refresh`. Two of these tests are
switched off there (DISABLED_), and one expects reads to fail. test_anchors_queue.py has those of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from following_fixtures import PATH, Primary, all_durable
from store_fixtures import TINY
from two_programs import Recorded, World
from wrapped_files import Wrapped

import kvwal


@pytest.fixture
def primary() -> Iterator[Primary]:
    primary = Primary()
    yield primary
    primary.db.close()


def shows(live: kvwal.Follower, content: dict[bytes, bytes]) -> None:
    """By gets, by scans in both directions, and by its length."""
    assert {key: live.get(key) for key in content} == content
    assert list(live.items()) == sorted(content.items())
    assert list(reversed(live)) == sorted(content, reverse=True)
    assert len(live) == len(content)


def test_open_as_secondary_wal_tailing(primary: Primary) -> None:
    """OpenAsSecondaryWALTailing: newer values come from the log, before and after a checkpoint."""
    db = primary.db
    for n in range(3):
        db.update({b"foo": b"foo_value%d" % n, b"bar": b"bar_value%d" % n})
    all_durable(db)
    with primary.follow() as live:
        shows(live, {b"foo": b"foo_value2", b"bar": b"bar_value2"})
        db.update({b"foo": b"new_foo_value", b"bar": b"new_bar_value"})
        all_durable(db)
        live.refresh()
        shows(live, {b"foo": b"new_foo_value", b"bar": b"new_bar_value"})
        db.checkpoint()
        db.put(b"foo", b"new_foo_value_1")
        all_durable(db)
        live.refresh()
        shows(live, {b"foo": b"new_foo_value_1", b"bar": b"new_bar_value"})


def reopening(writer: Recorded) -> None:
    """A recovery, which makes a new segment, and checkpoints."""
    writer.open()
    for n in range(3):
        writer.put((b"foo", b"%d" % n), durability="os")
    writer.begin = len(writer.steps)
    writer.disk.kill()
    db = writer.open()
    db.checkpoint()
    writer.put((b"foo", b"last"))
    db.close()


def test_switch_to_new_manifest_during_open() -> None:
    """SwitchToNewManifestDuringOpen: the primary is opened anew while a follower begins, at every place of both."""
    writer = Recorded(reopening)
    last = len(writer.steps)
    for start in range(writer.begin, last + 1):
        for at in range(0, 40, 3):
            world = World(writer, lambda n, at=at: last if n == at else 0)  # type: ignore[misc]  # bound in each round
            world.advance(start)
            with world.follow() as live:
                assert dict(live) in writer.states[: live.seqno + 1]


@pytest.mark.parametrize("begins", ["before", "after"])
def test_missing_table_file(primary: Primary, begins: str) -> None:
    """MissingTableFile, MissingTableFileDuringOpen: what it would read has gone. There reads fail until the next
    catching up; here they do not.
    """
    db = primary.db
    db.checkpoint()
    live = primary.follow() if begins == "before" else None
    for n in range(4):
        db.update({b"foo": b"foo_value%d" % n, b"bar": b"bar_value%d" % n})
        db.checkpoint()
    db.compact()
    with live or primary.follow() as live:
        assert live.get(b"foo") in (None, b"foo_value3")
        live.refresh()
        shows(live, {b"foo": b"foo_value3", b"bar": b"bar_value3"})


def test_a_file_that_goes_before_each_read_does_not_fail_it(primary: Primary) -> None:
    """The same of each read, without catching up: what is in memory is from before, and nothing else is missing."""
    db = primary.db
    content = {b"%03d" % n: b"%d" % n * 300 for n in range(100)}
    db.update(content)
    db.checkpoint()
    with primary.follow() as live:
        engine: Any = live.engine
        for key, value in content.items():
            for _ in range(3):
                db.put(b"other", key)
                db.checkpoint()
            engine.state.cache.clear()
            engine._pages.pager.cache.resize(0)
            assert live[key] == value
        assert live.rebases == 100


def test_primary_drop_column_family(primary: Primary) -> None:
    """PrimaryDropColumnFamily: a moment that is held still has the table; the newest one has not."""
    written = primary.db.table("pikachu", str, str)
    written["foo"] = "foo_val_1"
    primary.db.checkpoint()
    with primary.follow() as live:
        table = live.table("pikachu", str, str)
        assert table["foo"] == "foo_val_1"
        with live.snapshot() as then:
            held = written.within(then)
            assert held["foo"] == "foo_val_1"
            primary.db.drop_table("pikachu")
            primary.db.close()
            # It does not move by itself.
            assert table["foo"] == "foo_val_1"
            live.refresh()
            assert held["foo"] == "foo_val_1"
            assert not live.tables()
            assert not list(live.table("pikachu", str, str))


def test_tables_that_are_not_there_or_not_asked_for(primary: Primary) -> None:
    """OpenWithNonExistColumnFamily, OpenWithSubsetOfColumnFamilies: any table may be asked for, at any time."""
    primary.db.table("pikachu", str, str)["foo"] = "bar"
    primary.db.put(b"foo", b"foo_value")
    primary.db.checkpoint()
    with primary.follow() as live:
        assert live[b"foo"] == b"foo_value"
        assert not list(live.table("eevee", str, str))
        assert dict(live.table("pikachu", str, str)) == {"foo": "bar"}


def test_a_table_that_is_made_after_it_began(primary: Primary) -> None:
    """#12821: a column family of which the secondary knows nothing, and a primary that is opened again."""
    primary.db.put(b"key", b"value")
    primary.db.checkpoint()
    with primary.follow() as live:
        primary.db.table("eevee", str, int)["n"] = 1
        all_durable(primary.db)
        live.refresh()
        primary.reopen()
        primary.db.checkpoint()
        live.refresh()
        assert dict(live.table("eevee", str, int)) == {"n": 1}


def test_switch_manifest(primary: Primary) -> None:
    """SwitchManifest, #13297: the primary is opened again, compacts, and is opened again between two refreshes."""
    with primary.follow() as live:
        for n in range(3):
            primary.db.update({b"key%d" % k: b"value_%d" % n for k in range(10)})
            primary.db.checkpoint()
        expected = {b"key%d" % k: b"value_2" for k in range(10)}
        live.refresh()
        shows(live, expected)
        for _ in range(2):
            primary.reopen()
            primary.db.compact()
        primary.reopen()
        live.refresh()
        shows(live, expected)


@pytest.mark.parametrize("again", [Primary.reopen, Primary.restart])
def test_switch_manifest_twice(primary: Primary, again: Callable[[Primary], None]) -> None:
    """SwitchManifestTwice, #7815: two openings between two refreshes, clean or after a kill."""
    with primary.follow() as live:
        primary.db.put(b"0", b"value0")
        primary.db.checkpoint()
        live.refresh()
        assert live[b"0"] == b"value0"
        for n in range(1, 4):
            for _ in range(2):
                again(primary)
                primary.db.checkpoint()
            primary.db.put(b"0", b"value%d" % n)
            all_durable(primary.db)
            live.refresh()
            assert live[b"0"] == b"value%d" % n


def test_switch_wal() -> None:
    """SwitchWAL (switched off there): a checkpoint, and often a new segment, for each key."""
    primary = Primary(**TINY)
    with primary.db as db, primary.follow() as live:
        for k in range(16):
            db.put(b"key%d" % k, b"value%d" % k * 1000)
            db.checkpoint()
            live.refresh()
            shows(live, dict(db))
        assert live.rebases == 16


def test_switch_wal_multi_column_families() -> None:
    """SwitchWALMultiColumnFamilies (switched off there): the same with two tables."""
    primary = Primary(**TINY)
    with primary.db as db, primary.follow() as live:
        other = db.table("pikachu", bytes, bytes)
        for k in range(8):
            for _ in range(2):
                db.put(b"key%d" % k, b"value%d" % k * 500)
                other[b"key%d" % k] = b"value%d" % k * 500
            db.checkpoint()
            live.refresh()
            shows(live, dict(db))
            assert dict(live.table("pikachu", bytes, bytes)) == dict(other)


def test_catch_up_after_flush(primary: Primary) -> None:
    """CatchUpAfterFlush: what is held does not move; what was written over between is never seen."""
    db = primary.db
    with primary.follow() as live, live.snapshot() as first:
        db.update({b"key0": b"value0", b"key1": b"value1"})
        all_durable(db)
        assert not dict(first)
        live.refresh()
        assert not dict(first)
        with live.snapshot() as second:
            scan = live.scan()
            assert next(scan) == (b"key0", b"value0")
            db.update({b"key0": b"value01", b"key1": b"value11"})
            batch = kvwal.WriteBatch()
            batch.put(b"key0", b"new_value0")
            batch.delete(b"key1")
            db.commit(batch)
            db.checkpoint()
            live.refresh()
            assert list(scan) == [(b"key1", b"value1")]
            assert dict(second) == {b"key0": b"value0", b"key1": b"value1"}
        shows(live, {b"key0": b"new_value0"})


def test_inconsistency_at_the_start_and_during_catch_up(primary: Primary) -> None:
    """StartFromInconsistent, InconsistencyDuringCatchUp: damage is said, by the one that begins and by the other."""
    primary.db.put(b"foo", b"value")
    all_durable(primary.db)
    with primary.follow() as live:
        assert live[b"foo"] == b"value"
        primary.db.put(b"bar", b"value1")
        primary.db.checkpoint()
        for slot in (0, 4096):
            primary.disk.flip(f"{PATH}/data", slot + 100)
        with pytest.raises(kvwal.CorruptionError):
            live.refresh()
        with pytest.raises(kvwal.CorruptionError):
            primary.follow()
        assert live[b"foo"] == b"value"


class Hooked(Wrapped):
    """Files of which a listing of the directory is old when it is used."""

    def __init__(self, files: Any, then: Callable[[], None]) -> None:
        super().__init__(files)
        self._then = then

    def open_directory(self, path: str) -> Any:
        return Hooked(self.there.open_directory(path), self._then)

    def names(self) -> list[str]:
        found: list[str] = self.there.names()
        self._then()
        return found


def test_a_wal_that_is_deleted_between_list_and_open() -> None:
    """#5323, #12469: the log that was just listed is gone, each time, while it begins and while it goes on."""
    primary = Primary(**TINY)
    calls: list[None] = []
    with primary.db as db:

        def retire() -> None:
            calls.append(None)
            if len(calls) % 4 == 0:
                db.put(b"key", b"%d" % len(calls) * 3000)
                db.checkpoint()

        with primary.follow(Hooked(primary.disk, retire)) as live:
            for _ in range(20):
                before = live.seqno
                assert live.refresh() >= before
            assert live.rebases > 5
            assert len(primary.disk.open_directory(PATH).names()) < 12, "the log was retired"
            assert dict(live) == {b"key": live[b"key"]}
