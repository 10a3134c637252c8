"""Part 6, second half: KeyboardInterrupt and MemoryError raised at every place of a commit where they could be.

An interruption (KeyboardInterrupt) is raised where the interpreter runs signal handlers: at the start of a function, at
a jump back, after a call. A MemoryError is raised in the stead of an instruction that may allocate. Both only in
kvwal's own code; the simulated disk stands for the operating system. Tracing raises at the start of the next
instruction; where that one has another handler, profiling raises in the call itself, at its end.

Afterwards the commit is written or it is not, whole; an exception that says it was written says the truth, and a call
that returned has written; the store goes on, or says PoisonedError; and whatever a power cut leaves, or a kill, shows
the same (after a PoisonedError: the same or one commit more).
"""

from __future__ import annotations

import dis
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import kvwal
from crashtests.history import State, Violation
from crashtests.looked import OPTIONS, PATH
from kvwal.errors import DiskFullError, Error, PoisonedError
from kvwal.testing import SimulatedDisk

# Where the interpreter looks for pending signals. In between no handler runs; a `with` block, for one, is never left
# before its exit was called.
# (PRECALL: before Python 3.12 a specialized one does the call.)
_CHECKED_AFTER = {"RESUME", "JUMP_BACKWARD", "PRECALL", "CALL", "CALL_FUNCTION_EX", "CALL_KW"}

# Since 3.15 no handler runs between the end of `__enter__` and the block; in 3.14 it did, and the lock stayed held.
_NOT_CHECKED_AFTER = {"CALL of __enter__"} if sys.version_info >= (3, 15) else set()

# What may allocate, and fail.
_ALLOCATING = {
    "PRECALL" if sys.version_info < (3, 12) else "CALL",
    "CALL_FUNCTION_EX",
    "CALL_KW",
    "BINARY_OP",
    "BINARY_SLICE",
    "BINARY_SUBSCR",
    "BUILD_LIST",
    "BUILD_MAP",
    "BUILD_SET",
    "BUILD_SLICE",
    "BUILD_TUPLE",
    "FORMAT_VALUE",
    "FORMAT_SIMPLE",
    "GET_ITER",
    "LIST_APPEND",
    "LIST_EXTEND",
    "MAP_ADD",
    "SET_ADD",
    "STORE_SUBSCR",
    "MAKE_FUNCTION",
}
# Calls of these allocate nothing.
_NEVER_FAIL = {"release", "locked"}

#: By the letter that stands for it in the name of a case.
ERRORS: dict[str, type[BaseException]] = {"K": KeyboardInterrupt, "M": MemoryError}

Act = Callable[[Any], object]


def _batch(store: Any) -> None:
    batch = kvwal.WriteBatch()
    batch.put(b"b", b"new")
    batch.delete(b"a")
    batch.put(b"c", b"x" * 700)
    store.commit(batch)


def _transaction(store: Any) -> None:
    with store.transaction() as txn:
        txn[b"b"] = txn[b"a"] + b"2"
        txn[b"n"] = b"%d" % len(list(txn.scan(b"a", b"c")))


def _prepared(store: Any) -> None:
    # By itself a log prepares only large segments.
    store.engine._log._maker.prepare_spare(1 << 20)


def _nearly_full(store: Any) -> None:
    # The next record of some size does not fit into the segment.
    store.put(b"fill", b"f" * 11_000, durability="os")
    store.sync()


def _indexed(store: Any) -> None:
    # The next commit gets an entry in the index of its segment.
    store.engine._log._roll(0, 256 << 10)
    store.put(b"large", b"l" * 70_000)
    store.checkpoint()


def _due(store: Any) -> None:
    # The memtable is at its limit: the next commit makes the checkpoint itself.
    for number in itertools.count():
        store.put(b"due%02d" % number, b"d" * 600, durability="os")
        if store.engine.pressure.is_full():
            break
    store.sync()


#: What is done first, without an interruption, and what is interrupted.
WAYS: dict[str, tuple[Act, Act]] = {
    "put": (lambda store: None, lambda store: store.put(b"a", b"new")),
    "weak-put": (lambda store: None, lambda store: store.put(b"a", b"new", durability="os")),
    "indexed-weak-put": (_indexed, lambda store: store.put(b"a", b"new", durability="os")),
    "delete": (lambda store: None, lambda store: store.delete(b"a")),
    "range": (lambda store: None, lambda store: store.delete_range(b"a", b"c")),
    "batch": (lambda store: None, _batch),
    "transaction": (lambda store: None, _transaction),
    "pop": (lambda store: None, lambda store: store.pop(b"a")),
    "roll": (_nearly_full, lambda store: store.put(b"a", b"r" * 9000)),
    "prepared-roll": (
        lambda store: (_nearly_full(store), _prepared(store)),
        lambda store: store.put(b"a", b"r" * 9000),
    ),
    "sync": (lambda store: store.put(b"a", b"weak", durability="os"), lambda store: store.sync()),
    "due": (_due, lambda store: store.put(b"a", b"y" * 3000)),
    "checkpoint": (lambda store: store.put(b"b", b"2"), lambda store: store.checkpoint()),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One exception at one place."""

    way: str
    error: str
    #: Counted from 1, over all places of its kind.
    place: int

    def __str__(self) -> str:
        return f"{self.way}:{self.place}:{self.error}"

    @classmethod
    def parse(cls, text: str) -> Case:
        way, place, error = text.split(":")
        return cls(way, error, int(place))


@cache
def _template(way: str) -> SimulatedDisk:
    """A small store that was closed, ready for this way."""
    disk = SimulatedDisk(seed=11)
    with kvwal.open(PATH, files=disk, **OPTIONS) as store:
        store.update({b"a": b"1", b"b": b"2", b"z": b"z" * 300})
        store.checkpoint()
        store.put(b"d", b"4")
    return disk


def _prepare(way: str) -> tuple[SimulatedDisk, Any]:
    disk = _template(way).copy()
    store = kvwal.open(PATH, files=disk, **OPTIONS)
    WAYS[way][0](store)
    return disk, store


class Places:
    """Raises an exception at one of the places where it could be, or counts them."""

    def __init__(self, error: type[BaseException], place: int) -> None:
        self._error = error
        self._left = place
        self.count = 0
        self.where = ""
        #: By frame: index of the last instruction.
        self._last: dict[Any, int] = {}

    def run(self, function: Callable[[], object]) -> BaseException | None:
        """What the function raised."""
        # No finalizer of something else may run in between, and be the one that is interrupted.
        gc.disable()
        if self._error is KeyboardInterrupt:
            sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            function()
        except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  # judged by the caller
            return error
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            self._last.clear()
            gc.enable()
        return None

    def _trace(self, frame: Any, event: str, arg: object) -> Any:
        code = frame.f_code
        if not _is_ours(code.co_filename):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            at = frame.f_lasti // 2
            last = self._last.get(frame, -1)
            self._last[frame] = at
            if self._is_place(code, at, last):
                self._reached(frame)
        return self._trace

    def _profile(self, frame: Any, event: str, arg: object) -> None:
        """A call of C code is over. `_is_place` leaves out those at whose end another handler takes over."""
        code = frame.f_code
        if event != "c_return" or not _is_ours(code.co_filename):
            return
        at = frame.f_lasti // 2
        following = _following(code)[at]
        if following is None or _names(code)[at] in _NOT_CHECKED_AFTER:
            return
        if _handlers(code)[at] != _handlers(code)[following]:
            self._reached(frame)

    def _reached(self, frame: Any) -> None:
        self.count += 1
        if self.count == self._left:
            sys.settrace(None)
            sys.setprofile(None)
            code = frame.f_code
            self.where = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {code.co_qualname}"
            raise self._error

    def _is_place(self, code: Any, at: int, last: int) -> bool:
        names = _names(code)
        if self._error is not KeyboardInterrupt:
            return names[at] in _ALLOCATING
        # The interpreter raises at the end of the earlier instruction, tracing at the start of this one: only where
        # the same handler is in charge of both is it the same.
        return (
            last >= 0
            and names[last] in _CHECKED_AFTER
            and (names[last], names[at]) != ("PRECALL", "CALL")
            and _handlers(code)[last] == _handlers(code)[at]
        )


@cache
def _is_ours(name: str) -> bool:
    return "/kvwal/" in name and "/testing/" not in name


@cache
def _names(code: Any) -> list[str]:
    """The name of each instruction, by its index; other names for calls that do not allocate."""
    names = [""] * (len(code.co_code) // 2 + 1)
    recent: list[tuple[str, Any]] = []
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("PRECALL", "CALL"):
            # The exit of a `with` block is a call with three times None.
            constants = [value for kind, value in recent[-3:] if kind in ("LOAD_CONST", "LOAD_COMMON_CONSTANT")]
            if constants == [None] * 3 or (recent and recent[-1][1] in _NEVER_FAIL):
                name += " of what does not allocate"
            elif recent and recent[-1][0] == "LOAD_SPECIAL":
                name += " of __enter__"
        elif name not in ("CACHE", "PUSH_NULL", "KW_NAMES"):
            recent.append((name, instruction.argval))
        names[instruction.offset // 2] = name
    return names


@cache
def _handlers(code: Any) -> list[int]:
    """Where an exception goes, for each instruction; -1: out of the function."""
    handlers = [-1] * (len(code.co_code) // 2 + 1)
    # (typeshed does not know it; the table has no public reader.)
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        for index in range(entry.start // 2, entry.end // 2):
            handlers[index] = entry.target
    return handlers


@cache
def _following(code: Any) -> dict[int, int | None]:
    """The index of the instruction behind each."""
    indexes = [instruction.offset // 2 for instruction in dis.get_instructions(code)]
    return dict(itertools.zip_longest(indexes, indexes[1:]))


@cache
def places_of(way: str, error: str) -> int:
    """How many there are."""
    _, store = _prepare(way)
    places = Places(ERRORS[error], 0)
    failed = places.run(lambda: WAYS[way][1](store))
    if failed is not None:
        raise Violation(f"{way} fails without an interruption") from failed
    return places.count


def cases(seed: int) -> Iterator[Case]:
    """All of them in random order, the short ways first in each round of it; then again."""
    for round_ in itertools.count():
        streams: list[list[Case]] = []
        for way, error in itertools.product(WAYS, ERRORS):
            stream = [Case(way, error, place) for place in range(1, places_of(way, error) + 1)]
            Random(f"{seed} {round_} {way} {error}").shuffle(stream)
            streams.append(stream)
        for together in itertools.zip_longest(*streams):
            yield from (case for case in together if case is not None)


@cache
def _undisturbed(way: str) -> tuple[State, int]:
    """What the way leads to when nothing is raised: state, and number of the last commit."""
    disk, store = _prepare(way)
    WAYS[way][1](store)
    found = dict(store.scan()), store.last_seqno
    disk.kill()
    return found


def examine(case: Case) -> bool:
    """Raises `Violation`, or what else is wrong. False if there is no such place."""
    disk, store = _prepare(case.way)
    before: State = dict(store.scan())
    number = store.last_seqno
    after, last = _undisturbed(case.way)
    places = Places(ERRORS[case.error], case.place)
    raised = places.run(lambda: WAYS[case.way][1](store))
    if not places.where:
        disk.kill()
        return False
    try:
        # What was not flushed may be lost: all that a weak commit and a failed sync promise.
        weak = case.way.endswith("weak-put") or (case.way == "sync" and raised is not None)
        _judge(disk, store, raised, before, after, number, last - number, weak=weak)
    except BaseException as error:
        error.add_note(f"{case.error} at {places.where}, which came out as {raised!r}")
        raise
    finally:
        disk.kill()
    return True


def _shown(store: Any) -> State:
    """What the store shows, by every way to read."""
    state: State = dict(store.scan())
    keys = list(state)
    ways = {
        "backwards": dict(store.scan(reverse=True)) == state,
        "get": {key: store.get(key) for key in keys} == state,
        "get_many": list(store.get_many(keys)) == list(state.values()),
        "missing keys": all(store.get(key) is None for key in (b"a", b"b", b"c", b"n") if key not in state),
        "len": len(store) == len(state),
        "first": store.first() == next(iter(state.items()), None),
    }
    if not all(ways.values()):
        raise Violation(f"ways to read differ from a scan: {[way for way, same in ways.items() if not same]}")
    return state


def _judge(
    disk: SimulatedDisk,
    store: Any,
    raised: BaseException | None,
    before: State,
    after: State,
    number: int,
    commits: int,
    *,
    weak: bool,
) -> None:
    if raised is not None and not isinstance(raised, KeyboardInterrupt | MemoryError | PoisonedError):
        raise Violation(f"it came out as {raised!r}") from raised
    shown = _shown(store)
    written = store.last_seqno - number
    if shown == before != after:
        allowed = [0]
    elif shown == after:
        allowed = [commits]
    else:
        raise Violation(f"written in part: {shown.keys()}")
    if written not in allowed:
        raise Violation(f"the store shows {'the new' if shown == after else 'the old'} state, and seqno +{written}")
    if raised is None and shown != after:
        raise Violation("it returned, and is not written")
    notes = " ".join(getattr(raised, "__notes__", ()))
    if "was written" in notes and shown != after:
        raise Violation(f"it is not written, but says: {notes}")
    _reopened(disk, shown, [shown], kill=True, weak=weak)
    poisoned = False
    try:
        store.put(b"later", b"1")
        shown = shown | {b"later": b"1"}
        weak = False
    except PoisonedError:
        poisoned = True
    if _shown(store) != shown:
        raise Violation("the next commit changed something else")
    allowed_states = [shown, after] if poisoned else [shown]
    _reopened(disk, shown, allowed_states, kill=False, weak=weak)
    if not poisoned:
        try:
            store.checkpoint()
        except PoisonedError:
            # The interruption came where what is in the pages is not known; the log goes on.
            _reopened(disk, shown, [shown], kill=True, weak=False)
            return
        with store.transaction() as txn:
            txn[b"last"] = b"%d" % len(list(txn.scan()))
        shown[b"last"] = b"%d" % len(shown)
        _reopened(disk, shown, [shown], kill=False, weak=False)
        try:
            store.close()
        except (OSError, DiskFullError) as error:
            raise Violation(f"close: {error!r}") from error
        _reopened(disk, shown, [shown], kill=True, weak=False)


def _reopened(disk: SimulatedDisk, shown: State, allowed: list[State], *, kill: bool, weak: bool) -> None:
    """What is found after a kill or a power cut now."""
    founds = [] if weak else [("everything pending lost", disk.crash(0)), ("everything survives", disk.crash(-1))]
    if kill:
        founds.append(("killed", disk.copy()))
    for what, found in founds:
        try:
            with kvwal.open(PATH, files=found, **OPTIONS) as store:
                state = _shown(store)
                if state not in allowed:
                    raise Violation(f"{what}: reopened, it shows another state: {state.keys() ^ shown.keys()}")
                report = store.verify()
                if not report.ok:
                    raise Violation(f"{what}: verify: {report.problems[:3]}")
                store.put(b"works", b"1")
        except (Error, OSError) as error:
            raise Violation(f"{what}: {type(error).__name__}: {error}") from error


__all__ = ["Case", "cases", "examine", "places_of"]
