"""The store: what a user holds, and the one place where the rooms below are put together.

One put, followed: `Store.put` checks and encodes, `CommitPipeline.put` takes the baton, `LogWriter` numbers and writes
the record and flushes it, `Present` publishes it into rows and memtable. Later the background thread brings it into
the pages (`Checkpointer`). One get: `Present.rows`, one dict hit; else memtable, frozen memtable, tree.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot, chunks_of
from kvwal.db.transaction import Transaction
from kvwal.engine.checkpoint import COMPACT_PASSES, Background, Checkpointer, Reserve
from kvwal.engine.commit import CommitPipeline
from kvwal.engine.few import Pairs
from kvwal.engine.inspection import Pin, Stats, VerifyReport, verify_parts
from kvwal.engine.merge import Chunk
from kvwal.engine.recovery import Opened, RecoveryReport
from kvwal.engine.refusal import Refusal, closed_error, forked_error, poisoned_error, read_only_error, stalled_error
from kvwal.engine.request import CommitRequest
from kvwal.errors import ConflictError, DiskFullError, PoisonedError
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, BytesLike, Seqno, as_key, as_value
from kvwal.log import Record
from kvwal.options import Durability, Options, wants_sync

__all__ = ["Store"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

# A clean close leaves at most this much log to replay; more is checkpointed first, so that opening stays quick.
_CLOSE_REPLAY_BYTES = 256 << 10


class Store(OrderedMapping, MutableMapping[bytes, bytes]):
    """An open store: an ordered, transactional, durable map from bytes to bytes. Made by `kvwal.open`.

    Thread-safe, every method. Reads never wait for writers. Each write is a commit of its own, durable on return as
    the store's durability says; several writes that belong together go into `batch`, `update` or `transaction`. After
    a failed write or flush all writes raise `PoisonedError` until the store is reopened, and reads go on. In a forked
    child every method raises `ForkedError`.
    """

    def __init__(self, opened: Opened, options: Options, *, read_only: bool) -> None:
        self._directory = opened.directory
        self._options = options
        self._read_only = read_only
        self._files = options.files
        self._pages = opened.pages
        self._reader = opened.reader
        self._present = opened.present
        self._sync_default = wants_sync(options.durability)
        self._recovery = opened.report
        self._close_lock = threading.Lock()
        # Until everything stands: whoever opened the parts lets go of them if something here fails.
        self._closed = True
        self._log = opened.log
        self._background: Background | None = None
        self._reserve = reserve = Reserve(opened.directory, options.mode)
        if opened.log is None:
            refusal = Refusal(read_only_error, opened.present.seqno)
            self._pipeline = CommitPipeline(refusal, opened.present, release_reserve=lambda: False)
            self._checkpointer: Checkpointer | None = None
        else:
            self._pipeline = CommitPipeline(
                opened.log,
                opened.present,
                release_reserve=self._releaser(reserve),
                now_s=options.files.monotonic_s,
            )
            if not reserve.hold():
                opened.present.attention = True
            self._checkpointer = Checkpointer(
                opened.present, opened.pages, self._pipeline, opened.log, reserve, options, poison=self._poisoner()
            )
            if opened.present.is_full():
                try:
                    self._checkpointer.checkpoint()
                except DiskFullError:
                    pass  # It can wait: reading, and deleting what takes the space, comes first.
            if options.background:
                self._background = Background(
                    self._checkpointer, opened.present, self._pipeline, opened.log, options
                )
                self._background.start()
        self._put = self._pipeline.put
        self._closed = False

    def _releaser(self, reserve: Reserve) -> Callable[[], bool]:
        present = self._present

        def release() -> bool:
            # Until it is held again commits look after it before they put anything.
            present.attention = True
            return reserve.release()

        return release

    def _poisoner(self) -> Callable[[BaseException], PoisonedError]:
        # Not a bound method: the background thread must not keep a forgotten store alive.
        pipeline, log = self._pipeline, self._log

        def poison(cause: BaseException) -> PoisonedError:
            seqno = log.last_seqno if log is not None else Seqno(0)
            pipeline.refuse(Refusal(lambda: poisoned_error(cause), seqno))
            return poisoned_error(cause)

        return poison

    # -- about it -----------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The store's directory, as it was given."""
        return self._directory.path

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def read_only(self) -> bool:
        """Whether it was opened with flag "r"."""
        return self._read_only

    @property
    def recovery(self) -> RecoveryReport:
        """What opening found and did."""
        return self._recovery

    @property
    def last_seqno(self) -> Seqno:
        """The last commit that readers see."""
        return self._present.seqno

    @property
    def durable_seqno(self) -> Seqno:
        """The last commit known to be on disk."""
        return self._log.durable_seqno if self._log is not None else self._present.seqno

    def __repr__(self) -> str:
        state = "closed" if self._closed else "read-only" if self._read_only else "open"
        return f"<kvwal.Store {self._directory.path!r}, {state}, seqno {self._present.seqno}>"

    # -- reading ------------------------------------------------------------------------------

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for what is not bytes-like."""
        # Hot path: one dict hit, no lock. Whatever is not a row raises here and takes the long way, where everything is
        # checked: a wrong type, a key without a hash, a memoryview that may be written to (whose hash is a ValueError).
        try:
            value = self._present.rows[key]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            value = self._present.read(as_key(key))
        return default if value is None else value

    def __getitem__(self, key: BytesLike) -> bytes:
        try:
            value = self._present.rows[key]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            value = self._present.read(as_key(key))
        if value is None:
            raise KeyError(as_key(key))
        return value

    def _read(self, key: bytes) -> bytes | None:
        try:
            return self._present.rows[key]
        except KeyError:
            return self._present.read(key)

    def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        present = self._present
        wanted = keys if isinstance(keys, list | tuple) else list(keys)
        seqno = present.seqno
        try:
            # One C call over rows that all are the newest; if nothing was published meanwhile, they are of one moment.
            found = list(map(present.rows.__getitem__, wanted))
            if present.horizon == seqno:
                return found
        except (KeyError, TypeError, ValueError):
            pass  # Not all of them are rows: take the way below.
        with self.snapshot() as snapshot:
            return snapshot.get_many(wanted)

    def _few(self, bounds: Bounds) -> Pairs | None:
        return self._present.few(bounds.start, bounds.stop, bounds.limit, None, reverse=bounds.reverse)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        present = self._present
        return chunks_of(present, present.view("scan", self._files.now_us(), owner=self), bounds)

    def _count(self) -> int:
        """Number of keys.

        O(1), plus one lookup for each key written since the last call (at most a memtable's worth): a blind put need
        not know whether its key was there, so whoever wants the count pays for that.
        """
        return self._present.count(self._files.now_us())

    def snapshot(self) -> Snapshot:
        """The store as it is now, as a read-only map that stays so. Close it, or use it in a `with` block."""
        return Snapshot(self._present, self._files.now_us(), owner=self)

    # -- writing ------------------------------------------------------------------------------

    def put(self, key: BytesLike, value: BytesLike, *, durability: Durability | None = None) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno.

        Args:
            key: 0 to 65,535 bytes.
            value: up to 1 GiB.
            durability: for this commit, if it is to be another than the store's. A weaker one may still be flushed
                along with others.

        Raises TypeError or ValueError for what cannot be stored, ReadOnlyError, ClosedError, DiskFullError (nothing
        was written), PoisonedError.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if self._present.attention:
            self._attend()
        return self._put(key, value, self._sync_default if durability is None else wants_sync(durability))

    def __setitem__(self, key: BytesLike, value: BytesLike) -> None:
        self.put(key, value)

    def delete(self, key: BytesLike, *, durability: Durability | None = None) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first."""
        batch = WriteBatch()
        batch.delete(key)
        return self.commit(batch, durability=durability)

    def delete_range(
        self,
        start: BytesLike | None = None,
        stop: BytesLike | None = None,
        *,
        durability: Durability | None = None,
    ) -> Seqno:
        """Remove every key from `start` on (None: the first), up to but without `stop` (None: the end).

        One small record however many keys there are. Returns the commit's seqno.
        """
        batch = WriteBatch()
        batch.delete_range(start, stop)
        return self.commit(batch, durability=durability)

    def commit(self, batch: WriteBatch, *, durability: Durability | None = None) -> Seqno:
        """Commit a batch, whole or not at all; it reads nothing, so it never conflicts. Returns its seqno.

        An empty batch commits nothing, and the last visible seqno is returned.
        """
        if self._present.attention:
            self._attend(deleting=_only_deletes(batch))
        sync = self._sync_default if durability is None else wants_sync(durability)
        request = CommitRequest(batch, sync=sync)
        return self._pipeline.commit(request) or self._present.seqno

    @contextmanager
    def batch(self, *, durability: Durability | None = None) -> Iterator[WriteBatch]:
        """`with db.batch() as batch:` collects writes and commits them on clean exit, none of them on an exception."""
        batch = WriteBatch()
        yield batch
        self.commit(batch, durability=durability)

    def update(  # type: ignore[override]
        self, other: Mapping[bytes, bytes] | Iterable[tuple[BytesLike, BytesLike]] = (), /
    ) -> None:
        """Put every pair of a mapping or of an iterable, in one commit. None of them if one cannot be stored."""
        batch = WriteBatch()
        batch.update(other)
        self.commit(batch)

    def clear(self) -> None:
        """Remove every key, in one commit."""
        self.delete_range()

    def __delitem__(self, key: BytesLike) -> None:
        checked = as_key(key)

        def remove(txn: Transaction) -> None:
            del txn[checked]

        self.run(remove)

    def setdefault(self, key: BytesLike, default: BytesLike | None = None) -> bytes:
        """The value of `key`; if there is none, put `default` first. Atomic, whatever other threads do."""
        checked = as_key(key)

        def settle(txn: Transaction) -> bytes:
            value = txn.get(checked)
            if value is None:
                value = as_value(default)
                txn.put(checked, value)
            return value

        return self.run(settle)

    def pop(self, key: BytesLike, *default: Any) -> Any:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic."""
        if len(default) > 1:
            raise TypeError(f"pop takes a key and at most one default, not {len(default)}")
        checked = as_key(key)

        def take(txn: Transaction) -> bytes | None:
            value = txn.get(checked)
            if value is not None:
                txn.delete(checked)
            return value

        value = self.run(take)
        if value is None:
            if default:
                return default[0]
            raise KeyError(checked)
        return value

    def popitem(self) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key and return it; KeyError if the store is empty. Atomic."""

        def take(txn: Transaction) -> tuple[bytes, bytes] | None:
            pair = txn.last()
            if pair is not None:
                txn.delete(pair[0])
            return pair

        pair = self.run(take)
        if pair is None:
            raise KeyError("popitem(): the store is empty")
        return pair

    # -- transactions -------------------------------------------------------------------------

    def transaction(self, *, read_only: bool = False, durability: Durability | None = None) -> Transaction:
        """Begin a serializable transaction. `with db.transaction() as txn:` commits on clean exit.

        The commit raises `ConflictError` if something that was read has changed meanwhile; `run` retries for you.
        """
        sync = self._sync_default if durability is None else wants_sync(durability)
        if self._read_only:
            read_only = True
        return Transaction(
            self._present,
            self._pipeline,
            self._files.now_us(),
            sync=sync,
            read_only=read_only,
            owner=self,
            before_commit=self._before_commit,
        )

    def _before_commit(self, batch: WriteBatch) -> None:
        if self._present.attention:
            self._attend(deleting=_only_deletes(batch))

    def run(
        self, function: Callable[[Transaction], _T], *, attempts: int = 100, durability: Durability | None = None
    ) -> _T:
        """Call `function(txn)` in a transaction and commit; on a conflict, again, up to `attempts` times.

        The function may therefore run more than once: it should have no effect but on the transaction. Returns what
        it returned. Raises the last `ConflictError` when the attempts are used up.
        """
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; it is at least 1")
        for attempt in range(attempts):
            try:
                with self.transaction(durability=durability) as txn:
                    return function(txn)
            except ConflictError:
                if attempt + 1 == attempts:
                    raise
                # Whoever we conflict with has committed; let others through before trying again.
                self._files.give_way(0)
        raise AssertionError("unreachable")

    def transactional(
        self, function: Callable[Concatenate[Transaction, _P], _T]
    ) -> Callable[_P, _T]:
        """Decorator: `@db.transactional def transfer(txn, ...)` makes `transfer(...)` run as `run` does."""

        @functools.wraps(function)
        def in_transaction(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return self.run(lambda txn: function(txn, *args, **kwargs))

        return in_transaction

    # -- upkeep -------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make every commit so far durable, whatever durability it was made with."""
        self._refuse_if_closed()
        if not self._read_only:
            self._pipeline.sync()

    def checkpoint(self) -> None:
        """Bring every commit so far into the page file and let go of the log that is no longer needed.

        It happens by itself in the background; call it to choose the moment. Raises DiskFullError if there is no room
        (nothing is lost, and it may be tried again).
        """
        self._refuse_if_closed()
        if self._checkpointer is None:
            raise read_only_error()
        self._checkpointer.checkpoint()

    def compact(self) -> int:
        """Give the space of deleted and replaced data back to the system; returns the bytes the file shrank by.

        It happens by itself, bit by bit with checkpoints and when nothing is committed for a second; call it to have
        it done now. It brings every commit into the page file first. Reads and commits go on meanwhile; pages that a
        snapshot or transaction holds stay. Raises DiskFullError if there is no room to move anything.
        """
        self._refuse_if_closed()
        if self._checkpointer is None:
            raise read_only_error()
        before = self._pages.stats().file_bytes
        while self._checkpointer.compact(passes=COMPACT_PASSES):
            pass
        return max(0, before - self._pages.stats().file_bytes)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every page and every record and prove them: checksums, order, counts, every page reachable xor free,
        the log against the pages. Checkpoints wait meanwhile, commits go on.

        Returns a report; `report.ok` is True when nothing is wrong. `progress(done, total)` is called with bytes.
        """
        self._refuse_if_closed()
        if self._checkpointer is None:
            return verify_parts(self._pages, self._reader, self._files, progress)
        with self._checkpointer.lock:
            return verify_parts(self._pages, self._reader, self._files, progress)

    def stats(self) -> Stats:
        """Figures about memory, pages and log. Cheap."""
        self._refuse_if_closed()
        return Stats.of(self._present, self._pages, self._log, self._reader)

    def pins(self) -> list[Pin]:
        """Who holds an old moment of the store, since when, and how old it is: snapshots, transactions, scans."""
        self._refuse_if_closed()
        return [Pin.of(view) for view in self._present.views()]

    def history(self, after: int = 0) -> Iterator[Record]:
        """The commits still in the log, in order, beginning after seqno `after`.

        The log is kept as far back as recovery needs it and as `retain_log_bytes` and `retain_log_s` say; the first
        record may therefore have a higher seqno than asked for. Commits made after the call may be missing.
        """
        self._refuse_if_closed()
        if self._log is not None:
            self._pipeline.run(lambda: None)
        return self._reader.history(after=Seqno(after), until=self._present.seqno)

    def _attend(self, *, deleting: bool = False) -> None:
        """A commit found `attention` set: wake the background thread, wait if memory is short.

        DiskFullError if the reserve cannot be held, unless the commit only deletes: what is left is for that.
        """
        present = self._present
        present.attention = False
        self._make_room()
        checkpointer = self._checkpointer
        if checkpointer is None:
            return
        if not deleting and (present.short_of_space or not self._reserve.hold()):
            present.short_of_space = False
            checkpointer.reclaim()
        if not self._reserve.hold():
            present.attention = True
            if not deleting:
                raise DiskFullError(
                    "the disk is full but for what is kept for deleting; free some space, or delete keys, and try again"
                )

    def _make_room(self) -> None:
        present = self._present
        background = self._background
        if background is None:
            if self._checkpointer is not None and present.is_full():
                self._checkpoint_in_line()
            return
        background.wake()
        while present.is_stalled():
            if background.failure is not None:
                # The next commit is to look again: else every second one would slip through into memory.
                present.attention = True
                raise stalled_error(background.failure) from background.failure
            present.await_relief(1.0)

    def _checkpoint_in_line(self) -> None:
        assert self._checkpointer is not None
        try:
            self._checkpointer.checkpoint()
        except DiskFullError:
            # Deletes may still fit into the log, and are the way out: refuse only when memory is short as well.
            if self._present.is_stalled():
                raise

    def _refuse_if_closed(self) -> None:
        self._present.refuse_if_gone()

    # -- ending -------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush, checkpoint if the log's tail is long, and let go of everything. Idempotent.

        After a failed write or flush it only lets go: opening again recovers. Snapshots and transactions of this
        store raise `ClosedError` from here on; transactions that are open are aborted.
        """
        if self._directory.inherited and not self._closed:
            # A fork that the interpreter did not see: the threads of the parent, and their locks, are not here.
            self._abandon_in_child()
        with self._close_lock:
            if self._closed:
                return
            if self._background is not None:
                # Before anything else: interrupted while it waits for a checkpoint, the store stays as it is.
                self._background.stop()
            self._closed = True
            try:
                if self._log is not None:
                    self._close_log(self._log)
            finally:
                self._let_go(closed_error)

    def _close_log(self, log: Any) -> None:
        assert self._checkpointer is not None
        try:
            tail = log.tail_bytes - self._checkpointer.log_bytes_at_last + self._recovery.bytes_replayed
            if tail > _CLOSE_REPLAY_BYTES:
                self._checkpointer.checkpoint()
        except (DiskFullError, PoisonedError):
            pass  # Nothing is lost by it: the next open replays the log instead.
        finally:
            self._seal_log(log)

    def _seal_log(self, log: Any) -> None:
        refusal = Refusal(closed_error, log.last_seqno)
        try:
            # In the pipeline, so that no commit is under way; after it every commit is refused.
            self._pipeline.run(lambda: self._pipeline.refuse(refusal))
            log.close()
        except (OSError, PoisonedError, DiskFullError):
            # What was acknowledged is on disk, and what was not may be lost: recovery will tell.
            log.abandon()

    def _let_go(self, reason: Callable[[], Exception]) -> None:
        self._present.close(reason)
        self._pipeline.refuse(Refusal(reason, self._present.seqno))
        self._pages.close()
        self._directory.close()

    def _abandon_in_child(self) -> None:
        self._present.abandon_in_child(forked_error)
        self._pipeline.abandon_in_child(Refusal(forked_error, self._present.seqno))
        self._background = None
        self._checkpointer = None
        self._closed = True
        self._close_lock = threading.Lock()
        if self._log is not None:
            self._log.abandon()
        self._pages.abandon()
        self._directory.close()

    def __enter__(self) -> Store:
        self._refuse_if_closed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        # Whatever thread and moment the collector chose: take no lock, wait for nothing. Commits are as durable as
        # their durability says; the next open replays the log.
        warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=1, source=self)
        self._closed = True
        log, pages, directory = self._log, self._pages, self._directory

        def let_go() -> None:
            if log is not None:
                log.abandon()
            pages.abandon()
            directory.close()

        if self._background is not None:
            # The thread may be writing: the lock is held until it is done.
            self._background.stop(wait=False, then=let_go)
        else:
            let_go()


def _only_deletes(batch: WriteBatch) -> bool:
    return all(value is None for value in batch.writes.values())
