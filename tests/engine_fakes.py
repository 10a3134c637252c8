"""Stand-ins for pages, log, pressure and engine, for tests of the commit queue alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from kvwal.batch import WriteBatch
from kvwal.engine.commit import CommitQueue
from kvwal.engine.gaps import TableGaps
from kvwal.engine.indexing import Indexes
from kvwal.engine.memtable import Memtable
from kvwal.engine.publish import Publisher
from kvwal.engine.readers import Moments
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import State
from kvwal.engine.tables import Tables
from kvwal.engine.writes import EncodedBatch
from kvwal.events import Events
from kvwal.keys import Seqno
from kvwal.locks import new_lock
from kvwal.log import decode_intents, encode_put, writes_body
from kvwal.pages.cache import Cache
from kvwal.pages.pins import Pins


class FakeTree:
    """An empty generation."""

    height = 0
    has_expiring = False

    def __init__(self, generation: int = 1) -> None:
        self.meta = FakeMeta(generation)

    def get(self, key: bytes) -> bytes | None:
        return None

    def peek(self, key: bytes) -> bytes | None:
        return None

    def chunks(self, start: object = None, stop: object = None, *, reverse: bool = False) -> Iterator[Any]:
        return iter(())

    def cached_pairs(self, start: object, stop: object, most: int, *, reverse: bool) -> tuple[list[Any], bool]:
        return [], True

    def count(self, start: object = None, stop: object = None) -> int:
        return 0


class FakeMeta:
    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.seqno = Seqno(0)


class FakePages:
    meta = FakeMeta(1)

    def __init__(self) -> None:
        self.pins = Pins({1})
        self.pager = SimpleNamespace(cache=Cache(0))

    def tree(self, meta: object = None) -> FakeTree:
        return FakeTree()


class FakeLog:
    """A log in memory that counts flushes and can be told to fail."""

    def __init__(self) -> None:
        self.last_seqno = Seqno(0)
        self.durable_seqno = Seqno(0)
        self.bodies: list[bytes] = []
        self.groups: list[int] = []
        self.syncs = 0
        self.fail_append: list[BaseException] = []
        #: Of appends that may use what is kept for a full disk.
        self.fail_sync: list[BaseException] = []
        self.on_sync: Callable[[], None] = lambda: None
        self.on_append: Callable[[], None] = lambda: None

    def append_put(self, key: bytes, value: bytes, table: int = 0, whole: bytes | None = None) -> Seqno:
        return self.append((encode_put(key, value, table) if whole is None else writes_body(whole),))

    def append(self, bodies: Sequence[Any]) -> Seqno:
        failures = self.fail_append
        if failures:
            raise failures.pop()
        new = [body if isinstance(body, bytes) else b"".join(body) for body in bodies]
        self.bodies, self.last_seqno = self.bodies + new, Seqno(self.last_seqno + len(new))
        self.groups.append(len(new))
        self.on_append()
        return self.last_seqno

    def sync(self) -> None:
        if self.fail_sync:
            raise self.fail_sync.pop()
        self.syncs += 1
        self.on_sync()
        self.durable_seqno = self.last_seqno

    def content(self) -> dict[bytes, bytes]:
        state: dict[bytes, bytes | None] = {}
        for body in self.bodies:
            batch = decode_intents(body)
            for bounds in batch.ranges:
                state = {key: value for key, value in state.items() if not bounds.contains(key)}
            state.update(batch.writes)
        return {key: value for key, value in state.items() if value is not None}


class FakePressure:
    """Counts what it is told of a full disk. `reserve`: whether there is one to give up."""

    memtable_bytes = 1 << 20

    def __init__(self, *, reserve: bool = False) -> None:
        self.is_on = False
        self.lock = new_lock()
        self.reserve = reserve
        self.full = 0

    def disk_is_full(self) -> None:
        self.full += 1

    def release_reserve(self) -> bool:
        held, self.reserve = self.reserve, False
        return held


class FakeEngine:
    """An empty store: what a queue and a transaction need of an engine."""

    def __init__(self, pressure: Any) -> None:
        pages: Any = FakePages()
        self.state = State(pages, cache_bytes=1 << 20)
        gaps, moments = TableGaps(), Moments(self.state, lambda: 0)
        self.reads = Reads(self.state, moments, gaps)
        self.tables = Tables(self.state, self.reads)
        self.publisher = Publisher(self.state, moments, gaps, pressure)
        self.pressure = pressure

    def make_queue(self, log: Any, events: Events, **options: Any) -> CommitQueue:
        """The one that `commit` uses from here on."""
        parts = self.state, self.reads, self.publisher, self.reads.moments.history, self.pressure
        self.queue = CommitQueue(log, *parts, events, **options)
        self.tables.indexes = Indexes(self.state, self.reads, self.tables, self.queue, self.pressure)
        return self.queue

    def commit(self, request: CommitRequest) -> Seqno:
        return self.queue.commit(request) or self.state.seqno


def make(*, reserve: bool = False, events: Events | None = None) -> tuple[CommitQueue, FakeLog, FakeEngine]:
    """A queue on an empty store."""
    engine, log = FakeEngine(FakePressure(reserve=reserve)), FakeLog()
    return engine.make_queue(log, Events() if events is None else events), log, engine


def apply(table: Memtable, seqno: int, batch: WriteBatch, size: int = 10) -> None:
    """Apply one commit to a memtable."""
    table.write(Seqno(seqno), batch.writes, size, batch.ranges, batch.parts())


def values_at(table: Memtable, seqno: int) -> dict[bytes, bytes | None]:
    """What a memtable itself knows of its keys as of a commit."""
    chunks = table.chunks(Seqno(seqno), None, None, reverse=False, walk=None, check=lambda: None)
    return {key: value for chunk in chunks for key, value in zip(*chunk, strict=True)}


def put_request(key: bytes, value: bytes, **options: Any) -> CommitRequest:
    """A request of one put, of a batch."""
    batch = WriteBatch()
    batch.put(key, value)
    return CommitRequest(EncodedBatch(batch), **({"sync": True} | options))


def delete_request(key: bytes, *, sync: bool = True) -> CommitRequest:
    """A request of one delete."""
    batch = WriteBatch()
    batch.delete(key)
    return CommitRequest(EncodedBatch(batch), sync=sync)


class Asleep(BaseException):
    """A thread sleeps, and no thread is left that could wake it."""


class Waiter:
    """What a thread sleeps on, where one thread plays all of them: what the others do meanwhile is called instead."""

    def __init__(self, *meanwhile: Callable[[], object]) -> None:
        self.is_open = False
        self.meanwhile = list(meanwhile)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        while not self.is_open:
            if not self.meanwhile:
                raise Asleep
            _untraced(self.meanwhile.pop(0))
        self.is_open = False
        return True

    def release(self) -> None:
        if self.is_open:
            raise RuntimeError("release unlocked lock")
        self.is_open = True


def _untraced(function: Callable[[], object]) -> None:
    # What other threads do is not what is interrupted.
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        function()
    finally:
        sys.settrace(trace)


class Others:
    """Other threads that commit, played by the test's own thread. They enter the queue together, in `arrive`."""

    def __init__(self, queue: CommitQueue, requests: Sequence[CommitRequest]) -> None:
        self._queue = queue
        self.requests = requests
        self.have_arrived = False
        self._awake: list[CommitRequest] = []
        self._returned: list[CommitRequest] = []

    def arrive(self) -> None:
        """They append their requests. The thread of the head does not fall asleep."""
        if self.have_arrived:
            return
        self.have_arrived = True
        for request in self.requests:
            request.waiter = Waiter()  # type: ignore[assignment]
            if not self._queue._queue:
                self._awake.append(request)
            self._queue._queue.append(request)

    def run(self) -> None:
        """Each does what it does until its request is done. Asleep if no thread wakes it."""
        queue = self._queue
        for request in self.requests:
            if request in self._returned:
                continue
            waiter = request.waiter
            assert waiter is not None
            if request not in self._awake:
                waiter.acquire()
            while not request.done:
                if queue._leads(waiter):
                    queue.lock.acquire()
                    if queue._leads(waiter):
                        queue._lead()
                    queue.lock.release()
                else:
                    waiter.acquire()
            self._returned.append(request)


def at_rest(queue: CommitQueue, log: FakeLog, engine: FakeEngine) -> None:
    """Raise AssertionError where a rule does not hold that holds while no commit is under way."""
    state = engine.state
    assert not queue._queue, "a request is still queued"
    assert queue._group is None, "a group is still under way"
    for lock in (queue.lock, queue.queue_lock, state.lock):
        assert not lock._is_owned(), "a lock is still owned"
    assert len(log.bodies) == log.last_seqno == state.seqno == state.horizon
    memtable = state.version.memtable
    memtable._check()
    assert memtable.last_seqno == state.seqno
    content = log.content()
    for body in log.bodies:
        for key in decode_intents(body).writes:
            assert engine.reads.read(key) == content.get(key), key
    for key, row in state.cache.rows.items():
        assert row == content.get(key), key
