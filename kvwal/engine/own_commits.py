"""Which commits a thread or a task makes within a block of its program.

A block is in a context variable, so that each thread and each task has its own; a task that is started within a block
is in it, too. It is a listener besides, so that no put takes the way on which nothing is told: without a block nothing
here costs anything.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

from kvwal.events import Events, Listener
from kvwal.keys import Seqno

__all__ = ["OwnCommits", "block_of", "note"]


class OwnCommits(Listener):
    """The commits that were made in a `with` block: made by `Store.own_commits`.

    They are those of this thread or task, and of tasks that were started in the block; through the store, its tables,
    transactions and consumers. It can be read in the block and after it.

    Attributes:
        first: seqno of the first one that returned; None if nothing was written.
        last: the greatest seqno.
    """

    __slots__ = ("_events", "_outer", "first", "last")

    def __init__(self, events: Events) -> None:
        self._events = events
        self._outer: OwnCommits | None = None
        self.first: Seqno | None = None
        self.last: Seqno | None = None

    def __enter__(self) -> OwnCommits:
        outer = _current.get()
        # One whose leaving was interrupted is still current, and goes with its store.
        while outer is not None and id(outer) not in outer._events.listeners:
            outer = outer._outer
        self._outer = outer
        try:
            self._events.add(self)
            _current.set(self)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        # Not by a token: that of another context would be refused. Interrupted here, it stays a listener until the
        # store is closed, and puts take their longer way.
        _current.set(self._outer)
        self._events.remove(self)

    def __repr__(self) -> str:
        return f"<kvwal.OwnCommits {self.first} to {self.last}>"


_current: ContextVar[OwnCommits | None] = ContextVar("kvwal_own_commits", default=None)


def block_of(events: Events) -> OwnCommits:
    """A block of the store with these events, to be entered."""
    return OwnCommits(events)


def note(events: Events, seqno: Seqno) -> None:
    """Tell the blocks of the calling thread or task that it has made this commit; 0: it wrote nothing."""
    block = _current.get() if seqno else None
    while block is not None:
        if block._events is events:
            if block.first is None:
                block.first = seqno
            if block.last is None or block.last < seqno:
                block.last = seqno
        block = block._outer
