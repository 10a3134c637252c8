"""The recorder of events with tags (DCB: dynamic consistency boundary), and the subscription to them.

An append with a condition looks for an event that fails it before the commit, by the indexes, up to the last event
that there is. The commit leader then looks at the events that came since, one by one. If these are many, the look
before the commit is repeated, so that commits do not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import groupby, islice
from typing import Final, TypeAlias

from eventsourcing.dcb.api import (
    DCBAppendCondition,
    DCBEvent,
    DCBQuery,
    DCBReadResponse,
    DCBRecorder,
    DCBSequencedEvent,
    DCBSubscription,
)
from eventsourcing.persistence import IntegrityError, ProgrammingError

from kvwal.engine.request import Newest
from kvwal.eventsourcing.datastore import CHUNK_BYTES, EventTable, New
from kvwal.eventsourcing.failures import raising_persistence_errors
from kvwal.eventsourcing.rows import dcb_event_of, encode_dcb_event, event_key, prefix
from kvwal.eventsourcing.waking import Following, Wakeups

__all__ = ["KvwalDCBRecorder", "KvwalDCBSubscription"]

# Of each item its types and its tags.
Wanted: TypeAlias = tuple[tuple[frozenset[str], frozenset[str]], ...]

# Events that a subscription reads at a time, and that are looked up at a time.
_SELECT: Final = 500
_LOOKED_UP: Final = 64
# Events that the commit leader looks at; each repetition of the look before lets it look at more.
_BY_LEADER: Final = 64
_GROWTH: Final = 8


class KvwalDCBRecorder(DCBRecorder):
    """Events with types and tags, in the order of their commits, with contiguous positions from 1 on. Thread-safe."""

    def __init__(self, events: EventTable) -> None:
        self._events = events

    @raising_persistence_errors
    def read(
        self, query: DCBQuery | None = None, *, after: int | None = None, limit: int | None = None
    ) -> DCBReadResponse:
        """The events beyond `after` that match, at most `limit`; what is appended after the call is not among them.

        Without a limit they are read while the response is iterated.
        """
        last = self._events.last()
        found = self._matching(wanted_by(query), max(after or 0, 0), last)
        if limit is None:
            return _Response(found, last or None)
        chosen = list(islice(found, min(max(limit, 0), sys.maxsize)))
        return _Response(iter(chosen), chosen[-1].position if chosen else None)

    @raising_persistence_errors
    def append(self, events: Sequence[DCBEvent], condition: DCBAppendCondition | None = None) -> int:
        """Append events in one commit, and return the position of the last one.

        IntegrityError if an event beyond the condition's `after` matches its query: nothing is written then.
        """
        if not events:
            raise ProgrammingError("there is no event to append")
        new = list(map(_new, events))
        if condition is None:
            return self._events.append(new)[-1]
        wanted, after = wanted_by(condition.fail_if_events_match), max(condition.after or 0, 0)
        most = _BY_LEADER
        while True:
            last = self._events.last()
            if next(self._matching(wanted, after, last), None) is not None:
                raise IntegrityError(condition)
            check = _Check(wanted, max(after, last), most)
            try:
                return self._events.append(new, refusal=check)[-1]
            except IntegrityError as error:
                if not check.is_behind:
                    raise IntegrityError(condition) from error
            most *= _GROWTH

    def subscribe(self, query: DCBQuery | None = None, *, after: int | None = None) -> KvwalDCBSubscription:
        """The events beyond `after` that match, those to come included."""
        return KvwalDCBSubscription(self, query, after)

    # -- reading ------------------------------------------------------------------------------

    def _matching(self, wanted: Wanted, after: int, until: int) -> Iterator[DCBSequencedEvent]:
        for position, value in self._candidates(wanted, after, until):
            kind, tags, data = dcb_event_of(value)
            if _matches(wanted, kind, tags):
                yield DCBSequencedEvent(DCBEvent(kind, data, tags), position)

    def _candidates(self, wanted: Wanted, after: int, until: int) -> Iterator[tuple[int, bytes]]:
        """At least the events that match, in their order."""
        indexes: list[bytes] = []
        for types, tags in wanted:
            indexes += self._indexes(types, tags)
        if not wanted or (frozenset(), frozenset()) in wanted:
            yield from self._events.events(after, until)
            return
        found = merge(*(self._events.indexed(each, after, until) for each in set(indexes)))
        positions = (position for position, _ in groupby(found))
        while chunk := list(islice(positions, _LOOKED_UP)):
            yield from zip(chunk, self._events.values_of(chunk), strict=False)

    def _indexes(self, types: frozenset[str], tags: frozenset[str]) -> list[bytes]:
        """Indexes that together have all events that match."""
        if not tags:
            return [prefix("type", kind) for kind in types]
        found = [prefix("tag", tag) for tag in tags]
        return [found[0] if len(found) == 1 else min(found, key=self._events.count)]

    # -- for subscriptions --------------------------------------------------------------------

    @raising_persistence_errors
    def wakeups(self) -> Wakeups:
        """What wakes with each commit of the store."""
        return self._events.datastore.wakeups()

    @raising_persistence_errors
    def read_on(self, wanted: Wanted, after: int) -> tuple[list[DCBSequencedEvent], int]:
        """Events that match beyond `after`, and the position up to which there are no others.

        If there are none, raises why none can come, if that is so.
        """
        last = self._events.last()
        found: list[DCBSequencedEvent] = []
        size = 0
        for each in self._matching(wanted, after, last):
            found.append(each)
            size += len(each.event.data)
            if len(found) == _SELECT or size > CHUNK_BYTES:
                return found, each.position
        if not found:
            self._events.datastore.refuse_if_over()
        return found, max(after, last)


def _new(event: DCBEvent) -> New:
    value = encode_dcb_event(event.type, event.tags, event.data)
    indexes = [prefix("type", event.type), *(prefix("tag", tag) for tag in set(event.tags))]
    return New(value, indexes=indexes)


def wanted_by(query: DCBQuery | None) -> Wanted:
    """Types and tags of each item, of which an event matches one; of none, each event. TypeError."""
    wanted = tuple((frozenset(item.types), frozenset(item.tags)) for item in (query.items if query else ()))
    if not all(isinstance(each, str) for types, tags in wanted for each in (*types, *tags)):
        raise TypeError("the types and tags of a query are str")
    return wanted


def _matches(wanted: Wanted, kind: str, tags: Sequence[str]) -> bool:
    return not wanted or any((not types or kind in types) and required.issubset(tags) for types, required in wanted)


class _Check:
    """What the commit leader is to look at: the events that came after a position."""

    def __init__(self, wanted: Wanted, after: int, most: int) -> None:
        self._wanted = wanted
        self._after = after
        self._most = most
        #: There were more than `most`, and none was looked at.
        self.is_behind = False

    def __call__(self, newest: Newest, last: int) -> str | None:
        self.is_behind = last - self._after > self._most
        if self.is_behind:
            return "other events came meanwhile"
        for position in range(self._after + 1, last + 1):
            value = newest.get(event_key(position))
            if value is not None and _matches(self._wanted, *dcb_event_of(value)[:2]):
                return "an event that came meanwhile matches"
        return None


class _Response(DCBReadResponse):
    def __init__(self, events: Iterator[DCBSequencedEvent], head: int | None) -> None:
        self._events = events
        self._head = head

    @property
    def head(self) -> int | None:
        """With a limit, the position of the last event that was read; else the last position there was."""
        return self._head

    @raising_persistence_errors
    def _next(self) -> DCBSequencedEvent | None:
        return next(self._events, None)

    def __next__(self) -> DCBSequencedEvent:
        event = self._next()
        if event is None:
            raise StopIteration
        return event


class KvwalDCBSubscription(DCBSubscription[KvwalDCBRecorder]):
    """Events in their order, for one thread, which sleeps until a commit or `stop` wakes it."""

    def __init__(self, recorder: KvwalDCBRecorder, query: DCBQuery | None = None, after: int | None = None) -> None:
        super().__init__(recorder, query, after)
        wanted = wanted_by(query)
        self._following = Following(recorder.wakeups(), lambda after: recorder.read_on(wanted, after), after)

    def stop(self) -> None:
        """End the iteration, in whatever thread it is. Idempotent."""
        super().stop()
        self._following.end()

    def __next__(self) -> DCBSequencedEvent:
        return self._following.next()
