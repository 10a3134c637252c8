"""Fairness of `run`: a call that lost to others again and again goes before them.

Optimistic concurrency lets the first commit win, and nothing stops one call from losing a hundred times in a row.
So a call takes a ticket after three lost attempts. Ticket holders go one at a time, in the order of their tickets; and
while one of them has lost an attempt even so, calls without a ticket wait before they begin another attempt.

A function of `run` may call `run`, or await tasks that do. Such a call goes by the ticket of the one that it is
within, if that has one: it takes none and waits for none, since it would wait for itself.
"""

from __future__ import annotations

import threading
from collections import deque
from contextvars import ContextVar
from types import TracebackType
from typing import Final

from kvwal.locks import Lock, locked, new_lock

__all__ = ["FREE_ATTEMPTS", "PATIENCE_S", "Call", "Tickets"]

#: The first attempts need no ticket: with little contention they succeed, all at the same time.
FREE_ATTEMPTS: Final = 3
#: A holder that is stuck in its function must not stop the others for ever.
PATIENCE_S: Final = 1.0

# The calls that this thread or task is within, of any store; a task begins with those of the one that made it.
_within: ContextVar[tuple[Call, ...]] = ContextVar("kvwal.run", default=())


class Call:
    """One call of `run`, of a thread or a task, from its first attempt to its end: which calls it is within.

    Attributes:
        has_ticket: whether it holds one.
    """

    def __init__(self, tickets: object) -> None:
        self.has_ticket = False
        self._of = tickets
        self._is_over = False
        # A task may outlive the call that made it.
        self._outer = tuple(call for call in _within.get() if not call._is_over)

    def is_within_holder(self) -> bool:
        """Whether a call that it is within holds a ticket of the same store."""
        return any(call.has_ticket and call._of is self._of and not call._is_over for call in self._outer)

    def enter(self) -> None:
        """From here on calls are within this one."""
        _within.set((*self._outer, self))

    def leave(self) -> None:
        """The call is over."""
        self._is_over = True
        # Of an abandoned coroutine it is the collector who ends the call, in any context.
        within = _within.get()
        if self in within:
            _within.set(tuple(call for call in within if call is not self))


class Tickets:
    """The tickets of one store."""

    def __init__(self) -> None:
        self.lock: Lock = new_lock()
        self._holders: deque[_Call] = deque()
        #: A ticket holder has lost an attempt: the others let it pass.
        self.is_urgent = False
        self._waiting: deque[threading.Lock] = deque()

    def call(self) -> _Call:
        """One call of `run`, as a context manager."""
        return _Call(self)

    @locked
    def take(self, call: _Call) -> None:
        """Queue up."""
        if call not in self._holders:
            self._holders.append(call)

    def first(self) -> _Call | None:
        """Whose turn it is."""
        try:
            return self._holders[0]
        except IndexError:
            return None

    @locked
    def wait_in_line(self, waiter: threading.Lock) -> None:
        """Have the waiter opened when a holder leaves."""
        self._waiting.append(waiter)

    @locked
    def leave(self, call: _Call) -> None:
        """The call is over."""
        if call in self._holders:
            self._holders.remove(call)
            self.is_urgent = False
            while self._waiting:
                waiter = self._waiting.popleft()
                if waiter.locked():
                    waiter.release()


class _Call(Call):
    """One call of `run` of a thread."""

    def __init__(self, tickets: Tickets) -> None:
        super().__init__(tickets)
        self._tickets = tickets

    def begin(self, attempt: int) -> None:
        """Wait until this attempt may be made."""
        tickets = self._tickets
        if self.is_within_holder():
            tickets.is_urgent = tickets.is_urgent or attempt > 1
            return
        if self.has_ticket:
            tickets.is_urgent = True
        elif attempt > FREE_ATTEMPTS:
            self.has_ticket = True
            tickets.take(self)
        if self.has_ticket:
            while (first := tickets.first()) not in (self, None):
                self._wait(PATIENCE_S)
                if tickets.first() is first:
                    # Its function takes long, or waits for this one.
                    break
        elif tickets.is_urgent and tickets.first() is not None:
            self._wait(PATIENCE_S)

    def _wait(self, timeout_s: float) -> None:
        waiter = threading.Lock()
        waiter.acquire()
        self._tickets.wait_in_line(waiter)
        # Checked again, now that the waiter would be opened.
        if self.has_ticket and self._tickets.first() is self:
            return
        if not self.has_ticket and not self._tickets.is_urgent:
            return
        waiter.acquire(timeout=timeout_s)

    def __enter__(self) -> _Call:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.has_ticket:
            self._tickets.leave(self)
        self.leave()
