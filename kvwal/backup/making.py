"""Making a backup: a base of the newest generation and the commits behind it, while the store is in use.

What is there when it ends: the bases that the newest one builds on, and units up to the last commit that was durable
when it began. Each object is there whole or not at all, the base before the units behind it. So one that was cut off
leaves a destination that holds what it held, and perhaps more. Each object is read back before the next one is made, or
it returns.

Invariant: pages are read while their generation is pinned, and each is proved against its checksum as it is read. Of a
follower they may be written over; reading them says so, and the backup begins again from a newer generation.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from crc32c import crc32c

from kvwal.backup.bases import BaseHeader, chain_of, encode_base, reach_of, read_header
from kvwal.backup.chain import Held, digest_after, list_held
from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.forks import tell_fork
from kvwal.backup.identity import claim
from kvwal.backup.names import BaseName, UnitName
from kvwal.backup.port import Destination, sweep
from kvwal.backup.proofs import known_damage
from kvwal.backup.reach import Reach, walked
from kvwal.backup.units import UnitBuilder, lone_digest
from kvwal.engine.consumers import ROWS as CONSUMERS
from kvwal.engine.consumers import asked_for, asked_since
from kvwal.engine.engine import Engine
from kvwal.errors import ArchiveDiverged, CorruptionError, DiskFullError, FeedGap, SnapshotTooOld
from kvwal.files import is_full
from kvwal.keys import SYSTEM_TABLE, Seqno
from kvwal.log import Record, SegmentCursor
from kvwal.pages import Meta, Tree
from kvwal.pages.catalogue import root_of
from kvwal.pages.pager import Pager
from kvwal.positions import Position

__all__ = ["BackupReport", "BaseKind", "backup"]

BaseKind = Literal["auto", "full"]

# Generations that go while they are read: a writer makes two checkpoints in less time than a backup takes.
_TRIES: Final = 20
_UNIT_BYTES: Final = 8 << 20
# Of what is read back, at a time.
_READ_BYTES: Final = 1 << 20
# Of a commit that the log does not have any more.
_UNKNOWN: Final = bytes(32)
# A chain of differences costs a restore more than it saves when it has as many bytes as all pages, or this many links.
_MOST_LINKS: Final = 32
# Between two turns that other threads get.
_WORK_S: Final = 0.00005
_PAUSE_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup made. Sizes in bytes.

    Attributes:
        position: the last commit that can be restored.
        oldest: each commit from this one on can be restored, up to `position`.
        base: the object that holds the pages; it may have been there.
        made: the objects that were made, in order; none if nothing had changed.
        is_full: whether a base was made that builds on no other.
        pages: pages that were read and put into bases. bytes: of all that was made.
        commits: commits in the units that were made.
        seconds: how long it took.
    """

    position: Position
    oldest: Seqno
    base: str
    made: tuple[str, ...]
    is_full: bool
    pages: int
    bytes: int
    commits: int
    seconds: float


def backup(
    engine: Engine,
    destination: Destination,
    *,
    base: BaseKind = "auto",
    history: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BackupReport:
    """Put what an open store, or a follower, holds now into a destination; see `kvwal.Store.backup`."""
    if base not in get_args(BaseKind):
        raise ValueError(f'base is "auto" or "full", not {base!r}')
    for left in range(_TRIES - 1, -1, -1):
        try:
            engine.reads.moments.now.ready()
            return _Backup(engine, destination, progress).run(base, history)
        except (SnapshotTooOld, FeedGap):
            # Two checkpoints came, and the pages or the log may be gone; or something was pruned.
            if not left:
                raise
        except (OSError, ValueError):
            # It may be that it was closed meanwhile.
            engine.state.refuse_if_gone()
            raise
    raise AssertionError("unreachable")


class _Backup:
    """One run."""

    def __init__(self, engine: Engine, destination: Destination, progress: Callable[[int, int], None] | None) -> None:
        self._engine = engine
        self._destination = destination
        self._progress = progress
        self._worked_s = time.monotonic()
        # What `verify` has found.
        self._damaged: Container[str] = ()
        self._made: list[tuple[str, int]] = []
        self._pages = self._commits = 0
        self._is_full = False

    def run(self, kind: BaseKind, history: bool) -> BackupReport:
        engine, destination = self._engine, self._destination
        began_s = time.monotonic()
        engine.state.refuse_if_gone()
        line = engine.upkeep.consumers.line
        with engine.upkeep.past.generation() as (meta, pager):
            with self._named_if_full():
                claim(destination, meta.store_id)
                sweep(destination)
            with suppress(CorruptionError):
                # What is remembered of damage may be damaged as well, as status and verify say.
                # What a deep check alone finds is whole, and may be of another history.
                self._damaged = {name for name, each in known_damage(destination).items() if not each.deep}
            with self._named_if_full():
                tell_fork(destination, line, engine.reads)
            stored = list_held(destination, line)
            # Asked for after looking, so that what is there and beyond it is none of this store's.
            until = Seqno(max(min(engine.upkeep.durable_seqno, engine.state.seqno), meta.replay_through))
            with engine.upkeep.read(meta.seqno, until, "backup"):
                self._refuse_diverged(stored, until)
                oldest = self._history(stored, kind, until) if history else None
                name = self._base(stored if oldest is None else list_held(destination, line), meta, pager, kind)
                if oldest is None:
                    self._commits_beyond(stored, meta, pager, until)
                else:
                    self._refuse_pruned(list_held(destination, line), oldest, until)
        return BackupReport(
            Position(line, until),
            meta.replay_through if oldest is None else oldest,
            str(name),
            tuple(name for name, _ in self._made),
            self._is_full,
            self._pages,
            sum(size for _, size in self._made),
            self._commits,
            time.monotonic() - began_s,
        )

    # -- the past -----------------------------------------------------------------------------

    def _history(self, stored: Held, kind: BaseKind, until: Seqno) -> Seqno:
        """The oldest moment of the window, and the commits from there on."""
        with self._engine.upkeep.past.generation(oldest=True) as (meta, pager):
            if not meta.generation:
                # The moment before the first commit: no pages.
                meta = _beginning(meta)
            with self._engine.upkeep.read(meta.seqno, until, "backup"):
                self._base(stored, meta, pager, kind)
                self._commits_beyond(stored, meta, pager, until, of_all=True)
        return meta.replay_through

    def _refuse_pruned(self, held: Held, oldest: Seqno, until: Seqno) -> None:
        """NotInBackup if something that this relied on was pruned meanwhile: then it begins again."""
        if not any(each.first <= oldest and until <= each.last for each in held.stretches()):
            raise held.refusal(oldest)

    # -- the base -----------------------------------------------------------------------------

    def _base(self, stored: Held, meta: Meta, pager: Pager, kind: BaseKind) -> BaseName:
        """Make the base of a generation, unless there is a whole one of its moment."""
        parent, reach = None, Reach()
        whole = stored.without(self._damaged)
        for name in reversed(whole.bases):
            if name.seqno > meta.replay_through or (kind == "full" and name.parent):
                continue
            chain = self._chain(whole, name)
            if chain is None:
                continue
            if name.seqno == meta.replay_through:
                # The same moment, even if pages were moved since.
                return name
            if kind == "auto" and name.generation < meta.generation:
                sizes = [header.size for _, header in chain]
                if len(chain) < _MOST_LINKS and sum(sizes[1:]) <= sizes[0]:
                    parent, reach = name, self._reach(chain)
            break
        table = walked(pager, meta, reach, self._yield_to_writers)
        name = BaseName(meta.line, meta.replay_through, meta.generation, 0 if parent is None else parent.generation)
        # One of that name was passed over, so it is damaged.
        replaced = [each for each in stored.bases if each[:-1] == name[:-1]]
        name = name._replace(revision=max((each.revision + 1 for each in replaced), default=0))
        self._is_full = self._is_full or parent is None
        extents = table.new(self._yield_to_writers)
        pieces = encode_base(pager, meta, parent, table, extents, self._digest_of(meta.replay_through))
        self._put(str(name), self._told(pieces, extents.page_bytes()), replaced)
        return name

    def _chain(self, stored: Held, name: BaseName) -> list[tuple[BaseName, BaseHeader]] | None:
        """A base with those it builds on; None if one of them is missing or damaged: nothing is built on that.

        Headers tell, and what `verify` has found.
        """
        try:
            return chain_of(self._destination, stored, name)
        except CorruptionError:
            return None

    def _reach(self, chain: list[tuple[BaseName, BaseHeader]]) -> Reach:
        reach: Reach | None = None
        for name, header in chain:
            reach = reach_of(self._destination, name, header, reach)
        return Reach() if reach is None else reach

    def _told(self, pieces: Iterator[bytes | bytearray], total: int) -> Iterator[bytes | bytearray]:
        done = 0
        for piece in pieces:
            yield piece
            done += len(piece)
            self._yield_to_writers()
            if self._progress is not None:
                self._progress(min(done, total), total)
        self._pages += total // 4096

    # -- the units ----------------------------------------------------------------------------

    def _commits_beyond(self, stored: Held, meta: Meta, pager: Pager, until: Seqno, *, of_all: bool = False) -> None:
        """Units of the commits behind a base, and of those before it that consumers of the last moment still read.

        `of_all`: consumers of each moment from the base on.
        """
        begin = self._begin_of_units(meta, pager, until, of_all)
        with self._engine.upkeep.read(begin, until, "backup") as records:
            self._units(stored, begin, until, records)

    def _begin_of_units(self, meta: Meta, pager: Pager, until: Seqno, of_all: bool) -> Seqno:
        """After which commit they begin: what a consumer asks for that is lost already holds up no other."""
        if not meta.seqno:
            return meta.seqno
        read = self._engine.upkeep.read
        rows = Tree(pager, meta, *root_of(pager, meta, SYSTEM_TABLE)).chunks(*CONSUMERS)
        asked = dict(each for keys, values in rows for each in asked_for(zip(keys, values, strict=True)))
        before = set(asked.values())
        with read(None, until, "backup") as whole, read(meta.seqno, until, "backup") as behind:
            # Runs are of plain puts.
            while (part := behind.next_part(until)) is not None:
                if isinstance(part, Record):
                    before |= asked_since(asked, [(part.kind, part.body)])
                self._yield_to_writers()
            those = before if of_all else asked.values()
            return min([meta.seqno, *(seqno for seqno in those if seqno >= whole.position)])

    def _units(self, stored: Held, after: Seqno, until: Seqno, records: SegmentCursor) -> None:
        """Make units of the commits beyond `after`, as far as there are no whole ones."""
        store_id, line = self._engine.state.version.tree.meta.store_id, stored.line
        whole = stored.without(self._damaged)
        there = whole.units_from(after, until)
        begin, digest = after, digest_after(self._destination, store_id, whole, after)
        if there:
            name = str(there[-1])
            found = fetch_header(self._destination, name)
            begin, digest = found.last, found.after
        builder = UnitBuilder(store_id, line, begin, digest)
        for record in records:
            if record.seqno <= begin:
                continue
            builder.add(record.kind, record.time_us, record.body)
            self._yield_to_writers()
            if builder.size >= _UNIT_BYTES:
                builder = self._put_unit(stored, builder)
        if builder.size:
            self._put_unit(stored, builder)

    def _put_unit(self, stored: Held, builder: UnitBuilder) -> UnitBuilder:
        unit, raw = builder.encode()
        name = unit.header.name
        replaced = [each for each in stored.units if each[:-1] == name[:-1] and str(each) in self._damaged]
        if replaced:
            unit, raw = builder.encode(revision=replaced[0].revision + 1)
        self._put(str(unit.header.name), raw, replaced)
        self._commits += name.last - name.first
        return UnitBuilder(unit.header.store_id, stored.line, builder.last, builder.digest)

    def _refuse_diverged(self, stored: Held, until: Seqno) -> None:
        """ArchiveDiverged if the line has another history in the destination than in the store.

        That is told by commits that the store does not have, and by the last commit of the newest unit, and that of the
        newest base, as far as the log still has them. Where it does not, no unit here follows on one that is there, and
        a base takes from others only what is the same. One that is only read, beside its writer, may be behind what
        another backup has.
        """
        beyond = max([0, *(name.last for name in stored.units), *(name.seqno for name in stored.bases)])
        if beyond > until and not self._engine.upkeep.is_read_only:
            raise ArchiveDiverged(until)
        whole = stored.without(self._damaged)
        unit = max((name for name in whole.units if name.last <= until), key=lambda name: name.last, default=None)
        if unit is not None and self._is_other(unit.last, lambda: self._last_of(unit)):
            raise ArchiveDiverged(unit.first)
        base = max((name for name in whole.bases if name.seqno <= until), key=lambda name: name.seqno, default=None)
        if base is not None and self._is_other(base.seqno, lambda: self._commit_of(base)):
            raise ArchiveDiverged(max((name.seqno for name in stored.bases if name.seqno < base.seqno), default=0))

    def _is_other(self, seqno: Seqno, theirs: Callable[[], bytes]) -> bool:
        """Whether the destination is known to have another commit of this number than the log."""
        ours = self._digest_of(seqno)
        if ours == _UNKNOWN:
            return False
        found = theirs()
        return found not in (ours, _UNKNOWN)

    def _digest_of(self, seqno: Seqno) -> bytes:
        """That of one commit, or zeros if the log does not have it any more."""
        if not seqno:
            return _UNKNOWN
        try:
            with self._engine.upkeep.read(Seqno(seqno - 1), seqno, "backup") as records:
                record = next(iter(records))
        except FeedGap:
            return _UNKNOWN
        return lone_digest(record.kind, record.time_us, record.body)

    def _last_of(self, name: UnitName) -> bytes:
        unit = fetch_unit(self._destination, name)
        (last,) = deque(unit.commits(), maxlen=1)
        return lone_digest(last.kind, last.time_us, last.body)

    def _commit_of(self, name: BaseName) -> bytes:
        try:
            return read_header(self._destination, str(name)).commit
        except CorruptionError:
            # Nothing is built on it, either.
            return _UNKNOWN

    # -- both ---------------------------------------------------------------------------------

    def _put(
        self, name: str, data: bytes | Iterator[bytes | bytearray], replaced: Iterable[BaseName | UnitName] = ()
    ) -> None:
        size = crc = 0
        of_data: list[OSError] = []

        def counted() -> Iterator[bytes | bytearray]:
            nonlocal size, crc
            try:
                for piece in (data,) if isinstance(data, bytes) else data:
                    size += len(piece)
                    crc = crc32c(piece, crc)
                    yield piece
            except OSError as error:
                of_data.append(error)
                raise

        with self._named_if_full(of_data):
            is_new = self._destination.put_new(name, counted())
        if is_new:
            self._read_back(name, size, crc)
            self._made.append((name, size))
            for each in replaced:
                # The newer revision is taken instead. What is left would come up again when that is deleted.
                self._destination.delete(str(each))

    @contextmanager
    def _named_if_full(self, but: Container[OSError] = ()) -> Iterator[None]:
        """DiskFullError that names the destination where it is full. `but`: errors of what is put there."""
        try:
            yield
        except OSError as error:
            if error in but or not is_full(error):
                raise
            place = getattr(self._destination, "path", self._destination)
            raise DiskFullError(f"there is no space to back up to {place}; free some, and call it again") from error

    def _read_back(self, name: str, size: int, crc: int) -> None:
        """CorruptionError if the destination has other bytes than were put there: nothing is to be built on those."""
        at = found = 0
        while raw := self._destination.get(name, start=at, size=_READ_BYTES):
            found = crc32c(raw, found)
            at += len(raw)
            self._yield_to_writers()
        if (at, found) != (size, crc):
            self._destination.delete(name)
            raise CorruptionError(name, None, "came back from the destination with other bytes than were put")

    def _yield_to_writers(self) -> None:
        if time.monotonic() - self._worked_s >= _WORK_S:
            if self._engine.queue.is_busy():
                time.sleep(_PAUSE_S)
            self._worked_s = time.monotonic()


def _beginning(meta: Meta) -> Meta:
    """That of a base before the first commit: an empty store's first generation."""
    return replace(meta, generation=1, page_count=2)
