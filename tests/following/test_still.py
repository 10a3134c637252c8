"""Flag "r": a follower that moves only where it must. It excludes no process, and what it shows is there to stay."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import all_durable, rewrite
from recorded_programs import restarts
from two_programs import PATH, Recorded, World
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal.files import is_recovering, system_files
from kvwal.testing import SimulatedDisk

# Beside a writer.


def test_readers_and_a_writer_exclude_each_other_in_no_order(path: str) -> None:
    with kvwal.open(path, background=False) as db:
        db.put(b"key", b"1")
        all_durable(db)
        readers = [kvwal.open(path, "r") for _ in range(3)]
        assert [reader[b"key"] for reader in readers] == [b"1"] * 3
        db.put(b"key", b"2")
    assert [reader[b"key"] for reader in readers] == [b"1"] * 3
    with kvwal.open(path) as db, kvwal.open(path, "r") as late:
        db.put(b"key", b"3")
        assert late[b"key"] == b"2"
        assert (late.read_only, late.recovery.row) == (True, "followed")
    for reader in readers:
        reader.close()


def test_beside_a_writer_it_shows_what_is_on_disk_and_says_what_it_withholds() -> None:
    disk = SimulatedDisk()
    with kvwal.open(PATH, files=disk, background=False) as db:
        db.put(b"a", b"1")
        all_durable(db)
        db.put(b"b", b"2", durability="os")
        with kvwal.open(PATH, "r", files=disk) as reader:
            assert dict(reader) == {b"a": b"1"}
            assert (reader.recovery.withheld, reader.durable_seqno) == (1, 1)
        disk.kill()
        # Now it flushes what it finds, and shows it.
        with kvwal.open(PATH, "r", files=disk) as reader:
            assert dict(reader) == {b"a": b"1", b"b": b"2"}
            assert reader.recovery.withheld == 0
        with kvwal.open(PATH, files=disk.crash(0)) as again:
            assert dict(again) == {b"a": b"1", b"b": b"2"}
        db.engine.abandon()


@pytest.mark.parametrize("seen_by", ["the log", "the lock"])
@pytest.mark.parametrize("pauses_of_a_recovery", [3, 20])
def test_it_waits_for_a_writer_that_recovers_what_another_one_had_acknowledged(
    pauses_of_a_recovery: int, seen_by: str
) -> None:
    """That the recovery is over is seen by the next look at the log, or is said only after that look."""
    disk = SimulatedDisk()
    with kvwal.open(PATH, files=disk, background=False) as db:
        db.put(b"n", b"1")
        db.put(b"n", b"2")
        disk.kill()
        db.engine.abandon()
    held = disk.open_directory(PATH)
    held.lock(shared=False)
    recovering = False
    pauses: list[float] = []

    class Files(Wrapped):
        def give_way(self, pause_s: float) -> None:
            pauses.append(pause_s)
            if len(pauses) == ends and seen_by == "the log":
                recover()

        def open_directory(self, path: str) -> Any:
            return Held(self.there.open_directory(path))

    class Held(Wrapped):
        def is_recovering(self) -> bool:
            if len(pauses) == ends and seen_by == "the lock" and not kept:
                recover()
            return recovering and not kept

    def recover() -> None:
        held.close()
        kept.append(kvwal.open(PATH, files=disk, background=False))

    kept: list[kvwal.Store] = []
    ends = -1
    files: Any = Files(disk)
    # One that says nothing for so long, and then what is on disk for sure. One that goes on recovering: for longer.
    for recovering, least_s, most_s in ((False, 0.1, 0.2), (True, 10, 10.2)):  # noqa: B007  # `Held` reads it
        pauses.clear()
        with kvwal.open(PATH, "r", files=files) as reader:
            assert reader[b"n"] == b"1"
            assert reader.recovery.withheld == 1
        assert least_s < sum(pauses) < most_s
    # One that is done meanwhile.
    ends = pauses_of_a_recovery
    pauses.clear()
    with kvwal.open(PATH, "r", files=files) as reader:
        assert reader[b"n"] == b"2"
        assert reader.recovery.row == "followed"
    assert len(pauses) == (ends if seen_by == "the log" or ends > 7 else ends + 1)
    # Beside one that writes, for what was written when it looked first.
    for n in range(3, 6):
        kept[0].put(b"n", b"%d" % n)
    with kvwal.open(PATH, "r", files=files) as reader:
        assert reader[b"n"] == b"4"
    kept[0].close()


def test_it_shows_one_moment_until_its_pages_are_written_over(path: str) -> None:
    with kvwal.open(path, background=False, keep_history_s=0) as db:
        rewrite(db, b"x")
        with kvwal.open(path, "r", cache_bytes=256 << 10) as reader:
            rewrite(db, b"y")
            assert reader.get(b"0001") == b"x" * 500
            assert set(reader.values()) == {b"x" * 500}
            assert reader.last_seqno == 1
            rewrite(db, b"z")
            rewrite(db, b"!")
            # Not the one of before, and none between.
            assert set(reader.values()) == {b"!" * 500}
            assert reader.get(b"1500") == b"!" * 500
            assert reader.get_many([b"0001", b"1999"]) == [b"!" * 500] * 2
            assert (reader.last_seqno, len(reader)) == (4, 2000)
            with reader.transaction() as txn:
                assert txn.get(b"0777") == b"!" * 500


def test_reads_of_now_begin_again_and_moments_that_are_held_do_not(path: str) -> None:
    reads: list[Any] = [
        lambda db: db.get(b"1500"),
        lambda db: db.get_many([b"0001", b"1999"]),
        lambda db: len(db),
        lambda db: db.key_at(777),
        lambda db: db.first(b"1001"),
        lambda db: dict(db),
        lambda db: dict(db.snapshot()),
        lambda db: dict(db.transaction().items()),
        lambda db: dict(db.table("users", str, int)),
        lambda db: db.table("users", str, int).get_many(["ada"]),
        lambda db: [info.keys for info in db.tables()],
        lambda db: db.consumers(),
    ]
    with kvwal.open(path, background=False, keep_history_s=0) as db:
        db.table("users", str, int)["ada"] = 1
        for read in reads:
            rewrite(db, b"x")
            with kvwal.open(path, "r", cache_bytes=256 << 10) as reader:
                held = reader.snapshot()
                for value in (b"y", b"z", b"!"):
                    rewrite(db, value)
                assert read(reader) == read(db)
                with pytest.raises(kvwal.SnapshotTooOld):
                    dict(held)


def test_a_store_that_is_erased_under_it_is_said_to_be_so(path: str) -> None:
    with kvwal.open(path, background=False, keep_history_s=0) as db:
        rewrite(db, b"x")
    with kvwal.open(path, "r", cache_bytes=256 << 10) as reader:
        kvwal.open(path, "n").close()
        # Its file is still there for it.
        assert len(reader) == 2000
        Path(path, "data").unlink()
        with pytest.raises(kvwal.StoreRemovedError):
            reader.engine.progress.refresh()  # type: ignore[attr-defined]


def test_it_waits_for_no_commit(path: str) -> None:
    with kvwal.open(path) as db, kvwal.open(path, "r") as reader:
        db.put(b"a", b"")
        with pytest.raises(kvwal.ReadOnlyError):
            reader.changes(follow=True)
        with pytest.raises(kvwal.ReadOnlyError):
            reader.put(b"a", b"")
        assert list(reader.changes()) == []
        assert not reader.changes().alive or not list(reader.changes())


def test_a_writer_waits_for_one_that_looks_and_not_for_one_that_holds_the_lock(path: str) -> None:
    kvwal.open(path).close()
    held = system_files().open_directory(path)
    held.lock(shared=True)
    with pytest.raises(kvwal.LockedError):
        kvwal.open(path)
    timer = threading.Timer(0.03, held.close)
    timer.start()
    kvwal.open(path).close()
    timer.join()


def test_readers_that_come_all_the_time_keep_no_writer_out(path: str) -> None:
    db = kvwal.open(path, background=False)
    db.put(b"a", b"1")
    all_durable(db)
    db.put(b"a", b"1", durability="os")
    db.engine.abandon()
    stop = threading.Event()
    opened = []

    def read() -> None:
        while not stop.is_set():
            with kvwal.open(path, "r") as reader:
                opened.append(reader[b"a"])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until, writers = time.monotonic() + 0.5, 0
        while time.monotonic() < until or writers < 20:
            with kvwal.open(path, background=False) as db:
                db.put(b"a", b"1")
                with pytest.raises(kvwal.LockedError):
                    kvwal.open(path)
            writers += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(opened) == {b"1"}


# Writers that come and go while it is opened.


def in_doubt(writer: Recorded) -> None:
    """Writers that die with commits that no flush has brought on disk, and that clean up after them."""
    for n in range(6):
        db = writer.open()
        writer.put((b"a", b"%d durable" % n), (b"key%d" % n, b""))
        writer.put((b"b", b"%d not yet" % n), durability="os")
        writer.put((b"c", b"%d nor this" % n), durability="os")
        if n == 0:
            writer.begin = len(writer.steps)
        if n == 2:
            db.checkpoint()
        if n == 4:
            db.close()
        else:
            writer.disk.kill()
            db.engine.abandon()


@cache
def recorded() -> Recorded:
    return Recorded(in_doubt)


REFUSED = b"refused"


def superseding(writer: Recorded) -> None:
    """A record that is written whole and refused, since the disk is full, and another commit in its place."""
    writer.open().close()
    with writer.open():
        writer.put((b"a", b"1"))
    writer.begin = len(writer.steps)
    with writer.open():
        writer.disk.fail("pwrite", error=errno.ENOSPC, path="*.log*", effect="all", forever=True)
        writer.put((b"a", REFUSED))
        writer.disk.heal()
        writer.put((b"a", b"instead"))


def steps_with_the_refused_record(writer: Recorded) -> list[int]:
    """After how many steps the refused record is in the log, and no newer segment."""
    found = []
    for done in range(writer.begin, len(writer.steps)):
        world = World(writer)
        world.advance(done)
        names = sorted(name for name in world.disk.open_directory(PATH).names() if name.endswith(".log"))
        if len(names) == 1 and REFUSED in world.disk.read(f"{PATH}/{names[0]}"):
            found.append(done)
    return found


def test_a_record_that_was_refused_is_not_shown_whenever_its_writer_comes_and_goes() -> None:
    """The writer comes while it is opened, up to the refused record; and it ends later, or not at all."""
    writer = Recorded(superseding)
    there = steps_with_the_refused_record(writer)
    assert there
    moments = 40
    for first in range(moments):
        for second in (None, *range(first + 1, moments)):
            turns = {first: there[0] - writer.begin, second: len(writer.steps)}
            world = World(writer, lambda n, turns=turns: turns.get(n, 0))  # type: ignore[misc]
            world.advance(writer.begin)
            with world.read() as reader:
                seqno, content = reader.last_seqno, dict(reader)
            assert content == writer.states[seqno], (first, second)
            if second is not None and world.looked <= second:
                moments = min(moments, world.looked)
                break


def test_a_flush_that_fails_while_it_is_opened_is_no_flush() -> None:
    """The reader meets what a writer appends meanwhile, and the flush of that fails before the reader's own."""
    disk = SimulatedDisk()
    kvwal.open(PATH, files=disk, background=False).close()
    writers: list[kvwal.Store] = []

    class Opened:
        def __init__(self, file: Any, name: str) -> None:
            self._file, self._name = file, name
            if name.endswith(".log") and not writers:
                writers.append(kvwal.open(PATH, files=disk, background=False))
                writers[0].put(b"key", b"not on disk", durability="os")

        def datasync(self) -> None:
            if len(writers) == 1:
                writers.append(writers[0])
                disk.fail("datasync", 1, errno.EIO)
                with pytest.raises(kvwal.PoisonedError):
                    writers[0].sync()
                writers[0].engine.abandon()
            self._file.datasync()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    files: Any = WrappedFiles(disk, Opened)
    with kvwal.open(PATH, "r", files=files) as reader:
        assert len(writers) == 2
        assert dict(reader) == {}
        assert reader.recovery.withheld == 1


def look(world: World) -> int:
    """Open it among the steps of writers: it shows a state that no crash takes back. Returns the commit."""
    before = world.durable
    with world.read() as reader:
        seqno, content = reader.last_seqno, dict(reader)
    # What a writer that lives has acknowledged may be said to be on disk a little later.
    assert seqno >= before or world.is_locked
    assert content == world.recorded.states[seqno]
    for survivors in (0, 7):
        with kvwal.open(PATH, files=world.disk.crash(survivors), background=False) as after:
            assert after.last_seqno >= seqno
            assert list(after.history()) or seqno == 0
            with after.snapshot(at=seqno) as then:
                assert dict(then) == content
    return seqno


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_whatever_writers_do_while_it_is_opened_it_shows_what_stays(turns: int) -> None:
    writer = recorded()
    for begin in range(writer.begin, len(writer.steps), 1 if turns == 0 else 3):
        world = World(writer, lambda n: turns)
        world.advance(begin)
        look(world)


@pytest.mark.parametrize("program", [in_doubt, restarts])
def test_a_writer_that_is_killed_at_any_moment_leaves_what_stays(program: Callable[[Recorded], None]) -> None:
    writer = Recorded(program)
    writer.held = [False] * len(writer.held)
    for begin in range(writer.begin, len(writer.steps)):
        world = World(writer)
        world.advance(begin)
        look(world)


def test_a_writer_recovers_only_until_it_is_open(path: str) -> None:
    disk = SimulatedDisk()
    for files, where in ((disk, PATH), (system_files(), path)):
        with kvwal.open(where, files=files, background=False):
            assert not is_recovering(files.open_directory(where))


def test_it_never_goes_back_for_a_writer_that_recovers() -> None:
    """What was shown while no writer was there is shown beside one that recovers it, however long that takes."""
    writer = recorded()
    times = 0
    for begin, (name, _) in enumerate(writer.steps):
        if name != "lock" or begin < writer.begin:
            continue
        world = World(writer)
        world.advance(begin)
        shown = look(world)
        steps = begin + 1
        while writer.recovering[steps]:
            world = World(writer)
            world.advance(steps)
            assert world.is_locked
            assert look(world) >= shown
            times += 1
            steps += 1
    assert times > 20


@pytest.mark.parametrize("attach", [partial(kvwal.open, flag="r"), kvwal.follow])
def test_a_directory_that_cannot_be_flushed(attach: Callable[..., Any]) -> None:
    disk = SimulatedDisk()
    with kvwal.open(PATH, files=disk, background=False) as db:
        db.put(b"a", b"1")
        all_durable(db)
        disk.kill()
        db.engine.abandon()
    # As squashfs answers.
    disk.fail("sync_directory", error=errno.EINVAL, forever=True)
    with attach(PATH, files=disk) as found:
        assert dict(found) == {b"a": b"1"}
    disk.heal()
    disk.fail("sync_directory", error=errno.EIO, forever=True)
    with pytest.raises(OSError, match="EIO"):
        attach(PATH, files=disk)


def test_a_writer_that_comes_at_any_moment_of_the_opening() -> None:
    """All of what a writer does at once, before each operation of the reader."""
    writer = recorded()
    locks = [n for n, (name, _) in enumerate(writer.steps) if name == "lock" and n >= writer.begin]
    for begin in locks:
        for moment in range(60):
            world = World(writer, lambda n, moment=moment: 40 if n == moment else 0)  # type: ignore[misc]
            world.advance(begin)
            look(world)
            if world.looked <= moment:
                break


@pytest.mark.parametrize("seed", range(4))
def test_random_turns(seed: int) -> None:
    rng = random.Random(seed)
    writer = recorded()
    shown = []
    # An open does many operations while it waits for its writer.
    for _ in range(40):
        world = World(writer, lambda n: rng.choice([0] * 20 + [1, 2, 9]))
        world.advance(rng.randrange(writer.begin, len(writer.steps)))
        shown.append(look(world))
    assert len(set(shown)) > 3
