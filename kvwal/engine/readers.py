"""Who reads which moment: registered readers, and what stays because of them.

A reader is registered for as long as something refers to it and it was not released. It leaves by that alone: by one
assignment, or by being dropped, which runs no Python code. So a finalizer may release a reader whatever its thread was
doing, and an interruption leaves it registered or not, never half.

A read-write transaction is a writer as well: while there is one, the history keeps what commits write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar
from weakref import ref

from kvwal.batch import WriteBatch
from kvwal.engine.expiry import ExpiryClock
from kvwal.engine.occ import History
from kvwal.errors import closed
from kvwal.keys import KeyRange, Seqno
from kvwal.locks import locked_by_state

if TYPE_CHECKING:
    from kvwal.engine.count import Census
    from kvwal.engine.state import State
    from kvwal.engine.version import Version

__all__ = ["Moments", "Now", "Reader", "Readers"]

_T = TypeVar("_T")

_tokens: Final = count(1)


class Reader:
    """A moment that stays readable while this is registered."""

    __slots__ = (
        "__weakref__",
        "at_us",
        "censuses",
        "is_released",
        "lost",
        "owner",
        "purpose",
        "seqno",
        "since_us",
        "thread_name",
        "token",
        "version",
    )

    def __init__(
        self, version: Version, seqno: Seqno, purpose: str, since_us: int, owner: object, at_us: int | None = None
    ) -> None:
        #: Whether it was given back, or up.
        self.is_released = False
        #: Why it was given up, if it was.
        self.lost: Exception | None = None
        self.token = next(_tokens)
        self.version = version
        self.seqno = seqno
        self.purpose = purpose
        self.since_us = since_us
        #: The time that it judges by what has expired.
        self.at_us = since_us if at_us is None else at_us
        #: The store: while something reads, it is not collected, and so its lock not given to another process.
        self.owner = owner
        self.thread_name = threading.current_thread().name
        #: What counting at this moment has found out, by table.
        self.censuses: dict[Version, Census] = {}

    def register(self, *registries: Readers) -> None:
        """Enter the registries. Requires: State.lock."""
        entry = (self.seqno, self.token, ref(self))
        for registry in registries:
            registry.add(entry)

    def again(self, purpose: str) -> Reader:
        """A second reader of the same moment, not registered yet."""
        return Reader(self.version, self.seqno, purpose, self.since_us, self.owner, self.at_us)

    def release(self) -> None:
        """Leave the registries. Idempotent; takes no lock, so that a finalizer may call it."""
        self.is_released = True

    def give_up(self, reason: Exception) -> None:
        """Take its moment away, since it holds too much. Requires: State.lock."""
        self.lost = reason
        self.is_released = True

    def check(self) -> None:
        """Raise what became of it, if it is over. What was read before this passed is of its moment.

        Invariant: a page of its version is written over only after it is over.
        """
        if self.is_released:
            raise closed(self.purpose) if self.lost is None else copy(self.lost)


_Entry: TypeAlias = tuple[Seqno, int, "ref[Reader]"]


def _is_registered(entry: _Entry) -> bool:
    reader = entry[2]()
    return reader is not None and not reader.is_released


class Readers:
    """Registered readers, and the oldest moment that they read. Requires, but for `all` and `len`: State.lock."""

    __slots__ = ("_heap", "_sweep_at", "newest")

    def __init__(self) -> None:
        # By seqno. Readers that have left stay until they come up, or there are too many of them.
        self._heap: list[_Entry] = []
        self._sweep_at = 64
        #: The newest moment that was ever registered.
        self.newest = Seqno(0)

    def __bool__(self) -> bool:
        return self.oldest() is not None

    def __len__(self) -> int:
        return sum(map(_is_registered, list(self._heap)))

    def add(self, entry: _Entry) -> None:
        """Register a reader, by its seqno, its token and a reference to it. O(log readers)."""
        if len(self._heap) >= self._sweep_at:
            self._heap = sorted(filter(_is_registered, self._heap))
            self._sweep_at = 2 * len(self._heap) + 64
        if entry[0] > self.newest:
            self.newest = entry[0]
        heappush(self._heap, entry)

    def oldest(self) -> Seqno | None:
        """The oldest moment that a registered reader reads; None if there is none."""
        heap = self._heap
        while heap:
            if _is_registered(heap[0]):
                return heap[0][0]
            heappop(heap)
        return None

    def all(self) -> list[Reader]:
        """The registered readers, in the order they came."""
        readers = [reader for entry in list(self._heap) if (reader := entry[2]()) is not None]
        return sorted((each for each in readers if not each.is_released), key=lambda reader: reader.token)


class Now:
    """Reads of now, which may have to begin again: in a store that another process writes they do."""

    def ready(self) -> None:
        """Be at a moment that can be read."""

    def again(self, read: Callable[[], _T]) -> _T:
        """What a read of now gives; it is called again where its moment went meanwhile."""
        return read()

    def begun(self, walk: Callable[[], Iterator[_T]]) -> Iterator[_T]:
        """A walk of now, which `walk` begins; it is called again where its moment went before the first chunk."""
        return walk()


class Moments:
    """The registered readers and writers of one open store, and the history of conflicts."""

    def __init__(self, state: State, wall_us: Callable[[], int], clock: ExpiryClock | None = None) -> None:
        self._state = state
        #: The wall clock, for what another process compares with its own. The time of the store is `clock.now_us`.
        self.wall_us = wall_us
        #: By which a reader judges what has expired.
        self.clock: Final = ExpiryClock(wall_us) if clock is None else clock
        #: How reads of now begin.
        self.now = Now()
        #: Every registered reader.
        self.readers: Final = Readers()
        #: Recent commits, while a read-write transaction is open. Changed under `State.lock`.
        self.history: Final = History()
        # Open read-write transactions.
        self._writers = Readers()

    def reader(self, purpose: str, *, writer: bool = False, owner: object = None) -> Reader:
        """Register a reader of this moment. Give it back with `Reader.release`, or drop it."""
        return self._register(purpose, self.clock.now_us(), writer, owner)

    def register(self, purpose: str, since_us: int, writer: bool = False, owner: object = None) -> Reader:
        """The same for a caller in a section. Requires: State.lock."""
        state = self._state
        state.refuse_if_gone()
        state.finish()
        version, seqno = state.version, state.seqno
        reader = Reader(version, seqno, purpose, since_us, owner)
        registries: tuple[Readers, ...] = (version.memtable.older.readers, version.readers, self.readers)
        if writer:
            # Decided under the lock that publishing takes: every commit after `seqno` sees this writer and is recorded,
            # and none before it can matter.
            if not self._writers:
                self.history.begin(seqno)
            registries = (self._writers, *registries)
        state.plain = False
        reader.register(*registries)
        return reader

    _register = locked_by_state(register)

    @locked_by_state
    def again(self, reader: Reader, purpose: str) -> Reader:
        """A second registration of a reader's moment. ClosedError if another thread has just released it."""
        self._state.refuse_if_gone()
        reader.check()
        other = reader.again(purpose)
        other.register(other.version.memtable.older.readers, other.version.readers, self.readers)
        return other

    def record(
        self,
        seqno: Seqno,
        keys: Iterable[bytes],
        ranges: Sequence[KeyRange],
        parts: Iterable[tuple[int, WriteBatch]],
    ) -> None:
        """A commit wrote these, `parts` to other tables. Requires: State.lock."""
        oldest = self._writers.oldest()
        if oldest is not None:
            self.history.record(seqno, keys, ranges, oldest, parts)
