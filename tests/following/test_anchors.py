"""What the tests and the open issues of others are about, restated: RocksDB's secondary instances, Chronicle Queue's
tailers, and LMDB's readers. Each test names what it restates.

RocksDB: `db/db_secondary_test.cc` at 0220bb6, a test's name, and issues of facebook/rocksdb. What is a flush there is a
checkpoint here, a column family a table, the WAL the log, and catching up is `refresh`. Two of these tests are switched
off there (DISABLED_), and one expects reads to fail.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import all_durable
from store_fixtures import TINY
from two_programs import Recorded, World

import kvwal
from kvwal.testing import SimulatedDisk

PATH = "/store"


class Primary:
    """A writer that can be opened again, beside a follower of the same store."""

    def __init__(self, **options: Any) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_directory(PATH)
        self._options = {"files": self.disk, "background": False, "keep_history_s": 0, **options}
        self.db = kvwal.open(PATH, **self._options)

    def reopen(self) -> None:
        self.db.close()
        self.db = kvwal.open(PATH, **self._options)

    def die(self) -> None:
        """Killed: nothing says that its last commits are on disk, nor that it has ended."""
        self.db.engine.abandon()

    def restart(self) -> None:
        self.die()
        self.db = kvwal.open(PATH, **self._options)

    def follow(self, files: Any = None) -> kvwal.Follower:
        return kvwal.follow(PATH, files=files or self.disk)


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


# RocksDB's secondary instances.


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


class Hooked:
    """Files of which a listing of the directory is old when it is used."""

    def __init__(self, files: Any, then: Callable[[], None]) -> None:
        self._files = files
        self._then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open_directory(self, path: str) -> Any:
        return Hooked(self._files.open_directory(path), self._then)

    def names(self) -> list[str]:
        found: list[str] = self._files.names()
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


# Chronicle Queue's tailers.


def told(feed: Iterator[kvwal.Change]) -> list[bytes]:
    return [change.key for change in feed]


@pytest.mark.parametrize("end", [Primary.reopen, Primary.restart])
def test_a_file_without_a_mark_at_its_end_is_left_for_the_next_one(end: Callable[[Primary], None]) -> None:
    """#389, #301, #537, #469: a writer that ended without saying so in its last file, one that comes after a rest, and
    a tailer that outlives both.
    """
    primary = Primary(segment_bytes=16 << 10)
    with primary.follow() as live:
        feed = live.changes(follow=True, timeout_s=0)
        expected: list[bytes] = []
        seen: list[bytes] = []
        for n in range(12):
            for k in range(3):
                key = b"%d/%d" % (n, k)
                primary.db.put(key, b"x" * 2500)
                expected.append(key)
            end(primary)
            live.refresh()
            seen += told(feed)
        primary.db.put(b"last", b"")
        primary.db.close()
        live.refresh()
        seen += told(feed)
        assert seen == [*expected, b"last"]
        assert dict(live) == {key: b"x" * 2500 for key in expected} | {b"last": b""}


def test_empty_files_are_passed(primary: Primary) -> None:
    """#1438, #392, #281: several files without a record, before one that has some."""
    db = primary.db
    engine: Any = db.engine
    with primary.follow() as live:
        feed = live.changes(follow=True, timeout_s=0)
        for n in range(4):
            for k in range(2):
                db.put(b"%d/%d" % (n, k), b"")
            for _ in range(3):
                # What an idle writer does with a large file: the next one, which is empty.
                engine.queue.run(lambda: engine._log._roll(0))
                live.refresh()
            # A segment says that all before it is on disk: no mark is needed.
            assert live.seqno == db.last_seqno
            assert told(feed) == [b"%d/0" % n, b"%d/1" % n]
            later = live.changes(after=live.position, follow=True, timeout_s=0)
            db.put(b"later", b"")
            all_durable(db)
            live.refresh()
            assert told(later) == told(feed) == [b"later"]


def rolling(writer: Recorded) -> None:
    with writer.open() as db:
        writer.put((b"0", b""))
        writer.begin = len(writer.steps)
        for n in range(1, 8):
            writer.put((b"%d" % n, b"x" * 6000))
        db.checkpoint()
        writer.put((b"last", b""))


def test_a_file_that_is_being_made_is_not_skipped() -> None:
    """#1509: whatever is there of the next file when the tailer looks, it misses nothing of it."""
    writer = Recorded(rolling)
    keys = [b"%d" % n for n in range(8)] + [b"last"]
    for stride in (1, 2, 3, 5, 7):
        world = World(writer)
        world.advance(writer.begin)
        with world.follow() as live:
            feed = live.changes(after=0, follow=True, timeout_s=0)
            seen: list[bytes] = []
            while world.done < len(writer.steps):
                world.advance(stride)
                live.refresh()
                seen += told(feed)
                assert seen == keys[: len(seen)]
            assert seen == keys


def test_what_a_dead_writer_had_begun_to_make_is_no_file() -> None:
    """#1509: a process that dies while it makes the next file holds nothing up."""
    writer = Recorded(rolling)
    world = World(writer)
    world.advance(writer.begin)
    while not any(name.endswith(".log.tmp") for name in world.disk.open_directory(PATH).names()):
        world.advance(1)
    with world.follow() as live:
        before = live.seqno
        assert told(live.changes(after=0)) == [b"%d" % n for n in range(before)]
        disk = world.disk
        disk.kill()
        with kvwal.open(PATH, files=disk, background=False) as db:
            db.put(b"by the next", b"")
            all_durable(db)
            found = kvwal.follow(PATH, files=disk)
            with found:
                assert found.refresh() == db.last_seqno
                assert b"by the next" in found


def test_a_file_that_is_deleted_under_a_tailer_is_a_gap_that_is_said() -> None:
    """#534, #1368: reading does not go on behind what was deleted as if nothing had been there."""
    primary = Primary(**TINY)
    with primary.db as db, primary.follow() as live:
        for n in range(3):
            db.put(b"%d" % n, b"x" * 5000)
        live.refresh()
        feed = live.changes(after=0, follow=True, timeout_s=0)
        assert next(feed).key == b"0"
        for n in range(3, 20):
            db.put(b"%d" % n, b"x" * 5000)
            db.checkpoint()
        live.refresh()
        seen = [b"0"]
        with pytest.raises(kvwal.FeedGap) as gap:
            seen.extend(change.key for change in feed)
        assert seen == [b"%d" % n for n in range(len(seen))]
        assert gap.value.asked == len(seen)
        assert gap.value.oldest > gap.value.asked
        # From there on there is a seam that is known.
        assert told(live.changes(after=gap.value.oldest)) == [b"%d" % n for n in range(gap.value.oldest, 20)]


def test_a_position_that_a_reset_took_away_is_not_the_beginning(primary: Primary) -> None:
    """#251: a position that was kept elsewhere, of a commit that the machine lost when it was reset."""
    db = primary.db
    db.put(b"kept", b"")
    for n in range(3):
        db.put(b"%d" % n, b"", durability="os")
    position = db.last_seqno
    disk = primary.disk.crash(0)
    with kvwal.open(PATH, files=disk, background=False) as db:
        assert db.last_seqno < position
        db.sync()
        with kvwal.follow(PATH, files=disk) as live:
            assert live.refresh() == 1
            with pytest.raises(kvwal.FeedGap):
                live.changes(after=position)
            assert told(live.changes(after=0)) == [b"kept"]


# LMDB's readers.

READER = """
    import sys, kvwal
    with kvwal.follow(sys.argv[1]) as live, live.snapshot() as then:
        print(len(then), flush=True)
        sys.stdin.read()
"""


def test_readers_that_are_killed_hold_nothing(tmp_path: Path) -> None:
    """`mdb_reader_check`, and the issues that REQUIREMENTS.md lists of slots that killed readers leave."""
    path = tmp_path / "store"
    root = Path(__file__).parent.parent.parent
    with kvwal.open(path, background=False, keep_history_s=0) as db:
        db.update({b"%04d" % n: b"x" * 500 for n in range(500)})
        db.checkpoint()
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(READER), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=root,
            )
            for _ in range(3)
        ]
        names, sizes = sorted(each.name for each in path.iterdir()), []
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"500\n"
        for _ in range(8):
            db.update({b"%04d" % n: b"y" * 500 for n in range(500)})
            db.checkpoint()
            sizes.append(db.stats().data_bytes)
            if len(sizes) == 4:
                for reader in readers:
                    reader.send_signal(signal.SIGKILL)
                    reader.wait()
        # Neither while they read nor after: it does not know of them.
        assert max(sizes[3:]) == sizes[3]
        assert not {each.name for each in path.iterdir()} - set(names) - {f"{n:020}.log" for n in range(99)}
        for reader in readers:
            reader.communicate()
