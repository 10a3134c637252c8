"""What a look at the newest segment costs, and what is under way while it is looked at."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

import pytest
from following_fixtures import PATH, all_durable, offset_of
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal.files.names import segment_name
from kvwal.log import watch
from kvwal.log.reader import gather
from kvwal.log.segment import list_segments
from kvwal.testing import SimulatedDisk


class Counted(Wrapped):
    """A file of which is counted what is read of the log."""

    bytes_read = 0

    def pread(self, size: int, offset: int) -> bytes:
        found: bytes = self.there.pread(size, offset)
        if self.name.endswith(".log"):
            Counted.bytes_read += len(found)
        return found


def bytes_of(call: Callable[[], object]) -> int:
    Counted.bytes_read = 0
    call()
    return Counted.bytes_read


LARGE = 2 << 20
# One look at the end, one further behind, the header page; and where something is there, twice more at the end.
MOST_BYTES = (16 + 64 + 4) << 10
MOST_BYTES_DUE = MOST_BYTES + (2 * 16 + 5 << 10)


def with_large_record() -> tuple[SimulatedDisk, str, int, bytes]:
    """A store before its last record, which is large; where that begins, and its segment with it."""
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    with kvwal.open(PATH, files=disk, background=False, segment_bytes=16 << 20) as db:
        db.put(b"first", b"1")
        db.put(b"large", b"x" * LARGE)
        db.put(b"second", b"2")
        all_durable(db)
        found, begin = disk.copy(), offset_of(db)
        name = f"{PATH}/{segment_name(list_segments(disk.open_directory(PATH))[-1])}"
        db.put(b"large", b"y" * (LARGE - 10_000))
        assert begin + LARGE > offset_of(db) > begin + LARGE - 10_000, "it is in the same segment"
        return found, name, begin, disk.read(name)


@pytest.mark.parametrize("cut", [100, LARGE // 2, LARGE - 20_000, None])
def test_a_torn_tail_is_waited_for_at_a_bounded_cost(cut: int | None) -> None:
    """However large the record that a writer which died left in part; or with all of its bytes and a wrong one."""
    disk, name, begin, whole = with_large_record()
    data = bytearray(whole)
    if cut is None:
        data[begin + LARGE // 2] ^= 1
    else:
        data[begin + cut :] = bytes(len(data) - begin - cut)
    files: Any = WrappedFiles(disk, Counted)
    with kvwal.follow(PATH, files=files) as live:
        assert live.refresh() == 3
        assert bytes_of(live.refresh) <= MOST_BYTES
        disk.damage(name, 0, bytes(data))
        # It is read once: by the walk, again, and by each step of what judges it.
        assert bytes_of(live.refresh) < 8 * LARGE
        assert max(bytes_of(live.refresh) for _ in range(100)) <= MOST_BYTES
        assert bytes_of(live.lag) <= MOST_BYTES
        assert live.refresh() == 3
        # The next writer says what is there.
        with kvwal.open(PATH, files=disk, background=False) as db:
            db.put(b"third", b"3")
            all_durable(db)
            assert live.refresh() == 4
            assert dict(live) == dict(db)


def test_a_large_record_is_read_when_it_has_arrived() -> None:
    """While it is written, by a writer that takes its time, most looks at it cost little."""
    disk, name, begin, whole = with_large_record()
    files: Any = WrappedFiles(disk, Counted)
    with kvwal.follow(PATH, files=files) as live:
        live.refresh()
        counts = []
        for offset in range(begin, begin + LARGE, 20_000):
            disk.damage(name, offset, whole[offset : offset + 20_000])
            counts.append(bytes_of(live.refresh))
        assert len(counts) > 100
        # The others are those with the numbers 1, 2, 4, 7, 12, 21 and so on, and the last.
        assert sum(count > MOST_BYTES_DUE for count in counts) <= 10
        assert live.lag().commits == 1


@pytest.mark.parametrize("before", [0, 40, 300])
@pytest.mark.parametrize("seen", ["whole", "in part"])
def test_what_was_seen_and_then_refused_is_not_waited_for(
    seen: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look came while it was written; its writer unmade it, and makes no other commit."""
    # Of more it looks at the next ones at its next doubt.
    monkeypatch.setattr(watch, "_MOST_HEADERS", 128)
    refuses: list[bool] = []

    class Refusing(Wrapped):
        def pwrite(self, data: bytes, offset: int) -> None:
            if not refuses:
                self.there.pwrite(data, offset)
                return
            refuses.clear()
            self.there.pwrite(data if seen == "whole" else data[:-1], offset)
            live.refresh()
            raise OSError(errno.ENOSPC, "no space")

    disk = SimulatedDisk()
    files: Any = WrappedFiles(disk, Refusing)
    with kvwal.open(PATH, files=files, background=False) as db:
        for n in range(1 + before):
            db.put(b"%d" % n, b"", durability="os" if n else "commit")
        with kvwal.follow(PATH, pin=False, max_lag_s=3600, files=disk) as live:
            refuses.append(True)
            with pytest.raises(kvwal.DiskFullError):
                db.update({b"%d" % n: bytes(500) for n in range(9)})
            for _ in range(500):
                live.refresh()
            assert live.lag().commits == 0
            assert live.position == db.position
            assert live.get(b"0") == b""


def test_a_place_that_is_examined_rarely_does_not_delay_another_one() -> None:
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    name = f"{PATH}/{segment_name(1)}"
    with kvwal.open(PATH, files=disk, background=False) as db:
        db.put(b"first", b"1")
        all_durable(db)
        with kvwal.follow(PATH, files=disk) as live:
            begin = offset_of(db)
            db.put(b"second", b"2", durability="os")
            disk.flip(name, begin)
            engine: Any = live.engine
            says = []
            for n in range(20):
                db.put(b"%d" % n, b"", durability="os")
                now_s = time.monotonic()
                assert live.refresh() == 1
                says.append(engine.progress.freshness._current_s >= now_s)
            # What is behind may be commits: most of the time it does not say that it shows all there is.
            assert sum(says) < 8
            # The medium gives it back, and damages another one.
            disk.flip(name, begin)
            begin = offset_of(db)
            db.put(b"last", b"but one")
            db.put(b"last", b"one")
            disk.flip(name, begin)
            with pytest.raises(kvwal.CorruptionError, match="commit 23 is damaged"):
                live.refresh()


@pytest.mark.parametrize("ends", [b"x", b"\0" * 9000])
def test_a_large_record_that_ends_with_zeros_counts_when_another_one_follows(ends: bytes) -> None:
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    with kvwal.open(PATH, files=disk, background=False) as db, kvwal.follow(PATH, files=disk) as live:
        for n in range(1, 4):
            db.put(b"large", b"%d" % n * 40_000 + ends)
            assert live.lag().commits == 1
            all_durable(db)
            assert live.refresh() == n
            assert live.lag().commits == 0
            assert live[b"large"] == b"%d" % n * 40_000 + ends


def test_a_damaged_mark_is_passed_over_once() -> None:
    """By what moves the follower and by its feeds: the segment is not read again for each commit behind it."""
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    files: Any = WrappedFiles(disk, Counted)
    with kvwal.open(PATH, files=disk, background=False) as db, kvwal.follow(PATH, files=files) as live:
        feed = live.changes(follow=True, timeout_s=0)
        name = f"{PATH}/{segment_name(1)}"
        for n in range(100):
            db.put(b"%d" % n, b"x" * 300)
        all_durable(db)
        disk.flip(name, len(disk.read(name).rstrip(b"\0")) - 20)
        live.refresh()
        changes = list(feed)
        assert len(changes) == 99
        for n in range(5):
            db.put(b"behind", b"%d" % n)
            db.put(b"behind it", b"%d" % n)
            count = bytes_of(live.refresh)
            assert live.seqno == db.last_seqno - 1
            assert live.lag().commits == 1
            count += bytes_of(lambda: changes.extend(feed))
            # Two cursors, and the mark is behind 35,000 bytes of records.
            assert not n or count <= 2 * MOST_BYTES_DUE + 2 * (16 + 4 << 10), (n, count)
        assert len(changes) == live.seqno


class Late:
    """A segment of which the first part was read before the rest was written."""

    def __init__(self, file: Any, offset: int) -> None:
        self._file = file
        self._offset = offset

    def pread(self, size: int, offset: int) -> bytes:
        found: bytes = self._file.pread(size, offset)
        return bytes(len(found)) if offset == self._offset else found


def test_a_writer_that_is_faster_than_what_judges_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the end is read, a record comes where that was read already, and behind it one that says it is on disk."""
    monkeypatch.setattr("kvwal.log.walk.CHUNK_BYTES", 4096)
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    with kvwal.open(PATH, files=disk, background=False) as db:
        db.put(b"key", b"first")
        judged = []

        def late(file: Any, segment: Any, place: Any, *rest: Any) -> Any:
            db.put(b"key", b"%d" % len(judged) * 6000)
            db.put(b"key", b"%d again" % len(judged))
            judged.append(gather(Late(file, place.offset), segment, place, *rest))
            return judged[-1]

        monkeypatch.setattr("kvwal.log.watch.gather", late)
        with kvwal.follow(PATH, files=disk) as live:
            assert live.seqno == db.last_seqno - 1
            assert all(tail.durable > tail.last_seqno for tail, _ in judged)
            assert judged
