"""The archiver: brings the durable commits of an open store into a destination, one step at a time.

It has no thread of its own (archive.py has), so a test can interleave its steps with all that may happen.

Rules:
- Only durable commits are archived, in order: units `(first, last]` behind a base.
- Durability: the mark moves over a unit only when the unit was read back from the destination and is what was put; and
  the log beyond the mark is held. So every commit at or below the mark can be restored, after a crash of the store, of
  the archiver, or of both.
- An archiver that finds another one's claim on the mark was superseded, and stops (see claims.py); it looks before it
  merges or deletes.
- What the destination holds is found by listing it, and never taken from the mark alone: a mark says less than there is
  after a crash, and what it says may have been deleted since.
- A hold is dropped when it is beyond `max_behind_bytes`; of one that stalls commits never, since those wait instead.
- Log is held from the beginning on, and until it is known where to go on: what a destination does not tell is not lost.
- After a hold was dropped, it goes on from the first moment beyond which the log has all commits, or from a new base. A
  gap that is passed over is recorded.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from kvwal.backup import state
from kvwal.backup.adopting import adopt, without_damaged_end
from kvwal.backup.chain import Gap, Held, digest_after, list_confirmed, list_held, refuse_diverged
from kvwal.backup.checking import lost_gaps
from kvwal.backup.claims import Claim, Superseded
from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.forks import tell_fork
from kvwal.backup.identity import claim, keep_claim
from kvwal.backup.keeping import Keep, Merging, plan_pruning, prune
from kvwal.backup.port import Destination, sweep
from kvwal.backup.units import UnitBuilder
from kvwal.engine.engine import Engine
from kvwal.errors import ArchiveDiverged, BackupDestinationError, CorruptionError, FeedGap, FormatError, NotInBackup
from kvwal.files import system_files
from kvwal.keys import Seqno
from kvwal.log import ArchiveLimits, Hold, SegmentCursor, sealed_beyond

__all__ = ["UNIT_BYTES", "Archiver", "MakeBase"]

_log = logging.getLogger("kvwal")

#: A unit is cut when its body has this size.
UNIT_BYTES: Final = 8 << 20
_PURPOSE: Final = "archive"
# How often it looks whether units can be merged, and whether something is older than wanted.
_MERGE_EVERY_S: Final = 30.0
_PRUNE_EVERY_S: Final = 3600.0

#: Puts a base into the destination, with units up to the last commit that was durable when it was called, and reads the
#: base back; meanwhile it calls its last argument.
MakeBase = Callable[[Engine, Destination, Callable[[], object]], object]


class Archiver:
    """The archiver of one store. For one thread, but for what is read of it, which changes by single assignments."""

    def __init__(
        self,
        engine: Engine,
        destination: Destination,
        make_base: MakeBase,
        *,
        rpo_s: float,
        max_behind_bytes: int | None,
        stalls: bool = False,
        base_bytes: int = 64 << 20,
        base_every_s: float = 86400.0,
        keep: Keep | None = None,
        codec: str = "zlib",
        monotonic_s: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """
        Args:
            rpo_s: how long a durable commit may wait until its unit is cut.
            max_behind_bytes: how much sealed log may be kept for it; None: no limit, until the disk is full.
            stalls: whether commits wait when that much is kept, instead of a gap.
            base_bytes, base_every_s: a base is made when units since the last one have this size, or it has this age.
            keep: what stays; None: everything, and units are not merged either.
        """
        self._engine = engine
        self._destination = destination
        self._make_base = make_base
        self._rpo_s = rpo_s
        self._limits = None if stalls else ArchiveLimits(max_behind_bytes, None)
        self._most_bytes = max_behind_bytes if stalls else None
        self._base_bytes, self._base_every_s = base_bytes, base_every_s
        self._keep = keep
        self._codec = codec
        self._monotonic_s = monotonic_s
        self._store_id = engine.state.version.tree.meta.store_id
        self._line = engine.upkeep.consumers.line
        self._hold: Hold | None = None
        # What there is now, until it is known which of it is needed; what is beyond `_began_at` counts until then.
        self._first_hold: Hold | None = self._hold_first()
        self._began_at = engine.upkeep.durable_seqno
        self._segments = engine.upkeep.consumers.log().segments
        self._cursor: SegmentCursor | None = None
        self._digest = b""
        self._pending_since_s: float | None = None
        self._unit_bytes = 0
        self._base_s = 0.0
        self._in_base = False
        self._claim = Claim(destination, self._line, random_bytes or system_files().random_bytes)
        self._merging = Merging(destination, self._store_id, self._line)
        # None: by the second step, so that programs that never run for an hour tidy up, too. Where nothing is merged
        # and deleted, only gaps are looked for, which the first step does.
        self._tidied_s: float | None = monotonic_s() if keep is None else None
        self._pruned_s = monotonic_s() if keep is None else -math.inf
        #: What failed when units were merged, or old ones deleted; None if it did not. It is tried again.
        self.trouble: Exception | None = None
        #: Every moment from the first base on up to this commit can be restored; None until that is known.
        self.mark: Seqno | None = None
        #: Gaps of the destination that were not accepted: as of when it began; while there are some, they
        #: are looked at again.
        self.gaps: tuple[Gap, ...] = ()
        #: How many were made since it began.
        self.units = self.bases = 0

    @property
    def epoch(self) -> int:
        """Number of the claim; 0 before it is made."""
        return self._claim.epoch

    # -- what a thread calls ------------------------------------------------------------------

    def step(self, *, now: bool = False) -> float | None:
        """Do what is due. Returns after how many seconds something is; None: when a commit comes.

        `now`: what is durable is archived at once. It raises what the destination, or the log, raises: the next step
        goes on where it can.
        """
        self._engine.state.refuse_if_gone()
        if self._hold is not None and not self._hold.is_held:
            self._let_go()
        if self._hold is None:
            self._attach()
        durable = self._engine.upkeep.durable_seqno
        if self._at() >= durable:
            self._pending_since_s = None
            return self._tidy()
        if self._pending_since_s is None:
            self._pending_since_s = self._monotonic_s()
        left_s = self._pending_since_s + self._rpo_s - self._monotonic_s()
        if left_s > 0 and not now and not self.is_behind():
            return left_s
        self._cut(durable)
        self._pending_since_s = None
        return self._tidy()

    def idle_s(self) -> float:
        """For how long one that waits for a commit may wait at most: then it is to look at the destination again."""
        if self._tidied_s is None:
            return 0.0
        return min(max(0.0, self._tidied_s + _MERGE_EVERY_S - self._monotonic_s()), _MERGE_EVERY_S)

    def when_beyond(self, wake: Callable[[], object]) -> Callable[[], object] | None:
        """Have `wake` called when there is a commit to archive. Returns what takes that back; None if none may come."""
        cursor = self._cursor
        return None if cursor is None else cursor.when_beyond(wake)

    def is_behind(self) -> bool:
        """Whether commits are to wait, as the log that is held is at its limit. From any thread, without a lock."""
        hold = self._hold
        if self._most_bytes is None or (hold is None and self._first_hold is None):
            return False
        after = self._began_at if hold is None else hold.after
        return sealed_beyond(self._segments(), after) > self._most_bytes

    def close(self) -> None:
        """Let go of the log. Idempotent. From any thread."""
        self._let_go()
        self._let_go_of_all()

    # -- where it begins ----------------------------------------------------------------------

    def _at(self) -> Seqno:
        assert self.mark is not None, "it is attached"
        return self.mark

    def _hold_first(self) -> Hold:
        """Hold log before it is known which of it is needed: all there is, and what comes up to the limit.

        Of one that has a limit not all there is, but as much as the limit.
        """
        consumers, limits = self._engine.upkeep.consumers, self._limits
        if limits is None or limits.max_bytes is None:
            return consumers.begin_hold(_PURPOSE, None, limits)
        everything, segments, most = consumers.begin_hold(_PURPOSE, None, None), consumers.segments(), limits.max_bytes
        # The later, the less is beyond it.
        i = bisect_left(segments, -most, key=lambda each: -sealed_beyond(segments, Seqno(each.first_seqno - 1)))
        after = max(everything.after, Seqno(segments[i].first_seqno - 1))
        hold = consumers.begin_hold(_PURPOSE, after, ArchiveLimits(most + sealed_beyond(segments, after), None))
        everything.release()
        return hold

    def _let_go(self) -> None:
        hold, self._hold = self._hold, None
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            cursor.close()
        if hold is not None:
            hold.release()

    def _find_anew(self) -> None:
        """Have the next step find where to go on. Until it has, what is held stays held."""
        hold = self._hold
        if hold is not None:
            # In this order: `is_behind` looks at them meanwhile.
            self._began_at, self._first_hold, self._hold = hold.after, hold, None
        self._let_go()

    def _let_go_of_all(self) -> None:
        hold, self._first_hold = self._first_hold, None
        if hold is not None:
            hold.release()

    def _attach(self) -> None:
        """Claim the destination, find where to go on, and hold the log from there."""
        destination, upkeep = self._destination, self._engine.upkeep
        claim(destination, self._store_id)
        sweep(destination)
        # Before the claim, which ends another archiver: a copy of the store is to end none. Damage is met below.
        tell_fork(destination, self._line, self._engine.reads)
        with suppress(CorruptionError):
            held = without_damaged_end(destination, list_held(destination, self._line))
            refuse_diverged(self._read_one, destination, held, upkeep.durable_seqno)
        marked = self._claim.take()
        held = list_held(destination, self._line)
        if marked is not None and (less := without_damaged_end(destination, held, marked)) != held:
            # Damage behind the mark: those commits are put anew if the log has them; else a base ends the gap.
            held, marked = less, less.newest()
        # Asked for after listing: what is beyond it in the destination is none of this store's.
        durable = upkeep.durable_seqno
        found = self._go_on(held, marked)
        hold, position = found or (None, held.newest())
        try:
            if found is None and position is not None:
                with suppress(NotInBackup):
                    adopt(destination, self._store_id, held, marked, position)
            refuse_diverged(self._read_one, destination, held, durable)
            lost, end = held.last_with(marked), held.lost_end(marked)
            if hold is None:
                held, hold = self._begin()
                position = held.newest()
                if position is None or position < hold.after:
                    raise BackupDestinationError("a base was put into the destination, and is not there")
                adopt(destination, self._store_id, held, hold.after, position)
            assert position is not None, "a hold has one"
            if marked is None:
                # First: what backups lack below is none of what archivers pass over.
                state.record_beginning(destination, self._line, position)
            self._record_gaps(held, lost, position, end)
            # What is beyond that is put anew.
            gaps = tuple(gap for gap in lost_gaps(destination, held, position) if gap.first <= position)
            digest = digest_after(destination, self._store_id, held, position)
            self._claim.move(position, digest)
            # One that was made just now needs no other.
            replayed, since_s = (0, 0.0) if found is None else self._since_base(held, position)
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        self._unit_bytes, self._base_s = replayed, self._monotonic_s() - since_s
        # Durability: held from before the mark on, so that nothing is missing between.
        hold.advance(position)
        self.mark, self._digest, self._hold, self.gaps = position, digest, hold, gaps
        self._let_go_of_all()
        self._cursor = upkeep.read(position, None, None)

    def _go_on(self, held: Held, marked: Seqno | None) -> tuple[Hold, Seqno] | None:
        """Hold the log from the end of the stretch that the mark is in, or of the first one behind it, if it can be."""
        for stretch in held.stretches():
            if marked is not None and stretch.last < marked:
                continue
            try:
                hold = self._engine.upkeep.consumers.begin_hold(_PURPOSE, stretch.last, self._limits)
            except FeedGap:
                continue
            try:
                adopt(self._destination, self._store_id, held, marked, stretch.last)
                return hold, stretch.last
            except BaseException as error:
                hold.release()
                if not isinstance(error, NotInBackup):
                    raise
        return None

    def _begin(self) -> tuple[Held, Hold]:
        """Make a base to begin with, or to end a gap."""
        upkeep = self._engine.upkeep
        # Held from before the base is made, which comes with units up to here.
        hold = upkeep.consumers.begin_hold(_PURPOSE, upkeep.durable_seqno, self._limits)
        try:
            self._make_base(self._engine, self._destination, lambda: None)
            self.bases += 1
            return list_held(self._destination, self._line), hold
        except BaseException:
            hold.release()
            raise

    def _since_base(self, held: Held, position: Seqno) -> tuple[int, float]:
        """Size of the units that a restore of that moment replays, and how many seconds ago their first commit was."""
        units = held.plan(position).units
        if not units:
            return 0, 0.0
        first, first_us = str(units[0]), 0
        # One that is damaged is as good as very old: a base does without it.
        with suppress(CorruptionError, FormatError):
            first_us = fetch_header(self._destination, first).first_time_us
        since_us = max(0, self._engine.reads.moments.wall_us() - first_us)
        return sum(held.sizes[str(name)] for name in units), since_us / 1e6

    def _record_gaps(self, held: Held, lost: Seqno | None, position: Seqno, end: Gap | None) -> None:
        """The gaps that are passed over: those between where it could not go on, and where it does.

        `end`: that of the line, if objects are gone that were there, and the log was kept long enough.
        """
        why = () if end is None else ("objects are missing",)
        gaps = [gap for gap in held.gaps() if lost is not None and lost < gap.first and gap.last < position]
        began = state.began_at(self._destination, self._line) if gaps else 0
        for gap in gaps:
            if gap.last >= began or (end is not None and gap.first == end.first):
                _log.warning("the archive has a gap: commits %s cannot be restored; a base ends it", gap)
                wall_us = self._engine.reads.moments.wall_us()
                state.record_gap(self._destination, self._line, *gap, wall_us, *why)

    def _read_one(self, seqno: Seqno) -> tuple[int, int, bytes] | None:
        """Kind, time and body of a commit of the log; None if it is no longer kept."""
        with suppress(FeedGap), self._engine.upkeep.read(Seqno(seqno - 1), seqno, _PURPOSE) as records:
            for record in records:
                return record.kind, record.time_us, record.body
        return None

    # -- units --------------------------------------------------------------------------------

    def _cut(self, durable: Seqno) -> None:
        """Archive all commits up to `durable`, as units."""
        try:
            while (at := self._at()) < durable:
                if self._cursor is None:
                    self._cursor = self._engine.upkeep.read(at, None, None)
                builder = UnitBuilder(self._store_id, self._line, at, self._digest)
                for record in self._cursor:
                    builder.add(record.kind, record.time_us, record.body)
                    if builder.size >= UNIT_BYTES:
                        break
                if builder.last == at:
                    return
                self._put(builder)
        except BaseException:
            # It went on from the mark, and so does the next try.
            cursor, self._cursor = self._cursor, None
            if cursor is not None:
                cursor.close()
            hold = self._hold
            if hold is not None and not hold.is_held:
                # What was to be read is gone: the next step begins with a base.
                self._let_go()
                return
            raise

    def _put(self, builder: UnitBuilder) -> None:
        """Put a unit, read it back, and move the mark."""
        destination, revision = self._destination, 0
        while True:
            unit, data = builder.encode(epoch=self.epoch, codec=self._codec, revision=revision)
            name = str(unit.header.name)
            if destination.put_new(name, data):
                # Durability: what comes back, and no answer, says that it is there.
                if destination.get(name, size=len(data) + 1) != data:
                    destination.delete(name)
                    raise CorruptionError(name, None, "came back from the destination with other bytes than were put")
                break
            # It was put before, and the answer, or this process, was lost. Beyond the mark nothing relies on it.
            try:
                found = fetch_unit(destination, name)
            except CorruptionError:
                destination.delete(name)
                raise
            if found.header.after == unit.header.after:
                break
            if list(found.commits()) != list(unit.commits()):
                raise ArchiveDiverged(unit.header.first)
            # One of a backup, whose chain began elsewhere. A newer revision goes on with the chain of this one.
            revision += 1
        self._claim.move(builder.last, builder.digest)
        self.mark, self._digest = builder.last, builder.digest
        self.units += 1
        self._unit_bytes += len(data)
        if self._hold is not None:
            self._hold.advance(builder.last)

    # -- beside units -------------------------------------------------------------------------

    def _tidy(self) -> float | None:
        """Make a base, merge units and delete old ones, where that is due. Returns as `step`."""
        wait_s = self._base_if_due()
        now_s = self._monotonic_s()
        if self._in_base or self._hold is None:
            return wait_s
        if self._tidied_s is None:
            self._tidied_s = -math.inf
            return 0.0
        if now_s < self._tidied_s + _MERGE_EVERY_S:
            return wait_s
        at = self._at()
        try:
            self._claim.look()
            self._claim.move(at, self._digest)
            keep_claim(self._destination, self._store_id)
            # One at a time, so that units are cut between.
            if self._keep is not None and self._merging.step(at, epoch=self.epoch, codec=self._codec):
                return 0.0
            self._tidied_s = now_s
            is_hourly = now_s >= self._pruned_s + _PRUNE_EVERY_S
            if (self._keep is not None or self.gaps or is_hourly) and self._is_end_lost(at):
                # The next step makes a base, so that what comes from now on can be restored.
                self._find_anew()
                return 0.0
            if is_hourly:
                sweep(self._destination)
                if self._keep is not None:
                    self._prune(self._keep)
                self._pruned_s = now_s
        except Superseded:
            raise
        except Exception as error:  # noqa: BLE001  # told by `trouble`: units go on
            self._tidied_s = now_s
            if self.trouble is None:
                _log.error("the archive cannot be tidied up: %s", error)
            self.trouble = error
        else:
            self.trouble = None
        return wait_s

    def _is_end_lost(self, at: Seqno) -> bool:
        """Look which commits cannot be restored; whether that is so of the last ones. `at`: the mark."""
        held = self._merging.held
        if self._keep is None or held is None or lost_gaps(self._destination, held, at):
            held = list_confirmed(self._destination, self._line, at)
        self.gaps = lost_gaps(self._destination, held, at)
        end = held.lost_end(at)
        if end is not None:
            _log.error("the archive has lost objects: commits %s cannot be restored", end)
        return end is not None

    def _prune(self, keep: Keep) -> None:
        held = list_held(self._destination, self._line)
        prune(self._destination, plan_pruning(self._destination, held, keep, self._engine.reads.moments.wall_us()))

    def _base_if_due(self) -> float | None:
        """Make a base where a restore would have to replay much; meanwhile units go on being cut."""
        since_s = self._monotonic_s() - self._base_s
        if self._in_base or not (
            self._unit_bytes >= self._base_bytes or (self._unit_bytes and since_s >= self._base_every_s)
        ):
            return None if self._at() >= self._engine.upkeep.durable_seqno else self._rpo_s
        self._in_base = True
        try:
            self._make_base(self._engine, self._destination, self._while_making)
        finally:
            self._in_base = False
        self.bases += 1
        self._unit_bytes, self._base_s = 0, self._monotonic_s()
        return 0.0

    def _while_making(self) -> None:
        if self._hold is not None and self._hold.is_held:
            self.step()
