"""Cursors: reading a little at a time, going on where one stopped, waiting for what comes."""

from __future__ import annotations

import errno
import itertools
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_rig import LogRig, check_content, entry, simulated_disk
from wrapped_files import Wrapped, WrappedFiles

from kvwal.batch import WriteBatch
from kvwal.errors import ClosedError, CorruptionError, DiskFullError, PoisonedError
from kvwal.files import system_files
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log import Record, encode_intents, encode_put, extension_of, read_kept, writer
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.waiting import Waiting
from kvwal.testing import SimulatedDisk


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


def seqnos(cursor: Any, n: int | None = None) -> list[int]:
    found = []
    for record in itertools.islice(cursor, n):
        check_content(record.batch(), record.seqno)
        found.append(int(record.seqno))
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "sync", "mark", "read", "read", "close", "kill", "retire"]),
            st.integers(1, 20),
            st.sampled_from([20, 20, 700, 6000]),
        ),
        max_size=40,
    ),
    st.sampled_from([5096, 1 << 14, 1 << 20]),
)
def test_a_cursor_hands_out_every_durable_commit_once_in_order_whatever_the_writer_does(
    steps: list[tuple[str, int, int]], segment_bytes: int
):
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create(segment_bytes=segment_bytes)
    cursor = log.read(Seqno(0))
    seen: list[int] = []
    for step, n, size in steps:
        if step == "append":
            rig.fill(log, n, sync_every=7, size=size)
        elif step == "sync":
            log.sync()
        elif step == "mark":
            log.mark_idle()
        elif step == "read":
            seen += seqnos(cursor, n)
        elif step == "retire":
            log.retire(Seqno(log.last_seqno + 1))
        else:
            durable = log.durable_seqno
            log.close() if step == "close" else log.abandon()
            log = rig.resume(rig.replay(after=rig.segments()[0] - 1)[1], segment_bytes=segment_bytes)
            assert log.last_seqno >= durable
            # A cursor belongs to one open of the log; another goes on where it stopped.
            cursor = log.read(cursor.position)
        assert cursor.position == len(seen)
    log.sync()
    seen += seqnos(cursor)
    assert seen == list(range(1, log.last_seqno + 1))
    log.close()


def test_a_cursor_that_has_read_all_goes_on_when_more_is_durable(rig: LogRig):
    log = rig.create()
    cursor = log.read()
    assert seqnos(cursor) == []
    assert not cursor.wait(0)
    rig.fill(log, 3, sync_every=100)
    # Not durable: a power cut could still take it back.
    assert seqnos(cursor) == []
    log.sync()
    assert cursor.wait(0)
    assert seqnos(cursor) == [1, 2, 3]
    rig.fill(log, 40)
    assert seqnos(cursor, 10) == list(range(4, 14))
    rig.fill(log, 1)
    assert seqnos(cursor) == list(range(14, 45))
    assert cursor.position == 44


def test_a_cursor_to_an_end_stops_there_and_may_go_beyond_what_is_durable(rig: LogRig):
    log = rig.create()
    rig.fill(log, 20, sync_every=100)
    cursor = log.read(Seqno(5), until=Seqno(18))
    assert cursor.wait(0)
    assert seqnos(cursor) == list(range(6, 19))
    assert seqnos(cursor) == []
    rig.fill(log, 20)
    assert seqnos(cursor) == []
    assert log.holds() == []


def test_a_cursor_that_has_read_a_segment_to_its_end_needs_it_no_more(rig: LogRig):
    log = rig.create()
    rig.fill(log, 1, size=900)
    cursor = log.read()
    assert seqnos(cursor) == [1]
    rig.fill(log, 1, size=900)
    assert log.retire(Seqno(3)) == [1]
    assert seqnos(cursor) == [2]


def test_a_closed_cursor_is_refused(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    cursor = log.read()
    next(cursor)
    cursor.close()
    with pytest.raises(ClosedError):
        next(cursor)
    with pytest.raises(ClosedError):
        cursor.wait(0)


def test_a_cursor_of_a_closed_log_is_refused_as_it_reaches_for_more(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    cursor = log.read()
    assert seqnos(cursor) == [1, 2, 3]
    log.close()
    with pytest.raises(ClosedError):
        next(cursor)
    with pytest.raises(ClosedError):
        cursor.wait()


def test_reading_on_from_where_a_cursor_stopped_costs_nothing_of_what_was_read(rig: LogRig, disk: SimulatedDisk):
    log = rig.create(segment_bytes=1 << 20)
    rig.fill(log, 100, size=500)
    cursor = log.read()
    assert len(seqnos(cursor)) == 100
    end = log._offset
    # Too large to be kept in memory.
    rig.fill(log, 1, size=5000)
    disk.trace = []
    assert seqnos(cursor) == [101]
    assert [(op.offset, op.size <= 16 << 10) for op in disk.trace if op.name == "pread"] == [(end, True)]


# -- the newest commits in memory --------------------------------------------------------------


def fields(record: Record) -> list[Any]:
    return [getattr(record, name) for name in Record.__slots__]


def test_the_newest_commits_are_told_from_memory_as_the_log_has_them(rig: LogRig, disk: SimulatedDisk):
    log = rig.create(segment_bytes=1 << 14)
    cursor = log.read(Seqno(0))
    assert seqnos(cursor) == []
    log.recent(1)
    for number in range(1, 200):
        if number % 3:
            log.append_put(*entry(number, 300))
        else:
            batch = WriteBatch()
            batch.update([entry(number, 100), (b"another", b"")])
            body = encode_intents(batch, extension_of({"by": "teller"}) if number % 2 else None)
            log.append([body, encode_intents(batch)] if number % 2 == 0 else [body])
        log.sync()
    last = log.last_seqno
    disk.trace = []
    told = [fields(record) for record in cursor]
    assert sum(op.name == "pread" for op in disk.trace) == 0
    disk.trace = None
    assert len(told) == last
    assert told == [fields(record) for record in read_kept(rig.reader(), Seqno(0), last)]
    # It holds nothing of what it has read.
    assert [hold.after for hold in log.holds()] == [last]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "append", "read", "read", "skip"]), st.integers(0, 2), st.integers(1, 40)),
        max_size=30,
    )
)
def test_there_is_no_seam_between_memory_and_the_log(steps: list[tuple[str, int, int]]):
    """Followers that lag by more and less than what memory has, with commits between that are too large for it."""
    patched = pytest.MonkeyPatch()
    patched.setattr(writer, "_RECENT", 8)
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create(segment_bytes=1 << 16)
    cursors = [log.read(Seqno(0)) for _ in range(3)]
    seen: list[list[int]] = [[], [], []]
    try:
        for step, which, n in steps:
            if step == "append":
                rig.fill(log, n, sync_every=n, size=[100, 700, 5000][which])
            elif step == "read":
                seen[which] += seqnos(cursors[which], n)
            else:
                # As one that followed and was closed: memory is let go of some commits later.
                cursors[which].close()
                cursors[which] = log.read(Seqno(cursors[which].position))
        log.sync()
        for number, cursor in enumerate(cursors):
            seen[number] += seqnos(cursor)
        assert seen == [list(range(1, log.last_seqno + 1))] * 3
    finally:
        patched.undo()


def test_what_is_not_durable_is_not_told_from_memory(rig: LogRig):
    log = rig.create()
    cursor = log.read(Seqno(0))
    rig.fill(log, 1)
    assert seqnos(cursor) == [1]
    rig.fill(log, 3, sync_every=100)
    assert log.recent(2) is not None
    assert seqnos(cursor) == []
    log.sync()
    assert seqnos(cursor) == [2, 3, 4]


@pytest.mark.parametrize("way", ["append", "append_put"])
def test_a_commit_that_was_refused_is_not_kept_for_another_of_its_number(rig: LogRig, disk: SimulatedDisk, way: str):
    log = rig.create()
    cursor = log.read(Seqno(0))
    rig.fill(log, 1)
    assert seqnos(cursor) == [1]
    disk.fail("pwrite", error=errno.ENOSPC)
    with pytest.raises(DiskFullError):
        log.append_put(b"refused", b"") if way == "append_put" else log.append([encode_put(b"refused", b"")])
    # This one is not kept.
    log.append_put(*entry(2, 5000))
    log.sync()
    assert seqnos(cursor) == [2]


@pytest.mark.parametrize("way", ["refused", "interrupted"])
def test_what_a_segment_left_is_not_told_in_place_of_the_commit_of_that_number(disk: SimulatedDisk, way: str):
    """Where it cannot be unmade, its whole record stays in the segment in which the cursor stands."""

    class Left(Wrapped):
        def pwrite(self, data: bytes, offset: int) -> None:
            if armed and len(data) == RECORD_HEADER_BYTES:
                raise OSError(errno.ENOSPC, "a mark needs space as well")
            self.there.pwrite(data, offset)
            if armed:
                raise OSError(errno.ENOSPC, "no space") if way == "refused" else KeyboardInterrupt

    armed: list[bool] = []
    rig = LogRig(WrappedFiles(disk, Left), "/log")  # type: ignore[arg-type]
    log = rig.create(segment_bytes=1 << 20)
    cursor = log.read(Seqno(0))
    rig.fill(log, 3, size=5000)
    assert seqnos(cursor) == [1, 2, 3]
    armed.append(True)
    with pytest.raises(DiskFullError if way == "refused" else KeyboardInterrupt):
        log.append_put(b"refused", bytes(5000))
    armed.clear()
    rig.fill(log, 2, size=5000)
    assert seqnos(cursor) == [4, 5]


def test_the_log_is_read_on_behind_what_was_told_from_memory(rig: LogRig, disk: SimulatedDisk):
    log = rig.grown()
    log.sync()
    cursor = log.read(Seqno(log.last_seqno - 1))
    assert len(seqnos(cursor)) == 1
    for rolls in (False, True):
        segments = len(log.segments())
        for _ in range(20):
            rig.fill(log, 1, size=500)
            assert len(seqnos(cursor)) == 1
        while rolls and len(log.segments()) == segments:
            rig.fill(log, 1, size=3000)
            assert len(seqnos(cursor)) == 1
        end = log._offset
        rig.fill(log, 1, size=5000)
        disk.trace = []
        assert len(seqnos(cursor)) == 1
        [*_, read] = reads = [op for op in disk.trace if op.name == "pread" and op.path.endswith(".log")]
        assert {op.path for op in reads} == {f"/log/{log.segments()[-1].name}"}
        assert rolls or ([read.offset] == [end] and len(reads) == 1)
        disk.trace = None


def test_memory_is_bounded_and_let_go_of_when_no_one_follows(rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    assert log._recent is None
    rig.fill(log, 10)
    assert log._recent is None
    cursor = log.read(Seqno(0))
    assert len(seqnos(cursor)) == 10
    for _ in range(20):
        rig.fill(log, 100, sync_every=100)
        seqnos(cursor, 1)
        assert log._recent is not None
        assert len(log._recent) <= 2 * writer._RECENT
    rig.fill(log, 1, size=5000)
    assert log.recent(log.last_seqno) is None
    cursor.close()
    rig.fill(log, 4 * writer._RECENT, sync_every=100)
    assert log._recent is None


def test_a_follower_that_is_never_at_the_end_lets_go_of_what_it_has_read(rig: LogRig):
    log = rig.create()
    cursor = log.read(Seqno(0))
    assert seqnos(cursor) == []
    rig.fill(log, 5)
    for _ in range(300):
        rig.fill(log, 1)
        assert len(seqnos(cursor, 1)) == 1
        [hold] = log.holds()
        assert cursor.position - 65 <= hold.after < cursor.position


def test_a_read_up_to_a_commit_keeps_nothing_in_memory(rig: LogRig):
    log = rig.create()
    rig.fill(log, 10)
    assert len(seqnos(log.read(Seqno(0), until=Seqno(10)))) == 10
    assert log._recent is None


def test_a_cursor_that_begins_late_begins_at_the_index(rig: LogRig):
    log = rig.grown()
    rig.fill(log, 30, size=5000)
    last = int(log.last_seqno)
    log.close()
    newest = log.segments()[-1].first_seqno
    rig.flip_commit(newest + 1)
    assert seqnos(read_kept(rig.reader(), Seqno(last - 1), Seqno(last))) == [last]


@pytest.mark.parametrize("damage", ["commit", "segment", "header"])
def test_what_is_damaged_is_told_as_recovery_tells_it(rig: LogRig, damage: str):
    log = rig.create()
    rig.fill(log, 60)
    third = log.segments()[2].first_seqno
    cursor = log.read()
    assert seqnos(cursor, 5) == [1, 2, 3, 4, 5]
    if damage == "commit":
        name, offset = rig.flip_commit(third + 1)
        good = third
    else:
        name, offset, good = segment_name(third), None, third - 1
        if damage == "segment":
            rig.remove(name)
        else:
            rig.flip(name, 40)
            offset = 0
    with pytest.raises(CorruptionError) as caught:
        while True:
            next(cursor)
    assert (caught.value.file, caught.value.offset) == (name, offset)
    assert cursor.position == good


def test_a_failed_read_is_an_error_and_the_cursor_goes_on_after_it(rig: LogRig, disk: SimulatedDisk):
    log = rig.create()
    rig.fill(log, 30)
    for nth in range(1, 8):
        cursor = log.read()
        disk.fail("read", nth=nth, error=errno.EIO)
        found = []
        try:
            found += seqnos(cursor)
        except OSError:
            pass
        disk.heal()
        assert [*range(1, cursor.position + 1), *seqnos(cursor)] == list(range(1, 31))


# -- waiting -----------------------------------------------------------------------------------


def test_a_flush_wakes_those_who_wait_and_nothing_else_does(tmp_path_factory: pytest.TempPathFactory):
    rig = LogRig(system_files(), str(tmp_path_factory.mktemp("log")))
    log = rig.create(segment_bytes=1 << 20)
    seen: list[list[int]] = [[], [], []]

    def follow(found: list[int]) -> None:
        with log.read(Seqno(0)) as cursor:
            while len(found) < 500 and cursor.wait():
                found += seqnos(cursor)

    threads = [threading.Thread(target=follow, args=(found,)) for found in seen]
    for thread in threads:
        thread.start()
    for n in range(1, 501):
        log.append_put(*entry(n))
        if n % 3 == 0 or n == 500:
            log.sync()
    for thread in threads:
        thread.join()
    assert seen == [list(range(1, 501))] * 3
    assert not log._waiting
    assert log.holds() == []
    log.close()


def test_an_idle_mark_wakes_those_whose_turn_was_lost(rig: LogRig, monkeypatch: pytest.MonkeyPatch):
    log = rig.create()
    found: list[int] = []

    def follow() -> None:
        with log.read(Seqno(0)) as cursor:
            assert cursor.wait()
            found.extend(seqnos(cursor))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    while not log._waiting:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(Waiting, "pass_on", lambda waiting: None)
        rig.fill(log, 1)
    assert found == []
    log.mark_idle()
    thread.join(60)
    assert found == [1]


def test_who_waits_in_vain_leaves_nothing_behind(rig: LogRig):
    log = rig.create()
    cursor = log.read()
    for _ in range(100):
        assert not cursor.wait(0)
    assert not log._waiting


@pytest.mark.parametrize("end", ["close", "abandon", "poison"])
def test_the_end_of_a_log_wakes_those_who_wait(disk: SimulatedDisk, rig: LogRig, end: str):
    log = rig.create()
    rig.fill(log, 1)
    cursor = log.read(Seqno(1))
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(cursor.wait())
        except (ClosedError, PoisonedError) as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not log._waiting:
        pass
    if end == "poison":
        log.append_put(*entry(2))
        disk.fail("datasync")
        with pytest.raises(PoisonedError):
            log.sync()
    else:
        getattr(log, end)()
    thread.join()
    [found] = outcome
    assert type(found) is (PoisonedError if end == "poison" else ClosedError)


@pytest.mark.parametrize("end", ["sync", "close", "poison"])
def test_what_is_to_be_called_is_called_once_when_waiting_would_end(disk: SimulatedDisk, rig: LogRig, end: str):
    log = rig.create()
    cursor = log.read()
    calls: list[str] = []
    cursor.when_beyond(lambda: calls.append("waited"))
    cursor.when_beyond(lambda: calls.append("taken back"))()
    rig.fill(log, 1, sync_every=100)
    assert calls == []
    if end == "poison":
        disk.fail("datasync")
        with pytest.raises(PoisonedError):
            log.sync()
    else:
        getattr(log, end)()
    assert calls == ["waited"]
    # Where waiting would not even begin.
    if end == "sync":
        cursor.when_beyond(lambda: calls.append("at once"))()
        assert calls == ["waited", "at once"]
    else:
        with pytest.raises(PoisonedError if end == "poison" else ClosedError):
            cursor.when_beyond(lambda: calls.append("never"))
        assert not log._waiting


def test_one_that_need_not_wait_wakes_no_other(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    calls: list[str] = []
    log.read(Seqno(3)).when_beyond(lambda: calls.append("early"))
    log.read(Seqno(1)).when_beyond(lambda: calls.append("at once"))
    assert calls == ["at once"]


def test_what_is_durable_is_handed_out_before_a_failure_is_told(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 2)
    cursor = log.read()
    rig.fill(log, 1, sync_every=100)
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        log.sync()
    assert cursor.wait()
    assert seqnos(cursor) == [1, 2]
    with pytest.raises(PoisonedError):
        cursor.wait()


def test_seeking_among_many_segments_opens_three_files(rig: LogRig, disk: SimulatedDisk):
    log = rig.create(segment_bytes=1 << 18)
    rig.fill(log, 4000, size=1000, sync_every=100)
    assert log.stats().segments > 10
    names = [info.first_seqno for info in log.segments()[:-1]]
    for after in [0, 1, 700, 1234, names[-1] - 2, names[-1] + 100]:
        disk.trace = []
        cursor = log.read(Seqno(after))
        record = next(cursor)
        reads = [each for each in disk.trace if each.name == "pread" and each.path.endswith(".log")]
        assert record.seqno == after + 1
        assert sum(each.name == "open" for each in disk.trace) <= 3
        disk.trace = None
        # The header, and the records from the last indexed one on, which begins at most 64 KiB before.
        assert len(reads) == 2
        assert record.offset - reads[1].offset <= 66 << 10
        cursor.close()
