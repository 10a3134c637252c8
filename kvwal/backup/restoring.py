"""Restoring a moment into a new store, on a line of its own.

Made aside, in the directory `INTO.restoring`, in this order:

1. `restoring` says what is made, from which objects, with what in them, and the new line.
2. The pages of the bases, one over the other, with metas of the new line and a free list of their own:
   `restoring-pages.tmp`, renamed to `restoring-pages` when it is on disk.
3. The log: the commits of the units behind the base, and then the row of the new line (kvwal/engine/lines.py).
4. `restoring-pages` is renamed to `data`: from here on it is a store.
5. What recovery would have no space for in memory is brought from the log into the pages.
6. Every page is read and proved, as `Store.verify` does, and each record of the log, as a recovery does.
7. `restoring` is removed, and the directory gets its name.

From before step 1 to the end of step 7 the directory is locked, so that no two restores are made in it.

Each step ends on disk before the next one begins. So what was cut off goes on behind the last one that ended, if the
same is asked for again; if something else is, it begins anew. Durability: nothing is at `INTO` before step 7, and then
all of it.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from kvwal.backup.aside import MARKER, PAGES, begin, marker_of, refuse_foreign, refuse_link, refuse_taken, taken
from kvwal.backup.bases import BaseHeader, chain_of, pages_of, read_table
from kvwal.backup.choosing import Chosen, Moment, advice, as_moment, choose
from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.identity import known_store
from kvwal.backup.names import IDENTITY, BaseName, UnitName, parse_name
from kvwal.backup.port import Destination, Where, destination_at
from kvwal.backup.replaying import breaks, replay_units
from kvwal.backup.reporting import RestoreReport, report_of
from kvwal.backup.units import UnitCommit, lone_digest
from kvwal.batch import WriteBatch
from kvwal.engine.checkpoint import merge_into
from kvwal.engine.consumers import ROWS as CONSUMERS
from kvwal.engine.consumers import asked_for, asked_since
from kvwal.engine.lines import LineRow, encode_line, parent_of
from kvwal.engine.memtable import Memtable
from kvwal.engine.pressure import STALLED_AT
from kvwal.engine.recovery import replay
from kvwal.errors import (
    BackupDestinationError,
    CorruptionError,
    DiskFullError,
    FormatError,
    InternalError,
    NotInBackup,
    ObjectMissing,
    StoreNotFoundError,
)
from kvwal.features import EXPIRY
from kvwal.files import Directory, Files, PathArgument, is_full, parent_and_name, path_text, rooted, system_files
from kvwal.files.names import DATA, is_known, numbers, temporary_name
from kvwal.following.still import StillEngine
from kvwal.keys import SYSTEM_TABLE, Seqno
from kvwal.log import LogIdentity, LogOptions, LogReader, encode_intents
from kvwal.log.commits import Commits
from kvwal.log.copied import CopiedLog
from kvwal.log.intents import Body
from kvwal.log.record import COMMIT
from kvwal.log.walk import Puts
from kvwal.options import Options
from kvwal.pages import Meta, PageFile, Tree, check
from kvwal.pages.catalogue import root_of
from kvwal.pages.fresh import finish_page_file
from kvwal.pages.pager import Pager
from kvwal.positions import Position

__all__ = ["RestoreReport", "restore"]

_ASIDE: Final = ".restoring"
_CACHE_BYTES: Final = 64 << 20
# Of a commit that a base does not name.
_ZEROS: Final = bytes(32)
# An archiver merges one window at a time, in more time than a listing takes.
_TRIES: Final = 20


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
        into: where to make the store: nothing, or an empty directory, in a directory that is there. No symbolic link.
        at: "latest"; a seqno, which is the state after that commit; "before:SEQNO"; a `Position`, on whose line it is
            looked for; or a time with a time zone, which is the last commit at or before it. What is no position is
            looked for on the line with the newest commit, and on those that it came from.
        dry_run: read nothing but names, headers and at most 3 MiB, write nothing, and report what would be read, and
            how long that is expected to take.
        progress: called with the bytes read so far and those of all objects.
        files: another file system, such as `kvwal.testing.SimulatedDisk`.

    The store keeps its id, and goes on with a new line: positions, feeds and consumers that were not beyond that moment
    go on where the log of the restored store begins early enough. Durable on return, and there whole or not at all.
    What an interrupted restore has done is in `INTO.restoring`; the same call goes on with it.

    Raises:
        ForkDiverged: the moment is on a line that the newest one came from, and that is of another history there.
        NotInBackup: the moment is not there; the error has the bounds and the nearest moments.
        StoreNotFoundError: the directory that is to hold `into` is not there.
        StoreExistsError: something is at `into`, such as a symbolic link; or a directory `INTO.restoring` that is none
            of a restore.
        BackupDestinationError: there is no backup at `src`. CorruptionError: an object of it is damaged that the moment
            needs, and is named, and so are the moments before it.
        FormatError: a newer version of kvwal wrote it. LockedError: another process is restoring to `into`.
        DiskFullError: free some space, and call it again. TypeError, ValueError: an argument cannot be right.
    """
    files = system_files() if files is None else files
    # From here on the working directory may be another one.
    target, moment = rooted(path_text(into), files).rstrip("/") or "/", as_moment(at)
    # Before anything is read, and by a dry run too.
    refuse_taken(files, target)
    destination = destination_at(src, files)
    began_s = files.monotonic_s()
    damaged: dict[str, CorruptionError] = {}
    work: _Restore | None = None
    try:
        store_id, is_said = known_store(destination)
        without = () if is_said else (IDENTITY,)
        left = _TRIES
        while True:
            left -= 1
            try:
                chosen = choose(destination, moment, damaged)
                work = _Restore(destination, files, target, store_id, chosen, progress)
                position = None if dry_run else work.run()
                return report_of(
                    destination,
                    chosen,
                    work.units,
                    work.after,
                    position,
                    damaged=(*without, *damaged),
                    resumed=work.resumed,
                    began_s=began_s,
                    monotonic_s=files.monotonic_s,
                )
            except ObjectMissing:
                # An archiver has merged or pruned it since it was listed.
                if not left:
                    raise
            except CorruptionError as error:
                # Older objects may give the same moment. Not again for one that is read all the same.
                if not left or error.file in damaged or parse_name(error.file) is None:
                    raise
                damaged[error.file] = error
            except (NotInBackup, BackupDestinationError):
                if damaged:
                    raise next(iter(damaged.values())) from None
                raise
    except CorruptionError as error:
        instead = advice(destination, moment, error.file, damaged)
        raise CorruptionError(error.file, error.offset, error.reason, advice=instead) from error
    except (DiskFullError, OSError) as error:
        # Whichever step it was, and whatever that says: what it had made is used, or made anew.
        # That of the caller's `progress` is of another place.
        is_own = work is None or error is not work.told
        if is_own and (isinstance(error, DiskFullError) or is_full(error)):
            text = f"there is no space to restore to {target}; free some, and call it again to go on"
            raise DiskFullError(text) from error
        raise


class _Unkept(dict[bytes, bytes | None]):
    """Where a replay leaves puts that are to be proved, and nothing else."""

    def __setitem__(self, key: bytes, value: bytes | None) -> None:
        pass

    def update(self, *others: object, **more: object) -> None:
        pass


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
        self._done, self._total = 0, chosen.plan.bytes
        self._line = b""
        self._headers: list[tuple[BaseName, BaseHeader]] = []
        self._options = Options(files=files, background=False)
        self.resumed = False
        #: What `progress` raised.
        self.told: Exception | None = None
        #: What the log is made of: the commits behind this one, of these units.
        self.after, self.units = chosen.plan.after, tuple(chosen.plan.units)

    def run(self) -> Position:
        """Make the store; its position."""
        directory = self._aside_directory()
        try:
            # Held until it has its name: another restore to the same place would begin anew in it.
            directory.lock(shared=False)
            self._make(directory)
            position = self._verified(directory)
            if directory.kind(MARKER) is not None:
                directory.unlink(MARKER)
            directory.sync()
            if sys.platform == "win32":
                # A directory cannot be renamed there while a file in it, the lock, is open.
                directory.close()
            self._name()
        finally:
            directory.close()
        return position

    def _name(self) -> None:
        parent, name = parent_and_name(self._target)
        directory = self._files.open_directory(parent)
        try:
            refuse_taken(self._files, self._target)
            directory.rename(name + _ASIDE, name)
            # Durability: the store is at its place when this returns.
            directory.sync()
        finally:
            directory.close()

    # -- aside --------------------------------------------------------------------------------

    def _aside_directory(self) -> Directory:
        """It is made if it is not there. StoreExistsError if it is none of a restore."""
        refuse_link(self._files, self._aside, "move it")
        try:
            directory = self._files.open_directory(self._aside)
        except FileNotFoundError:
            try:
                self._files.make_directory(self._aside, self._options.directory_mode)
            except FileNotFoundError:
                text = "the directory that should hold the store is not there; make it first"
                raise StoreNotFoundError(errno.ENOENT, text, self._target) from None
            directory = self._files.open_directory(self._aside)
        except NotADirectoryError:
            raise taken(self._aside, "is in the way; move it") from None
        try:
            # Before the lock leaves a file there.
            if directory.kind(DATA) is None:
                refuse_foreign(directory)
        except BaseException:
            directory.close()
            raise
        return directory

    def _make(self, directory: Directory) -> None:
        """Steps 1 to 5, or those that are left."""
        if directory.kind(DATA) is not None and marker_of(directory) is None:
            if not self._is_made():
                raise taken(self._aside, "is none of a restore, or of another one; move it")
            self.resumed = True
            return
        refuse_foreign(directory)
        # Else all that is made in it could be gone, and be made again.
        directory.sync_parent()
        plan = self._chosen.plan
        asked = {
            "store": self._store_id.hex(),
            "from": self._chosen.line.hex(),
            "at": plan.at,
            "objects": [str(name) for name in (*plan.bases, *plan.units)],
            # Those of another copy of the store, in another destination, may have the same names.
            "pages": [header.table_digest.hex() for _, header in self._chain()],
            "commits": self._digest_of_commits(),
        }
        self._line, self.resumed = begin(directory, asked, self._files, self._options.mode)
        if directory.kind(DATA) is None:
            if directory.kind(PAGES) is None:
                self._write_pages(directory)
            self._write_log(directory)
            directory.rename(PAGES, DATA)
            # It has this name before the marker goes.
            directory.sync()
        self._replay(directory)

    def _is_made(self) -> bool:
        """Whether what lies aside is this restore, verified, but for its name."""
        try:
            engine = StillEngine.attach(self._aside, self._options, pin=False)
        except (CorruptionError, FormatError, OSError):
            return False
        try:
            line = engine.upkeep.consumers.line
            row = parent_of(engine.reads, line)
            if row is None:
                return False
            self._line = line
            # The row is its last commit, unless it has gone on since.
            made = engine.state.version.tree.meta.store_id, row.parent, row.fork, engine.state.seqno - 1
        finally:
            engine.close()
        at = self._chosen.plan.at
        return made == (self._store_id, self._chosen.line, at, at) and row.digest == self._digest_at()

    def _digest_of_commits(self) -> str:
        """Of those up to the end of the last unit, or of the base's last one alone."""
        units = self._chosen.plan.units
        if not units:
            return self._chain()[-1][1].commit.hex()
        name = str(units[-1])
        return fetch_header(self._destination, name).after.hex()

    def _digest_at(self) -> bytes | None:
        """That of the last commit alone, as the row of the new line has it; None if it is not known."""
        plan, header = self._chosen.plan, self._chain()[-1][1]
        if header.replay_through == plan.at:
            return None if header.commit == _ZEROS else header.commit
        name = str(plan.units[-1])
        last = fetch_unit(self._destination, name).commit(plan.at)
        return lone_digest(last.kind, last.time_us, last.body)

    # -- pages --------------------------------------------------------------------------------

    def _write_pages(self, directory: Directory) -> None:
        """Step 2."""
        name = temporary_name(PAGES)
        if directory.kind(name) is not None:
            directory.unlink(name)
        chain = self._chain()
        file = directory.open(name, create=True, mode=self._options.mode)
        try:
            for each, header in chain:
                extents = read_table(self._destination, str(each), header).new()
                self._tell(header.size - extents.page_bytes())
                for page, raw in pages_of(self._destination, str(each), header, extents):
                    file.pwrite(raw, page * header.meta.page_size)
                    self._tell(len(raw))
            meta = chain[-1][1].meta
            finish_page_file(file, replace(meta, line=self._line, wall_us=self._files.now_us()))
            file.sync()
        finally:
            file.close()
        directory.rename(name, PAGES)
        directory.sync()

    def _chain(self) -> list[tuple[BaseName, BaseHeader]]:
        if not self._headers:
            chain = chain_of(self._destination, self._chosen.held, self._chosen.plan.bases[-1])
            for name, header in chain:
                if header.store_id != self._store_id:
                    raise CorruptionError(str(name), 32, "it is a base of another store")
            self._headers = chain
        return self._headers

    # -- log ----------------------------------------------------------------------------------

    def _write_log(self, directory: Directory) -> None:
        """Step 3."""
        header = self._chain()[-1][1]
        asked = self._asked_for(directory, header.meta)
        begin = self._begin_of_log(header.meta, asked)
        while True:
            self.after, self.units = begin
            found = self._copy_commits(directory, header)
            if min(found - asked, default=self.after) >= self.after:
                break
            asked |= found
            begin = self._begin_of_log(header.meta, asked)
            if begin[0] >= self.after:
                break
            # A consumer that was made behind the base reads what is before it: the log is made again.

    def _copy_commits(self, directory: Directory, header: BaseHeader) -> set[Seqno]:
        """Make the log. Returns beyond which commits consumers still read, of their rows in what is behind the base."""
        for name in directory.names():
            if numbers(name) is not None or (name.endswith(".tmp") and is_known(name)):
                directory.unlink(name)
        meta, asked = header.meta, dict[bytes, Seqno]()
        after, held = self.after, self._chosen.held
        self._total = sum(held.sizes[str(name)] for name in (*self._chosen.plan.bases, *self.units))
        now_us = self._files.now_us()
        identity = LogIdentity(self._store_id, self._line, now_us)
        options = LogOptions(self._options.segment_bytes, self._options.preallocate, self._options.mode)
        log = CopiedLog(self._files, directory, identity, options, after, meta.time_us, meta.required)
        last_us, digest = meta.time_us, header.commit if header.replay_through == self._chosen.plan.at else _ZEROS
        at = self._chosen.plan.at
        if at > after:
            for run in replay_units(
                self._destination, self._store_id, self.units, after, at, held, read=self._tell
            ):
                log.add(run)
                last_us = run.times_us[-1]
                digest = lone_digest(run.kinds[-1], last_us, run.bodies[-1])
                behind = max(0, meta.seqno + 1 - run.seqnos[0])
                asked_since(asked, zip(run.kinds[behind:], run.bodies[behind:], strict=True))
        fork = None if digest == _ZEROS else digest
        log.add(Commits.of([self._row(max(last_us, now_us), now_us, fork)]))
        log.close()
        return set(asked.values())

    def _asked_for(self, directory: Directory, meta: Meta) -> set[Seqno]:
        """The commits beyond which consumers still read, of their rows in the base."""
        file = directory.open(PAGES)
        try:
            pager = Pager(file, 0)
            rows = Tree(pager, meta, *root_of(pager, meta, SYSTEM_TABLE)).chunks(*CONSUMERS)
            return {seqno for keys, values in rows for _, seqno in asked_for(zip(keys, values, strict=True))}
        finally:
            file.close()

    def _begin_of_log(self, meta: Meta, asked: Iterable[Seqno]) -> tuple[Seqno, tuple[UnitName, ...]]:
        """After which commit the log begins, and the units that it is made of.

        That is before the base where consumers still read what is there, from the first on for which units have it:
        without it a consumer is lost, and with units that do not follow each other the store would be.
        """
        plan, held = self._chosen.plan, self._chosen.held
        sound = Seqno(0)
        for after in sorted(seqno for seqno in asked if seqno < meta.seqno):
            units = held.units_from(after, plan.at)
            if after < sound or not units or units[-1].last < plan.at:
                continue
            broken = {error.file for error in breaks(self._destination, held, units)}
            if not broken:
                return after, units
            # What begins before the last of these comes to it, too.
            sound = max((name.first for name in units if str(name) in broken), default=after)
        return meta.seqno, tuple(plan.units)

    def _row(self, time_us: int, wall_us: int, digest: bytes | None) -> UnitCommit:
        """The first commit of the new line, which says whence it came. `digest`: of the commit before it."""
        plan = self._chosen.plan
        batch = WriteBatch()
        batch.table(SYSTEM_TABLE).put(
            *encode_line(LineRow(self._line, self._chosen.line, plan.at, "restore", wall_us, digest))
        )
        body = encode_intents(batch)
        bits = body.bits if isinstance(body, Body) else 0
        return UnitCommit(COMMIT | bits, Seqno(plan.at + 1), time_us, b"".join(body))

    # -- the store ----------------------------------------------------------------------------

    def _replay(self, directory: Directory) -> None:
        """Step 5: what is left to recovery fits into a memtable."""
        reader, most = LogReader(directory, self._store_id), self._options.memtable_bytes
        if sum(segment.size for segment in reader.segments()) <= most:
            return
        pages = PageFile(directory, cache_bytes=_CACHE_BYTES, writable=True)
        try:
            seqno = pages.meta.seqno
            replay(reader, seqno, Memtable(seqno), seqno, partial(self._merged_if_full, pages))
        finally:
            pages.close()

    def _merged_if_full(self, pages: PageFile, memtable: Memtable, time_us: int) -> Memtable:
        # A store may use as much while it is written to.
        if memtable.bytes_used < STALLED_AT * self._options.memtable_bytes:
            return memtable
        expires = memtable.has_expiring or any(part.has_expiring for _, part in memtable.parts.written())
        required = EXPIRY if expires else 0
        now_us = self._files.now_us()
        merge_into(pages, memtable, lambda: None, time_us=time_us, wall_us=now_us, required=required)
        return Memtable(memtable.last_seqno)

    def _verified(self, directory: Directory) -> Position:
        """Step 6. CorruptionError for the first thing that does not hold."""
        pages = PageFile(directory, cache_bytes=0, writable=False)
        try:
            for finding in check(pages):
                raise CorruptionError(finding.file, finding.offset, f"the restored store: {finding.reason}")
            meta = pages.meta
        finally:
            pages.close()
        # As a recovery, this reads and proves each record of the log: from its beginning on, which consumers read.
        reader = LogReader(directory, self._store_id)
        begin = Seqno(reader.segments()[0].first_seqno - 1)
        records = reader.replay(begin, meta.replay_through, Puts(_Unkept()))
        for record in records:
            record.batch()
        end = records.end
        if (end.last_seqno, meta.line) != (self._chosen.plan.at + 1, self._line):
            raise InternalError(f"the restored store is at commit {end.last_seqno}")
        return Position(self._line, end.last_seqno)

    def _tell(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            try:
                self._progress(min(self._done, self._total), self._total)
            except (DiskFullError, OSError) as error:
                self.told = error
                raise
