"""A follower: a store that another process writes, as a read-only map that moves from commit to commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

from kvwal.api.followed_table import FollowedTable
from kvwal.api.naming import TableInfo, table_infos
from kvwal.api.opened import Opened
from kvwal.backup.making import BackupReport, BaseKind, backup
from kvwal.backup.port import Where, destination_at
from kvwal.codecs import Codec, KeyCodec
from kvwal.db.mapping import Bounds
from kvwal.engine.merge import Pairs
from kvwal.engine.row_cache import RowCache
from kvwal.feed.line import position_at, seqno_of
from kvwal.following.engine import FollowedEngine
from kvwal.following.progress import Lag
from kvwal.following.waiting import Freshness
from kvwal.keys import Seqno, as_seconds
from kvwal.positions import Position
from kvwal.tables.spec import TableSpec

__all__ = ["Follower"]

K = TypeVar("K")
V = TypeVar("V")


class _FreshRows:
    """The rows of a follower that has a `max_lag_s`: each look at them says first that they are not too old."""

    __slots__ = ("_cache", "_freshness")

    def __init__(self, cache: RowCache, freshness: Freshness) -> None:
        self._cache = cache
        self._freshness = freshness

    def __getattr__(self, name: str) -> Any:
        self._freshness.ensure()
        return getattr(self._cache, name)


class Follower(Opened):
    """A store that another process may be writing, for reading. Made by `kvwal.follow`.

    It always shows the state after one durable commit, and moves when it is told to (`refresh`, `wait`), when a feed of
    it waits, and when what it reads is no longer there; never back. With a pin the writer keeps what is read of now,
    within its `hold_s` and `hold_bytes`. Without one it writes no byte, its writer does not know of it, and what it
    holds may be taken away: a scan, or a snapshot of now, that is still read when the writer has made two checkpoints
    since it began raises `SnapshotTooOld`, and so does one of a past moment in any case. Other reads do not: they go on
    from a newer moment. With `max_lag_s` reads of now move it themselves, and raise `StaleError` where that does not
    help; a snapshot does at its beginning, and not later.

    Thread-safe, every method. In a forked child every method raises `ForkedError`, and so do `pinned` and its feeds;
    what is only kept in memory (`seqno`, `position`, `rebases`, `path`, `closed`) is as it was at the fork.
    """

    engine: FollowedEngine

    def __init__(self, engine: FollowedEngine) -> None:
        super().__init__(engine)
        freshness = engine.progress.freshness
        if freshness.max_lag_s is not None:
            self._cache = cast("RowCache", _FreshRows(self._cache, freshness))

    # -- where it is ----------------------------------------------------------------------------

    @property
    def seqno(self) -> Seqno:
        """The last commit that reads see."""
        return self._state.seqno

    @property
    def position(self) -> Position:
        """The same with its line: what a feed goes on after."""
        return position_at(self.engine, self._state.seqno)

    @property
    def pinned(self) -> bool:
        """Whether the writer keeps what this shows now. One system call. ClosedError, ForkedError."""
        self._state.refuse_if_gone()
        return self.engine.progress.pinned

    @property
    def rebases(self) -> int:
        """How often it went over to a newer checkpoint of the writer."""
        return self.engine.progress.rebases

    def refresh(self) -> Seqno:
        """Move to the newest commit of which the writer has said that it is on disk; returns its seqno.

        That may not be the last one that a put in another process has just returned: see `wait`, which shows a commit
        as soon as that is said. A few system calls if there is nothing new.

        Raises StoreRemovedError if the store was removed, erased or replaced; CorruptionError if what is needed does
        not verify; ClosedError. Reads then go on from where it was.
        """
        return self.engine.progress.refresh()

    def wait(self, position: int, timeout_s: float | None = None) -> bool:
        """Move until it shows a commit, at most for `timeout_s` seconds (None: for ever). Whether it does.

        Args:
            position: of the commit: a position, or the seqno that a write in another process returned.

        It looks after 1 ms, then less and less often, at last every 50 ms. A commit can be shown once a later record of
        the log says that it is on disk: the next commit, or what a writer adds within 0.1 s when it has nothing else to
        do. FeedGap for a position on another line; TypeError or ValueError; otherwise raises as `refresh`. A closed one
        raises ClosedError whatever it shows.
        """
        if timeout_s is not None:
            timeout_s = as_seconds("timeout_s", timeout_s)
        return self.engine.progress.await_beyond(seqno_of(self.engine, "position", position) - 1, timeout_s)

    def lag(self) -> Lag:
        """How far it is behind what is in the writer's files. Reads the end of the log, and moves nothing."""
        return self.engine.progress.lag(self._reads.moments.clock.now_us())

    def backup(
        self,
        dest: Where,
        *,
        base: BaseKind = "auto",
        history: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> BackupReport:
        """As `Store.backup`, of the commit that `refresh` moves to, beside the writer.

        Without a pin it begins again from a newer checkpoint where the writer has made two meanwhile. SnapshotTooOld if
        that happened 20 times.
        """
        self.refresh()
        return backup(self.engine, destination_at(dest), base=base, history=history, progress=progress)

    # -- reading ------------------------------------------------------------------------------

    def _cached(self, bounds: Bounds) -> Pairs | None:
        self.engine.progress.freshness.ensure()
        return super()._cached(bounds)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        self.engine.progress.freshness.ensure()
        return super()._count(start, stop)

    def _key_at(self, rank: int) -> bytes | None:
        self.engine.progress.freshness.ensure()
        return super()._key_at(rank)

    def _lasting(self, key: bytes) -> bytes | None:
        self.engine.progress.freshness.ensure()
        return super()._lasting(key)

    # Each codec, or type, with each: a default of `bytes` says nothing to a type checker.
    @overload
    def table(self, name: str) -> FollowedTable[bytes, bytes]: ...
    @overload
    def table(self, name: str, key: type[K] | KeyCodec[K]) -> FollowedTable[K, bytes]: ...
    @overload
    def table(self, name: str, *, value: type[V] | Codec[V]) -> FollowedTable[bytes, V]: ...
    @overload
    def table(self, name: str, key: type[K] | KeyCodec[K], value: type[V] | Codec[V]) -> FollowedTable[K, V]: ...
    def table(self, name: str, key: Any = bytes, value: Any = bytes) -> Any:
        """A named table, for reading. Arguments as in `Store.table`.

        It need not be there yet. TableCodecError if it was made with other codecs; TypeError or ValueError.
        """
        self._state.refuse_if_gone()
        table: FollowedTable[Any, Any] = self.unchecked(TableSpec(name, key, value))
        table.id  # noqa: B018  # it raises if the table has other codecs
        return table

    def unchecked(self, spec: TableSpec[K, V]) -> FollowedTable[K, V]:
        """A table that is looked up when it is used first."""
        return FollowedTable(self.engine, spec, self, self._cache)

    def tables(self) -> list[TableInfo]:
        """The tables that there are, by name, all as of one moment. As `Store.tables`."""
        self.engine.progress.freshness.ensure()
        return table_infos(self.engine)

    def _catch_up(self) -> None:
        self.refresh()

    def _freshen(self) -> None:
        self.engine.progress.freshness.ensure()

    # -- ending -------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the files. Idempotent. Snapshots, scans and feeds of it raise `ClosedError` from here on."""
        self.engine.close()

    def __repr__(self) -> str:
        return f"<kvwal.Follower of {self.path!r}{' (closed)' if self.closed else ''}, seqno {self._state.seqno}>"
