"""Run a program and cut the power before every operation that it asks of the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvwal.testing.disk import SimulatedDisk
from kvwal.testing.faults import Operation
from kvwal.testing.states import Choice

__all__ = ["CrashReport", "crash_every"]


@dataclass(slots=True)
class CrashReport:
    """What `crash_every` went through."""

    #: Operations before which the power was cut, and once more after the last one.
    points: int = 0
    #: Distinct disks that were checked.
    states: int = 0


class _Stop(BaseException):
    """Ends the program once a check failed. Not an Exception: the program must not take it for a fault."""


def crash_every(
    program: Callable[[SimulatedDisk, list[Any]], None],
    check: Callable[[SimulatedDisk, list[Any]], None],
    *,
    seed: int = 0,
    states_per_point: int = 16,
    disk: SimulatedDisk | None = None,
) -> CrashReport:
    """Call `program` once, and `check` for disks that a power cut before each of its operations may leave.

    Args:
        program: does its work on the disk it is given and appends to the list what it was told is durable.
        check: gets such a disk and a copy of the list as it was at that instant. It raises if something is wrong.
        seed: for the disk and for the choice of states.
        states_per_point: up to this number of states all are checked, beyond it a sample of this size.
        disk: where to start; a new one if None.

    Raises what `check` raised first, with a note that says which cut it was.
    """
    disk = SimulatedDisk(seed=seed) if disk is None else disk
    acknowledged: list[Any] = []
    report = CrashReport()
    random = Random(seed)
    checked: set[tuple[int, int]] = set()
    failure: BaseException | None = None

    def cut(where: str) -> None:
        report.points += 1
        states = disk.states()
        for choice in states.choices(states_per_point, random):
            found = disk.crash(choice.survivors, stale=choice.stale)
            case = (found.fingerprint(), len(acknowledged))
            if case in checked:
                continue
            checked.add(case)
            report.states += 1
            try:
                check(found, acknowledged.copy())
            except BaseException as error:
                error.add_note(_note(where, choice, seed, [str(piece) for piece in states.pieces]))
                raise

    def watch(operation: Operation) -> None:
        nonlocal failure
        if failure is not None:
            raise _Stop
        try:
            cut(f"before operation {operation}")
        except BaseException as error:
            failure = error
            raise _Stop from error

    disk.watcher = watch
    try:
        program(disk, acknowledged)
    except _Stop:
        pass
    finally:
        disk.watcher = None
    if failure is not None:
        raise failure
    cut("after the last operation")
    return report


def _note(where: str, choice: Choice, seed: int, pieces: list[str]) -> str:
    listed = "\n  ".join(pieces) or "none"
    return f"power cut {where}, seed {seed}, survivors {choice}, of the pieces\n  {listed}"
