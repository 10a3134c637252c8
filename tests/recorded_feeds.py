"""Feeds as they were told, and one checker that says which promises of a watch a recording breaks.

The promises are those that users of two other stores are given. etcd (its API guarantees, and the validators of its
robustness tests): a watch is ordered, unique, atomic, reliable, resumable and bookmarkable, and says so if what was
asked for is compacted. NATS, for watches of its key-value buckets: what is there first, then what comes; a mark that
all of the first was told, of an empty set too; a durable consumer is not told again of what it acknowledged.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, NamedTuple

import kvwal
from kvwal.batch import WriteBatch
from kvwal.feed.change import Change
from kvwal.keys import stop_of_prefix

#: A commit has this and its name as one of its keys, so that a feed of everything says which commit is which.
NAMED = b"name:"
# Between them lie all other keys.
FIRST, LAST = b"a", b"c"


class Event(NamedTuple):
    """What a feed tells of one key or range."""

    seqno: int
    kind: str
    key: bytes
    stop: bytes | None
    value: bytes | None

    @classmethod
    def of(cls, change: Change) -> Event:
        return cls(change.seqno, change.kind, change.key, change.stop, change.value)


class Told(NamedTuple):
    """What was told at once, and the position behind it."""

    events: tuple[Event, ...]
    position: int


@dataclass
class Watch:
    """One feed from its call to its end.

    Attributes:
        after: the position that it was asked to go on from.
        prefix: what its keys begin with.
        newest: the last commit that was durable when it was asked.
        told: what it told.
        complete: how much it had told when it said first that all up to `newest` was told. None: it never said so.
        first: the pairs that it was given as those of the moment `after`, if it was.
        oldest: it told nothing, and said that commits before this one are gone.
    """

    after: int
    prefix: bytes
    newest: int
    told: list[Told] = field(default_factory=list)
    complete: int | None = None
    first: dict[bytes, bytes] | None = None
    oldest: int | None = None

    @property
    def position(self) -> int:
        return self.told[-1].position if self.told else self.after

    def add(self, events: Sequence[Event], position: int) -> None:
        self.told.append(Told(tuple(events), position))
        if self.complete is None and not events and position >= self.newest:
            self.complete = len(self.told)


History = Mapping[int, Sequence[Event]]


def wanted(events: Sequence[Event], prefix: bytes) -> list[Event]:
    """What a feed of the prefix is to tell of a commit."""
    end = stop_of_prefix(prefix)
    found: list[Event] = []
    for event in events:
        if event.kind != "delete_range":
            found += [event] * event.key.startswith(prefix)
            continue
        assert event.stop is not None
        start, stop = max(event.key, prefix), event.stop if end is None else min(event.stop, end)
        found += [event._replace(key=start, stop=stop)] * (start < stop)
    return found


def state_at(history: History, seqno: int, prefix: bytes) -> dict[bytes, bytes]:
    """The pairs that the commits up to this one leave."""
    state: dict[bytes, bytes] = {}
    for number in range(1, seqno + 1):
        for event in wanted(history.get(number, ()), prefix):
            if event.value is not None:
                state[event.key] = event.value
            elif event.stop is None:
                state.pop(event.key, None)
            else:
                for key in [key for key in state if event.key <= key < event.stop]:
                    del state[key]
    return state


def broken(history: History, watch: Watch) -> set[str]:
    """The promises that a recording breaks. `history`: what each commit of users wrote, by seqno."""
    found: set[str] = set()

    def expect(claim: bool, promise: str) -> None:
        if not claim:
            found.add(promise)

    if watch.oldest is not None:
        # Commits beyond the position are gone, and the one that is named is the first that can be told.
        expect(not watch.told and watch.oldest > watch.after + 1, "compacted")
        return found
    if watch.first is not None:
        expect(watch.first == state_at(history, watch.after, watch.prefix), "what is there first")
    to_tell = {
        number: told
        for number in range(watch.after + 1, max(watch.position, watch.newest) + 1)
        if (told := wanted(history.get(number, ()), watch.prefix))
    }
    seen: set[Event] = set()
    last = position = watch.after
    begun: int | None = None
    for events, behind in watch.told:
        for event in events:
            begun = event.seqno if begun is None else begun
            expect(event.seqno >= last, "ordered")
            last = max(last, event.seqno)
            expect(event not in seen, "unique")
            seen.add(event)
            expect(event.seqno > watch.after, "resumable")
            expect(event.seqno > position, "bookmarkable")
            expect(event in wanted(history.get(event.seqno, ()), watch.prefix), "true")
        for seqno in {event.seqno for event in events}:
            expect([event for event in events if event.seqno == seqno] == to_tell.get(seqno), "atomic")
        expect(behind >= max(position, last), "bookmarkable")
        position = max(position, behind)
    for number, missing in to_tell.items():
        if number <= position and not seen.issuperset(missing):
            expect(begun is not None and number > begun, "resumable")
            expect(begun is None or number < begun, "reliable")
            expect(number > position, "bookmarkable")
    if watch.complete is not None:
        said = {event for told in watch.told[: watch.complete] for event in told.events}
        for number, events_of in to_tell.items():
            expect(number > watch.newest or said.issuperset(events_of), "all that was there")
    return found


def commit_of(name: bytes) -> tuple[WriteBatch, list[Event]]:
    """The commit of this name, and what is to be told of it; the seqno is left open."""
    random = Random(name)
    batch, events = WriteBatch(), []
    if random.random() < 0.15:
        start, stop = sorted(b"%c%d" % (random.choice(b"ab"), random.randrange(10)) for _ in range(2))
        if start < stop:
            batch.delete_range(start, stop)
            events.append(Event(0, "delete_range", start, stop, None))
    writes: dict[bytes, bytes | None] = {NAMED + name: name}
    for _ in range(random.randrange(4)):
        key = b"%c%d" % (random.choice(b"ab"), random.randrange(10))
        # Of a key that is not there, too.
        writes[key] = None if random.random() < 0.3 else name * random.randrange(1, 40)
    for key, value in writes.items():
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)
        events.append(Event(0, "delete" if value is None else "put", key, None, value))
    return batch, events


def numbered(seqno: int, name: bytes) -> list[Event]:
    """What is to be told of the commit of this name, which got this seqno."""
    return [event._replace(seqno=seqno) for event in commit_of(name)[1]]


def follow(feed: kvwal.Changes, watch: Watch, most: int | None = None) -> Iterator[Watch]:
    """Record what a feed tells, commit by commit; an empty list where nothing came within its time.

    `most`: it stops after this number of changes, perhaps within a commit, and then its position does not count that.
    """
    while True:
        events: list[Event] = []
        for change in feed:
            events.append(Event.of(change))
            if change.last:
                watch.add(events, feed.position)
                events = []
                yield watch
            if most is not None:
                most -= 1
                if most < 0:
                    watch.add((), feed.position)
                    return
        watch.add((), feed.position)
        yield watch


def follow_once(feed: kvwal.Changes, watch: Watch) -> Watch:
    """Record what is there."""
    for each in follow(feed, watch):
        if not each.told[-1].events:
            break
    return watch


def consume(consumer: kvwal.Consumer, watch: Watch) -> Iterator[kvwal.Batch]:
    """Record what a consumer is told, batch by batch."""
    for batch in consumer:
        watch.add([Event.of(change) for change in batch.changes], batch.last)
        yield batch


# -- a program that is killed ------------------------------------------------------------------

SMALL: dict[str, Any] = {"segment_bytes": 16 << 10, "memtable_bytes": 16 << 10, "checkpoint_log_bytes": 8 << 10}


class Notes:
    """What a program that is killed says before and after each step: lines of JSON, one system call each."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, *words: Any) -> None:
        os.write(self._file, json.dumps(words, default=bytes.hex).encode() + b"\n")


def live(path: str, notes_path: str, life: int, after: int) -> None:
    """Write, follow and consume until killed."""
    notes = Notes(notes_path)
    with kvwal.open(path, **SMALL) as db:

        def write(thread: int) -> None:
            for number in range(1 << 30):
                name = b"%d-%d-%d" % (life, thread, number)
                notes.say("begin", name)
                notes.say("done", name, db.commit(commit_of(name)[0]))

        def watch() -> None:
            watch = Watch(after, b"", db.durable_seqno)
            notes.say("watch", "follower", asdict(watch))
            for _ in follow(db.changes(after, follow=True), watch):
                notes.say("told", "follower", watch.told[-1])

        def handle(name: str, prefix: bytes) -> None:
            with db.consumer(name, prefix=prefix, start="oldest", ack_interval_s=0) as consumer:
                watch = Watch(consumer.position, prefix, db.durable_seqno)
                notes.say("watch", name, asdict(watch))
                for batch in consume(consumer, watch):
                    notes.say("told", name, watch.told[-1])
                    consumer.ack(batch)
                    notes.say("acked", name, batch.last)

        threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(2)]
        threads += [threading.Thread(target=handle, args=pair, daemon=True) for pair in (("all", b""), ("some", b"b"))]
        for thread in threads:
            thread.start()
        watch()


if __name__ == "__main__":
    live(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
