"""Values of former versions of a codec, rewritten in the newest: in bounded commits, beside other writers, resumable.

The steps, each a commit of cause "migrate" with some values:

1. The table remembers the newest version, if it did not.
2. Values are read from `next` on, and those of former versions brought up, here and not in the commit leader.
3. The leader puts those whose bytes are still the ones that were read. If some are not, the next step reads the same
   stretch again; else it goes on behind it. The last step removes the row of the migration.

Invariant: the table remembers the newest version before the first value is read, so that no writer who goes by name
puts a former version behind `next`.
Invariant: what is put in place of a value was made of just that value. `next` moves only in a commit after which all of
the stretch before it is of the newest version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeGuard

from kvwal.batch import SAME_INDEX_KEYS, WriteBatch
from kvwal.engine.engine import Engine
from kvwal.engine.migration import MigrationRow, decode_migration, encode_migration, migration_key
from kvwal.engine.operations import keep_expiry
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.request import CommitRequest, Newest
from kvwal.engine.tables import check_codecs, decode_row, keep_asked, row_key
from kvwal.errors import CodecError, ReadOnlyError, TableNotFoundError
from kvwal.keys import as_int
from kvwal.log import Extension, extension_of
from kvwal.log.extension import CAUSE, MIGRATE
from kvwal.options import Durability
from kvwal.tables.spec import TableSpec
from kvwal.tables.stored import StoredTable

__all__ = ["MIGRATION_BATCH", "Migration", "MigrationReport", "Progress"]

#: Values that one commit rewrites, unless something else is asked for.
MIGRATION_BATCH: Final = 500
_MAX_BATCH: Final = 100_000
# A commit has fewer values if they have this many bytes.
_BATCH_BYTES: Final = 1 << 20
# The keys of a stretch, where few of them have former values.
_STRETCH_KEYS: Final = 20_000

Progress = Callable[[int, int], None]
"""Called with the number of values that were looked at, and that of all."""


class _Upcasting(Protocol):
    name: str
    version: int

    def version_of(self, data: bytes) -> int: ...
    def upcast(self, data: bytes) -> bytes: ...


def _has_versions(codec: object) -> TypeGuard[_Upcasting]:
    return hasattr(codec, "upcast") and hasattr(codec, "version_of")


@dataclass(slots=True)
class MigrationReport:
    """What a migration has done so far. Counts are of values, those before an interruption included.

    Attributes:
        table: its name.
        version: the newest one, that is written.
        examined: were looked at.
        rewritten: were of a former version, and are of the newest now; in a dry run: would be rewritten.
        unreadable: could not be brought up, and are as they were.
        first_unreadable: the bytes of the key of one of these, and why; None if this call met none.
        versions: by version, how many of it this call has found.
        resumed: whether it went on where another one had stopped.
    """

    table: str
    version: int
    examined: int = 0
    rewritten: int = 0
    unreadable: int = 0
    first_unreadable: tuple[bytes, CodecError] | None = None
    versions: dict[int, int] = field(default_factory=dict)
    resumed: bool = False


@dataclass(slots=True)
class _Stretch:
    """Values that follow one another, and what is to be put in their place."""

    changes: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    examined: int = 0
    unreadable: int = 0
    first_unreadable: tuple[bytes, CodecError] | None = None
    #: Where the next one begins; None: there is none.
    next: bytes | None = None


class Migration:
    """The migration of one table, step by step. For one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        spec: TableSpec[Any, Any],
        *,
        batch: int = MIGRATION_BATCH,
        dry_run: bool = False,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> None:
        """See `Table.migrate`. Finds the table, and what is stored of a migration that was not finished."""
        codec = spec.value
        if spec.is_default:
            raise TypeError("a part of the default table remembers no codec, so its values are not migrated")
        if not _has_versions(codec):
            raise TypeError(
                f"values of codec {spec.asked.value} have no versions that could be brought up; "
                "codecs.versioned makes a codec that has"
            )
        self._engine = engine
        self._spec = spec
        self._codec = codec
        self._stored = StoredTable(engine, spec)
        self._batch = as_int("batch", batch, 1, _MAX_BATCH)
        self._is_dry = dry_run
        self._sync = engine.wants_sync(durability)
        self._extension: Extension = {**(extension_of(meta) or {}), CAUSE: MIGRATE}
        if engine.upkeep.is_read_only and not dry_run:
            raise ReadOnlyError("the store is open for reading only; a dry run writes nothing")
        table = self._stored.id()
        row = engine.tables.row(spec.name)
        if table is None or row is None:
            raise TableNotFoundError(spec.name)
        self.report = MigrationReport(spec.name, codec.version)
        self._table = table
        self._is_current = (row.key, row.value) == spec.asked[:2]
        self._progress = MigrationRow(codec.name, row.value.version, codec.version)
        # Whether table 1 has a row of this migration.
        self._is_stored = False
        # Values below this key were rewritten before an interruption: at the end they are looked at once more, since a
        # `load` or a `revert` may have brought back a former version.
        self._again: bytes | None = None
        self._stop: bytes | None = None
        if not dry_run:
            self._resume()
        #: How many values there are to look at, those of before an interruption included.
        self.total: int = self._progress.examined + engine.reads.count(self._progress.next, None, table=table)

    def _resume(self) -> None:
        value = self._engine.reads.read(migration_key(self._table), table=SYSTEM_TABLE)
        self._is_stored = value is not None
        found = None if value is None else decode_migration(value)
        # Of another version: the values below its `next` are not of ours.
        if found is not None and (found.codec, found.to) == (self._progress.codec, self._progress.to):
            self._progress = found
            self.report.resumed = bool(found.next)
            self._again = found.next or None
        self._say()

    def _say(self) -> None:
        report, progress = self.report, self._progress
        report.examined, report.rewritten, report.unreadable = (
            progress.examined,
            progress.rewritten,
            progress.unreadable,
        )

    def step(self) -> bool:
        """One commit, or a stretch in which nothing is to be done. False: the migration is over.

        Raises: TableNotFoundError if the table was dropped or renamed meanwhile, and what a commit raises.
        """
        if not self._is_current and not self._is_dry:
            self._commit(_Step(self._spec, self._table, (), self._extension, self._progress, self._progress))
            self._is_current = True
            return True
        before = self._progress
        stretch = self._read(before.next)
        after = replace(
            before,
            next=stretch.next or b"",
            examined=before.examined + stretch.examined,
            rewritten=before.rewritten + len(stretch.changes),
            unreadable=before.unreadable + stretch.unreadable,
        )
        if (stretch.changes or self._is_stored) and not self._is_dry:
            stored = None if stretch.next is None else after
            step = _Step(self._spec, self._table, stretch.changes, self._extension, before, stored)
            self._commit(step)
            if step.is_behind:
                self._progress = replace(before, rewritten=before.rewritten + step.rewritten)
                return True
        if self._stop is not None:
            after = replace(after, examined=before.examined)
        self._progress = after
        self._count(stretch)
        if stretch.next is None and self._again is not None:
            self._again, self._stop = None, self._again
            return True
        return stretch.next is not None

    def _read(self, start: bytes) -> _Stretch:
        found, codec = _Stretch(), self._codec
        size = 0
        for key, value in self._stored.scan(start, self._stop):
            if len(found.changes) >= self._batch or size >= _BATCH_BYTES or found.examined >= _STRETCH_KEYS:
                found.next = key
                break
            found.examined += 1
            try:
                version = codec.version_of(value)
                newest = codec.upcast(value)
            except CodecError as error:
                found.unreadable += 1
                found.first_unreadable = found.first_unreadable or (key, error)
                continue
            found.versions[version] = found.versions.get(version, 0) + 1
            if newest != value:
                found.changes.append((key, value, newest))
                size += len(newest)
        return found

    def _count(self, stretch: _Stretch) -> None:
        self._say()
        report = self.report
        report.first_unreadable = report.first_unreadable or stretch.first_unreadable
        for version, count in stretch.versions.items():
            report.versions[version] = report.versions.get(version, 0) + count

    def _commit(self, step: _Step) -> None:
        self._engine.commit(CommitRequest(sync=self._sync, operation=step))
        self._is_stored = True


class _Step:
    """One commit of a migration: see above. `rewritten` and `is_behind` say afterwards what became of it."""

    __slots__ = ("_after", "_before", "_changes", "_spec", "_table", "extension", "is_behind", "rewritten")

    dropped: Final = None

    def __init__(
        self,
        spec: TableSpec[Any, Any],
        table: int,
        changes: Sequence[tuple[bytes, bytes, bytes]],
        extension: Extension,
        before: MigrationRow,
        after: MigrationRow | None,
    ) -> None:
        """`changes`: keys with the values that were read, and those to put. `after`: None when all is done."""
        self._spec = spec
        self._table = table
        self._changes = changes
        self._before, self._after = before, after
        #: What the commit says of itself beside its writes.
        self.extension = extension
        #: Values that were put.
        self.rewritten = 0
        #: Whether a value had changed meanwhile.
        self.is_behind = False

    def evaluate(self, newest: Newest) -> WriteBatch:
        """What to write. TableNotFoundError if the table is not there any more; TableCodecError."""
        spec, rows = self._spec, newest.table(SYSTEM_TABLE)
        key = row_key(spec.name)
        value = rows.get(key)
        row = None if value is None else decode_row(key, value)
        if row is None or row.id != self._table:
            raise TableNotFoundError(spec.name)
        check_codecs(row, spec.asked)
        batch = WriteBatch()
        system, part = batch.table(SYSTEM_TABLE), batch.table(self._table)
        keep_asked(row, spec.asked, system)
        now = newest.table(self._table)
        part.writes.update((key, new) for key, old, new in self._changes if now.get(key) == old)
        # An index is built by the newest version already, or being built (see `keep_asked`): then building reads what
        # is put here.
        part.index_keys = SAME_INDEX_KEYS
        for key in part.writes:
            keep_expiry(now, part, key)
        self.rewritten = len(part.writes)
        self.is_behind = self.rewritten < len(self._changes)
        progress = self._before if self.is_behind else self._after
        if progress is None:
            system.delete(migration_key(self._table))
        else:
            rewritten = self._before.rewritten + self.rewritten
            system.put(migration_key(self._table), encode_migration(replace(progress, rewritten=rewritten)))
        return batch
