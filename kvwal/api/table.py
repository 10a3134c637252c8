"""A table of a store: `db.table(name, key=, value=)`, with what became of its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.errors import SnapshotTooOld
from kvwal.feed.change import Change
from kvwal.feed.difference import differences, past_value
from kvwal.feed.key_versions import KeyVersions
from kvwal.feed.line import moment_of, seqno_of
from kvwal.keys import Seqno, as_int
from kvwal.options import Durability
from kvwal.tables.migration import MIGRATION_BATCH, Migration, MigrationReport, Progress
from kvwal.tables.spec import TableSpec
from kvwal.tables.table import WritableTable
from kvwal.tables.writing import How, at_once, bring_back
from kvwal.times import time_of

__all__ = ["Table", "TableDifference", "TableVersion"]

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class TableVersion(Generic[V]):
    """What one commit made of a key of a table. See `kvwal.KeyVersion`, of which it has all; `value` is decoded."""

    seqno: Seqno
    time_us: int
    meta: Mapping[str, str] = field(hash=False)
    kind: str
    value: V | None
    cause: str | None = None

    @property
    def time(self) -> datetime:
        """Of the commit, in UTC."""
        return time_of(self.time_us)


class TableDifference(NamedTuple, Generic[K, V]):
    """A key of a table that two moments have different values of. See `kvwal.Difference`."""

    key: K
    old: V | None
    new: V | None


class Table(WritableTable[K, V], Generic[K, V]):
    """A named, ordered map of one store, with keys and values of Python's types. Made by `Store.table`.

    Thread-safe, every method. It reads and writes as the store does: reads never wait for writers, each write is a
    commit of its own, and `within` takes part in a transaction, a batch or a snapshot. The table comes to be with the
    first commit that puts something into it. Where a value cannot be decoded, CodecError is raised, and `raw` reads
    its bytes.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine, spec: TableSpec[K, V], owner: object) -> None:
        super().__init__(engine, spec, owner)
        self._engine = engine

    def versions(
        self,
        key: K,
        *,
        since: int | None = None,
        until: int | None = None,
        reverse: bool = True,
        limit: int | None = None,
    ) -> Iterator[TableVersion[V]]:
        """What each commit made of `key`, newest first. As `Store.versions`."""
        table = self.id
        if table is None:
            return iter(())
        found = KeyVersions(
            self._engine,
            self._spec.encode_key(key),
            table=table,
            since=None if since is None else seqno_of(self._engine, "since", since, SnapshotTooOld),
            until=None if until is None else seqno_of(self._engine, "until", until, SnapshotTooOld),
            reverse=reverse,
            limit=None if limit is None else as_int("limit", limit, 0),
            owner=self._owner,
        )
        return (
            TableVersion(each.seqno, each.time_us, each.meta, each.kind, self._of(each.value), each.cause)
            for each in found
        )

    def _of(self, value: bytes | None) -> V | None:
        return None if value is None else self._decode(value)

    def diff(
        self,
        a: int | datetime,
        b: int | datetime | None = None,
        *,
        start: K | Any = None,
        stop: K | Any = None,
        prefix: Any = None,
        reverse: bool = False,
    ) -> Iterator[TableDifference[K, V]]:
        """The keys whose values at moment `b` (None: now) are others than at moment `a`. As `Store.diff`."""
        table = self.id
        if table is None:
            return iter(())
        bounds = self._bounds(start, stop, prefix, reverse, None)
        last = None if b is None else moment_of(self._engine, "b", b)
        found = differences(self._engine, moment_of(self._engine, "a", a), last, bounds, table, self._owner)
        decode = self._spec.key.decode
        return (TableDifference(decode(key), self._of(old), self._of(new)) for key, old, new in found)

    def revert(
        self,
        key: K,
        *,
        to: int | datetime,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Bring back what `key` was at a past moment, in a new commit. As `Store.revert`."""
        how = How(durability, meta)
        return at_once(bring_back, self._way, self._spec, *self.past(key, to), how)

    def past(self, key: K, at: int | datetime) -> tuple[bytes, bytes | None]:
        """The key as bytes, and its value at a past moment; None if it had none. Raises as `Store.snapshot`."""
        encoded, then, table = self._spec.encode_key(key), moment_of(self._engine, "to", at), self.id
        return encoded, None if table is None else past_value(self._engine, encoded, then, table)

    def migrate(
        self,
        *,
        batch: int = MIGRATION_BATCH,
        dry_run: bool = False,
        progress: Progress | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> MigrationReport:
        """Rewrite the values that are of former versions of the codec in the newest, beside any other writers.

        Each commit has some values, and says how far all has come: interrupted or killed, a migration goes on there
        when it is called again. Feeds show these commits with the cause "migrate". A value that was changed meanwhile
        is never overwritten. One that cannot be brought up stays as it is, and is counted.

        Args:
            batch: values in a commit, from 1 to 100,000; they have 1 MiB and a value at the most.
            dry_run: only look, from the first key on. Then the store may be open for reading only.
            progress: called after each step with the number of values that were looked at, and that of all.
            durability, meta: of the commits: see `Store.put`.

        Raises: TypeError if the values have no versions (see `kvwal.codecs.versioned`); TableNotFoundError, also if the
        table is dropped or renamed meanwhile; ReadOnlyError. O(values).
        """
        going = Migration(self._engine, self._spec, batch=batch, dry_run=dry_run, durability=durability, meta=meta)
        more = True
        while more:
            more = going.step()
            if progress is not None:
                progress(going.report.examined, going.total)
        return going.report

    def at(self, at: int | datetime) -> Snapshot:
        """The store at a past moment: `users.within(users.at(moment))` is the table then. See `Store.snapshot`."""
        return Snapshot(self._engine, at=moment_of(self._engine, "at", at), owner=self._owner)

    def of(self, change: Change) -> tuple[K, V | None]:
        """The key and the value of a change of this table, as the feed tells it (of a range: its start, and None)."""
        return self._spec.key.decode(change.key), self._of(change.value)
