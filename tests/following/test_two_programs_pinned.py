"""A writer and a follower with pins take turns at file operations: what is pinned stays, and no answer is ever wrong.

Here the writer is no recording, since it does other things where it finds a pin. It runs in a thread, which goes on
by one operation whenever it is told to.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from following_fixtures import look_at_no_checksum, page_of, said

import kvwal
from kvwal.testing import SimulatedDisk

PATH = "/store"
KEYS = [b"key%d" % n for n in range(6)]
OPERATIONS = ("pread", "pwrite", "pwrite_all", "datasync", "sync", "truncate", "rename", "unlink", "names", "kind")
OPENING = ("open", "inner")
LOCKS = ("holder", "lock_record", "has_name", "size")
Turns = Callable[[int], int]


class Stopping:
    """Files, a directory or a file whose every operation is announced."""

    def __init__(self, there: Any, announce: Callable[[], None]) -> None:
        self._there = there
        self._announce = announce

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._there, name)
        if name not in OPERATIONS + OPENING + LOCKS + ("open_directory",):
            return found

        def operation(*args: Any, **options: Any) -> Any:
            self._announce()
            result = found(*args, **options)
            return Stopping(result, self._announce) if name in (*OPENING, "open_directory") else result

        return operation


class Over(BaseException):
    """The test is over before the writer is."""


class Live:
    """One disk, on which a writer and a follower take turns."""

    def __init__(self, turns: Turns, checkpoints: int, **options: Any) -> None:
        self.disk, self.states = prepared()
        self.states = list(self.states)
        self._turns = turns
        self._options = options
        self._checkpoints = checkpoints
        self._go, self._gone = threading.Semaphore(0), threading.Semaphore(0)
        self._is_over = False
        self.ended = False
        self.failure: BaseException | None = None
        self.looked = self.done = 0
        self.other = self.disk.beside()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        self._go.acquire()
        try:
            files: Any = Stopping(self.disk, self._stop)
            with kvwal.open(PATH, files=files, background=False, keep_history_s=0, **self._options) as db:
                # Some commits are told, and some are not.
                page = page_of(db, PATH, self.disk, self.other)
                for n in range(self._checkpoints):
                    state = {key: b"%d" % (n % 10) * 900 for key in KEYS[n % 3 :]}
                    self.states.append({**self.states[-1], **state})
                    db.update(state)
                    if n % 3:
                        page.write(*said(db))
                    db.checkpoint()
        except Over:
            pass
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread of the test
            self.failure = error
        finally:
            self.ended = True
            self._gone.release()

    def _stop(self) -> None:
        if not self._is_over:
            self._gone.release()
            self._go.acquire()
        # Not in the thread that ends a close which this one leaves.
        if self._is_over and threading.current_thread() is self._thread:
            raise Over

    def advance(self, count: int) -> None:
        """Let the writer do this number of operations."""
        for _ in range(count):
            if self.ended:
                break
            self._go.release()
            self._gone.acquire()
            self.done += 1
        if self.failure is not None:
            raise self.failure

    def _look(self) -> None:
        self.advance(self._turns(self.looked))
        self.looked += 1

    def follow(self) -> kvwal.Follower:
        files: Any = Stopping(self.other, self._look)
        return kvwal.follow(PATH, files=files)

    def end(self) -> None:
        self._is_over = True
        while not self.ended:
            self._go.release()
            self._thread.join(0.01)
        self._thread.join()


@cache
def _prepared() -> tuple[SimulatedDisk, list[dict[bytes, bytes]]]:
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    disk.make_directory(f"{PATH}/readers")
    states: list[dict[bytes, bytes]] = [{}]
    with kvwal.open(PATH, files=disk, background=False, keep_history_s=0) as db:
        for n in range(4):
            states.append({key: b"%d" % n * 900 for key in KEYS})
            db.update(states[-1])
            db.checkpoint()
    return disk, states


def prepared() -> tuple[SimulatedDisk, list[dict[bytes, bytes]]]:
    disk, states = _prepared()
    return disk.copy(), states


@contextmanager
def living(turns: Turns, checkpoints: int = 12, **options: Any) -> Iterator[Live]:
    live = Live(turns, checkpoints, **options)
    try:
        yield live
    finally:
        live.end()


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs are in one process to Python, and not on the disk."""
    monkeypatch.setattr("kvwal.readers.listing.pin_of_this_process", lambda name: None)


@pytest.fixture
def no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were written over are seen by pin and slot alone."""
    look_at_no_checksum(monkeypatch)


def forget(follower: kvwal.Follower) -> None:
    """Have the next read look into the file."""
    engine: Any = follower.engine
    engine.state.cache.clear()
    engine._pages.pager.cache.resize(0)


def session(world: Live, draw: random.Random, *, kept: bool) -> int:
    """A follower with moments that it holds. `kept`: none of them may be lost. How many were."""
    lost = 0
    with world.follow() as follower:
        assert follower.pinned or not kept
        held = [follower.snapshot()]
        for _ in range(draw.randint(1, 8)):
            before = follower.seqno
            world.advance(draw.choice((0, 0, 0, 50, 200)))
            forget(follower)
            found = dict(follower.items())
            assert found in world.states[before : follower.seqno + 1]
            then = draw.choice(held)
            forget(follower)
            try:
                assert dict(then.items()) == world.states[then.seqno]
            except kvwal.SnapshotTooOld:
                assert not kept, "a moment was lost that was pinned"
                lost += 1
                held = [follower.snapshot()]
            follower.refresh()
            assert follower.seqno >= before
            if draw.random() < 0.4:
                held.append(follower.snapshot())
    return lost


def turns_of(draw: random.Random) -> Turns:
    often, most = draw.choice(((0.02, 300), (0.1, 60), (0.3, 12), (0.9, 4)))
    return lambda n: (draw.random() < often) * draw.randint(1, most)


def at_random(rng: random.Random, runs: int, *, kept: bool, **options: Any) -> int:
    lost = 0
    for _ in range(runs):
        seed = rng.getrandbits(64)
        draw = random.Random(seed)
        try:
            with living(turns_of(draw), **options) as world:
                world.advance(draw.randint(0, 250))
                lost += session(world, draw, kept=kept)
        except BaseException as error:
            error.add_note(f"the seed of this run is {seed}")
            raise
    return lost


LIMITS: list[dict[str, Any]] = [{"hold_s": 0.0}, {"hold_bytes": 20_000}, {"hold_s": 0.0005}]


@pytest.mark.usefixtures("no_checksums")
def test_what_is_pinned_stays_whatever_the_turns(rng: random.Random) -> None:
    assert at_random(rng, 25, kept=True) == 0


@pytest.mark.usefixtures("no_checksums")
def test_a_slot_that_changes_while_another_generation_is_pinned_is_looked_at_again() -> None:
    draw = random.Random(1104978941397742833)
    with living(turns_of(draw)) as world:
        world.advance(draw.randint(0, 250))
        assert session(world, draw, kept=True) == 0


@pytest.mark.usefixtures("no_checksums")
def test_what_is_broken_is_never_wrong_whatever_the_turns(rng: random.Random) -> None:
    assert any(sum(at_random(rng, 12, kept=False, **limit) for limit in LIMITS) for _ in range(20))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("no_checksums")
@pytest.mark.parametrize("limit", [{}, *LIMITS])
def test_pins_hold_or_are_broken_whatever_the_turns_for_long(rng: random.Random, limit: dict[str, Any]) -> None:
    at_random(rng, 3000, kept=not limit, **limit)


@pytest.mark.usefixtures("no_checksums")
@pytest.mark.parametrize("step", [251, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.long])])
def test_one_turn_anywhere_in_attaching_and_reading(step: int) -> None:
    """Each instant at which a follower comes, and one turn of every length in each of its operations."""
    number, lost = 0, 0
    for start in range(0, 120, 3):
        for at in range(40):
            for count in (1, 7, 30, 60, 90, 120, 200):
                number += 1
                if number % step == 0:
                    limit: dict[str, Any] = [{}, *LIMITS][number // step % 4]
                    with living(lambda n, at=at, count=count: count if n == at else 0, **limit) as world:  # type: ignore[misc]
                        world.advance(start)
                        lost += session(world, random.Random(number), kept=not limit)


def test_a_killed_follower_holds_nothing_from_the_next_checkpoint_on(rng: random.Random) -> None:
    for _ in range(12):
        draw = random.Random(rng.getrandbits(64))
        with living(turns_of(draw), 10) as world:
            world.advance(draw.randint(0, 200))
            killed_at = draw.randint(1, 60)

            def kill_at(n: int, killed_at: int = killed_at, world: Live = world) -> int:
                if n == killed_at:
                    world.other.kill()
                return 1

            world._turns = kill_at
            with pytest.raises(OSError, match="killed"):
                session(world, draw, kept=True)
                session(world, draw, kept=True)
                session(world, draw, kept=True)
            world.advance(10_000)
            with kvwal.open(PATH, files=world.disk, background=False) as db:
                db[b"one"] = b"more"
                db.checkpoint()
            left = world.disk.open_directory(f"{PATH}/readers").names()
            assert not [name for name in left if name.endswith(".pin")]
