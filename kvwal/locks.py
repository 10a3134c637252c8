"""Locks, interruptions and re-entry: one mechanism, here and nowhere else.

A signal handler runs in the main thread between any two bytecodes. It may raise (Ctrl-C), and it may call the store; so
may a finalizer, on whatever thread the collector runs. The rules that make both harmless:

- Every lock with sections is a C `RLock` that is never taken twice. A call that would take it twice was made from
  within its section: it raises `ReentrancyError`, at once, instead of waiting for its own thread for ever. (Plain locks
  are what a thread sleeps on, and those of the spare segment and of a file's position.)
- A section changes what it guards by single assignments, ordered so that stopping between any two of them, or doing all
  of them again, is harmless.
- On CPython 3.14 a `with lock:` that is interrupted as it begins leaves the lock owned (of 3.11, 3.13 and 3.15 none
  does). So each section ends in `release`, which gives back what its thread still owns.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from gc import get_count, get_threshold
from types import FrameType, TracebackType
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, Protocol, TypeVar

from kvwal.errors import ReentrancyError

__all__ = [
    "Lock",
    "collect_first",
    "if_free",
    "is_nested",
    "locked",
    "locked_by_state",
    "new_lock",
    "refuse_nested",
    "refuse_reentry",
    "refused_calls",
    "release",
    "shared_items",
    "wake",
]

_P = ParamSpec("_P")
_S = TypeVar("_S")
_T = TypeVar("_T")
_K = TypeVar("_K")
_V = TypeVar("_V")

# Modules with sections, or what runs in one.
_INSIDE: Final = ("kvwal.engine.", "kvwal.following.", "kvwal.log.", "kvwal.pages.", "kvwal.locks")
_refused: list[None] = []
# The objects that the collector counts and that a section makes at a time.
_SECTION_OBJECTS: Final = 16
# What no mapping has as a value.
_GONE: Final[Any] = object()


class Lock(Protocol):
    """A C `RLock`, and the question whether the calling thread owns it."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...
    def __enter__(self) -> bool: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def _is_owned(self) -> bool: ...


def new_lock() -> Lock:
    """A lock."""
    return threading.RLock()  # type: ignore[return-value]  # typeshed does not list _is_owned


def release(lock: Lock) -> None:
    """Give the lock back if the calling thread owns it."""
    while lock._is_owned():
        lock.release()


def if_free(lock: Lock, action: Callable[[], _T]) -> _T | None:
    """Run something as a section of the lock. None, at once, if a thread has it, the calling one among them."""
    if lock._is_owned():
        return None
    try:
        return action() if lock.acquire(False) else None
    finally:
        release(lock)


def wake(waiter: threading.Lock) -> None:
    """Wake the thread that sleeps on it, or let it not fall asleep."""
    # Opening twice is harmless: a thread that wakes looks whether it is done.
    try:
        waiter.release()
    except RuntimeError:
        return


def refuse_reentry(lock: Lock, what: str) -> None:
    """ReentrancyError if the calling thread is in a section of this lock, which it was interrupted in."""
    if lock._is_owned():
        if not is_nested():
            # A second interruption came into the handler of the first one, and left it owned.
            release(lock)
            return
        _refuse(what)


def refuse_nested(what: str) -> None:
    """ReentrancyError if the call that is being made came from within another one, as `is_nested` tells."""
    if is_nested():
        _refuse(what)


def _refuse(what: str) -> NoReturn:
    # Python drops what a finalizer raises, so the log is the only one to tell.
    _refused.append(None)
    logging.getLogger("kvwal").error("%s was refused: its thread is inside another call of the same store", what)
    raise ReentrancyError(what)


def is_nested() -> bool:
    """Whether the call of the store that is being made came from within another one, by way of other code."""
    left = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        # A listener may be a method of ours, or have no frame.
        if not name.startswith("kvwal.") or name == "kvwal.events":
            left = True
        elif left and name.startswith(_INSIDE):
            return True
        frame = frame.f_back
    return False


def collect_first(lock: Lock, count: int) -> None:
    """Have more objects that the collector counts, for a moment, than a section makes.

    The collector runs when the most objects are there at a time. So it runs here, where a finalizer may still call, and
    not in the section, where it would be refused. Method wrappers are always counted. Lists and tuples, and since 3.14
    the methods of C objects, come from a free list that is not.
    """
    if get_count()[0] + count <= get_threshold()[0]:
        return  # It is not its time, and will not be in the section.
    objects = [lock.__hash__ for _ in range(count)]
    del objects


def shared_items(shared: Mapping[_K, _V]) -> list[tuple[_K, _V]]:
    """The entries of a dict that another thread, or a finalizer on this one, may change meanwhile.

    `list` of a dict, of its values, of a set or of a deque is one step: once it has begun it makes nothing that the
    collector counts, and runs no code of others. `list(shared.items())` is not one, and neither are a comprehension and
    `tuple`: they make objects on the way, so on CPython 3.11 the collector may run there, a finalizer with it, and
    another thread in that. What came or went meanwhile would be a RuntimeError. Here it is in the list, or it is not.

    No lock makes this needless: a finalizer runs on the thread that has the lock, and to let go of a hold or of a file
    it takes none, so nothing refuses it.
    """
    return [(key, value) for key in list(shared) if (value := shared.get(key, _GONE)) is not _GONE]


def refused_calls() -> int:
    """How often a call was refused in this process because it came from within another one."""
    return len(_refused)


def locked(
    method: Callable[Concatenate[_S, _P], _T], holder: str | None = None
) -> Callable[Concatenate[_S, _P], _T]:
    """A method that is one section of its object's `lock`, or of that of an attribute of its object."""

    @functools.wraps(method)
    def section(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        lock: Lock = self.lock if holder is None else getattr(self, holder).lock
        if lock._is_owned():
            refuse_reentry(lock, method.__qualname__)
        collect_first(lock, _SECTION_OBJECTS)
        try:
            with lock:
                return method(self, *args, **kwargs)
        except BaseException:
            release(lock)
            raise

    return section


def locked_by_state(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """A method that is one section of `State.lock`: that of its object's `_state`."""
    return locked(method, "_state")
