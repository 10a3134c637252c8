"""A writer, its archiver and a restore at the same time, on one disk; the power is cut, or one of them is killed.

Commits come in the middle of the archiver's steps. The restore is another program, which takes turns with them: after
any call to the file system it may be the other's turn. What was acknowledged at or below the mark can be restored then,
and the restore that was cut off goes on, or begins anew, and has made nothing that opens as another moment.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import pytest
from archive_fixtures import Killed, Program

import kvwal
from kvwal.backup.port import DirectoryDestination
from kvwal.keys import Seqno
from kvwal.testing import Operation, SimulatedDisk

# Which pending writes a power cut may take: all, or those of one of the three.
CUT = {"writer": "/kv", "archiver": "/b", "restore": "/r", "all": "/"}
_RESTORES = 12


class Turns:
    """Two programs of which one runs at a time. In place of a disk's mutex: after each call the other one may go on."""

    def __init__(self, coin: random.Random) -> None:
        self._coin = coin
        self._depth = 0
        self._turns = threading.Semaphore(1), threading.Semaphore(0)
        self._has_ended = [False, False]
        self.now = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth and self._coin.random() < 0.2:
            self.hand_over()

    def hand_over(self) -> bool:
        """Returns when it is this one's turn again. False if the other one has ended."""
        mine = self.now
        if self._has_ended[1 - mine]:
            return False
        self.now = 1 - mine
        self._turns[1 - mine].release()
        self._turns[mine].acquire()
        return True

    def run(self, number: int, program: Callable[[], object]) -> BaseException | None:
        """What it raised."""
        self._turns[number].acquire()
        try:
            program()
        except BaseException as error:  # noqa: BLE001  # raised by the test
            return error
        finally:
            self._has_ended[number] = True
            self.now = 1 - number
            self._turns[1 - number].release()
        return None


class Begun(NamedTuple):
    """A restore that was begun, to a moment that had been acknowledged."""

    into: str
    at: int
    is_done: bool


class Together:
    """The two programs, the same ones for a seed."""

    def __init__(self, seed: int, turns: int) -> None:
        self.disk = SimulatedDisk(seed=seed)
        self.coin = random.Random(seed)
        self.turns = Turns(self.coin)
        self.program = Program(seed, turns, is_busy=True)
        self.acknowledged: list[Any] = []
        self.restores: list[Begun] = []
        #: Whether what was cut off went on, or was begun anew.
        self.resumed: list[bool] = []

    def run(self, watch: Callable[[Operation], object]) -> list[BaseException | None]:
        """Both to their ends; what each of them raised."""
        disk: Any = self.disk
        mutex, disk.mutex, disk.watcher = disk.mutex, self.turns, watch
        raised: list[BaseException | None] = [None, None]

        def restoring() -> None:
            raised[1] = self.turns.run(1, self._restore)

        other = threading.Thread(target=restoring)
        other.start()
        raised[0] = self.turns.run(0, lambda: self.program(disk, self.acknowledged))
        other.join()
        disk.mutex, disk.watcher = mutex, None
        return raised

    def _restore(self) -> None:
        while not self.acknowledged:
            if not self.turns.hand_over():
                return
        for n in range(_RESTORES):
            first, mark = self.acknowledged[-1]
            begun = Begun(f"/r{n}", self.coin.randint(first, mark), False)
            self.restores.append(begun)
            place = DirectoryDestination("/b", files=self.disk)
            kvwal.restore(place, begun.into, at=begun.at, files=self.disk)
            self.restores[-1] = begun._replace(is_done=True)

    def check(self, found: SimulatedDisk, coin: random.Random) -> None:
        """After the power is back. What goes on first, the archive or the restore, is by the coin."""
        steps = [self._check_restores, lambda disk: self.program.check(disk, self.acknowledged.copy())]
        for step in coin.sample(steps, 2):
            step(found)

    def _check_restores(self, found: SimulatedDisk) -> None:
        for into, at, is_done in self.restores[-2:]:
            expected = self.program.model[Seqno(at)]
            for path in (into, f"{into}.restoring"):
                with suppress(kvwal.Error), kvwal.open(path, "r", files=found) as db:
                    assert dict(db) == expected
            if not is_done and found.kind(f"{into}/data") is None:
                place = DirectoryDestination("/b", files=found)
                self.resumed.append(kvwal.restore(place, into, at=at, files=found).resumed)
            with kvwal.open(into, files=found, background=False) as db:
                assert dict(db) == expected
                assert db.verify().ok


def cut(seed: int, which: str, turns: int, every: int) -> Together:
    """Cut the power at each `every`-th operation of any of them."""
    both, seen = Together(seed, turns), 0
    coin = random.Random(seed)

    def survives(piece: Any) -> bool:
        return not piece.path.startswith(CUT[which]) or coin.random() < 0.5

    def watch(operation: Operation) -> None:
        nonlocal seen
        seen += 1
        if seen % every == 0:
            both.check(both.disk.crash(survives), coin)

    for error in both.run(watch):
        if error is not None:
            raise error
    assert both.restores[-1].is_done
    return both


@pytest.mark.parametrize("which", CUT)
def test_a_power_cut_while_all_three_are_at_work(which: str) -> None:
    # With this seed an object that the restore has listed is merged before it is read.
    both = cut(seed=3, which=which, turns=24, every=13)
    assert True in both.resumed
    assert False in both.resumed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("which", CUT)
def test_power_cuts_of_many_programs_at_work_together(which: str, seed: int) -> None:
    assert len(cut(seed, which, turns=40, every=3).resumed) > 50


def killed(who: Literal[0, 1], seed: int, nth: int) -> bool:
    """One of them is killed before its nth change of the disk, the other one goes on. False if it ended before that."""
    both, seen = Together(seed, 20), 0

    def watch(operation: Operation) -> None:
        nonlocal seen
        if both.turns.now == who:
            seen += 1
            if seen >= nth:
                raise Killed

    raised = both.run(watch)
    assert raised[1 - who] is None
    # A store whose write was cut off says that it is poisoned to what it would still do.
    assert (raised[who] is not None) == (seen >= nth)
    both.check(both.disk.copy(), random.Random(nth))
    return seen >= nth


@pytest.mark.parametrize("every", [pytest.param(13), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("who", [0, 1], ids=["writer and archiver", "restore"])
def test_one_that_is_killed_leaves_the_other_to_go_on(who: Literal[0, 1], every: int) -> None:
    nth = 1
    while killed(who, 9, nth):
        nth += every
    assert nth > 150
