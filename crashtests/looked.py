"""One store on one disk, with its history: what is found in it when it is opened, and looked at."""

from __future__ import annotations

import warnings
from typing import Any

import kvwal
from crashtests.consumers import Feed, row_key
from crashtests.history import History, State, Violation
from kvwal.testing import SimulatedDisk

PATH = "/kv"

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


def table_key(table: int, key: bytes) -> bytes:
    """What a state calls a key of a table; behind all keys of table 0."""
    return b"t%d/" % table + key if table else key


def said_by(commit: int) -> bytes:
    """How a value begins that was put by a commit that says its number."""
    return b"said/%d/" % commit


class Client:
    """A transaction and what the model expects of it."""

    def __init__(self, txn: kvwal.Transaction, view: State, begun: int) -> None:
        self.txn = txn
        self.view = view.copy()
        self.begun = begun
        self.reads: set[bytes] = set()
        self.ranges: list[tuple[bytes, bytes]] = []
        self.writes: dict[bytes, bytes | None] = {}


class Looked:
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
        self.clients: dict[int, Client] = {}
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
        self.compare(self.store, self.history.newest, "the store")
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
                self.compare(snapshot, self.history.states[at], f"the moment of commit {at}")
            reader = self.store.engine.upkeep.past.reader(at, "look")
            found = dict(self._of_tables(reader))
            expected = {key: value for key, value in self.history.states[at].items() if key.startswith(b"t")}
            if found != expected:
                raise Violation(f"the moment of commit {at} shows {_difference(found, expected)}")

    def _said(self, number: int) -> dict[str, str]:
        """What commit `number` says of itself: a value that it put tells."""
        begins = said_by(number)
        said = any(value.startswith(begins) for value in self.history.states[number].values())
        return {"commit": str(number)} if said else {}

    def nothing_early(self) -> None:
        """No reader may see a commit that has not returned (point 4). For calling while one is under way."""
        if self.store is not None and not self.store.closed and self.store.last_seqno > self.history.returned:
            raise Violation(f"commit {self.store.last_seqno} is visible before it is durable")

    def compare(self, source: Any, state: State, what: str) -> None:
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


def _difference(found: State, state: State) -> str:
    missing = sorted(state.keys() - found.keys())[:5]
    extra = sorted(found.keys() - state.keys())[:5]
    wrong = [(k, state[k][:20], found[k][:20]) for k in sorted(state.keys() & found.keys()) if state[k] != found[k]][:5]
    return f"missing {missing}, extra {extra}, wrong (key, expected, found) {wrong}"
