"""What users of etcd and of NATS are promised of a watch, held against recorded feeds: see `recorded_feeds`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import recorded_feeds
from recorded_feeds import (
    FIRST,
    LAST,
    NAMED,
    SMALL,
    Event,
    History,
    Told,
    Watch,
    broken,
    commit_of,
    consume,
    follow,
    follow_once,
    numbered,
)
from store_fixtures import run_threads, wait_until

import kvwal
import kvwal.aio
from kvwal import FeedGap
from kvwal.aio import AsyncStore
from kvwal.feed import owned
from kvwal.testing import SimulatedDisk, crash_every


def begun(db: kvwal.Store, after: int, prefix: bytes, **first: Any) -> Watch:
    return Watch(after, prefix, db.durable_seqno, **first)


def unbroken(history: History, watches: list[Watch]) -> None:
    for watch in watches:
        assert broken(history, watch) == set(), watch


# -- while threads write, checkpoints run, and log goes ----------------------------------------


class Watcher:
    """Follows a prefix, stops again and again, and goes on from where it was; at times only when that is gone."""

    def __init__(self, db: kvwal.Store, prefix: bytes, over: threading.Event, seed: int) -> None:
        self._db = db
        self._prefix = prefix
        self._over = over
        self._random = Random(seed)
        self.watches: list[Watch] = []
        self.gaps = 0

    def run(self) -> None:
        self._begin_anew()
        while True:
            position = self.watches[-1].position
            if self._random.random() < 0.3:
                self._stay_away(position)
            watch = begun(self._db, position, self._prefix)
            self.watches.append(watch)
            try:
                feed = self._db.changes(position, prefix=self._prefix, follow=True, timeout_s=0.01)
            except FeedGap as gap:
                watch.oldest = gap.oldest
                self.gaps += 1
                self._begin_anew()
                continue
            if not self._followed(feed, watch):
                return

    def _followed(self, feed: kvwal.Changes, watch: Watch) -> bool:
        """Whether there may be more."""
        with feed:
            for number, _ in enumerate(follow(feed, watch, most=self._random.randrange(200))):
                if number == 60:
                    break
                if not watch.told[-1].events and self._over.is_set() and watch.position >= self._db.last_seqno:
                    return False
        return True

    def _begin_anew(self) -> None:
        with self._db.bootstrap() as base:
            first = dict(base.snapshot.scan(prefix=self._prefix))
            watch = begun(self._db, base.position, self._prefix, first=first)
            self.watches.append(watch)
            self._followed(base.changes(prefix=self._prefix, follow=True, timeout_s=0.01), watch)

    def _stay_away(self, position: int) -> None:
        """Until what comes next is gone, or nothing more comes."""

        def gone() -> bool:
            try:
                self._db.changes(position).close()
            except FeedGap:
                return True
            return self._over.is_set()

        wait_until(gone)


@pytest.mark.parametrize("durability", ["commit", "os"])
def test_watches_keep_their_promises_under_writers_checkpoints_and_retention(
    tmp_path: Path, durability: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "_BATCH_CHANGES", 20)
    over = threading.Event()
    history: dict[int, list[Event]] = {}
    with kvwal.open(tmp_path / "s", durability=durability, keep_history_bytes=0, **SMALL) as db:
        watchers = [Watcher(db, prefix, over, seed) for seed, prefix in enumerate([b"", b"a", b"b1", b"none"])]
        consumed: list[Watch] = []
        left = [0, 1, 2, 3]

        def write(thread: int) -> None:
            for number in range(3000):
                name = b"%d-%d" % (thread, number)
                seqno = db.commit(commit_of(name)[0])
                history[seqno] = numbered(seqno, name)
                if number > 150 and sum(watcher.gaps for watcher in watchers) > 2:
                    break
            left.pop()

        def checkpoint() -> None:
            while left:
                db.checkpoint()
            db.sync()
            over.set()

        def handle() -> None:
            acked = position = 0
            random = Random(9)
            while not over.is_set() or position < max(history):
                with db.consumer("c", prefix=b"a", start="oldest", timeout_s=0.01, ack_interval_s=0.002) as consumer:
                    watch = begun(db, consumer.position, b"a")
                    # A durable one is not told again of what it acknowledged, and misses nothing.
                    assert watch.after >= acked
                    consumed.append(watch)
                    left_here = random.randrange(1, 30)
                    for batch in consume(consumer, watch):
                        position = batch.last
                        if batch.changes and random.random() < 0.8:
                            consumer.ack(batch)
                            acked = batch.last
                        left_here -= 1
                        if not left_here or not batch.changes:
                            break

        run_threads(
            *(lambda thread=thread: write(thread) for thread in range(4)),
            *(watcher.run for watcher in watchers),
            checkpoint,
            handle,
        )
    watches = [watch for watcher in watchers for watch in watcher.watches]
    unbroken(history, watches + consumed)
    for watcher in watchers:
        # Beyond that there are positions of the consumer alone.
        assert watcher.watches[-1].position >= max(history)
    # It was no quiet time.
    assert any(watch.oldest is not None for watch in watches)
    assert sum(watch.complete is not None for watch in watches) > len(watchers)
    assert sum(watch.first is not None for watch in watches) > len(watchers)


def test_watches_of_tasks_keep_the_same_promises() -> None:
    history: dict[int, list[Event]] = {}
    watches: list[Watch] = []

    async def write(db: AsyncStore, task: int) -> None:
        for number in range(60):
            name = b"%d-%d" % (task, number)
            seqno = await db.commit(commit_of(name)[0])
            history[seqno] = numbered(seqno, name)

    async def watch(db: AsyncStore, prefix: bytes) -> None:
        position = 0
        while position < 4 * 60:
            watches.append(watch := Watch(position, prefix, db.durable_seqno))
            events: list[Event] = []
            async with contextlib.aclosing(db.changes(position, prefix=prefix, follow=True, timeout_s=0.01)) as feed:
                async for change in feed:
                    events.append(Event.of(change))
                    if change.last:
                        watch.add(events, feed.position)
                        events = []
                        if len(watch.told) == 50:
                            break
                else:
                    watch.add((), feed.position)
            position = watch.position

    async def main() -> None:
        async with kvwal.aio.open("/kv", files=SimulatedDisk(), **SMALL) as db:
            await asyncio.gather(*(write(db, task) for task in range(4)), *(watch(db, each) for each in (b"", b"a")))

    asyncio.run(main())
    unbroken(history, watches)
    assert len(watches) > 6


# -- over kills and power cuts -----------------------------------------------------------------


def test_watches_keep_their_promises_over_kills(tmp_path: Path) -> None:
    path, notes = tmp_path / "s", tmp_path / "notes"
    random = Random(7)
    followed = 0
    for life in range(4):
        script = [sys.executable, recorded_feeds.__file__, path, notes, str(life), str(followed)]
        process = subprocess.Popen([str(word) for word in script])
        enough = (notes.stat().st_size if life else 0) + random.randrange(30_000, 90_000)
        wait_until(lambda least=enough: notes.exists() and notes.stat().st_size > least)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        # A long line may be cut.
        notes.write_bytes(notes.read_bytes().rpartition(b"\n")[0] + b"\n")
        followed = max((watch.position for who, watch, _ in heard(notes) if who == "follower"), default=0)
    lines = [json.loads(line) for line in notes.read_bytes().splitlines()]
    names = [bytes.fromhex(line[1]) for line in lines if line[0] == "begin"]
    done = {line[2]: bytes.fromhex(line[1]) for line in lines if line[0] == "done"}
    with kvwal.open(path) as db:
        last = begun(db, 0, b"")
        everything = db.changes(0)
        for change in everything:
            last.told.append(Told((Event.of(change),), everything.position))
    # Which commit was which: a name that was begun, each once, and those that were done where they said they were.
    found = {event.seqno: event.key[len(NAMED) :] for told in last.told for event in told.events if NAMED in event.key}
    assert set(found.values()) <= set(names)
    assert len(set(found.values())) == len(found)
    assert done.items() <= found.items()
    history = {seqno: numbered(seqno, name) for seqno, name in found.items()}
    acknowledged: dict[str, tuple[int, int]] = {}
    for who, watch, acked in heard(notes):
        assert broken(history, watch) == set(), (who, watch)
        if who == "follower":
            continue
        if who in acknowledged:
            least, position = acknowledged[who]
            # It goes on behind what it acknowledged last, or was about to, or behind what it passed over since.
            assert least <= watch.after
            if watch.after > position:
                unbroken(history, [Watch(position, watch.prefix, 0, [Told((), watch.after)])])
        acknowledged[who] = acked or watch.after, watch.position
    assert len(acknowledged) == 2


def heard(notes: Path) -> list[tuple[str, Watch, int]]:
    """Each watch of the notes, with its name, and what it acknowledged last."""
    watches: list[tuple[str, Watch, int]] = []
    newest: dict[str, int] = {}
    for line in notes.read_bytes().splitlines():
        kind, who, *rest = json.loads(line)
        if kind == "watch":
            newest[who] = len(watches)
            about = rest[0]
            watches.append((who, Watch(about["after"], bytes.fromhex(about["prefix"]), about["newest"]), 0))
        elif kind == "told":
            events, position = rest[0]
            watches[newest[who]][1].add([event_of(event) for event in events], position)
        elif kind == "acked":
            watches[newest[who]] = (*watches[newest[who]][:2], rest[0])
    return watches


def event_of(fields: list[Any]) -> Event:
    seqno, kind, *rest = fields
    return Event(seqno, kind, *(None if each is None else bytes.fromhex(each) for each in rest))


def test_watches_keep_their_promises_over_power_cuts() -> None:
    names = [b"%d" % number for number in range(1, 25)]
    history = {seqno: numbered(seqno, name) for seqno, name in enumerate(names, 1)}

    def write(disk: SimulatedDisk, watches: list[Watch]) -> None:
        with kvwal.open("/kv", files=disk, background=False, durability="os", **SMALL) as db:
            watches.append(begun(db, 0, b""))
            feed = db.changes(0, follow=True, timeout_s=0)
            for number, name in enumerate(names):
                db.commit(commit_of(name)[0])
                if number % 4 == 1:
                    db.sync()
                if number == 11:
                    db.checkpoint()
                while next(follow(feed, watches[0])).told[-1].events:
                    pass

    def check(disk: SimulatedDisk, watches: list[Watch]) -> None:
        # It may not be there yet.
        watch = Watch(watches[0].after, b"", 0, list(watches[0].told)) if watches else Watch(0, b"", 0)
        with kvwal.open("/kv", files=disk, background=False, **SMALL) as db:
            resumed = begun(db, watch.position, b"")
            follow_once(db.changes(watch.position, follow=True, timeout_s=0), resumed)
            assert resumed.complete is not None
            unbroken(history, [watch, resumed])

    assert crash_every(write, check, states_per_point=4).points > 20


# -- what NATS says of its key-value watches ---------------------------------------------------


@pytest.mark.parametrize("prefix", [b"", b"none"])
def test_all_that_was_there_is_said_to_be_told_of_an_empty_set_too(tmp_path: Path, prefix: bytes) -> None:
    """nats.py#995, nats.js#270: the mark came too early under writers, and not at all of an empty set."""
    over = threading.Event()
    history: dict[int, list[Event]] = {}
    watches: list[Watch] = []
    with kvwal.open(tmp_path / "s", **SMALL) as db:

        def write() -> None:
            number = 0
            while not over.is_set():
                name = b"%d" % number
                seqno = db.commit(commit_of(name)[0])
                history[seqno] = numbered(seqno, name)
                number += 1

        def watch() -> None:
            try:
                for number in range(30):
                    with db.consumer(f"{number}", prefix=prefix, start="oldest", timeout_s=0) as consumer:
                        # Writers never rest, so a batch may always have more; what was there comes within a few.
                        seen = begun(db, consumer.position, prefix)
                        for _ in consume(consumer, seen):
                            if seen.position >= seen.newest:
                                break
                    watches.append(seen)
            finally:
                over.set()

        follow_once(db.changes(0, prefix=prefix, follow=True, timeout_s=0), nothing := begun(db, 0, prefix))
        assert nothing.complete == 1
        run_threads(write, watch)
        quiet = follow_once(db.changes(0, prefix=prefix, follow=True, timeout_s=0), begun(db, 0, prefix))
        assert quiet.complete == len(quiet.told)
    unbroken(history, [*watches, quiet])


def test_a_resumed_durable_is_told_of_what_it_did_not_acknowledge_and_of_nothing_else(tmp_path: Path) -> None:
    """nats-server#1580 (the last one came again at each start), nats-server#3143 (what came before the first start)."""

    def told_now(db: kvwal.Store) -> list[int]:
        with db.consumer("durable", timeout_s=0, ack_interval_s=0) as durable:
            batch = next(durable)
            durable.ack(batch)
            return [change.seqno for change in batch.changes]

    with kvwal.open(tmp_path / "s", **SMALL) as db:
        db[b"before"] = b""
        # It begins here, and not at its first batch.
        db.consumer("durable").close()
        created = db.last_seqno
        first = [db.put(b"1", b""), db.put(b"2", b"")]
        assert first[0] > created
        assert told_now(db) == first
        assert told_now(db) == []
    for _ in range(2):
        with kvwal.open(tmp_path / "s", **SMALL) as db:
            assert told_now(db) == []
            later = [db.put(b"3", b""), db.put(b"4", b"")]
            assert told_now(db) == later


def test_deletes_of_one_key_of_a_range_and_of_all_are_seen(tmp_path: Path) -> None:
    """NATS tells watchers of deletes and purges, and of both also where there was nothing."""
    with kvwal.open(tmp_path / "s", **SMALL) as db:
        db.update({b"a1": b"", b"a2": b"", b"b1": b""})
        position = db.last_seqno
        db.delete(b"a1")
        db.delete(b"a9")
        db.delete_range(b"a", b"b")
        db.delete_range(FIRST, LAST)
        db.clear()
        told = [(each.kind, each.key, each.stop) for each in db.changes(position, prefix=b"a")]
    ranges = [("delete_range", b"a", b"b")] * 3
    assert told == [("delete", b"a1", None), ("delete", b"a9", None), *ranges]
