"""Restoring a moment into a new store, on a line of its own.

Made aside, in the directory `INTO.restoring`, in this order:

1. `restoring` says what is made, from which objects, and the new line.
2. The pages of the bases, one over the other, with metas of the new line and a free list of their own:
   `restoring-pages.tmp`, renamed to `restoring-pages` when it is on disk.
3. The log: the commits of the units behind the base, and then the row of the new line (kvwal/engine/lines.py).
4. `restoring-pages` is renamed to `data`: from here on it is a store.
5. What recovery would not have room for is brought from the log into the pages.
6. The store is opened for reading, and verified as a whole.
7. `restoring` is removed, and the directory gets its name.

Each step ends on disk before the next one begins. So what was cut off goes on behind the last one that ended, if the
same is asked for again; if something else is, it begins anew. Durability: nothing is at `INTO` before step 7, and then
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from kvwal.backup.bases import BaseHeader, chain_of, pages_of, read_table
from kvwal.backup.chain import replay
from kvwal.backup.choosing import Chosen, Moment, as_moment, choose
from kvwal.backup.names import BaseName
from kvwal.backup.port import Destination, Where, destination_at
from kvwal.backup.state import dump, identity_of, load
from kvwal.backup.units import UnitCommit
from kvwal.batch import WriteBatch
from kvwal.engine.checkpoint import merge_into
from kvwal.engine.engine import Engine
from kvwal.engine.lines import LineRow, encode_line, parent_of
from kvwal.engine.memtable import Memtable
from kvwal.errors import CorruptionError, DiskFullError, Error, FormatError, InternalError, StoreExistsError
from kvwal.features import EXPIRY
from kvwal.files import Directory, Files, PathArgument, is_full, parent_and_name, path_text, system_files
from kvwal.files.names import DATA, is_known, numbers, temporary_name
from kvwal.keys import SYSTEM_TABLE, Seqno
from kvwal.log import LogIdentity, LogOptions, LogReader, encode_intents
from kvwal.log.copied import CopiedLog
from kvwal.log.intents import Body
from kvwal.log.record import COMMIT
from kvwal.options import Options
from kvwal.pages import Meta, PageFile
from kvwal.pages.fresh import finish_page_file
from kvwal.positions import Position

__all__ = ["RestoreReport", "restore"]

_ASIDE: Final = ".restoring"
_MARKER: Final = "restoring"
_PAGES: Final = "restoring-pages"
_OURS: Final = frozenset((_MARKER, _PAGES, temporary_name(_MARKER), temporary_name(_PAGES)))
_LINE_BYTES: Final = 8
_CACHE_BYTES: Final = 64 << 20
_REQUEST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did, or would do.

    Attributes:
        restored: the moment: a commit, on the line that it was backed up from.
        position: the newest commit of the new store, on its own line: the one that says whence the line came. None if
            nothing was done.
        objects: what was read, or would be, in order. bytes: of these. requests: reads of the destination that take.
        commits: how many came from units, and were replayed.
        resumed: whether an interrupted restore went on.
        seconds: how long it took.
    """

    restored: Position
    position: Position | None
    objects: tuple[str, ...]
    bytes: int
    requests: int
    commits: int
    resumed: bool
    seconds: float


def restore(
    src: Where,
    into: PathArgument,
    *,
    at: Moment = "latest",
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    files: Files | None = None,
) -> RestoreReport:
    """Make a new store at `into` that is as the backed-up one was at a moment.

    Args:
        src: the destination of backups or of an archive: a path, or an object with the calls of a destination.
        into: where to make the store: nothing, or an empty directory, in a directory that is there.
        at: "latest"; a seqno, which is the state after that commit; "before:SEQNO"; a `Position`, on whose line it is
            looked for; or a time with a time zone, which is the last commit at or before it. What is no position is
            looked for on the line with the newest commit, and on those that it came from.
        dry_run: read nothing but names and headers, write nothing, and report what would be read.
        progress: called with the bytes read so far and those of all objects.
        files: another file system, such as `kvwal.testing.SimulatedDisk`.

    The store keeps its id, and goes on with a new line: positions, feeds and consumers that were not beyond that moment
    go on where the log of the restored store begins early enough. Durable on return, and there whole or not at all.
    What an interrupted restore has done is in `INTO.restoring`; the same call goes on with it.

    Raises:
        NotInBackup: the moment is not there; the error has the bounds and the nearest moments.
        StoreExistsError: something is at `into`, or a directory `INTO.restoring` that is none of a restore.
        BackupDestinationError: there is no backup at `src`. CorruptionError: an object of it is damaged, and is named.
        FormatError: a newer version of kvwal wrote it. LockedError: another process is restoring to `into`.
        DiskFullError: free some space, and call it again. TypeError, ValueError: an argument cannot be right.
    """
    files = system_files() if files is None else files
    target, moment = path_text(into).rstrip("/") or "/", as_moment(at)
    destination = destination_at(src, files)
    began_s = files.monotonic_s()
    try:
        store_id = identity_of(destination)
        chosen = choose(destination, moment)
        work = _Restore(destination, files, target, store_id, chosen, progress)
        position = None if dry_run else work.run()
    except OSError as error:
        if is_full(error) and not isinstance(error, Error):
            raise DiskFullError("there is no space to restore; free some, and call it again to go on") from error
        raise
    plan = chosen.plan
    sizes = {str(name): chosen.held.sizes[str(name)] for name in (*plan.bases, *plan.units)}
    requests = sum(2 + sizes[str(name)] // _REQUEST_BYTES for name in plan.bases) + len(plan.units)
    return RestoreReport(
        Position(chosen.line, plan.at),
        position,
        tuple(sizes),
        plan.bytes,
        requests,
        plan.at - plan.after if plan.units else 0,
        work.resumed,
        files.monotonic_s() - began_s,
    )


class _Restore:
    """One restore."""

    def __init__(
        self,
        destination: Destination,
        files: Files,
        target: str,
        store_id: bytes,
        chosen: Chosen,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._destination = destination
        self._files = files
        self._target = target
        self._aside = target + _ASIDE
        self._store_id = store_id
        self._chosen = chosen
        self._progress = progress
        self._done = 0
        self._line = bytes(_LINE_BYTES)
        self._options = Options(files=files, background=False)
        self.resumed = False

    def run(self) -> Position:
        """Make the store; its position."""
        _refuse_taken(self._files, self._target)
        self._make()
        position = self._verified()
        directory = self._files.open_directory(self._aside)
        try:
            if directory.kind(_MARKER) is not None:
                directory.unlink(_MARKER)
            directory.sync()
        finally:
            directory.close()
        parent, name = parent_and_name(self._target)
        directory = self._files.open_directory(parent)
        try:
            _refuse_taken(self._files, self._target)
            directory.rename(name + _ASIDE, name)
            # Durability: the store is at its place when this returns.
            directory.sync()
        finally:
            directory.close()
        return position

    # -- aside --------------------------------------------------------------------------------

    def _make(self) -> None:
        """Steps 1 to 5, or those that are left."""
        try:
            directory = self._files.open_directory(self._aside)
        except FileNotFoundError:
            self._files.make_directory(self._aside, self._options.directory_mode)
            directory = self._files.open_directory(self._aside)
        except NotADirectoryError:
            raise _taken(self._aside, "is in the way; move it") from None
        try:
            if directory.kind(DATA) is not None and _marker_of(directory) is None:
                # Opened to be looked at, it takes the lock.
                directory.close()
                if not self._is_made():
                    raise _taken(self._aside, "is none of a restore, or of another one; move it")
                self.resumed = True
                return
            directory.lock(shared=False)
            # Durability: else all that is made in it could be gone.
            directory.sync_parent()
            self._begin(directory)
            if directory.kind(DATA) is None:
                if directory.kind(_PAGES) is None:
                    self._write_pages(directory)
                self._write_log(directory)
                directory.rename(_PAGES, DATA)
                directory.sync()
            self._replay(directory)
        finally:
            directory.close()

    def _begin(self, directory: Directory) -> None:
        """Step 1, unless the same is being made."""
        names = directory.names()
        foreign = [name for name in names if not (name in _OURS or is_known(name))]
        plan = self._chosen.plan
        wanted: dict[str, Any] = {
            "store": self._store_id.hex(),
            "from": self._chosen.line.hex(),
            "at": plan.at,
            "objects": [str(name) for name in (*plan.bases, *plan.units)],
        }
        found = _marker_of(directory)
        if foreign or (found is None and (_PAGES in names or any(map(numbers, names)))):
            raise _taken(self._aside, "is none of a restore, or of another version; move it")
        if found is not None and {key: found.get(key) for key in wanted} == wanted:
            line = _line_in(found)
            if line is not None:
                self._line, self.resumed = line, True
                return
        # That of another moment, or none: what there is of it goes, the marker last.
        for name in sorted(names, key=lambda name: name == _MARKER):
            if name in _OURS or numbers(name) or name == DATA or name.endswith(".tmp"):
                directory.unlink(name)
        directory.sync()
        self._line = self._files.random_bytes(_LINE_BYTES)
        file = directory.open(temporary_name(_MARKER), create=True, mode=self._options.mode)
        try:
            file.pwrite(dump({**wanted, "line": self._line.hex()}), 0)
            file.sync()
        finally:
            file.close()
        directory.rename(temporary_name(_MARKER), _MARKER)
        # Durability: without the marker, what comes now would be none of a restore.
        directory.sync()

    def _is_made(self) -> bool:
        """Whether what lies aside is this restore, verified, but for its name."""
        try:
            engine = Engine.open(self._aside, "r", self._options)
        except (CorruptionError, FormatError, OSError):
            return False
        try:
            line = engine.upkeep.consumers.line
            row = parent_of(engine.reads, line)
            self._line = line
            return row is not None and (row.parent, row.fork) == (self._chosen.line, self._chosen.plan.at)
        finally:
            engine.close()

    # -- pages --------------------------------------------------------------------------------

    def _write_pages(self, directory: Directory) -> None:
        """Step 2."""
        name = temporary_name(_PAGES)
        if directory.kind(name) is not None:
            directory.unlink(name)
        chain = self._chain()
        file = directory.open(name, create=True, mode=self._options.mode)
        try:
            for each, header in chain:
                extents = read_table(self._destination, str(each), header).new()
                for page, raw in pages_of(self._destination, str(each), header, extents):
                    file.pwrite(raw, page * header.meta.page_size)
                    self._tell(len(raw))
            meta = chain[-1][1].meta
            finish_page_file(file, replace(meta, line=self._line, wall_us=self._files.now_us()))
            file.sync()
        finally:
            file.close()
        directory.rename(name, _PAGES)
        directory.sync()

    def _chain(self) -> list[tuple[BaseName, BaseHeader]]:
        held, plan = self._chosen.held, self._chosen.plan
        chain = chain_of(self._destination, held, plan.bases[-1])
        for name, header in chain:
            if header.store_id != self._store_id:
                raise CorruptionError(str(name), 32, "it is a base of another store")
        return chain

    # -- log ----------------------------------------------------------------------------------

    def _write_log(self, directory: Directory) -> None:
        """Step 3."""
        for name in directory.names():
            if numbers(name) is not None or (name.endswith(".tmp") and is_known(name)):
                directory.unlink(name)
        meta = self._chain()[-1][1].meta
        now_us = self._files.now_us()
        identity = LogIdentity(self._store_id, self._line, now_us)
        options = LogOptions(self._options.segment_bytes, self._options.preallocate, self._options.mode)
        log = CopiedLog(self._files, directory, identity, options, meta.seqno, meta.time_us, meta.required)
        last_us = meta.time_us
        for commit in self._commits(meta):
            log.add(commit)
            last_us = commit.time_us
        log.add(self._row(max(last_us, now_us), now_us))
        log.close()

    def _commits(self, meta: Meta) -> Iterator[UnitCommit]:
        plan = self._chosen.plan
        if plan.at > meta.seqno:
            for commit in replay(self._destination, self._store_id, plan.units, meta.seqno, plan.at):
                yield commit
                self._tell(len(commit.body))

    def _row(self, time_us: int, wall_us: int) -> UnitCommit:
        """The first commit of the new line, which says whence it came."""
        plan = self._chosen.plan
        batch = WriteBatch()
        batch.table(SYSTEM_TABLE).put(
            *encode_line(LineRow(self._line, self._chosen.line, plan.at, "restore", wall_us))
        )
        body = encode_intents(batch)
        bits = body.bits if isinstance(body, Body) else 0
        return UnitCommit(COMMIT | bits, Seqno(plan.at + 1), time_us, b"".join(body))

    # -- the store ----------------------------------------------------------------------------

    def _replay(self, directory: Directory) -> None:
        """Step 5: what is left to recovery fits into a memtable."""
        pages = PageFile(directory, cache_bytes=_CACHE_BYTES, writable=True)
        try:
            seqno = pages.meta.seqno
            memtable = Memtable(seqno)
            for record in LogReader(directory, self._store_id).replay(seqno, seqno):
                batch = record.batch()
                memtable.write(record.seqno, batch.writes, record.size, batch.ranges, batch.parts())
                memtable.last_seqno = record.seqno
                if memtable.bytes_used >= self._options.memtable_bytes:
                    self._merge(pages, memtable, record.time_us)
                    memtable = Memtable(record.seqno)
        finally:
            pages.close()

    def _merge(self, pages: PageFile, memtable: Memtable, time_us: int) -> None:
        expires = memtable.has_expiring or any(part.has_expiring for _, part in memtable.parts.written())
        required = EXPIRY if expires else 0
        now_us = self._files.now_us()
        merge_into(pages, memtable, lambda: None, time_us=time_us, wall_us=now_us, required=required)

    def _verified(self) -> Position:
        """Step 6. CorruptionError for the first thing that does not hold."""
        engine = Engine.open(self._aside, "r", self._options)
        try:
            report = engine.upkeep.verify(None)
            for finding in report.problems[:1]:
                raise CorruptionError(finding.file, finding.offset, f"the restored store: {finding.reason}")
            if engine.state.seqno != self._chosen.plan.at + 1 or engine.upkeep.consumers.line != self._line:
                raise InternalError(f"the restored store is at commit {engine.state.seqno}")
            return Position(self._line, engine.state.seqno)
        finally:
            engine.close()

    def _tell(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            total = self._chosen.plan.bytes
            self._progress(min(self._done, total), total)


def _marker_of(directory: Directory) -> dict[str, Any] | None:
    if directory.kind(_MARKER) != "file":
        return None
    file = directory.open(_MARKER)
    try:
        return load(_MARKER, file.pread(file.size(), 0))
    except (CorruptionError, FormatError):
        return None
    finally:
        file.close()


def _line_in(marker: dict[str, Any]) -> bytes | None:
    try:
        line = bytes.fromhex(marker["line"])
    except (LookupError, TypeError, ValueError):
        return None
    return line if len(line) == _LINE_BYTES else None


def _refuse_taken(files: Files, path: str) -> None:
    """StoreExistsError if there is something at a path, and not just an empty directory."""
    try:
        directory = files.open_directory(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise _taken(path, "is a file; name a new directory to restore into") from None
    try:
        if directory.names():
            raise _taken(path, "is not empty; name a new directory to restore into")
    finally:
        directory.close()


def _taken(path: str, why: str) -> StoreExistsError:
    return StoreExistsError(17, f"{path} {why}")
