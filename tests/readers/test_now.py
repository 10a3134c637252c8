"""The control page: what the writer says while a follower has a pin, what is believed of it, and what it costs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from store_fixtures import wait_until
from wrapped_files import WrappedFiles

import kvwal
from kvwal.files import inside, system_files
from kvwal.readers.now import NOW_BYTES, NowPage, NowReader, Said, decode_now, encode_now
from kvwal.testing import SimulatedDisk

SAID = Said(b"s" * 16, b"l" * 8, 3, 41, 7, 123_456_789, 30, 31)


def test_a_page_comes_back_as_it_was_written_and_a_damaged_one_is_none() -> None:
    raw = encode_now(SAID)
    assert len(raw) == NOW_BYTES == 88
    assert decode_now(raw) == SAID
    assert raw[:12].hex() == "6b7677616c6e6f7701005800"
    for at in range(len(raw)):
        assert decode_now(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]) is None
    other = encode_now(SAID._replace(durable=42, heartbeat_ns=5))
    # Torn anywhere.
    assert {decode_now(raw[:at] + other[at:]) for at in range(1, 88)} <= {None, SAID, decode_now(other)}
    assert decode_now(raw[:-1]) is decode_now(raw + b"\0") is None


class Page:
    """A page on a simulated disk, with its writer and a reader."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_directory("/store")
        self.directory = self.disk.open_directory("/store")
        inside(self.directory, "readers", make=True)
        self.page = NowPage(self.disk, self.directory, SAID.store_id, SAID.line, 3, 0o600)
        self.reader = NowReader(self.disk, self.directory, SAID.store_id, SAID.line)


def test_it_is_believed_while_its_writer_lives() -> None:
    world = Page()
    assert world.reader.look() is None
    world.page.begin()
    assert world.reader.look() is None
    for durable in (5, 6):
        world.page.write(durable, 2, 1, 0)
        said = world.reader.look()
        assert said is not None
        assert (said.durable, said.generation, said.session, said.segment) == (durable, 2, 3, 1)
    world.disk.pass_time(1.5)
    assert world.reader.look() is not None
    world.disk.pass_time(0.6)
    assert world.reader.look() is None
    world.page.write(7, 2, 1, 0)
    assert world.reader.look() is not None
    world.page.end()
    world.page.end()
    assert inside(world.directory, "readers").names() == []
    # Another file of that name.
    world.page.begin()
    world.page.write(8, 2, 1, 0)
    world.disk.pass_time(3)
    assert world.reader.look() is None
    world.page.write(8, 2, 1, 0)
    said = world.reader.look()
    assert said is not None
    assert said.durable == 8
    world.reader.close()


def test_it_is_not_believed_of_another_store_or_from_another_clock() -> None:
    world = Page()
    world.page.begin()
    world.page.write(5, 2, 1, 0)
    for store_id, line in ((b"x" * 16, SAID.line), (SAID.store_id, b"x" * 8)):
        assert NowReader(world.disk, world.directory, store_id, line).look() is None
    ahead = Said(SAID.store_id, SAID.line, 3, 9, 2, int((world.disk.monotonic_s() + 60) * 1e9), 1, 0)
    world.disk.damage("/store/readers/now", 0, encode_now(ahead))
    assert world.reader.look() is None


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_a_commit_is_shown_as_soon_as_the_page_says_that_it_is_on_disk(store: str) -> None:
    files = system_files()
    with kvwal.open(store, background=False) as db, kvwal.follow(store) as live:
        db.put(b"key", b"1")
        last = db.put(b"key", b"2")
        # No record says so yet.
        assert live.refresh() == last - 1
        meta = db.engine._pages.meta  # type: ignore[attr-defined]
        page = NowPage(files, files.open_directory(store), meta.store_id, meta.line, meta.session, 0o600)
        page.begin()
        page.write(last, meta.generation, 1, 0)
        assert live.refresh() == last
        assert live[b"key"] == b"2"
        unpinned = kvwal.follow(store, pin=False)
        assert unpinned.refresh() == last - 1
        unpinned.close()
        page.end()


def test_the_page_is_there_while_a_follower_is(store: str) -> None:
    now = f"{store}/readers/now"
    with kvwal.open(store) as db:
        db[b"key"] = b"1"
        assert not os.path.exists(f"{store}/readers")
        with kvwal.follow(store) as live:
            wait_until(lambda: os.path.exists(now))
            for n in range(20):
                seqno = db.put(b"key", b"%d" % n)
                assert live.wait(seqno, 10)
                time.sleep(0.001)
            said = decode_now(Path(now).read_bytes())
            assert said is not None
            assert said.durable <= db.last_seqno
        wait_until(lambda: not os.path.exists(now))
        live = kvwal.follow(store)
        db[b"key"] = b"2"
        wait_until(lambda: os.path.exists(now))
    assert not os.path.exists(now)
    live.close()


def opcodes(call: Any) -> int:
    """How many bytecodes of the package a call runs in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        # Not of the files: each 5 ms it is looked whether the log still has its name.
        if "kvwal" in frame.f_code.co_filename and "/files/" not in frame.f_code.co_filename:
            frame.f_trace_opcodes = True
            count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_put_pays_nothing_for_followers_that_are_not_there(store: str) -> None:
    calls: list[str] = []

    class Counting:
        def __init__(self, file: Any, name: str) -> None:
            self._file, self._name = file, name

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._file, name)

            def call(*args: Any) -> Any:
                calls.append(f"{name} {self._name[-3:]}")
                return found(*args)

            return call

    files: Any = WrappedFiles(system_files(), Counting)
    with kvwal.open(store, files=files, background=False) as db:
        engine: Any = db.engine

        def put() -> None:
            db.put(b"key", b"value")

        for _ in range(20):
            put()
        before = min(opcodes(put) for _ in range(6))
        calls.clear()
        put()
        asked = [call for call in calls if not call.startswith("size")]
        assert asked == ["pwrite log", "datasync log"]
        # One comes and is told.
        told: list[int] = []
        engine._log.tell_flushes(lambda: told.append(engine._log.durable_seqno))
        put()
        assert told == [db.last_seqno]
        put()
        assert told == [db.last_seqno - 1, db.last_seqno]
        engine._log.tell_flushes(None)
        put()
        assert min(opcodes(put) for _ in range(6)) == before
        calls.clear()
        put()
        assert [call for call in calls if not call.startswith("size")] == asked


def test_who_waits_for_a_flush_is_woken_beside_those_who_are_told(store: str) -> None:
    with kvwal.open(store, background=False) as db:
        engine: Any = db.engine
        told: list[int] = []
        engine._log.tell_flushes(lambda: told.append(1))
        engine._log.tell_flushes(lambda: told.append(2))
        woken: list[int] = []
        engine._log._waiting.when_beyond(db.last_seqno, lambda: woken.append(1))
        for _ in range(3):
            db[b"key"] = b""
        assert woken == [1]
        assert told == [2, 2, 2]


def test_one_that_gives_up_waiting_takes_no_flush_from_those_who_are_told(store: str) -> None:
    with kvwal.open(store, background=False) as db:
        engine: Any = db.engine
        told: list[int] = []
        gives_up = engine._log._waiting.when_beyond(db.last_seqno, lambda: None)
        engine._log.tell_flushes(lambda: told.append(1))
        assert gives_up()
        for _ in range(3):
            db[b"key"] = b""
        assert told == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="this system has no pwrite")
def test_the_end_closes_no_file_that_a_leader_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its descriptor may be another file's by the time of the write."""
    path = str(tmp_path / "store")
    kvwal.open(path).close()
    files = system_files()
    directory = files.open_directory(path)
    inside(directory, "readers", make=True).close()
    page = NowPage(files, directory, b"s" * 16, b"l" * 8, 3, 0o600)
    page.begin()
    real, written = os.pwrite, []

    def ended_meanwhile(fd: int, data: bytes, offset: int) -> int:
        page.end()
        assert os.fstat(fd).st_nlink == 0
        written.append(fd)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", ended_meanwhile)
    page.write(1, 1, 1, 0)
    assert not page.is_open
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(*written)
