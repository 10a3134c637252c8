"""Each operation of a checkpoint fails once: the generation before stays, and a full disk is only a delay."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from pages_fixtures import Scratch, WatchedFiles, columns, contents, pin

from kvwal.errors import DiskFullError, PoisonedError
from kvwal.keys import Seqno
from kvwal.pages import check, create_page_file, writer
from kvwal.pages.node import PAGE_SIZE

BATCH: dict[bytes, bytes | None] = {b"%04d" % index: b"new" * 20 for index in range(0, 4000, 3)}
BATCH |= {b"large": bytes(300_000), b"0001": None}


@pytest.fixture(params=[writer._FLUSH_BYTES, PAGE_SIZE], ids=["flushed once", "flushed on the way"])
def flushed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint writes is flushed at its end, or after each write as well."""
    monkeypatch.setattr(writer, "_FLUSH_BYTES", request.param)


class Trap:
    """Fails the nth operation, and only that."""

    def __init__(self, nth: int, code: int, kinds: set[str]) -> None:
        self.left = nth
        self.code = code
        self.kinds = kinds
        self.sprung: tuple[str, int] | None = None

    def __call__(self, operation: str, offset: int, size: int) -> None:
        if operation in self.kinds and self.sprung is None:
            if self.left == 0:
                self.sprung = (operation, offset)
                raise OSError(self.code, "injected")
            self.left -= 1


def prepared(directory: Path) -> Scratch:
    directory.mkdir(exist_ok=True)
    scratch = Scratch(str(directory), files=WatchedFiles())
    for step in range(4):
        scratch.checkpoint({b"%04d" % index: b"%d" % step * 60 for index in range(0, 4000, 1 + step)})
    return scratch


def quiet(operation: str, offset: int, size: int) -> None:
    del operation, offset, size


def each_failure(tmp_path: Path, code: int, kinds: set[str]) -> Any:
    """A prepared file per operation of one checkpoint, with that operation failing in it."""
    nth = 0
    while True:
        directory = tmp_path / f"{code}-{nth}"
        directory.mkdir()
        scratch = prepared(directory)
        trap = Trap(nth, code, kinds)
        scratch.files.before = trap
        yield scratch, trap
        scratch.files.before = quiet
        scratch.pages.close()
        if trap.sprung is None:
            assert nth, "nothing was tried"
            return
        nth += 1


def test_full_disk_at_any_write_changes_nothing_and_a_retry_succeeds(tmp_path: Path) -> None:
    for scratch, trap in each_failure(tmp_path, errno.ENOSPC, {"pwrite"}):
        meta, before = scratch.pages.meta, scratch.model
        in_meta_slot = False
        try:
            scratch.checkpoint(BATCH)
        except DiskFullError:
            assert trap.sprung[1] >= 2 * PAGE_SIZE
        except OSError as error:
            # A meta slot is never new space; whatever made it fail leaves the slot in doubt.
            in_meta_slot = error.errno == errno.ENOSPC and trap.sprung[1] < 2 * PAGE_SIZE
            if not in_meta_slot:
                raise
        scratch.files.before = quiet
        if trap.sprung is None:
            scratch.verify()
            continue
        assert scratch.pages.meta == meta
        assert contents(scratch.pages.tree()) == before
        if in_meta_slot:
            with pytest.raises(PoisonedError):
                scratch.checkpoint(BATCH)
            continue
        scratch.verify()
        assert Path(scratch.path).stat().st_size <= meta.page_count * PAGE_SIZE
        scratch.checkpoint(BATCH)
        scratch.verify()
        scratch.reopen()
        scratch.verify()


@pytest.mark.usefixtures("flushed")
@pytest.mark.parametrize("kind", ["pwrite", "sync"])
def test_failed_write_or_sync_poisons_checkpoints_and_leaves_reads(tmp_path: Path, kind: str) -> None:
    for scratch, trap in each_failure(tmp_path, errno.EIO, {kind}):
        meta, before = scratch.pages.meta, scratch.model
        if trap.left > 50:
            break
        try:
            scratch.checkpoint(BATCH)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        scratch.files.before = quiet
        if trap.sprung is None:
            continue
        assert scratch.pages.meta == meta
        assert contents(scratch.pages.tree()) == before
        with pytest.raises(PoisonedError) as caught:
            scratch.checkpoint(BATCH)
        assert isinstance(caught.value.__cause__, OSError)
        scratch.pages.close()
        scratch.pages = scratch.open()
        # The flip may have reached the disk or not; both are a whole generation.
        if scratch.pages.meta.generation == meta.generation:
            scratch.model = before
        assert list(check(scratch.pages)) == []
        scratch.checkpoint({b"after": b"recovery"})
        assert list(check(scratch.pages)) == []


def test_generations_can_still_be_checked_and_pinned_after_a_flip_that_failed(tmp_path: Path) -> None:
    for kind in ("pwrite", "sync"):
        scratch = prepared(tmp_path / kind)
        older, meta = scratch.pages.older, scratch.pages.meta
        assert older is not None
        before = contents(scratch.pages.tree(older))

        def fail_from_now_on(scratch: Scratch = scratch, kind: str = kind) -> None:
            scratch.files.before = Trap(0, errno.EIO, {kind})

        with pytest.raises(OSError, match="injected"):
            scratch.pages.checkpoint(
                columns(sorted(BATCH.items())), seqno=Seqno(9), time_us=9, before_flip=fail_from_now_on
            )
        assert (scratch.pages.meta, scratch.pages.older) == (meta, older)
        scratch.verify()
        pin(scratch.pages, older.generation)
        assert contents(scratch.pages.tree(older)) == before
        scratch.pages.close()


@pytest.mark.parametrize("kinds", [{"pwrite"}, {"sync"}, {"truncate"}])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_flip_that_is_interrupted_again_and_again_is_done_by_the_next_checkpoint(
    tmp_path: Path, kinds: set[str], times: int
) -> None:
    class Interrupted(KeyboardInterrupt):
        pass

    scratch = prepared(tmp_path)
    # So that the file is cut as well.
    scratch.checkpoint({}, [(b"", None)])
    interrupted = 0

    def interrupt(operation: str, offset: int, size: int) -> None:
        nonlocal interrupted
        if operation in kinds and interrupted < times:
            interrupted += 1
            raise Interrupted

    def from_now_on() -> None:
        scratch.files.before = interrupt

    for _ in range(times):
        before = contents(scratch.pages.tree())
        with pytest.raises(Interrupted):
            scratch.pages.checkpoint(
                columns([(b"a", b"1")]), seqno=Seqno(8), time_us=9, before_flip=from_now_on if not interrupted else None
            )
        assert contents(scratch.pages.tree()) in (before, {b"a": b"1"})
        assert not scratch.pages.poisoned
        assert list(check(scratch.pages)) == []
    assert interrupted == times
    scratch.pages.checkpoint(columns([(b"b", b"2")]), seqno=Seqno(9), time_us=9)
    for reopened in (False, True):
        if reopened:
            scratch.reopen()
        assert contents(scratch.pages.tree()) == {b"a": b"1", b"b": b"2"}
        assert list(check(scratch.pages)) == []
    scratch.pages.close()


@pytest.mark.usefixtures("flushed")
def test_full_disk_reported_by_a_sync_is_not_retried(tmp_path: Path) -> None:
    """The kernel reports it once, and the pages it could not write count as clean afterwards."""
    for scratch, trap in each_failure(tmp_path, errno.ENOSPC, {"sync"}):
        try:
            scratch.checkpoint(BATCH)
        except DiskFullError:
            pytest.fail("a failed sync must not look like something to try again")
        except OSError:
            scratch.files.before = quiet
            with pytest.raises(PoisonedError):
                scratch.checkpoint(BATCH)
        assert trap.left >= 0


def test_no_more_is_flushed_at_once_than_a_commit_can_wait_for(tmp_path: Path) -> None:
    scratch = prepared(tmp_path)
    written, unflushed = [0], [0]

    def count(operation: str, offset: int, size: int) -> None:
        if operation == "pwrite":
            written.append(written[-1] + size)
            unflushed.append(unflushed[-1] + size)
        elif operation == "sync":
            unflushed.append(0)

    scratch.files.before = count
    scratch.checkpoint({b"%06d" % index: bytes(4000) for index in range(9000)})
    assert written[-1] > 4 * writer._FLUSH_BYTES
    # One write more is seen after the flush is due.
    assert max(unflushed) < writer._FLUSH_BYTES + writer._RUN_BYTES
    # And no less: what is left, and the flip, are flushed besides.
    assert unflushed.count(0) - 1 <= written[-1] // writer._FLUSH_BYTES + 2
    scratch.verify()
    scratch.pages.close()


def test_failed_read_changes_nothing_and_a_retry_succeeds(tmp_path: Path) -> None:
    for scratch, trap in each_failure(tmp_path, errno.EIO, {"pread"}):
        meta = scratch.pages.meta
        try:
            scratch.checkpoint(BATCH)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            scratch.files.before = quiet
            assert scratch.pages.meta == meta
            if trap.left == 0:
                scratch.verify()
                scratch.checkpoint(BATCH)
        scratch.files.before = quiet
        scratch.verify()
        if trap.sprung is not None:
            # One in each stretch of the file shows the same; all of them would only be slow.
            trap.left += 7


def test_failed_truncation_does_no_harm(tmp_path: Path) -> None:
    scratch = prepared(tmp_path)
    scratch.checkpoint({}, [(b"", None)])
    scratch.checkpoint({})
    scratch.files.before = Trap(0, errno.EIO, {"truncate"})
    scratch.checkpoint({})
    scratch.checkpoint({})
    scratch.files.before = quiet
    scratch.checkpoint({})
    scratch.verify()
    assert Path(scratch.path).stat().st_size <= 8 * PAGE_SIZE
    scratch.pages.close()


def test_caller_that_stops_before_the_flip_stops_the_checkpoint(tmp_path: Path) -> None:
    scratch = prepared(tmp_path)
    meta = scratch.pages.meta
    size = Path(scratch.path).stat().st_size

    def stop() -> None:
        raise OSError(errno.ENOSPC, "the log's disk is full")

    # What the caller raises passes through: only the caller knows what it means.
    with pytest.raises(OSError, match="log's disk"):
        scratch.pages.checkpoint(columns(sorted(BATCH.items())), (), seqno=Seqno(9), time_us=9, before_flip=stop)
    assert scratch.pages.meta == meta
    assert Path(scratch.path).stat().st_size == size
    scratch.verify()
    scratch.checkpoint(BATCH)
    scratch.verify()
    scratch.pages.close()


def test_updates_that_raise_stop_the_checkpoint(tmp_path: Path) -> None:
    scratch = prepared(tmp_path)

    def updates() -> Any:
        for index in range(3000):
            yield b"%04d" % index, b"x" * 500
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scratch.pages.checkpoint(columns(updates()), (), seqno=Seqno(9), time_us=9)
    scratch.verify()
    scratch.checkpoint(BATCH)
    scratch.verify()
    scratch.pages.close()


def test_create_that_fails_leaves_no_page_file(tmp_path: Path) -> None:
    files: Any = WatchedFiles()
    for kind in ("pwrite", "sync"):
        files.before = Trap(0, errno.ENOSPC, {kind})
        with pytest.raises(OSError, match="injected"):
            create_page_file(files.open_directory(str(tmp_path)), b"s" * 16, time_us=1)
        assert not (tmp_path / "data").exists()
    files.before = quiet
    create_page_file(files.open_directory(str(tmp_path)), b"s" * 16, time_us=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
