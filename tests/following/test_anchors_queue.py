"""Issues of OpenHFT/Chronicle-Queue about its tailers, and what LMDB's readers leave, restated.

Each test names the issues. What is a cycle, or a file, there is a segment of the log here, and a tailer a follower.
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
from following_fixtures import PATH, Primary, all_durable
from store_fixtures import TINY
from two_programs import Recorded, World

import kvwal


@pytest.fixture
def primary() -> Iterator[Primary]:
    primary = Primary()
    yield primary
    primary.db.close()


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
            found = kvwal.follow(PATH, pin=False, files=disk)
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
        with kvwal.follow(PATH, pin=False, files=disk) as live:
            assert live.refresh() == 1
            with pytest.raises(kvwal.FeedGap):
                live.changes(after=position)
            assert told(live.changes(after=0)) == [b"kept"]


# LMDB's readers.

READER = """
    import sys, kvwal
    with kvwal.follow(sys.argv[1], pin=False) as live, live.snapshot() as then:
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
