"""Fairness of `run` for the tasks of one loop: the rules of kvwal/api/fairness.py, but holders wait without limit."""

from __future__ import annotations

import asyncio
from types import TracebackType

from kvwal.api.fairness import FREE_ATTEMPTS

__all__ = ["Tickets"]


class Tickets:
    """The tickets of one store. One task at a time holds one; the others wait in the order in which they asked."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        #: The holder has lost an attempt: tasks without a ticket let it pass.
        self.is_urgent = False

    def call(self) -> _Call:
        """One call of `run`, as a context manager."""
        return _Call(self)


class _Call:
    def __init__(self, tickets: Tickets) -> None:
        self._tickets = tickets
        self._has_ticket = False

    async def begin(self, attempt: int) -> None:
        """Wait until this attempt may be made."""
        tickets = self._tickets
        if self._has_ticket:
            tickets.is_urgent = True
        elif attempt > FREE_ATTEMPTS:
            await tickets.lock.acquire()
            self._has_ticket = True
        elif tickets.is_urgent:
            async with tickets.lock:
                pass

    def __enter__(self) -> _Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._has_ticket:
            self._tickets.is_urgent = False
            self._tickets.lock.release()
