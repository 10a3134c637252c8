"""Runs programs against a store and keeps their history.

A program is a list of steps, each a list that JSON can hold, so that every case can be written down and replayed.
Keys are small numbers, values are made of the commit's number, so that no two writes look the same.

| step | what it does |
|---|---|
| `["put", key, size]`, `["del", key]` | one commit |
| `["range", first, stop]` | delete a range of keys |
| `["batch", [[key, size or null], ...]]` | several writes in one commit |
| `["tables", [[table, key, size or null], ...]]` | the same over several tables; key null: all keys of the table |
| `["said", key, size]` | a put, alone or in a transaction, that says its number as `meta` |
| `["weak", key, size]` | a put at durability "os" |
| `["move", key, key]` | a transaction that reads both and swaps their values |
| `["sync"]`, `["checkpoint"]`, `["verify"]`, `["look"]` | as the store's methods; look compares every way to read |
| `["begin", c]`, `["commit", c]`, `["abort", c]` | transaction of client c, among others |
| `["get", c, key]`, `["scan", c, first, stop]`, `["set", c, key, size or null]` | what it reads and writes |
| `["pin", c]`, `["pinned", c]`, `["unpin", c]` | take a snapshot, compare it, let it go |
| `["past", c, back]` | take one of the moment this number of commits ago, or of the oldest of the window |
| `["reopen"]` | close, open |
| `["kill"]` | the process dies, the page cache stays; open |
| `["cut", survivors]` | the power fails (survivors as in `SimulatedDisk.crash`); open |
| `["clock", seconds]` | the wall clock jumps |
| `["take", c]`, `["ack", c]` | consumer c, 0 or 1, is told of a batch; it acknowledges that |
| `["project"]` | the consumer "mirror" projects what is there |
| `["on"]` | each consumer that is stored goes on to the end |
| `["prepare"]`, `["idle"]` | what the background thread does: make the next segment, mark the log idle |
"""

from __future__ import annotations

from typing import Any

import kvwal
from crashtests.consumers import MIRROR, Feed, positions
from crashtests.history import State, Violation
from crashtests.looked import Client, Looked, said_by, table_key
from kvwal.errors import ConflictError, DiskFullError, FeedGap

Step = list[Any]
Program = list[Step]


def key_of(number: int) -> bytes:
    return b"k%03d" % number


def value_of(commit: int, key: bytes, size: int) -> bytes:
    unit = b"%d/%s/" % (commit, key)
    return (unit * (size // len(unit) + 1))[:size]


class Session(Looked):
    """A store to which programs are done."""

    def run(self, program: Program) -> None:
        for step in program:
            self.step(step)
            self.steps_done += 1

    def step(self, step: Step) -> None:
        getattr(self, "_do_" + step[0])(*step[1:])

    def _commit(self, state: State, act: Any, *, durable: bool = True, system: bool = False) -> None:
        number = self.history.begin(state, system=system)
        try:
            seqno = act()
        except (DiskFullError, ConflictError):
            self.history.retract()
            raise
        if seqno is not None and seqno != number:
            raise Violation(f"commit {number} was given the seqno {seqno}")
        self.history.complete()
        if durable and self.options.get("durability", "commit") == "commit":
            self.history.acknowledge(number)

    def _value(self, key: bytes, size: int) -> bytes:
        return value_of(self.history.begun + 1, key, size)

    def _do_put(self, number: int, size: int, **options: Any) -> None:
        key = key_of(number)
        value = self._value(key, size)
        state = self.history.newest | {key: value}
        self._commit(state, lambda: self.store.put(key, value, **options), durable=not options)

    def _do_said(self, number: int, size: int) -> None:
        key, commit = key_of(number), self.history.begun + 1
        value = said_by(commit) + self._value(key, size)
        meta = {"commit": str(commit)}

        def in_transaction() -> None:
            with self.store.transaction() as txn:
                txn[key] = value
                txn.meta = meta

        state = self.history.newest | {key: value}
        self._commit(state, in_transaction if commit % 2 else lambda: self.store.put(key, value, meta=meta))

    def _do_weak(self, number: int, size: int) -> None:
        self._do_put(number, size, durability="os")

    def _do_del(self, number: int) -> None:
        key = key_of(number)
        state = self.history.newest.copy()
        state.pop(key, None)
        self._commit(state, lambda: self.store.delete(key))

    def _do_range(self, first: int, stop: int) -> None:
        if stop <= first:
            return
        start, end = key_of(first), key_of(stop)
        state = {k: v for k, v in self.history.newest.items() if not start <= k < end}
        self._commit(state, lambda: self.store.delete_range(start, end))

    def _do_batch(self, writes: list[tuple[int, int | None]]) -> None:
        if not writes:
            return
        batch = kvwal.WriteBatch()
        state = self.history.newest.copy()
        for number, size in writes:
            key = key_of(number)
            if size is None:
                batch.delete(key)
                state.pop(key, None)
            else:
                value = self._value(key, size)
                batch.put(key, value)
                state[key] = value
        self._commit(state, lambda: self.store.commit(batch))

    def _do_tables(self, writes: list[list[Any]]) -> None:
        batch = kvwal.WriteBatch()
        state = self.history.newest.copy()
        for table, number, size in writes:
            part = batch.table(table) if table else batch
            if number is None:
                part.delete_range()
                prefix = table_key(table, b"k")
                for key in [key for key in state if key.startswith(prefix)]:
                    del state[key]
                continue
            key = key_of(number)
            if size is None:
                part.delete(key)
                state.pop(table_key(table, key), None)
            else:
                state[table_key(table, key)] = value = self._value(table_key(table, key), size)
                part.put(key, value)
        if len(batch):
            self._commit(state, lambda: self.store.commit(batch))

    def _do_move(self, one: int, other: int) -> None:
        a, b = key_of(one), key_of(other)
        state = self.history.newest.copy()
        if one == other or a not in state or b not in state:
            return
        state[a], state[b] = state[b], state[a]

        def swap() -> None:
            with self.store.transaction() as txn:
                txn[a], txn[b] = txn[b], txn[a]

        self._commit(state, swap)

    def _do_sync(self) -> None:
        self.store.sync()
        self.history.acknowledge()

    def _do_checkpoint(self) -> None:
        self.store.checkpoint()
        self.history.acknowledge()

    def _do_verify(self) -> None:
        self.verify()

    def _do_look(self) -> None:
        self.look()

    def _do_prepare(self) -> None:
        self.store.engine._log.prepare_next()

    def _do_idle(self) -> None:
        self.store.sync()
        self.history.acknowledge()
        self.store.engine._log.mark_idle()

    def _do_reopen(self) -> None:
        for feed in self.feeds.values():
            self._feeding(feed.close)
        self.store.close()
        self.history.acknowledge()
        before = self.history.begun
        self.clients = {}
        if self.open() != before:
            raise Violation("a clean close and open lost commits")

    def _do_kill(self) -> None:
        before = self.history.begun
        self.abandon()
        if self.open() != before:
            raise Violation("a killed process lost commits that were in the page cache")

    def _do_cut(self, survivors: int) -> None:
        self.cut(survivors)
        self.open()

    def _do_clock(self, seconds: int) -> None:
        self.disk.jump_clock(seconds * 1_000_000)

    # --- consumers ---

    def _feed(self, name: str) -> Feed:
        if name not in self.feeds:
            self.feeds[name] = Feed(self.store, self.history, name, self._commit_flushed)
        return self.feeds[name]

    def _commit_flushed(self, state: State, act: Any, system: bool) -> None:
        self._commit(state, act, system=system)
        # It is flushed at any durability.
        self.history.acknowledge()

    def _feeding(self, act: Any) -> None:
        try:
            act()
        except FeedGap:
            if not self.was_full:
                raise

    def _do_take(self, client: int) -> None:
        self._feeding(self._feed(str(client)).take)

    def _do_ack(self, client: int) -> None:
        self._feeding(self._feed(str(client)).acknowledge)

    def _do_project(self) -> None:
        self._feeding(self._feed(MIRROR).mirror)

    def _do_on(self) -> None:
        for name in positions(self.history.newest):
            feed = self._feed(name)
            self._feeding(feed.mirror if name == MIRROR else feed.take)
            self._feeding(feed.acknowledge)

    # --- transactions and snapshots ---

    def _do_begin(self, client: int) -> None:
        self._do_abort(client)
        self.clients[client] = Client(self.store.transaction(), self.history.newest, self.history.begun)

    def _do_get(self, client: int, number: int) -> None:
        state = self.clients.get(client)
        if state is None:
            return
        key = key_of(number)
        state.reads.add(key)
        if state.txn.get(key) != state.view.get(key):
            raise Violation(f"a transaction read {key!r} not as of its beginning")

    def _do_scan(self, client: int, first: int, stop: int) -> None:
        state = self.clients.get(client)
        if state is None:
            return
        start, end = key_of(first), key_of(stop)
        state.ranges.append((start, end))
        found = list(state.txn.scan(start, end))
        if found != sorted((k, v) for k, v in state.view.items() if start <= k < end):
            raise Violation(f"a transaction scanned {start!r} to {end!r} not as of its beginning")

    def _do_set(self, client: int, number: int, size: int | None) -> None:
        state = self.clients.get(client)
        if state is None:
            return
        key = key_of(number)
        if size is None:
            state.txn.delete(key)
            state.view.pop(key, None)
            state.writes[key] = None
        else:
            value = b"c%d/" % client + self._value(key, size)
            state.txn.put(key, value)
            state.view[key] = value
            state.writes[key] = value

    def _do_commit(self, client: int) -> None:
        state = self.clients.pop(client, None)
        if state is None:
            return
        if not state.writes:
            state.txn.commit()
            return
        changed = self._changed_since(state.begun)
        conflict = bool(changed & state.reads) or any(start <= k < end for k in changed for start, end in state.ranges)
        # What it read and wrote itself does not count; the store may also be stricter about that.
        newest = {k: v for k, v in self.history.newest.items() if k not in state.writes}
        newest |= {k: v for k, v in state.writes.items() if v is not None}
        try:
            self._commit(newest, state.txn.commit)
        except ConflictError:
            if not changed:
                raise Violation("a conflict, although nothing was committed meanwhile") from None
        else:
            if conflict and self._really_read(state, changed):
                raise Violation("a transaction committed although what it read was changed meanwhile")

    def _changed_since(self, begun: int) -> set[bytes]:
        changed: set[bytes] = set()
        for before, after in zip(self.history.states[begun:], self.history.states[begun + 1 :], strict=False):
            changed |= {key for key, _ in before.items() ^ after.items()}
        return changed

    @staticmethod
    def _really_read(state: Client, changed: set[bytes]) -> bool:
        # A key that it had written itself before reading came from its own writes.
        foreign = changed - state.writes.keys()
        return bool(foreign & state.reads) or any(start <= k < end for k in foreign for start, end in state.ranges)

    def _do_abort(self, client: int) -> None:
        state = self.clients.pop(client, None)
        if state is not None:
            state.txn.abort()

    def _do_pin(self, name: int) -> None:
        self._do_unpin(name)
        self.snapshots[name] = (self.store.snapshot(), self.history.newest)

    def _do_past(self, name: int, back: int) -> None:
        self._do_unpin(name)
        at = max(self.store.window.oldest, self.store.last_seqno - back)
        self.snapshots[name] = (self.store.snapshot(at=at), self.history.states[at])

    def _do_pinned(self, name: int) -> None:
        if name in self.snapshots:
            snapshot, state = self.snapshots[name]
            self.compare(snapshot, state, "a snapshot")

    def _do_unpin(self, name: int) -> None:
        if name in self.snapshots:
            self.snapshots.pop(name)[0].close()
