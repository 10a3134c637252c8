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

import warnings
from typing import Any

import kvwal
from crashtests.consumers import MIRROR, Feed, positions, row_key
from crashtests.history import History, State, Violation
from kvwal.errors import ConflictError, DiskFullError, FeedGap
from kvwal.testing import SimulatedDisk

PATH = "/kv"

Step = list[Any]
Program = list[Step]

#: Those that programs write to, beside table 0.
TABLES = (16, 17)

#: Everything is small, so that a program of few steps reaches rolls, checkpoints and retired segments.
OPTIONS: dict[str, Any] = {
    "background": False,
    "segment_bytes": 16 << 10,
    "memtable_bytes": 16 << 10,
    "cache_bytes": 256 << 10,
    # A window would hold log and pages that a defect takes away. Some programs have one.
    "keep_history_bytes": 0,
}

# Stores are left open here on purpose: a process that dies closes nothing.
warnings.filterwarnings("ignore", category=ResourceWarning, message=".*was never closed")


def key_of(number: int) -> bytes:
    return b"k%03d" % number


def table_key(table: int, key: bytes) -> bytes:
    """What a state calls a key of a table; behind all keys of table 0."""
    return b"t%d/" % table + key if table else key


def value_of(commit: int, key: bytes, size: int) -> bytes:
    unit = b"%d/%s/" % (commit, key)
    return (unit * (size // len(unit) + 1))[:size]


def _said_by(commit: int) -> bytes:
    """How a value begins that was put by a commit that says its number."""
    return b"said/%d/" % commit


class _Client:
    """A transaction and what the model expects of it."""

    def __init__(self, txn: kvwal.Transaction, view: State, begun: int) -> None:
        self.txn = txn
        self.view = view.copy()
        self.begun = begun
        self.reads: set[bytes] = set()
        self.ranges: list[tuple[bytes, bytes]] = []
        self.writes: dict[bytes, bytes | None] = {}


class Session:
    """One store on one disk, with its history.

    Raises `Violation` where the store answers what the contract forbids; lets the store's own errors through, with the
    history telling what may have become of the commit.
    """

    def __init__(
        self, disk: SimulatedDisk, history: History | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.disk = disk
        self.history = History() if history is None else history
        self.options = OPTIONS | (options or {})
        self.store: Any = None
        self.clients: dict[int, _Client] = {}
        self.snapshots: dict[int, tuple[Any, State]] = {}
        self.feeds: dict[str, Feed] = {}
        #: Whether a disk was full, so that consumers may have given their log up.
        self.was_full = False
        #: The name of a file that cannot be read, as long as that is so.
        self.unreadable: str | None = None
        self.steps_done = 0

    # --- opening and what is found ---

    def open(self) -> int:
        """Open the store and find out which commit it is at."""
        self.clients = {}
        self.snapshots = {}
        self.feeds = {}
        self.store = kvwal.open(PATH, files=self.disk, **self.options)
        return self.identify()

    def identify(self) -> int:
        return self.history.identify(self.content().items(), self.store.last_seqno)

    def content(self) -> State:
        """What the store holds, by scanning."""
        return dict([*self.store.scan(), *self._of_tables(), *self._of_consumers()])

    def _of_consumers(self) -> list[tuple[bytes, bytes]]:
        """The positions of consumers."""
        rows = self.store.engine.upkeep.consumers.rows()
        for row in rows:
            if row.position > self.store.durable_seqno or row.last_error:
                raise Violation(f"consumer {row.name} is at {row.position}, {row.last_error}")
        return [(row_key(row.name), b"%d" % row.position) for row in rows]

    def _of_tables(self, moment: Any = None) -> list[tuple[bytes, bytes]]:
        """What the tables beside table 0 hold, in the order of their keys in a state. `moment`: a reader; None: now."""
        found: list[tuple[bytes, bytes]] = []
        engine = self.store.engine
        for table in TABLES:
            pairs: list[tuple[bytes, bytes]] = []
            moments = engine.reads.moments
            reader = moments.reader("scan") if moment is None else moments.again(moment, "scan")
            for keys, values in engine.reads.chunks(reader, None, None, reverse=False, table=table):
                pairs += zip(keys, values, strict=True)
            reads = engine.reads
            size = reads.count(table=table) if moment is None else reads.count_at(moment, None, None, table=table)
            if size != len(pairs):
                raise Violation(f"table {table} has another length than its {len(pairs)} keys")
            found += ((table_key(table, key), value) for key, value in pairs)
        return found

    def abandon(self) -> None:
        """Forget the store as a process that dies does. The disk is left as it is."""
        self.clients = {}
        self.snapshots = {}
        self.feeds = {}
        self.store = None
        self.disk.kill()

    def cut(self, survivors: int, *, stale: bool = False) -> None:
        """Cut the power and go on with the disk that is found."""
        found = self.disk.crash(survivors, stale=stale)
        found.watcher = self.disk.watcher
        self.abandon()
        self.disk = found

    # --- checks ---

    def look(self) -> None:
        """Compare every way to read with the newest state, and what the commits in the log say of themselves."""
        self._compare(self.store, self.history.newest, "the store")
        found = [(commit.seqno, dict(commit.meta)) for commit in self.store.commits()]
        stats = self.store.stats()
        # All that is not in the pages is in the log.
        first = min([stats.checkpoint_seqno + 1, *(number for number, _ in found[:1])])
        numbers = range(first, stats.durable_seqno + 1)
        expected = [(number, self._said(number)) for number in numbers if number not in self.history.system]
        if found != expected:
            raise Violation(f"commits say {found}, but {expected} was committed")
        self._look_back()

    def _look_back(self) -> None:
        """Compare moments of the window with what there was: the oldest, and another one."""
        window = self.store.window
        if window.newest != self.store.last_seqno or (not window.bases and window.oldest != window.newest):
            raise Violation(f"the window is {window}, and the newest commit {self.store.last_seqno}")
        # Not always the same.
        other = window.oldest + 7919 * window.newest % (window.newest - window.oldest + 1)
        for at in {window.oldest, other}:
            with self.store.snapshot(at=at) as snapshot:
                self._compare(snapshot, self.history.states[at], f"the moment of commit {at}")
            reader = self.store.engine.upkeep.past.reader(at, "look")
            found = dict(self._of_tables(reader))
            expected = {key: value for key, value in self.history.states[at].items() if key.startswith(b"t")}
            if found != expected:
                raise Violation(f"the moment of commit {at} shows {_difference(found, expected)}")

    def _said(self, number: int) -> dict[str, str]:
        """What commit `number` says of itself: a value that it put tells."""
        begins = _said_by(number)
        said = any(value.startswith(begins) for value in self.history.states[number].values())
        return {"commit": str(number)} if said else {}

    def nothing_early(self) -> None:
        """No reader may see a commit that has not returned (point 4). For calling while one is under way."""
        if self.store is not None and not self.store.closed and self.store.last_seqno > self.history.returned:
            raise Violation(f"commit {self.store.last_seqno} is visible before it is durable")

    def _compare(self, source: Any, state: State, what: str) -> None:
        items = sorted(state.items())
        if source is self.store:
            found = [*source.scan(), *self._of_tables(), *self._of_consumers()]
            if found != items:
                raise Violation(f"{what} shows {_difference(dict(found), state)}")
        if any(items[-1:]) and items[-1][0].startswith((b"t", b"u")):
            items = [item for item in items if not item[0].startswith((b"t", b"u"))]
            state = dict(items)
        found = list(source.scan())
        if found != items:
            raise Violation(f"{what} shows {_difference(dict(found), state)}")
        if list(source.scan(reverse=True)) != items[::-1]:
            raise Violation(f"{what} scans differently in reverse")
        if len(source) != len(items):
            raise Violation(f"{what} has length {len(source)}, but {len(items)} keys")
        for key, value in items:
            if source.get(key) != value:
                raise Violation(f"{what} scans {key!r}, but does not get it")
        if source.get(b"k-none") is not None:
            raise Violation(f"{what} gets a key that was never put")
        if len(items) > 2:
            first, stop = items[1][0], items[-1][0]
            if list(source.scan(first, stop)) != items[1:-1]:
                raise Violation(f"{what} scans a part differently")

    def verify(self) -> None:
        report = self.store.verify()
        # That this file cannot be read is the truth.
        problems = [problem for problem in report.problems if problem.file != self.unreadable]
        if problems:
            raise Violation(f"verify: {problems[:3]}")

    # --- steps ---

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
        value = _said_by(commit) + self._value(key, size)
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
        self.clients[client] = _Client(self.store.transaction(), self.history.newest, self.history.begun)

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
    def _really_read(state: _Client, changed: set[bytes]) -> bool:
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
            self._compare(snapshot, state, "a snapshot")

    def _do_unpin(self, name: int) -> None:
        if name in self.snapshots:
            self.snapshots.pop(name)[0].close()


def _difference(found: State, state: State) -> str:
    missing = sorted(state.keys() - found.keys())[:5]
    extra = sorted(found.keys() - state.keys())[:5]
    wrong = [(k, state[k][:20], found[k][:20]) for k in sorted(state.keys() & found.keys()) if state[k] != found[k]][:5]
    return f"missing {missing}, extra {extra}, wrong (key, expected, found) {wrong}"
