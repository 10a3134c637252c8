"""Cuts the power at every barrier of a program, opens what is found, checks it, works on, and cuts again.

Between two barriers (a sync of a file or of the directory) the pending pieces only become more, so every disk that a
cut anywhere between them may leave is among those that a cut right before the second barrier may leave. Hence cuts are
made right before each barrier, and at the end; each distinct disk is checked once for given bounds of the history. A
killed process leaves its page cache: that outcome is tried before every operation.

Every disk found is opened (the store must serve one of the allowed states), verified, read in every way, written to,
cut again or closed, and opened again. In a part of the cases, recovery and this further work are themselves cut at
every barrier, down to `depth`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from crashtests.history import History, Violation
from crashtests.session import Program, Session
from kvwal.testing import Choice, Operation, SimulatedDisk

BARRIERS = frozenset(("datasync", "sync", "sync_directory"))

#: The outcome "the process is killed, and the page cache stays"; the others are written as `Choice` is.
KILLED = "k"

#: What is done with a store that was found, after it was checked: it accepts writes, and keeps them.
FOLLOW_UPS: tuple[Program, ...] = (
    [["put", 1, 90], ["cut", 0], ["look"]],
    [["put", 2, 700], ["checkpoint"], ["del", 2], ["cut", 0], ["look"], ["verify"]],
    [["batch", [[3, 60], [4, 600], [1, None]]], ["reopen"], ["look"]],
    [["range", 0, 5], ["put", 4, 20], ["kill"], ["look"], ["put", 5, 30], ["cut", 0]],
    [["checkpoint"], ["put", 6, 1200], ["checkpoint"], ["cut", 0], ["look"], ["verify"]],
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is tried."""

    #: Outcomes of one cut: all if there are no more, else a sample.
    choices: int = 64
    #: Cuts in a row; 1 is no cut during recovery.
    depth: int = 3
    #: One case in this number is cut again during recovery and further work,
    nested_every: int = 6
    #: and so is one in this number of those that were found by that.
    deeper_every: int = 12
    nested_choices: int = 3


@dataclass(slots=True)
class Case:
    """Everything needed to see a violation again."""

    program: Program
    seed: int
    options: dict[str, Any]
    #: (operation before which the power was cut, outcome), outermost first.
    trail: list[tuple[int, str]]

    def text(self) -> str:
        return json.dumps([self.program, self.seed, self.options, self.trail], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Case:
        program, seed, options, trail = json.loads(text)
        return cls(program, seed, options, [(number, choice) for number, choice in trail])


@dataclass(slots=True)
class Tally:
    """What was done so far."""

    states: int = 0
    nested: int = 0
    points: int = 0
    faults: int = 0
    violations: list[tuple[str, Case | str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.states += other.states
        self.nested += other.nested
        self.points += other.points
        self.faults += other.faults
        self.violations += other.violations


class Explorer:
    """Runs one program at a time."""

    def __init__(
        self,
        limits: Limits,
        tally: Tally,
        *,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        stop_at_first: bool = False,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.limits = limits
        self.tally = tally
        self.seed = seed
        self.options = options or {}
        self.stop_at_first = stop_at_first
        self.give_up = give_up
        self._random = Random(seed)
        self._seen: set[tuple[int, int, int]] = set()
        self._program: Program = []
        self._stopped = False
        # Cases so far: [those found during recovery or further work, the others].
        self._turn = [0, 0]

    def explore(self, program: Program, *, prepare: Callable[[Session], None] | None = None) -> None:
        """Run the program, and check every cut that the limits allow."""
        self._program = program
        self._seen = set()
        self._stopped = False
        if not self._stands_alone(program):
            return
        disk = SimulatedDisk(seed=self.seed)
        session = Session(disk, options=self.options)
        if prepare is not None:
            prepare(session)
        disk.watcher = self._watcher(session, [], self.limits.depth)
        try:
            session.open()
            session.run(program)
            session.look()
        except _EXPECTED as error:
            self._record(error, [])
        session.disk.watcher = None
        self._cut(session.disk, session.history, [], self.limits.depth, session.disk.operations + 1)
        session.abandon()

    def _stands_alone(self, program: Program) -> bool:
        """What is wrong without any cut is told without any."""
        self.tally.states += 1
        try:
            self.replay(Case(program, self.seed, self.options, []))
        except _EXPECTED as error:
            self._record(error, [])
            return False
        return True

    def _watcher(self, session: Session, trail: list[tuple[int, str]], depth: int) -> Callable[[Operation], None]:
        def watch(operation: Operation) -> None:
            if self._stopped:
                return
            try:
                session.nothing_early()
            except Violation as error:
                self._record(error, [*trail, (operation.number, KILLED)])
            if not trail or depth > 1:
                self._kill(session, trail, depth, operation.number)
            if operation.name in BARRIERS:
                self._cut(session.disk, session.history, trail, depth, operation.number)

        return watch

    def _cut(
        self, disk: SimulatedDisk, history: History, trail: list[tuple[int, str]], depth: int, number: int
    ) -> None:
        if self._stopped:
            return
        if self.give_up():
            self._stopped = True
            return
        self.tally.points += 1
        outermost = not trail
        limit = self.limits.choices if outermost else self.limits.nested_choices
        for choice in disk.states().choices(limit, self._random):
            found = disk.crash(choice.survivors, stale=choice.stale)
            key = (found.fingerprint(), history.durable, history.begun)
            if key in self._seen:
                continue
            self._seen.add(key)
            self.tally.states += 1
            self.tally.nested += not outermost
            every = self.limits.nested_every if outermost else self.limits.deeper_every
            self._turn[outermost] += 1
            nested = depth > 1 and self._turn[outermost] % every == 0
            self._check(found, history.fork(), [*trail, (number, str(choice))], depth - 1 if nested else 0)
            if self._stopped:
                return

    def _kill(self, session: Session, trail: list[tuple[int, str]], depth: int, number: int) -> None:
        """The process dies here. What it had not flushed is found all the same, and must not be built upon."""
        if trail and self._random.random() > 1 / self.limits.deeper_every:
            return
        self.tally.states += 1
        self._turn[0] += 1
        nested = depth > 1 and self._turn[0] % self.limits.deeper_every == 0
        self._check(session.disk.copy(), session.history.fork(), [*trail, (number, KILLED)], depth - 1 if nested else 0)

    def _check(self, found: SimulatedDisk, history: History, trail: list[tuple[int, str]], depth: int) -> None:
        session = Session(found, history, self.options)
        if depth > 0:
            found.watcher = self._watcher(session, trail, depth)
        _in_a_thread(lambda: self._examine(session, trail))
        session.disk.watcher = None
        session.abandon()

    def _examine(self, session: Session, trail: list[tuple[int, str]]) -> None:
        try:
            self.examine(session, trail)
        except _EXPECTED as error:
            self._record(error, trail)

    def examine(self, session: Session, trail: list[tuple[int, str]]) -> None:
        """All that the contract says of a store that is found: points 1 to 8."""
        session.open()
        session.verify()
        session.look()
        session.run([["on"], *FOLLOW_UPS[follow_up_of(trail)]])

    def _record(self, error: BaseException, trail: list[tuple[int, str]]) -> None:
        text = f"{type(error).__name__}: {error}"
        self.tally.violations.append((text, Case(self._program, self.seed, self.options, trail)))
        if self.stop_at_first or len(self.tally.violations) >= 20:
            self._stopped = True

    def replay(self, case: Case) -> None:
        """Run one case again; what is wrong is raised with its traceback."""
        session = Session(SimulatedDisk(seed=case.seed), options=case.options)
        trail: list[tuple[int, str]] = []

        def go_on(run: Callable[[Session], None]) -> None:
            nonlocal session
            if len(trail) == len(case.trail):
                run(session)
                return
            number, choice = case.trail[len(trail)]
            cut: list[tuple[SimulatedDisk, History]] = []

            def watch(operation: Operation) -> None:
                if operation.number == number:
                    cut.append((outcome(session.disk, choice), session.history.fork()))
                    raise _Cut

            session.disk.watcher = watch
            try:
                run(session)
            except _Cut:
                pass
            session.disk.watcher = None
            if not cut:
                cut.append((outcome(session.disk, choice), session.history.fork()))
            session = Session(*cut[0], case.options)
            trail.append((number, choice))
            go_on(lambda s: self.examine(s, case.trail[: len(trail)]))

        def first(session: Session) -> None:
            session.open()
            session.run(case.program)
            session.look()

        go_on(first)


class _Cut(BaseException):
    """The power fails in a replay."""


# Every error that the store raises in a case is a violation, because nothing here asks for one.
_EXPECTED = (Exception,)


def _in_a_thread(run: Callable[[], None]) -> None:
    """Run to the end in a thread of its own, which is in the middle of no other call.

    A watcher is called from within a store's call, and a store that is closed there lets another thread end it.
    """
    failures: list[BaseException] = []

    def go() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001  # raised below
            failures.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def outcome(disk: SimulatedDisk, choice: str) -> SimulatedDisk:
    """The disk that is found."""
    if choice == KILLED:
        return disk.copy()
    parsed = Choice.parse(choice)
    return disk.crash(parsed.survivors, stale=parsed.stale)


def follow_up_of(trail: list[tuple[int, str]]) -> int:
    """Which further work a case does: a function of the case alone, so that a replay does the same."""
    return sum(
        number if choice == KILLED else number + Choice.parse(choice).survivors for number, choice in trail
    ) % len(FOLLOW_UPS)


__all__ = ["BARRIERS", "Case", "Explorer", "Limits", "Tally", "Violation", "follow_up_of"]
