"""Flag "r" after a crash: what it shows is on disk, and it writes no byte."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.batch import WriteBatch
from kvwal.errors import PoisonedError
from kvwal.files.names import POISONED
from kvwal.testing import SimulatedDisk

SETTINGS: dict[str, Any] = {"background": False, "durability": "os", "segment_bytes": 16 << 10}


def killed(disk: SimulatedDisk, commits: int, *, flushed: int = 0) -> dict[bytes, bytes]:
    """A process that dies, after some commits of which the first ones were flushed; the page cache stays."""
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    content = {}
    for number in range(commits):
        db[b"%03d" % number] = content[b"%03d" % number] = b"%d." % number * 300
        if number + 1 == flushed:
            db.sync()
    disk.kill()
    return content


@pytest.mark.parametrize("commits", [1, 5, 60])
def test_what_a_reader_saw_is_still_there_after_a_power_cut(commits: int) -> None:
    disk = SimulatedDisk(seed=commits)
    content = killed(disk, commits)
    disk.trace = []
    with kvwal.open("/kv", "r", files=disk) as db:
        assert dict(db) == content
        assert db.recovery.withheld == 0
        assert db.durable_seqno == db.last_seqno == commits
    writing = {"pwrite", "allocate", "truncate", "create", "rename", "unlink", "make_directory"}
    assert not writing & {operation.name for operation in disk.trace}
    with kvwal.open("/kv", files=disk.crash(0)) as db:
        assert dict(db) == content


@pytest.mark.parametrize("commits", [9, 60])
@pytest.mark.parametrize("operation", ["datasync", "sync_directory"])
def test_where_the_flush_fails_a_reader_stops_at_what_is_known_to_be_on_disk(commits: int, operation: str) -> None:
    disk = SimulatedDisk(seed=1)
    content = killed(disk, commits, flushed=7)
    fault = disk.fail(operation, 1, errno.EIO)
    with kvwal.open("/kv", "r", files=disk) as db:
        assert fault.struck == 1
        # The watermark may lag behind the last flush; what is beyond it is not shown.
        report = db.recovery
        last = db.last_seqno
        assert report.durable_seqno == last < commits
        assert dict(db) == {key: value for key, value in content.items() if int(key) < last}
        assert report.withheld == commits - last
        assert report.commits == last
        assert "are not shown: flushing them failed" in report.detail
        assert db.verify().ok


def test_a_flush_of_the_writer_that_failed_is_not_made_good_by_the_one_of_a_reader() -> None:
    """The system took what it could not write for written: a second flush says nothing."""
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    db[b"a"] = b"1"
    db.sync()
    db[b"b"] = b"2"
    db.engine._log.mark_idle()  # type: ignore[union-attr]
    db[b"c"] = b"3"
    disk.fail("datasync", 1, errno.EIO)
    with pytest.raises(PoisonedError):
        db.sync()
    said = json.loads(disk.read(f"/kv/{POISONED}"))
    assert said["durable_seqno"] == 1
    assert set(said) == {"reason", "durable_seqno", "session", "wall_us"}
    disk.kill()
    assert_shows(disk, {b"a": b"1"}, 2)
    # A writer writes it again, and takes the word back.
    with kvwal.open("/kv", files=disk, **SETTINGS) as again:
        assert dict(again) == {b"a": b"1", b"b": b"2", b"c": b"3"}
        assert POISONED not in disk.open_directory("/kv").names()
    with kvwal.open("/kv", files=disk.crash(0)) as found:
        assert len(found) == 3


def test_a_word_that_was_taken_back_does_not_come_back() -> None:
    """It would keep from readers what was acknowledged since."""
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    db[b"a"] = b"1"
    disk.fail("datasync", 1, errno.EIO)
    with pytest.raises(PoisonedError):
        db.sync()
    disk.kill()
    db = kvwal.open("/kv", files=disk, **{**SETTINGS, "durability": "commit"})
    db[b"b"] = b"2"
    db[b"c"] = b"3"
    for survivors in (0, 1, 2, 3, -1):
        assert_shows(disk.crash(survivors), {b"a": b"1", b"b": b"2", b"c": b"3"}, 0)


def assert_shows(disk: SimulatedDisk, content: dict[bytes, bytes], withheld: int) -> None:
    with kvwal.open("/kv", "r", files=disk) as reader:
        assert dict(reader) == content
        assert reader.recovery.withheld == withheld
        assert not withheld or "a write or flush of their writer failed" in reader.recovery.detail


WORDS = [None, b"", b"{", b"[]", b'{"durable_seqno": true}', b'{"durable_seqno": 99}', b"\xff", b"[" * 60_000]


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_what_was_acknowledged_is_shown_although_no_record_says_so(word: bytes | None, mark: bool) -> None:
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **{**SETTINGS, "durability": "commit"})
    db[b"a"] = b"1"
    db[b"b"] = b"2"
    if mark:
        db.engine._log.mark_idle()  # type: ignore[union-attr]
    disk.fail("pwrite", 1, errno.EIO)
    with pytest.raises(PoisonedError):
        db[b"c"] = b"3"
    disk.kill()
    if word is not None:
        # It was not flushed, and may be torn.
        disk.cut(f"/kv/{POISONED}", 0)
        disk.damage(f"/kv/{POISONED}", 0, word)
    if word is None or b"99" in word or mark:
        assert_shows(disk, {b"a": b"1", b"b": b"2"}, 0)
    else:
        assert_shows(disk, {b"a": b"1"}, 1)


def test_a_store_that_is_erased_takes_the_word_with_it() -> None:
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    db[b"a"] = b"1"
    disk.fail("datasync", 1, errno.EIO)
    with pytest.raises(PoisonedError):
        db.sync()
    disk.kill()
    db = kvwal.open("/kv", "n", files=disk, **SETTINGS)
    db[b"b"] = b"2"
    disk.kill()
    assert_shows(disk, {b"b": b"2"}, 0)


def test_a_directory_of_that_name_is_no_word(tmp_path: Path) -> None:
    for flag in ("c", "r", "w"):
        with kvwal.open(tmp_path / "a.kv", flag, **SETTINGS) as db:  # type: ignore[arg-type]
            if flag == "c":
                db[b"a"] = b"1"
                (tmp_path / "a.kv" / POISONED).mkdir()
            assert db[b"a"] == b"1"


def test_a_writer_that_cannot_leave_word_is_poisoned_all_the_same() -> None:
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    db[b"a"] = b"1"
    disk.fail("datasync", 1, errno.EIO)
    disk.fail("create", 1, errno.EMFILE, forever=True)
    with pytest.raises(PoisonedError):
        db.sync()
    with pytest.raises(PoisonedError):
        db[b"b"] = b"1"
    assert POISONED not in disk.open_directory("/kv").names()


def test_a_commit_over_several_tables_is_withheld_whole() -> None:
    disk = SimulatedDisk(seed=1)
    db = kvwal.open("/kv", files=disk, **SETTINGS)
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.table(16).put(b"a", b"1")
    db.commit(batch)
    disk.kill()
    disk.fail("datasync", 1, errno.EIO)
    with kvwal.open("/kv", "r", files=disk) as reader:
        assert (len(reader), reader.engine.reads.count(table=16)) == (0, 0)
    disk.heal()
    with kvwal.open("/kv", "r", files=disk) as reader:
        assert (len(reader), reader.engine.reads.count(table=16)) == (1, 1)
