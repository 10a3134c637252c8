"""The writer when the disk is full, when writes and flushes fail, and when it is interrupted."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from itertools import islice

import pytest
from log_rig import FIRST_SEGMENT_BYTES, IDENTITY, SEGMENT_BYTES, LogRig, body, entry, log_options, simulated_disk
from wrapped_files import Wrapped, WrappedFiles

from kvwal.errors import DiskFullError, InternalError, PoisonedError, RefusedError
from kvwal.keys import Seqno
from kvwal.log import Record, SegmentLog
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.testing import Operation, SimulatedDisk
from kvwal.testing.faults import Effect

RECORD_BYTES = 40 + len(body(1))


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


# -- a full disk -------------------------------------------------------------------------------


def fill_segment(rig: LogRig, log: SegmentLog) -> None:
    """Append until the next commit needs a new segment."""
    while log.tail_bytes + 2 * RECORD_BYTES + 50 < SEGMENT_BYTES - 4096:
        rig.fill(log, 1)


def test_a_full_disk_while_rolling_changes_nothing(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno
    before = rig.snapshot()
    disk.capacity = disk.used_bytes()
    for _ in range(3):
        with pytest.raises(DiskFullError):
            log.append([body(last + 1, 500)])
        assert log.last_seqno == last
        assert rig.snapshot() == before
    # What still fits goes into the old segment.
    assert log.append([b""]) == last + 1
    log.sync()
    disk.capacity = None
    assert log.append([body(last + 2, 500)]) == last + 2
    log.sync()
    log.close()


@pytest.mark.parametrize("op", ["create", "pwrite", "rename"])
def test_an_index_that_cannot_be_written_leaves_nothing_behind(disk: SimulatedDisk, rig: LogRig, op: str):
    log = rig.create()
    rig.fill(log, 20)
    before = rig.names()
    fault = disk.fail(op, forever=True)
    assert log._header is not None
    log._maker.write_index(log._header, log._index)
    assert fault.struck
    assert rig.names() == before


@pytest.mark.parametrize("op", ["create", "allocate", "pwrite", "rename", "sync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_at_any_step_of_making_a_segment_is_survived(disk: SimulatedDisk, rig: LogRig, op: str, code: int):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno
    disk.fail(op, path="*" if op == "rename" else "*.tmp", error=code, forever=True)
    with pytest.raises(DiskFullError):
        log.append([body(last + 1, 500)])
    assert [name for name in rig.names() if name.endswith(".tmp")] == []
    disk.heal()
    rig.fill(log, 20)
    log.close()
    assert len(rig.replay()[0]) == last + 20


@pytest.mark.parametrize("op", ["create", "allocate", "pwrite", "rename", "sync"])
def test_where_there_is_no_space_for_a_large_segment_a_smaller_one_is_made(
    disk: SimulatedDisk, rig: LogRig, op: str
):
    log = rig.grown()
    large = log.segments()[-1].size
    sizes = []
    for times in (0, 1, 2):
        for nth in range(1, times + 1):
            disk.fail(op, path="*" if op == "rename" else "*.tmp", nth=nth, error=errno.ENOSPC)
        log._roll(10_000)
        rig.fill(log, 1)
        disk.heal()
        sizes.append(log.segments()[-1].size)
    last = int(log.last_seqno)
    assert sizes[0] >= large
    assert sizes[1:] == [FIRST_SEGMENT_BYTES, 4096 + 10_000 + 80]
    log.close()
    assert len(rig.replay()[0]) == last


def test_no_space_for_the_slot_is_survived(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno
    disk.fail("pwrite", path=f"*{1:020d}.*", error=errno.ENOSPC, effect="part")
    with pytest.raises(DiskFullError):
        log.append([body(last + 1, 500)])
    disk.heal()
    # The next segment has its name: even what would fit into the old one must go to the new one.
    rig.fill(log, 1)
    assert [s.first_seqno for s in log.segments()] == [1, last + 1]
    log.close()
    assert len(rig.replay()[0]) == last + 1


def test_no_space_in_the_middle_of_a_record_costs_the_segment(disk: SimulatedDisk, rig: LogRig):
    for one in (True, False):
        log = rig.create() if one else rig.resume()
        rig.fill(log, 5)
        last = log.last_seqno
        disk.fail("pwrite", error=errno.ENOSPC, effect="part")
        with pytest.raises(DiskFullError):
            log.append_put(*entry(last + 1)) if one else log.append([body(last + 1)])
        disk.heal()
        assert log.last_seqno == last
        log.mark_idle()
        rig.fill(log, 2)
        assert log.segments()[-1].first_seqno == last + 1
        log.abandon()
        assert len(rig.replay()[0]) == last + 2


def test_no_space_for_the_first_record_of_a_segment_replaces_it(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    disk.fail("pwrite", error=errno.ENOSPC, effect="part")
    with pytest.raises(DiskFullError):
        log.append_put(*entry(1))
    disk.heal()
    rig.fill(log, 3)
    assert rig.segments() == [1]
    log.close()
    assert rig.replay()[0] == [1, 2, 3]


def test_closing_after_a_left_segment_keeps_what_was_acknowledged(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    disk.fail("pwrite", error=errno.ENOSPC, effect="part")
    with pytest.raises(DiskFullError):
        log.append_put(*entry(4))
    log.close()
    disk.heal()
    assert rig.replay()[0] == [1, 2, 3]
    rig.resume().close()


@pytest.mark.parametrize("end", ["close", "kill", "power cut", "poison"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_commits_that_were_refused_do_not_come_back(error: int, end: str):
    """What was written of a group that met a full disk was replayed where no segment came behind it."""
    for seed in range(8):
        disk = SimulatedDisk(seed=seed)
        disk.make_directory("/log")
        disk.open_directory("/log").sync_parent()
        rig = LogRig(disk, "/log")
        log = rig.create()
        rig.fill(log, 3)
        log.sync()
        fault = disk.fail("pwrite", error=error, effect="part" if seed else "all")
        with pytest.raises((DiskFullError, RefusedError)):
            log.append([body(n) for n in range(4, 12)])
        assert fault.struck == 1
        disk.heal()
        if end == "poison":
            disk.fail("fsync", error=errno.EIO, forever=True)
            disk.fail("create", error=errno.EIO, forever=True)
            with pytest.raises((PoisonedError, DiskFullError, OSError)):
                log.append([body(4)])
            disk.heal()
        if end == "close":
            log.close()
        else:
            log.abandon()
        if end == "power cut":
            for choice in range(4):
                assert LogRig(disk.crash(random.Random(choice)), "/log").replay()[0] == [1, 2, 3]
        assert rig.replay()[0] == [1, 2, 3]


@pytest.mark.parametrize(("op", "nth"), [("pread", 1), ("pwrite", 2), ("fsync", 1)])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_refused_commit_that_cannot_be_unmade_poisons_but_for_want_of_space(
    disk: SimulatedDisk, rig: LogRig, op: str, nth: int, error: int
):
    """A flush that failed poisons whatever it said: what it was to flush may be gone."""
    log = rig.create()
    rig.fill(log, 3)
    disk.fail("pwrite", error=errno.ENOSPC, effect="all")
    disk.fail(op, nth=nth, error=error)
    if (op, error) == ("pwrite", errno.ENOSPC):
        with pytest.raises(DiskFullError):
            log.append([body(9)])
        disk.heal()
        rig.fill(log, 2)
        log.close()
        assert rig.replay()[0] == [1, 2, 3, 4, 5]
        return
    for _ in range(2):
        with pytest.raises(PoisonedError):
            log.append([body(4)])
        disk.heal()
    log.abandon()


@pytest.mark.parametrize("op", ["pwrite", "datasync"])
def test_where_the_unmaking_is_interrupted_the_log_goes_on(disk: SimulatedDisk, rig: LogRig, op: str):
    log = rig.create()
    rig.fill(log, 3)
    fault = disk.fail("pwrite", error=errno.ENOSPC, effect="all")

    def watch(operation: Operation) -> None:
        if fault.struck and operation.name == op:
            raise Interrupt

    disk.watcher = watch
    with pytest.raises(Interrupt):
        log.append([body(n) for n in range(4, 7)])
    disk.watcher = None
    disk.heal()
    assert log.last_seqno == 3
    rig.fill(log, 1)
    log.close()
    assert rig.replay()[0] == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ["close", "kill"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC])
@pytest.mark.parametrize("at", ["append", "append_put", "unmaking"])
def test_what_was_interrupted_and_then_refused_does_not_come_back(at: str, code: int, end: str):
    """No segment could be made for the rest of it, and whole records were left."""
    disk = simulated_disk()
    armed: list[bool] = []

    class Interrupted(Wrapped):
        def pwrite(self, data: bytes, offset: int) -> None:
            if armed and at == "unmaking" and len(data) == RECORD_HEADER_BYTES:
                armed.clear()
                raise Interrupt
            self.there.pwrite(data, offset)
            if armed and at == "unmaking":
                raise OSError(errno.ENOSPC, "no space")
            if armed:
                armed.clear()
                raise Interrupt

    rig = LogRig(WrappedFiles(disk, Interrupted), "/log")  # type: ignore[arg-type]
    log = rig.create()
    rig.fill(log, 3)
    armed.append(True)
    with pytest.raises(Interrupt):
        log.append_put(*entry(4)) if at == "append_put" else log.append([body(4), body(5)])
    assert not armed
    disk.fail("create", error=code, forever=True)
    for _ in range(2):
        with pytest.raises((RefusedError, DiskFullError)):
            log.append([body(4), body(5)])
    log.close() if end == "close" else log.abandon()
    disk.heal()
    assert LogRig(disk.crash(random.Random(1)), "/log").replay()[0] == [1, 2, 3]
    seqnos, log_end = rig.replay()
    assert (seqnos, log_end.watermark) == ([1, 2, 3], 3)


@pytest.mark.parametrize("effect", ["none", "part", "all"])
def test_a_limit_on_the_size_of_files_holds_for_what_unmakes_as_well(disk: SimulatedDisk, rig: LogRig, effect: Effect):
    """EFBIG, as with `ulimit -f`: where the log goes on, nothing can be written until the limit is raised."""
    log = rig.create()
    rig.fill(log, 3)
    for _ in range(3):
        disk.fail("pwrite", error=errno.EFBIG, effect=effect)
        disk.fail("pwrite", error=errno.EFBIG, forever=True)
        with pytest.raises(RefusedError):
            log.append([body(4)])
        disk.heal()
    rig.fill(log, 2)
    log.close()
    assert rig.replay()[0] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("effect", ["none", "part", "all"])
def test_a_refused_write_leaves_a_mark_of_what_is_on_disk(disk: SimulatedDisk, rig: LogRig, effect: Effect):
    """Nothing else would say so before the next commit: those who follow without a pin would wait for it."""
    log = rig.create()
    rig.fill(log, 5, sync_every=9)
    disk.fail("pwrite", error=errno.ENOSPC, effect=effect)
    with pytest.raises(DiskFullError):
        log.append([body(n) for n in range(6, 9)])
    assert log.durable_seqno == 5
    for closes in (False, True):
        if closes:
            log.close()
        seqnos, end = rig.replay()
        assert (seqnos, end.watermark) == ([1, 2, 3, 4, 5], 5)
        assert LogRig(disk.crash(random.Random(1)), "/log").replay()[0] == [1, 2, 3, 4, 5]


def test_an_append_on_a_disk_with_little_space_needs_space_for_itself(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    log.append([body(1, 1_000_000)])
    for free, size in ((FIRST_SEGMENT_BYTES, 60_000), (2 * 4096, 3000)):
        disk.capacity = disk.used_bytes() + free
        with pytest.raises(DiskFullError):
            log.append([body(log.last_seqno + 1, free)])
        log.append([body(log.last_seqno + 1, size)])
        log.sync()
    sizes = [segment.size for segment in log.segments()]
    assert sizes[1:] == [FIRST_SEGMENT_BYTES, 4096 + 40 + len(body(3, 3000)) + 80]
    log.abandon()
    assert len(rig.replay()[0]) == 3


def test_resuming_on_a_full_disk_rewrites_the_tail_into_a_small_segment(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    rig.fill(log, 5)
    log.abandon()
    disk.capacity = disk.used_bytes() + 3 * 4096
    log = rig.resume(segment_bytes=1 << 20)
    assert (log.last_seqno, log.durable_seqno) == (5, 5)
    with pytest.raises(DiskFullError):
        log.append([body(6, 100_000)])
    log.abandon()
    assert rig.replay()[0] == [1, 2, 3, 4, 5]


def test_a_spare_that_cannot_be_made_is_no_failure(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    fill_segment(rig, log)
    for op, code in (("create", errno.ENOSPC), ("allocate", errno.ENOSPC), ("sync", errno.EIO)):
        disk.fail(op, path="*spare.tmp", error=code)
        log.prepare_next()
        disk.heal()
        assert "spare.tmp" not in rig.names()
    rig.fill(log, 30)
    log.close()


# -- failures and interruptions ----------------------------------------------------------------


@pytest.mark.parametrize("one", [True, False])
def test_a_failed_write_poisons(disk: SimulatedDisk, rig: LogRig, one: bool):
    log = rig.create()
    rig.fill(log, 3)
    disk.fail("pwrite", effect="part")
    with pytest.raises(PoisonedError) as caught:
        log.append_put(*entry(4)) if one else log.append([body(4)])
    assert isinstance(caught.value.__cause__, OSError)
    refuses_everything(disk, log)
    assert rig.replay()[0] == [1, 2, 3]
    rig.resume().close()


def refuses_everything(disk: SimulatedDisk, log: SegmentLog) -> None:
    disk.heal()
    disk.trace = []
    last = log.last_seqno
    for call in (
        lambda: log.append_put(*entry(last + 1)),
        lambda: log.append([body(last + 1)]),
        log.sync,
        log.mark_idle,
        lambda: log.retire(last),
    ):
        with pytest.raises(PoisonedError):
            call()
    log.prepare_next()
    log.close()
    assert [op for op in disk.trace if op.name != "unlink"] == []
    assert log.last_seqno == last


def test_a_failed_flush_poisons_and_is_not_tried_again(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.append_put(*entry(4))
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        log.sync()
    assert log.durable_seqno == 3
    refuses_everything(disk, log)


def test_commits_of_a_failed_flush_are_written_anew_by_recovery(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.append_put(*entry(4))
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        log.sync()
    log.abandon()
    disk.kill()
    disk.heal()
    # The page cache still shows commit 4, and a flush of it would succeed without writing it.
    log = rig.resume()
    assert log.last_seqno == 4
    for survivors in (0, -1):
        assert LogRig(disk.crash(survivors), "/log").replay()[0] == [1, 2, 3, 4]


@pytest.mark.parametrize("op", ["allocate", "pwrite", "sync", "rename", "sync_directory", "datasync"])
def test_a_failed_step_of_a_roll_poisons(disk: SimulatedDisk, rig: LogRig, op: str):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno
    disk.fail(op)
    with pytest.raises(PoisonedError):
        log.append([body(last + 1, 500)])
    refuses_everything(disk, log)
    assert len(rig.replay()[0]) == last
    rig.resume().close()
    assert len(rig.replay()[0]) == last


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EROFS, errno.ENOMEM, errno.EIO])
def test_a_segment_whose_file_cannot_be_made_poisons_nothing(disk: SimulatedDisk, rig: LogRig, code: int):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno
    before = rig.snapshot()
    disk.fail("create", error=code, forever=True)
    for _ in range(3):
        with pytest.raises(RefusedError, match="nothing was written") as caught:
            log.append([body(last + 1, 500)])
        assert caught.value.errno == code
        assert rig.snapshot() == before
    disk.heal()
    rig.fill(log, 20)
    log.close()
    assert len(rig.replay()[0]) == last + 20


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt."""


def test_an_interruption_before_any_operation_is_survived_in_place():
    """Whatever is interrupted, the same append done again counts once, and the log reads right."""
    at = 0
    while True:
        at += 1
        disk = simulated_disk()
        rig = LogRig(disk, "/log")
        log = rig.create()
        start = disk.operations
        hit = False

        def watch(operation: Operation, start: int = start, at: int = at, disk: SimulatedDisk = disk) -> None:
            nonlocal hit
            if not hit and operation.number >= start + at:
                hit = True
                raise Interrupt

        disk.watcher = watch
        while log.last_seqno < 30:
            seqno = log.last_seqno + 1
            appended = False
            try:
                if seqno % 2:
                    log.append_put(*entry(seqno))
                else:
                    log.append([body(seqno)])
                appended = True
                log.sync()
                log.prepare_next()
            except Interrupt:
                # The last operation of an append is the write of its record, and the interruption came before it. (What
                # is left of a spare does not matter.)
                assert log.last_seqno == (seqno if appended else seqno - 1)
        disk.watcher = None
        log.sync()
        log.mark_idle()
        log.abandon()
        seqnos, end = rig.replay()
        assert (len(seqnos), end.watermark, end.cut_bytes) == (30, 30, 0)
        if not hit:
            break
    assert at > 60


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("one", [True, False])
def test_what_an_interrupted_append_has_written_does_not_come_back(disk: SimulatedDisk, one: bool, later: int):
    """Were it written over in place, what is longer than the next record would be behind that."""
    armed: list[bool] = []

    class Interrupted(Wrapped):
        def pwrite(self, data: bytes, offset: int) -> None:
            self.there.pwrite(data, offset)
            if armed:
                armed.clear()
                raise Interrupt

    rig = LogRig(WrappedFiles(disk, Interrupted), "/log")  # type: ignore[arg-type]
    log = rig.create()
    rig.fill(log, 3)
    armed.append(True)
    with pytest.raises(Interrupt):
        log.append_put(*entry(4, 200)) if one else log.append([body(4), body(5)])
    assert log.last_seqno == 3
    rig.fill(log, later)
    if later:
        log.abandon()
    else:
        # No other append unmakes it.
        log.close()
    seqnos, end = rig.replay()
    assert seqnos == [1, 2, 3, 4][: 3 + later]
    assert end.cut_bytes == 0 or not later


def test_an_interruption_after_the_roll_named_the_next_segment_loses_nothing(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    fill_segment(rig, log)
    last = log.last_seqno

    def watch(operation: Operation) -> None:
        if operation.name == "sync_directory":
            raise Interrupt

    disk.watcher = watch
    with pytest.raises(Interrupt):
        log.append([body(last + 1, 500)])
    disk.watcher = None
    # This one would fit into the old segment, where it would be superseded.
    log.append([b"\1\0\0\0\1\1\0\0\0\0\0k"])
    log.sync()
    log.abandon()
    assert rig.seek().seek(Seqno(last + 1)).segment == last + 1


@pytest.mark.parametrize("op", ["datasync", "truncate", "sync"])
def test_a_failure_while_closing_loses_nothing(disk: SimulatedDisk, rig: LogRig, op: str):
    log = rig.grown()
    last = int(log.last_seqno)
    disk.fail(op, effect="part" if op != "truncate" else "none")
    with pytest.raises(PoisonedError):
        log.close()
    log.close()
    disk.kill()
    disk.heal()
    for survivors in (0, -1):
        assert LogRig(disk.crash(survivors), "/log").replay()[0] == list(range(1, last + 1))
    rig.resume().close()
    assert rig.replay()[0] == list(range(1, last + 1))


def test_a_failed_flush_of_the_directory_while_retiring_poisons(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 40)
    disk.fail("sync_directory")
    with pytest.raises(PoisonedError):
        log.retire(Seqno(30))
    refuses_everything(disk, log)
    assert rig.replay(after=30)[1].last_seqno == 40


def test_a_tail_that_changes_while_it_is_rewritten_is_refused(rig: LogRig):
    rig.made(9, sync_every=100)
    _, end = rig.replay()
    before = rig.snapshot()

    class Forgetful:
        def replay(self, after: Seqno, floor: Seqno) -> Iterator[Record]:
            return islice(rig.reader().replay(after, floor), 4)

    with pytest.raises(InternalError):
        SegmentLog.resume(rig.files, rig.directory, IDENTITY, log_options({}), end, Forgetful())
    after = rig.snapshot()
    assert {name: after[name] for name in before} == before
    rig.resume().abandon()
    assert rig.replay()[0] == list(range(1, 10))
