"""Part 3: every file operation of a workload fails, once and for good, in each way that it can.

For each operation of a program, and each way: the program runs with that fault; what it meets must be an error that
the contract names; what the store then shows, refuses and recovers is checked:

- Reads go on, and show a state that the history allows (points 4 and 7).
- After a failed write or flush every write raises `PoisonedError` until the store is reopened (point 7).
- On a full disk nothing is lost, and once there is space writes go on without a reopen (point 10). A commit that was
  refused does not come back, also where the disk has all of it, and nothing is written behind it.
- The machine then goes on in one of three ways: the process dies and the page cache, with what a failed flush
  dropped, stays; the power is cut and nothing pending survives, or all of it. What is found is examined as always.
- A write that was lost, or landed elsewhere, is answered with right data or with a `CorruptionError` (point 5). What
  was acknowledged last may then be missing: nothing on disk is younger and could tell (point 6).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import kvwal
from crashtests.console import Result
from crashtests.explorer import FOLLOW_UPS, Tally
from crashtests.history import Violation
from crashtests.programs import NAMED
from crashtests.session import Program, Session
from crashtests.workers import Run, Share, beginning, spread
from kvwal.errors import CorruptionError, DiskFullError, FormatError, PoisonedError, SnapshotTooOld
from kvwal.testing import Operation, SimulatedDisk
from kvwal.testing.faults import Effect

_CHANGES = ("pwrite", "allocate", "truncate", "create", "rename", "unlink", "make_directory")
_FLUSHES = ("datasync", "sync", "sync_directory")
_SILENT = ("lost", "misdirected")


@dataclass(frozen=True, slots=True)
class Way:
    """How an operation fails, and how the machine goes on."""

    error: int
    effect: str
    forever: bool
    #: "kill": the process dies; "none", "all": the power is cut, and that is what survives.
    #: With the effect "die" no operation fails: the process dies before it, is started again, and goes on.
    #: With "unreadable" this and all later reads of the file fail, and nothing else.
    after: str


def ways(operation: Operation) -> list[Way]:
    """All of them for one operation."""
    name = operation.name
    if name not in _CHANGES and name not in _FLUSHES:
        kinds = [(errno.EIO, "none", False), (errno.EIO, "none", True)]
        if name == "pread":
            kinds.append((errno.EIO, "unreadable", True))
        return [Way(*kind, after) for kind in kinds for after in ("kill", "none")]
    kinds = [(errno.EIO, "none", False), (errno.EIO, "none", True)]
    if name in _FLUSHES:
        kinds += [(errno.EIO, effect, forever) for effect in ("part", "all") for forever in (False, True)]
        kinds.append((errno.ENOSPC, "none", False))
    elif name in _CHANGES:
        kinds += [(errno.EIO, "all", False)]
        if name == "pwrite":
            kinds += [(errno.EIO, "part", False), (errno.ENOSPC, "part", False), (errno.ENOSPC, "part", True)]
            kinds.append((errno.ENOSPC, "all", False))
        if name in ("pwrite", "create", "allocate", "make_directory"):
            kinds += [(errno.ENOSPC, "none", False), (errno.ENOSPC, "none", True)]
    found = [Way(*kind, after) for kind in kinds for after in ("kill", "none", "all")]
    found += [Way(0, "die", False, after) for after in ("none", "all")]
    if name == "pwrite" and operation.size:
        found += [Way(0, effect, False, "none") for effect in _SILENT]
    return found


def case_of(name: str, operation: int, way: Way) -> str:
    """As it is written for `--case`."""
    return f"{name.replace(' ', '_')}:{operation}:{way.error}:{way.effect}:{int(way.forever)}:{way.after}"


def operations_of(options: dict[str, Any], program: Program) -> list[Operation]:
    """The operations of a run in which nothing fails, up to a power cut that the program itself makes."""
    disk = SimulatedDisk(seed=0)
    disk.trace = []
    session = Session(disk, options=options)
    session.open()
    for step in program:
        if step[0] == "cut":
            break
        session.step(step)
    else:
        session.store.close()
    return disk.trace


class _Die(BaseException):
    """The process is killed."""


class _Stop(Exception):
    """The program cannot go on: the store was poisoned, or found its damage."""


class FaultCase:
    """One operation of one program failing in one way."""

    def __init__(self, name: str, operation: int, way: Way) -> None:
        self.options, self.program = NAMED[name]
        self.name = name
        self.operation = operation
        self.way = way
        self.session = Session(SimulatedDisk(seed=0), options=self.options)
        self.session.was_full = way.error == errno.ENOSPC
        self.died = False

    def __str__(self) -> str:
        return f"--case {case_of(self.name, self.operation, self.way)}"

    def run(self) -> None:
        """Raises `Violation`, or what the store should not have raised."""
        self._arm()
        try:
            self._work()
        except _Stop:
            pass
        self.session.disk.heal()
        self.session.unreadable = None
        self._after()

    def _arm(self) -> None:
        way = self.way
        disk = self.session.disk
        if way.effect == "die":

            def die(operation: Operation) -> None:
                if operation.number == self.operation:
                    self.died = True
                    disk.kill()
                    raise _Die

            disk.watcher = die
            return
        if way.effect not in (*_SILENT, "unreadable"):
            disk.fail("any", self.operation, way.error, forever=way.forever, effect=cast("Effect", way.effect))
            return
        before = operations_of(self.options, self.program)[: self.operation]
        if way.effect == "unreadable":
            path = before[-1].path
            nth = sum(operation.name == "pread" and operation.path == path for operation in before)
            disk.fail("pread", nth, way.error, forever=True, path=path)
            self.session.unreadable = path.rpartition("/")[2]
            return
        nth = sum(operation.name == "pwrite" for operation in before)
        if way.effect == "lost":
            disk.lose_write(nth)
        else:
            disk.misdirect_write(nth, by=4096 if self.operation % 2 else 512)

    def _work(self) -> None:
        session = self.session
        self._attempt(session.open)
        self._reopen_if_needed()
        for step in self.program:
            if step[0] == "cut" and self.way.effect in _SILENT:
                return
            self._attempt(lambda step=step: session.step(step))
            self._reopen_if_needed()
            self._reads_go_on()
        self._attempt(session.store.close)

    def _reopen_if_needed(self) -> None:
        """Opening failed. Once the fault is over it must succeed."""
        session = self.session
        if session.store is None or session.store.closed:
            session.disk.heal()
            session.open()

    def _attempt(self, act: Callable[[], Any]) -> None:
        """Do it. An error must be one that the contract names, and what it promises then is checked."""
        way = self.way
        try:
            if way.effect == "die":
                self._die_in(act)
            else:
                act()
            return
        except DiskFullError:
            if way.error != errno.ENOSPC:
                raise
        except SnapshotTooOld as error:
            # On a full disk what snapshots hold goes last, and it was the last that a checkpoint could do.
            if way.error != errno.ENOSPC or error.limit_bytes != 0:
                raise
            self.session.snapshots.clear()
        except PoisonedError:
            if self.session.store is None or self.session.store.closed:
                return
            self._writes_are_refused()
            raise _Stop from None
        except (CorruptionError, FormatError):
            if way.effect not in _SILENT:
                raise
            raise _Stop from None
        except OSError as error:
            if error.errno != way.error:
                raise
        session = self.session
        session.disk.heal()
        if session.store is None or session.store.closed:
            return
        # The fault is over. The store goes on from what it shows, or says that it is poisoned.
        number = session.history.begun
        self._adopt()
        if way.error == errno.ENOSPC and way.effect == "all":
            # Without another write, behind which what was refused would not be looked for.
            raise _Stop
        try:
            session.step(["put", 50, 40])
        except PoisonedError:
            if way.error == errno.ENOSPC and way.effect != "all" and not self._flush_failed():
                raise Violation("the store does not go on although there is space again") from None
            del session.history.states[number + 1 :]
            self._writes_are_refused()
            raise _Stop from None
        session.look()

    def _die_in(self, act: Callable[[], Any]) -> None:
        """The page cache stays: what was not flushed is shown, and must be flushed before it is built upon."""
        try:
            act()
        except BaseException:
            # What a dying process says does not matter.
            if not self.died:
                raise
            self.died = False
            self.session.disk.watcher = None
            self.session.abandon()

    def _flush_failed(self) -> bool:
        return operations_of(self.options, self.program)[self.operation - 1].name in _FLUSHES

    def _adopt(self) -> None:
        """The step that failed was done, or not: by what the store shows."""
        history = self.session.history
        number = self.session.store.last_seqno
        shown = self.session.content()
        if not history.durable <= number <= history.begun or history.states[number] != shown:
            raise Violation(f"after an error the store says it is at commit {number}, and shows something else")
        history.returned = number
        if number == history.begun:
            return
        # It may still be on disk, unless the store goes on to write.
        try:
            self.session.store.commit(kvwal.WriteBatch())
        except PoisonedError:
            return
        del history.states[number + 1 :]

    def _writes_are_refused(self) -> None:
        session = self.session
        session.disk.heal()
        number = session.history.begun
        for _ in range(2):
            try:
                session.step(["put", 51, 40])
            except PoisonedError:
                # Refused before anything was begun: it must never be seen.
                del session.history.states[number + 1 :]
                continue
            raise Violation("a write was accepted after a failed write or flush")
        self._reads_go_on()

    def _reads_go_on(self) -> None:
        history = self.session.history
        try:
            shown = self.session.content()
        except OSError as error:
            if error.errno == self.way.error:
                return
            raise
        except CorruptionError:
            if self.way.effect in _SILENT:
                raise _Stop from None
            raise
        if shown != history.states[history.returned]:
            raise Violation(f"reads do not show the state of commit {history.returned}, the last that returned")

    def _after(self) -> None:
        session = self.session
        if self.way.after == "kill":
            session.abandon()
        else:
            session.cut(-1 if self.way.after == "all" else 0)
        if self.way.effect in _SILENT:
            # What was acknowledged last may be gone: nothing on disk is younger and could tell.
            session.history.durable = session.history.before_last
            examine_damaged(session)
            return
        session.open()
        session.verify()
        session.look()
        session.run([["on"], *FOLLOW_UPS[self.operation % len(FOLLOW_UPS)]])


def examine_damaged(session: Session) -> None:
    """A disk that lies or is damaged: right data, or an error that says where; never anything else."""
    try:
        session.open()
        session.look()
        session.store.verify()
        session.run(FOLLOW_UPS[0])
        session.store.close()
    except CorruptionError as error:
        if not error.file:
            raise Violation("a CorruptionError that names no file") from error
    except FormatError:
        pass


def listed(seed: int) -> list[tuple[str, int, Way]]:
    """All cases, mixed by the seed."""
    found = [
        (name, operation.number, way)
        for name, (options, program) in NAMED.items()
        for operation in operations_of(options, program)
        for way in ways(operation)
    ]
    Random(seed).shuffle(found)
    return found


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    tally = Tally()
    cases = listed(run.seed)
    for number, (name, operation, way) in enumerate(
        share.mine(beginning(run.first, lambda: iter(cases), lambda case: case_of(*case)))
    ):
        case = FaultCase(name, operation, way)
        try:
            case.run()
        except Exception as error:  # noqa: BLE001  # every exception is a violation
            tally.violations.append((f"{type(error).__name__}: {error}", str(case)))
        tally.states += 1
        tally.faults += 1
        case.session.abandon()
        if number % 50 == 0 or tally.violations:
            yield tally
            tally = Tally()
        if share.over():
            break
    yield tally


def run(run: Run) -> Result:
    """Run the part."""
    result = spread("faults", work, run)
    if not run.stop_at_first:
        result.notes.append(f"faults: {result.faults:,} of {len(listed(run.seed)):,} cases")
    return result


def replay(text: str, run: Run) -> int:
    """Run one case with its traceback."""
    name, number, error, effect, forever, after = text.split(":")
    case = FaultCase(name.replace("_", " "), int(number), Way(int(error), effect, forever == "1", after))
    print(case.program)
    print(f"fails: {operations_of(case.options, case.program)[case.operation - 1]}, {case.way}")
    case.run()
    print("nothing is wrong")
    return 0
