"""Fairness of `run` for the tasks of one loop: the rules of kvwal/api/fairness.py."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from kvwal.api.fairness import FREE_ATTEMPTS, PATIENCE_S, Call

__all__ = ["Tickets"]


class Tickets:
    """The tickets of one store. Their holders go one at a time, in the order in which they asked."""

    def __init__(self) -> None:
        self._holders: deque[_Call] = deque()
        #: A holder has lost an attempt: tasks without a ticket let it pass.
        self.is_urgent = False
        self._waiting: set[asyncio.Future[None]] = set()

    def call(self) -> _Call:
        """One call of `run`, as a context manager."""
        return _Call(self)

    def take(self, call: _Call) -> None:
        """Queue up."""
        self._holders.append(call)

    def first(self) -> _Call | None:
        """Whose turn it is."""
        return self._holders[0] if self._holders else None

    async def wait_for_holder(self) -> None:
        """Wait until a holder leaves, for as long as patience lasts."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=PATIENCE_S)
        finally:
            self._waiting.discard(waiter)

    def leave(self, call: _Call) -> None:
        """The call is over."""
        self._holders.remove(call)
        self.is_urgent = False
        first = self.first()
        if first is not None:
            first.wake()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


class _Call(Call):
    def __init__(self, tickets: Tickets) -> None:
        super().__init__(tickets)
        self._tickets = tickets
        self._turn = asyncio.Event()

    async def begin(self, attempt: int) -> None:
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
            await self._wait_in_line()
        elif tickets.is_urgent:
            await tickets.wait_for_holder()

    async def _wait_in_line(self) -> None:
        while (first := self._tickets.first()) is not self:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._turn.wait()
            except TimeoutError:
                if self._tickets.first() is first:
                    # Its function takes long, or waits for this one.
                    return

    def wake(self) -> None:
        """It is its turn."""
        self._turn.set()

    def __enter__(self) -> _Call:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        if self.has_ticket:
            self._tickets.leave(self)
