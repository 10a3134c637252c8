"""The meta slots in a file: how a file is made, which row of the table in meta.py holds, what is written first."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from pages_fixtures import Scratch, WatchedFiles, columns, overwrite, two_generations

from kvwal.keys import Seqno
from kvwal.pages import PageFile, Row, check
from kvwal.pages.node import PAGE_SIZE, POINTER


def test_create_removes_what_an_interrupted_create_left(tmp_path: Path) -> None:
    (tmp_path / "data.tmp").write_bytes(b"half")
    Scratch(str(tmp_path)).verify()
    assert not (tmp_path / "data.tmp").exists()


def test_file_with_a_torn_newer_slot_opens_with_the_older_generation_and_goes_on(tmp_path: Any) -> None:
    scratch = two_generations(tmp_path)
    newest = scratch.pages.meta
    scratch.pages.close()
    overwrite(scratch, newest.generation % 2 * PAGE_SIZE + 40, b"\xff\xff")
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.ONE_TORN
    assert scratch.pages.meta.generation == newest.generation - 1
    assert scratch.pages.older is None
    scratch.model = {b"%04d" % index: b"old" for index in range(500)}
    scratch.verify()
    for step in range(4):
        scratch.checkpoint({b"%04d" % step: b"again"})
        scratch.verify()
    assert scratch.pages.meta.generation == newest.generation + 3


def test_file_with_a_bad_newer_root_opens_with_the_older_generation_and_the_bad_one_never_returns(
    tmp_path: Any,
) -> None:
    """The root may read well again after the pages below it were reused: its slot must not survive."""
    scratch = two_generations(tmp_path)
    newest = scratch.pages.meta
    scratch.pages.close()
    at = POINTER.unpack(newest.root)[0] * PAGE_SIZE + 100
    with open(scratch.path, "rb") as file:
        file.seek(at)
        good = file.read(1)
    overwrite(scratch, at, bytes([good[0] ^ 1]))
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.NEWER_ROOT_BAD
    overwrite(scratch, at, good)

    def stop() -> None:
        raise KeyError("crash before the flip")

    with pytest.raises(KeyError):
        scratch.pages.checkpoint(columns([(b"x", b"y")]), (), seqno=Seqno(9), time_us=9, before_flip=stop)
    scratch.pages.close()
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.ONE_TORN
    assert scratch.pages.meta.generation == newest.generation - 1
    assert list(check(scratch.pages)) == []


def test_first_checkpoint_writes_the_newest_slot_again_before_the_other(tmp_path: Any) -> None:
    """Its writer may have died before the sync; then only the page cache has it, and the other slot is all there is."""
    scratch = two_generations(tmp_path)
    scratch.pages.close()
    files = WatchedFiles()
    calls: list[tuple[str, int]] = []
    pages = PageFile(files.open_directory(str(tmp_path)), cache_bytes=1 << 20, writable=True)  # type: ignore[arg-type]
    files.before = lambda operation, offset, size: calls.append((operation, offset))
    slot = pages.meta.generation % 2 * PAGE_SIZE
    pages.checkpoint(columns([(b"k", b"v")]), (), seqno=Seqno(9), time_us=9)
    writes = [call for call in calls if call[0] in {"pwrite", "sync"}]
    assert writes[:2] == [("pwrite", slot), ("sync", 0)]
    assert writes[-3:] == [("sync", 0), ("pwrite", PAGE_SIZE - slot), ("sync", 0)]
    pages.close()


def test_open_reads_two_slots_and_a_root_and_writes_nothing(tmp_path: Any) -> None:
    scratch = two_generations(tmp_path)
    scratch.pages.close()
    files = WatchedFiles()
    calls: list[str] = []
    files.before = lambda operation, offset, size: calls.append(operation)
    PageFile(files.open_directory(str(tmp_path)), cache_bytes=1 << 20, writable=True).close()  # type: ignore[arg-type]
    assert calls == ["pread", "pread"]


@pytest.mark.parametrize("place", ["slot of the newer", "slot of the older", "root of the newer"])
def test_a_slot_or_root_that_cannot_be_read_costs_salvage_its_generation_alone(tmp_path: Any, place: str) -> None:
    scratch = two_generations(tmp_path)
    newest = scratch.pages.meta
    scratch.pages.close()
    bad = {
        "slot of the newer": newest.generation % 2,
        "slot of the older": (newest.generation - 1) % 2,
        "root of the newer": POINTER.unpack(newest.root)[0],
    }[place]

    def before(operation: str, offset: int, size: int) -> None:
        if offset < (bad + 1) * PAGE_SIZE and bad * PAGE_SIZE < offset + size:
            raise OSError(code, "bad sector")

    code, files = errno.EIO, WatchedFiles()
    directory: Any = files.open_directory(str(tmp_path))
    files.before = before
    # An open does not go back for it: the next one may read it.
    with pytest.raises(OSError, match="bad sector"):
        PageFile(directory, cache_bytes=0, writable=False)
    pages = PageFile(directory, cache_bytes=0, writable=False, salvages=True)
    assert pages.choice.row is (Row.NEWER_ROOT_BAD if "root" in place else Row.ONE_TORN)
    assert pages.meta.generation == newest.generation - ("newer" in place)
    assert "cannot be read: [Errno 5] bad sector" in pages.choice.detail
    pages.close()
    code = errno.EMFILE
    with pytest.raises(OSError, match="bad sector"):
        PageFile(directory, cache_bytes=0, writable=False, salvages=True)
