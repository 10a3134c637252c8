"""Saving what verifies of a damaged store into a new one.

What is saved, and why it can be trusted:

- From the page file: every leaf of the newest generation that can be read, each under a checksum that its parent
  holds. What lies under a node that does not verify is reported and left out.
- From the log: every commit that verifies. A commit after the generation is applied as it is, even behind a gap (which
  is reported: what the missing commits changed is then not what it was). A commit up to the generation is already in
  the pages; what these commits say last of a key is used only if the damaged pages no longer have it. What a commit
  after the generation says of itself (`meta`) is kept with it.
- At the end each table that has keys has one row of its own, under a name that says so where its own was lost, and the
  next ids are above all: a new table never gets the keys of another one.

The damaged store is only read. The new one is made under the marker `salvaging`: from before there is anything of a
store until all is on disk. Without it it is an ordinary store, checkpointed and closed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final

from kvwal.api.opened import made_over
from kvwal.api.store import Store
from kvwal.batch import MAX_TABLE_ID, WriteBatch
from kvwal.engine.create import SALVAGE_MARK, make_marker, mark_of_part, open_directory
from kvwal.engine.engine import Engine
from kvwal.engine.index_commits import without_indexes
from kvwal.engine.indexes import FIRST_DERIVED_ID
from kvwal.engine.request import CommitRequest
from kvwal.engine.tables import NEXT_IDS_KEY, CodecName, TableRow, encode_ids, encode_row, next_ids, row_key
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import (
    CorruptionError,
    DiskFullError,
    Error,
    Finding,
    FormatError,
    RefusedError,
    StoreExistsError,
    StoreNotFoundError,
)
from kvwal.expiring import Expiring
from kvwal.files import Directory, Files, PathArgument, is_full, outwards, path_text, rooted, system_files
from kvwal.files.names import DATA, LOCK, READERS, SALVAGING, is_known, segment_name, temporary_name
from kvwal.keys import SYSTEM_TABLE, Seqno
from kvwal.log import Chain, Extension, Record, salvage_log
from kvwal.log.intents import is_of_users
from kvwal.log.salvage import missing
from kvwal.log.segment import list_segments, store_id_of_log
from kvwal.options import Options
from kvwal.pages import PageFile, Row, salvage_pages
from kvwal.pages.catalogue import roots

__all__ = ["SalvageReport", "salvage"]

_BATCH_BYTES = 8 << 20
_BYTES = CodecName("bytes", 1)

_NUMBER_BYTES: Final = 8


class _Options(Options):
    __slots__ = ()

    opens_unfinished: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class SalvageReport:
    """What `salvage` found.

    Attributes:
        saved_keys: keys in the new store: of the default table and of those that `Store.tables` lists.
        pages_keys: entries read from the pages. records: commits read from the log.
        base_seqno: the last commit of the generation that was read; 0 if none could be.
        last_seqno: the last commit of the log that was applied.
        damages: everything that did not verify, and what is therefore missing.
    """

    saved_keys: int
    pages_keys: int
    records: int
    base_seqno: Seqno
    last_seqno: Seqno
    damages: tuple[Finding, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was damaged."""
        return not self.damages


def salvage(
    path: PathArgument,
    into: PathArgument,
    *,
    files: Files | None = None,
    progress: Callable[[int], None] | None = None,
) -> SalvageReport:
    """Save all that verifies of the store at `path` into a new store at `into`, and list what does not.

    Args:
        path: the damaged store; it is read only, and must not be open for writing.
        into: where to make the new store, outside of the damaged one; nothing, or an empty directory. Where salvage
            fails or is interrupted, it is empty again; a process that is killed leaves a part there, which no open
            takes for a store, and which the next salvage replaces.
        progress: called with the number of entries and commits done so far.

    Raises:
        StoreNotFoundError: there is nothing at `path`, or neither pages nor a log of a store.
        StoreExistsError: there is something at `into`, or it lies in the damaged store.
        LockedError: the store at `path` is open for writing, or another salvage writes to `into`.
        DiskFullError: there is no space at `into`, which is empty again: free some, and call it again.
    """
    files = system_files() if files is None else files
    # From here on the working directory may be another one.
    source, target = rooted(path_text(path), files), rooted(path_text(into), files)
    try:
        directory = files.open_directory(source)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_store(source) from None
    work: _Salvage | None = None
    try:
        if not _is_free(files, target):
            raise StoreExistsError(errno.EEXIST, f"{target} is not empty; name a new directory to save into")
        if directory.kind(DATA) is None and not list_segments(directory):
            raise _no_store(source)
        _refuse_inside(files, directory, target)
        directory.lock(shared=True)
        place, mark = _marked(files, target)
        has_lock = False
        try:
            options = _Options(durability="os", files=files, background=False)
            with made_over(lambda: Engine.open(target, "c", options), Store) as new:
                _refuse_other(place, mark)
                work = _Salvage(directory, new, progress)
                report = work.run()
                new.checkpoint()
            place.lock(shared=False)
            has_lock = True
            # Another process may have had it meanwhile.
            _refuse_other(place, mark)
            place.unlink(SALVAGING)
            # Durability: what is in it was flushed by the checkpoint and the close.
            place.sync()
            return report
        except BaseException:
            with suppress(OSError, Error):
                if not has_lock:
                    place.lock(shared=False)
                if mark_of_part(place) == mark:
                    _empty(place)
            raise
        finally:
            place.close()
    except (DiskFullError, OSError) as error:
        # That of the caller's `progress` is of another place.
        is_own = work is None or error is not work.told
        if is_own and (isinstance(error, DiskFullError) or is_full(error)):
            text = f"there is no space to save into {target}; free some, and call it again"
            raise DiskFullError(text) from error
        raise
    finally:
        directory.close()


def _no_store(path: str) -> StoreNotFoundError:
    return StoreNotFoundError(errno.ENOENT, f"there is no store at {path}")


def _is_free(files: Files, path: str) -> bool:
    """Whether there is nothing at `path`, an empty directory, or the part of a store that another salvage left."""
    try:
        directory = files.open_directory(path)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    try:
        return not set(directory.names()) - {LOCK, READERS, temporary_name(SALVAGING)} or _is_part(directory)
    finally:
        directory.close()


def _refuse_inside(files: Files, source: Directory, target: str) -> None:
    for place in outwards(target):
        # What may not be looked into, or is not there yet, tells nothing.
        is_source = False
        with suppress(OSError):
            directory = files.open_directory(place)
            is_source = directory == source
            directory.close()
        if is_source:
            raise StoreExistsError(errno.EEXIST, f"{target} lies in the store {source.path}; save outside of it")


def _is_part(directory: Directory) -> bool:
    """Whether the marker is there, and nothing that no store has."""
    return mark_of_part(directory) is not None and all(map(is_known, directory.names()))


def _refuse_other(directory: Directory, mark: bytes) -> None:
    """StoreExistsError if the marker is not this one any more. Requires: the lock of the store there."""
    if mark_of_part(directory) != mark:
        text = f"another program has taken {directory.path} meanwhile; salvage again, into a new directory"
        raise StoreExistsError(errno.EEXIST, text)


def _marked(files: Files, path: str) -> tuple[Directory, bytes]:
    """The directory at `path`, with a marker and nothing else, and what that says, which no other one does."""
    mark = SALVAGE_MARK + files.random_bytes(_NUMBER_BYTES).hex().encode()
    options = Options(files=files)
    directory, _ = open_directory(path, "c", options)
    lock = files.open_directory(path)
    is_own = False
    try:
        lock.lock(shared=False)
        if not _is_part(directory) and not _is_free(files, path):
            raise StoreExistsError(errno.EEXIST, f"{path} is not empty; name a new directory to save into")
        is_own = True
        _empty(directory, SALVAGING, LOCK)
        make_marker(directory, SALVAGING, mark, options.mode)
        directory.sync_parent()
        return directory, mark
    except BaseException:
        with suppress(OSError):
            if is_own:
                _empty(directory)
        directory.close()
        raise
    finally:
        lock.close()


def _empty(directory: Directory, *but: str) -> None:
    """Remove what is there, the marker and the lock last, and not what other processes share. Requires: the lock."""
    for name in sorted(directory.names(), key=_place_of):
        if name not in but and directory.kind(name) != "directory":
            if name == SALVAGING:
                directory.sync()
            directory.unlink(name)
    directory.sync()


def _place_of(name: str) -> int:
    return (SALVAGING, LOCK).index(name) + 1 if name in (SALVAGING, LOCK) else 0


class _Salvage:
    """One run: collects writes into batches, and findings."""

    def __init__(self, source: Directory, new: Store, progress: Callable[[int], None] | None) -> None:
        self._source = source
        self._new = new
        self._progress = progress
        #: What `progress` raised.
        self.told: Exception | None = None
        self._damages: list[Finding] = []
        self._batch = WriteBatch()
        self._batch_bytes = 0
        # All that there were.
        self._tables = {0}
        # Those of indexes, which are not saved: they may be damaged, and are built again when they are declared.
        self._derived: set[int] = set()
        self._done = 0

    def run(self) -> SalvageReport:
        base = Seqno(0)
        pages_keys = 0
        store_id: bytes | None = None
        if mark_of_part(self._source) is not None:
            self._note(SALVAGING, None, "a salvage into this store was cut off; what it had not saved is missing")
        pages = self._open_pages()
        if pages is not None:
            store_id = pages.meta.store_id
            base = pages.meta.seqno
            if pages.choice.row is not Row.BOTH_VALID:
                self._note(DATA, None, f"only one of its two generations can be read ({pages.choice})")
            try:
                pages_keys = self._save_pages(pages)
            finally:
                pages.close()
        records, last = self._save_log(store_id, base, damaged=bool(self._damages))
        self._flush()
        saved = sum(self._new.engine.reads.count(table=table) for table in self._name_tables())
        return SalvageReport(saved, pages_keys, records, base, Seqno(max(base, last)), tuple(self._damages))

    def _open_pages(self) -> PageFile | None:
        try:
            return PageFile(self._source, cache_bytes=8 << 20, writable=False, salvages=True)
        except RefusedError:
            raise
        except FileNotFoundError:
            self._note(DATA, None, "it is missing; only the log is saved")
            return None
        except (CorruptionError, FormatError, OSError) as error:
            # Without what it advises, which is this.
            reason = error.reason if isinstance(error, CorruptionError) else error
            self._note(DATA, None, f"no generation can be read ({reason}); only the log is saved")
            return None

    def _save_pages(self, pages: PageFile) -> int:
        # What is damaged of them is noted below.
        with suppress(CorruptionError):
            self._tables.update(table for table, _ in roots(pages.pager, pages.meta))
        count = 0
        for found in salvage_pages(pages):
            if isinstance(found, tuple):
                count += len(found.keys)
                for key, value in zip(found.keys, found.values, strict=True):
                    self._put(found.table, key, value)
            else:
                self._note(found.file, found.offset, found.reason)
        return count

    def _save_log(self, store_id: bytes | None, base: Seqno, *, damaged: bool) -> tuple[int, Seqno]:
        if store_id is None:
            store_id = store_id_of_log(self._source, salvages=True)
            if store_id is None:
                self._note("log", None, "no segment has a readable header")
                return 0, Seqno(0)
        segments = list_segments(self._source)
        if not segments:
            self._note("log", None, f"there is none; commits after {base} are missing, if there were any")
        elif segments[0] > base + 1:
            # What is missing behind its beginning the log tells.
            self._note(segment_name(segments[0]), None, f"before it {missing(base + 1, segments[0] - 1)}")
        records = 0
        last = base
        # What the log says last of keys that it names at or before `base`, as far as the damaged pages may lack them.
        older: dict[int, dict[bytes, bytes | None]] = {}
        for found in salvage_log(Chain(self._source, store_id)):
            if isinstance(found, Finding):
                self._note(found.file, found.offset, found.reason)
                continue
            try:
                batch = found.batch()
            except CorruptionError as error:
                self._note(error.file, error.offset, f"{error.reason}; {missing(found.seqno, found.seqno)}")
                continue
            records += 1
            if found.seqno > base:
                last = found.seqno
                self._save_older(older)
                self._flush()
                self._commit(batch, self._extension(found))
            elif damaged:
                for table, part in ((0, batch), *batch.parts()):
                    said = older.setdefault(table, {})
                    for bounds in part.ranges:
                        said.update((key, None) for key in said if bounds.contains(key))
                    said.update(part.writes)
            self._tell()
        self._save_older(older)
        return records, last

    def _save_older(self, older: dict[int, dict[bytes, bytes | None]]) -> None:
        """Put what the damaged pages no longer have."""
        self._flush()
        reads = self._new.engine.reads
        reader = reads.moments.reader("salvage")
        for table, said in older.items():
            for key, value in said.items():
                if value is not None and reads.read_at(reader, key, table=table, raw=True) is None:
                    self._put(table, key, value)
        reader.release()
        self._flush()
        older.clear()

    def _put(self, table: int, key: bytes, value: bytes) -> None:
        part = self._batch.part(table)
        if type(value) is Expiring:
            part.put_until(key, value.value, value.expires_us)
        else:
            part.put(key, value)
        self._batch_bytes += len(key) + len(value)
        if self._batch_bytes > _BATCH_BYTES:
            self._flush()
        self._tell()

    def _flush(self) -> None:
        if len(self._batch):
            self._commit(self._batch)
            self._batch = WriteBatch()
            self._batch_bytes = 0

    def _extension(self, record: Record) -> Extension | None:
        """What the commit says of itself; nothing, where that is damaged: what it wrote is saved even so."""
        try:
            record.meta()
            return record.extension()
        except CorruptionError as error:
            self._note(error.file, error.offset, error.reason)
            return None

    def _commit(self, batch: WriteBatch, extension: Extension | None = None) -> None:
        self._tables.update(table for table, _ in batch.parts())
        batch = without_indexes(batch, self._derived)
        self._new.engine.commit(CommitRequest(EncodedBatch(batch, extension), sync=False))

    def _name_tables(self) -> set[int]:
        """Give each table with keys a row of its own, and let the next ids be above all. Returns the tables with names.

        Rows may be lost, and one of a former name may be there again.
        """
        reads = self._new.engine.reads
        system = self._batch.table(SYSTEM_TABLE)
        rows = self._new.engine.tables.rows(reads.moments.reader("salvage"))
        names = {name for name, _ in rows}
        named = {0: ""}
        for name, row in rows:
            if isinstance(row, TableRow) and named.setdefault(row.id, name) != name:
                both = f"{named[row.id]!r} and {name!r}"
                self._note(DATA, None, f"table {row.id} has two names, {both}; it keeps the first")
                system.delete(row_key(name))
        for table in sorted(filter(is_of_users, self._tables - named.keys())):
            if reads.count(table=table):
                named[table] = name = _free_name(f"salvaged-{table}", names)
                self._note(DATA, None, f"the name of table {table} is lost, and its codecs; it is saved as {name!r}")
                system.put(row_key(name), encode_row(TableRow(name, table, _BYTES, _BYTES)))
        before = reads.read(NEXT_IDS_KEY, table=SYSTEM_TABLE)
        found, derived = next_ids(None)
        # A row that is not valid says nothing.
        with suppress(CorruptionError):
            found, derived = next_ids(before)
        ids = self._tables | self._derived | named.keys()
        found = max(found, *(table + 1 for table in ids if table < FIRST_DERIVED_ID))
        # Of those that are derived an index has two, of which the first is even.
        derived = max(derived, (max(ids) | 1) + 1)
        after = encode_ids(min(found, FIRST_DERIVED_ID - 1), min(derived, MAX_TABLE_ID - 1))
        if after != before and ids != {0}:
            system.put(NEXT_IDS_KEY, after)
        self._flush()
        return set(named)

    def _note(self, file: str, offset: int | None, reason: str) -> None:
        self._damages.append(Finding(file, offset, reason))

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None and not self._done % 1000:
            try:
                self._progress(self._done)
            except (DiskFullError, OSError) as error:
                self.told = error
                raise


def _free_name(name: str, taken: set[str]) -> str:
    return name if name not in taken else _free_name(f"{name}-", taken)
