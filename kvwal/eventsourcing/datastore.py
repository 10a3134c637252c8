"""An open store for recorders, and its tables of events.

Notification ids are given by the commit leader: what appends is an operation, which reads the last id among what is
newest, and writes the events with the next ones. So the ids are contiguous and in the order of the commits, whatever
number of threads appends, and no append conflicts with another.

Invariant: an event, its id, its index rows, the tracking that came with it and the last id are of one commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from eventsourcing.persistence import IntegrityError

from kvwal.api.store import Store
from kvwal.batch import WriteBatch
from kvwal.db.handle import Uncopied
from kvwal.engine.engine import Engine
from kvwal.engine.request import CommitRequest, Newest
from kvwal.engine.tables import InTable
from kvwal.errors import closed
from kvwal.eventsourcing.failures import encoding, raising_persistence_errors
from kvwal.eventsourcing.rows import EVENT, LAST, Key, encode_id, event_key, id_of, last_of
from kvwal.eventsourcing.waking import Wakeups
from kvwal.tables.spec import TableSpec

__all__ = ["Datastore", "EventTable", "New", "Tracked"]

# What one read takes, which is then over: an iterator that is left alone holds no moment of the store.
CHUNK: Final = 256
CHUNK_BYTES: Final = 8 << 20
_TAKEN: Final = "a version of an aggregate that is to be inserted is there already"


class Datastore(Uncopied):
    """An open store that several recorders share. Thread-safe."""

    def __init__(self, store: Store) -> None:
        #: The store.
        self.store = store
        self._engine: Engine = store.engine

    @encoding
    @raising_persistence_errors
    def table(self, name: str) -> EventTable:
        """A table of events. DataError if no table can have this name, or one that has it is something else."""
        return EventTable(self, name)

    def refuse_if_over(self) -> None:
        """Raise why no commit can come any more, if that is so."""
        if self.store.closed:
            raise closed()
        self._engine.queue.refuse_if_ended()

    def wakeups(self) -> Wakeups:
        """What wakes with each commit from now on."""
        return Wakeups(self._engine)

    @raising_persistence_errors
    def close(self) -> None:
        """Close the store, and wake who waits for a commit of it. Idempotent."""
        try:
            self.store.close()
        finally:
            # Where others hold the store, it is over for those that wait here all the same.
            for listener in list(self._engine.queue.events.listeners.values()):
                if isinstance(listener, Wakeups):
                    listener.wake()


@dataclass(frozen=True, slots=True)
class New:
    """An event to append.

    Attributes:
        value: of its row.
        version: the key of its row that says which version it made; None: it makes none.
        indexes: the keys of its index rows, less its id.
    """

    value: bytes
    version: bytes | None = None
    indexes: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Tracked:
    """A position to track: the key and the value of its row, and the id, which must be above the one that is there."""

    key: bytes
    value: bytes
    id: int

    def refusal(self, found: bytes | None) -> str | None:
        """Why it cannot be tracked, if `found` is what is there."""
        if found is not None and id_of(found) >= self.id:
            return "the position is not above the one that is tracked already"
        return None


class EventTable:
    """A table of events. Thread-safe."""

    def __init__(self, datastore: Datastore, name: str) -> None:
        self.datastore = datastore
        self._engine: Engine = datastore.store.engine
        self._spec: TableSpec[Any, Any] = TableSpec(name, Key, bytes)
        self.table = datastore.store.table(name, Key, bytes)
        self._raw = self.table.raw()

    # -- reading ------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """A row."""
        return self._raw.get(key)

    def last(self) -> int:
        """The id that was given last; 0 if there is no event."""
        return last_of(self._raw.get(LAST))

    def scan(
        self, start: bytes, stop: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """The rows from `start` on, below `stop`."""
        return self._raw.scan(start, stop, reverse=reverse, limit=limit)

    def values_of(self, ids: Sequence[int]) -> list[bytes]:
        """The events with these ids, which are there."""
        # One by one, since they never change. None: the table was dropped meanwhile.
        get = self._raw.get
        return [value for number in ids if (value := get(event_key(number))) is not None]

    def events(self, after: int, until: int) -> Iterator[tuple[int, bytes]]:
        """The events beyond `after` up to `until`, with their ids."""
        while after < until:
            chunk: list[tuple[int, bytes]] = []
            size = 0
            for key, value in self._raw.scan(event_key(after + 1), event_key(until + 1), limit=CHUNK):
                chunk.append((id_of(key[len(EVENT) :]), value))
                size += len(value)
                if size > CHUNK_BYTES:
                    break
            if not chunk:
                return
            yield from chunk
            after = chunk[-1][0]

    def indexed(self, index: bytes, after: int, until: int) -> Iterator[int]:
        """The ids beyond `after` up to `until` of an index, in their order."""
        while after < until:
            keys = list(self._raw.keys(index + encode_id(after + 1), index + encode_id(until + 1), limit=CHUNK))
            for key in keys:
                after = id_of(key[len(index) :])
                yield after
            if len(keys) < CHUNK:
                return

    def count(self, index: bytes) -> int:
        """How many rows an index has."""
        return self._raw.count(prefix=index)

    # -- writing ------------------------------------------------------------------------------

    def append(
        self,
        events: Sequence[New],
        tracked: Tracked | None = None,
        refusal: Callable[[Newest, int], str | None] = lambda newest, last: None,
    ) -> range:
        """Append events in one commit, durable as the store is, and return their ids.

        IntegrityError, and nothing is written, if one of their versions is there, if what is tracked is not above what
        is there, or if `refusal` says why: the commit leader calls it, with what is newest and the last id.
        """
        versions = [event.version for event in events if event.version is not None]
        if len(set(versions)) < len(versions):
            raise IntegrityError("one version of an aggregate is there twice")
        # Read first, so that the commit leader need not read a page.
        for version in versions:
            if self._raw.get(version) is not None:
                raise IntegrityError(_TAKEN)
        self._raw.get(LAST)
        if tracked is not None:
            self._raw.get(tracked.key)
        refused: str | None = None
        ids = range(0)

        # The commit leader calls it: it raises nothing but what the leader expects of an operation.
        def fill(newest: Newest, part: WriteBatch) -> None:
            nonlocal refused, ids
            last = last_of(newest.get(LAST))
            refused = refusal(newest, last)
            if tracked is not None and refused is None:
                refused = tracked.refusal(newest.get(tracked.key))
            for version in versions:
                if newest.get(version) is not None:
                    refused = _TAKEN
            if refused is not None:
                return
            ids = range(last + 1, last + 1 + len(events))
            writes = part.writes
            for number, event in zip(ids, events, strict=True):
                encoded = encode_id(number)
                writes[EVENT + encoded] = event.value
                if event.version is not None:
                    writes[event.version] = encoded
                for index in event.indexes:
                    writes[index + encoded] = b""
            if events:
                writes[LAST] = encode_id(ids[-1])
            if tracked is not None:
                writes[tracked.key] = tracked.value

        if events or tracked is not None:
            self._operate(fill)
        if refused is not None:
            raise IntegrityError(refused)
        return ids

    def _operate(self, fill: Callable[[Newest, WriteBatch], None]) -> None:
        engine = self._engine
        operation = InTable(self._spec.name, self._spec.asked, fill, engine.reads.moments.clock.now_us)
        engine.commit(CommitRequest(sync=engine.wants_sync(None), operation=operation))
