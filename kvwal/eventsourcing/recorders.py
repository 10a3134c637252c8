"""Recorders of stored events and of tracking, and the subscription to events.

All recorders of one table see the same rows. An aggregate recorder gives its events ids too, which it does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Event
from time import monotonic
from typing import Any, Final
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    Notification,
    ProcessRecorder,
    Recorder,
    StoredEvent,
    Subscription,
    Tracking,
    TrackingRecorder,
    WaitInterruptedError,
)

from kvwal.api.store import Store
from kvwal.calling import refuse_unrun
from kvwal.db.transaction import Transaction
from kvwal.eventsourcing.datastore import CHUNK_BYTES, EventTable, New, Tracked
from kvwal.eventsourcing.failures import raising_persistence_errors
from kvwal.eventsourcing.rows import (
    encode_id,
    encode_stored_event,
    id_of,
    prefix,
    stored_event_of,
)
from kvwal.eventsourcing.waking import Following, Wakeups

__all__ = [
    "KvwalAggregateRecorder",
    "KvwalApplicationRecorder",
    "KvwalProcessRecorder",
    "KvwalSubscription",
    "KvwalTrackingRecorder",
]

# Notifications that a subscription reads at a time.
_SELECT: Final = 500
# Nothing wakes a thread when the event that interrupts it is set, so it looks again after this time.
_INTERRUPT_S: Final = 0.05


class _KvwalRecorder(Recorder):
    def __init__(self, events: EventTable) -> None:
        self._events = events

    @property
    def store(self) -> Store:
        """The store, for what else is kept in it."""
        return self._events.datastore.store


class KvwalAggregateRecorder(_KvwalRecorder, AggregateRecorder):
    """Events by aggregate and version. Thread-safe."""

    @raising_persistence_errors
    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Write events in one commit. IntegrityError if one of the versions is there: nothing is written then."""
        self._insert(stored_events)
        return None

    def _insert(self, stored_events: Sequence[StoredEvent], tracked: Tracked | None = None) -> Sequence[int]:
        return list(self._events.append(_new(stored_events), tracked))

    @raising_persistence_errors
    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """The events of an aggregate, by version. A UUID and a str are never the same aggregate."""
        events = self._events
        versions = prefix("version", originator_id)
        start = versions if gt is None else versions + encode_id(gt + 1)
        stop = versions + (b"\xff" if lte is None else encode_id(lte + 1))
        most = None if limit is None else max(limit, 0)
        ids = [id_of(value) for _, value in events.scan(start, stop, reverse=desc, limit=most)]
        return [StoredEvent(*stored_event_of(value)) for value in events.values_of(ids)]


def _new(events: Sequence[StoredEvent]) -> list[New]:
    new: list[New] = []
    # Most often all are of one aggregate.
    aggregates: dict[UUID | str, bytes] = {}
    for event in events:
        originator, version = event.originator_id, event.originator_version
        value = encode_stored_event(originator, version, event.topic, event.state)
        versions = aggregates.get(originator)
        if versions is None:
            versions = aggregates[originator] = prefix("version", originator)
        new.append(New(value, versions + encode_id(version)))
    return new


class KvwalApplicationRecorder(KvwalAggregateRecorder, ApplicationRecorder):
    """Events by aggregate and version, and in the order of their commits. Thread-safe."""

    @raising_persistence_errors
    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """As of the aggregate recorder. Returns the notification ids: contiguous, and in the order of the commits."""
        return self._insert(stored_events)

    @raising_persistence_errors
    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """At most `limit` notifications from `start` on (None: the first), up to and with `stop`, of these topics."""
        after = 0 if start is None else max(start - inclusive_of_start, 0)
        last = self._events.last()
        found: list[Notification] = []
        if limit > 0:
            until = last if stop is None else min(stop, last)
            for each in self._notifications(after, until, frozenset(topics)):
                found.append(each)
                if len(found) == limit:
                    break
        return found

    def _notifications(self, after: int, until: int, wanted: frozenset[str]) -> Iterator[Notification]:
        for number, value in self._events.events(after, until):
            originator, version, topic, state = stored_event_of(value)
            if not wanted or topic in wanted:
                yield Notification(originator, version, topic, state, number)

    @raising_persistence_errors
    def max_notification_id(self) -> int | None:
        """The last notification id; None if there is none."""
        return self._events.last() or None

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> KvwalSubscription:
        """The notifications beyond `gt` of these topics, those to come included."""
        return KvwalSubscription(self, gt, topics)

    @raising_persistence_errors
    def wakeups(self) -> Wakeups:
        """What wakes with each commit of the store."""
        return self._events.datastore.wakeups()

    @raising_persistence_errors
    def read_on(self, after: int, topics: frozenset[str]) -> tuple[list[Notification], int]:
        """Notifications beyond `after`, and the id up to which there are no others.

        If there are none, raises why none can come, if that is so.
        """
        last = self._events.last()
        found: list[Notification] = []
        size = 0
        for each in self._notifications(after, last, topics):
            found.append(each)
            size += len(each.state)
            if len(found) == _SELECT or size > CHUNK_BYTES:
                return found, each.id
        if not found:
            self._events.datastore.refuse_if_over()
        return found, max(after, last)


class KvwalSubscription(Subscription[KvwalApplicationRecorder]):
    """Notifications in their order, for one thread, which sleeps until a commit or `stop` wakes it."""

    def __init__(self, recorder: KvwalApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()) -> None:
        super().__init__(recorder, gt, topics)
        wanted = frozenset(topics)
        self._following = Following(recorder.wakeups(), lambda after: recorder.read_on(after, wanted), gt)

    def stop(self) -> None:
        """End the iteration, in whatever thread it is. Idempotent."""
        super().stop()
        self._following.end()

    def __next__(self) -> Notification:
        return self._following.next()


class KvwalTrackingRecorder(_KvwalRecorder, TrackingRecorder):
    """What was processed of other applications' events. Thread-safe.

    Inherit from it for a view that changes with what it tracks: see `record`.
    """

    @raising_persistence_errors
    def insert_tracking(self, tracking: Tracking) -> None:
        """Record a position. IntegrityError if it is not above the one that is there."""
        self._events.append((), _tracked(tracking))

    @raising_persistence_errors
    def record(self, tracking: Tracking, function: Callable[[Transaction], object]) -> None:
        """Call `function(txn)`, and commit what it writes to the store together with a position.

        As `kvwal.Store.run`: on a conflict it is called again. IntegrityError if the position is not above the one that
        is there: then the function is not called.
        """
        tracked, table = _tracked(tracking), self._events.table

        def in_transaction(txn: Transaction) -> None:
            within = table.within(txn)
            key = ("tracking", tracking.application_name)
            refusal = tracked.refusal(within.get(key))
            if refusal is not None:
                raise IntegrityError(refusal)
            within.put(key, tracked.value)
            refuse_unrun(function(txn), is_used=False)

        self.store.run(in_transaction)

    @raising_persistence_errors
    def max_tracking_id(self, application_name: str) -> int | None:
        """The position; None if there is none."""
        found = self._events.get(prefix("tracking", application_name))
        return None if found is None else id_of(found)

    @raising_persistence_errors
    def wait(
        self,
        application_name: str,
        notification_id: int | None,
        timeout: float = 1.0,
        interrupt: Event | None = None,
    ) -> None:
        """Wait, at most `timeout` seconds, until a position is recorded that is not below this one.

        A commit wakes it. TimeoutError; WaitInterruptedError once `interrupt` is set.
        """
        deadline = monotonic() + timeout
        if self.has_tracking_id(application_name, notification_id):
            return
        with self._events.datastore.wakeups() as wakeups:
            while not self.has_tracking_id(application_name, notification_id):
                if interrupt is not None and interrupt.is_set():
                    raise WaitInterruptedError
                left_s = deadline - monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"the notification of {application_name!r} was not processed in {timeout} s")
                self._events.datastore.refuse_if_over()
                wakeups.wait(left_s if interrupt is None else min(left_s, _INTERRUPT_S))


def _tracked(tracking: Tracking) -> Tracked:
    position = tracking.notification_id
    return Tracked(prefix("tracking", tracking.application_name), encode_id(position), position)


class KvwalProcessRecorder(KvwalTrackingRecorder, KvwalApplicationRecorder, ProcessRecorder):
    """Events, and with them what they came of, in one commit. Thread-safe."""

    @raising_persistence_errors
    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """As of the application recorder; with `tracking`, that is recorded in the same commit."""
        tracking: Tracking | None = kwargs.get("tracking")
        return self._insert(stored_events, None if tracking is None else _tracked(tracking))
