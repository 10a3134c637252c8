"""What an archive keeps: small units are merged into larger ones, and what is older than wanted goes.

Merging. Units of a closed window of time become one unit of the next level: of 30 s at level 1, of 5 minutes at level
2, of an hour at level 3, by the times of commits. So a restore asks for few objects, and every moment stays.

Thinning. Every moment of the last `pitr_s` seconds stays; of what is older one base for each day, and for each month.
Times are those of commits, and the newest one, or the wall clock if that is behind it, counts as now: an archive
of an idle store stays as it is, and the newest moment always does.

Invariant: a unit is deleted for being merged only after the merged one was read back, and has its digests.
Invariant: before anything is thinned, it is proved on the names that every moment that is to stay can be restored then,
without any object that `verify` has found damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from itertools import chain, groupby
from typing import Any, Final, NamedTuple

from kvwal.backup import state
from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held, Stretch, around, list_held, seqno_at
from kvwal.backup.fetching import fetch_header, fetch_stored, fetch_unit
from kvwal.backup.names import MAX_LEVEL, BaseName, UnitName
from kvwal.backup.port import Destination
from kvwal.backup.proofs import known_damage
from kvwal.backup.replaying import replay_units
from kvwal.backup.units import UnitBuilder, UnitHeader, decode_unit
from kvwal.errors import BackupDestinationError, CorruptionError, NotInBackup
from kvwal.keys import Seqno, as_seconds
from kvwal.times import time_of

__all__ = ["WINDOWS_S", "Keep", "Merging", "Pruning", "plan_pruning", "prune"]

#: Length of the window of each level from 1 on, in seconds.
WINDOWS_S: Final = (30, 300, 3600)
# What has more commits than that in bytes is not merged any more: a restore takes a unit into memory.
_MOST_MERGED_BYTES: Final = 32 << 20
# Before the first commit that there can be, and in us an int.
_FOR_EVER_S: Final = 1e12


@dataclass(frozen=True, slots=True)
class Keep:
    """How long an archive keeps what.

    Attributes:
        pitr_s: every moment of this time, in seconds, from the newest commit back; `math.inf`: for ever.
        daily: of what is older, the last base of each day (UTC), for this number of days that have one.
        monthly: the same for months.
    """

    pitr_s: float = 30 * 86400.0
    daily: int = 90
    monthly: int = 24

    def __post_init__(self) -> None:
        for name in ("daily", "monthly"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} is a number of bases, not {getattr(self, name)!r}")
        as_seconds("pitr_s", self.pitr_s)


class Merging:
    """Merges the units of a line, a little at a time. It remembers the headers that it has read."""

    def __init__(self, destination: Destination, store_id: bytes, line: bytes) -> None:
        self._destination = destination
        self._store_id = store_id
        self._line = line
        self._headers: dict[str, UnitHeader] = {}
        #: What there was when it last looked.
        self.held: Held | None = None
        # A unit, and one of a higher level that has its commits and not its digests.
        self._other_chain: set[tuple[UnitName, UnitName]] = set()

    def step(self, until: Seqno, *, epoch: int = 0, codec: str = "zlib") -> bool:
        """Merge one window, and delete what is merged. `until`: up to here all is read back. False: there is none."""
        held = self.held = list_held(self._destination, self._line)
        self._headers = {name: header for name, header in self._headers.items() if name in held.sizes}
        for level in range(1, MAX_LEVEL + 1):
            for group in self._groups(held, level, until):
                self._merge(group, level, epoch, codec)
                return True
        return self._delete_covered(held, until)

    def _header(self, name: UnitName) -> UnitHeader:
        text = str(name)
        header = self._headers.get(text)
        if header is None:
            header = self._headers[text] = fetch_header(self._destination, text)
        return header

    def _groups(self, held: Held, level: int, until: Seqno) -> Iterator[list[UnitName]]:
        """Units of lesser levels that follow each other, of one window that is over."""
        window_us = WINDOWS_S[level - 1] * 1_000_000
        for stretch in _unit_stretches(held, until):
            path = held.units_from(stretch.first, stretch.last)

            def window(name: UnitName, window_us: int = window_us) -> int:
                # Of those that are not merged only whether they part others matters.
                return self._header(name).first_time_us // window_us if name.level < level else -1 - name.first

            groups = [list(names) for _, names in groupby(path, key=window)]
            # The last one is still growing. Only units of one chain become one.
            for group in (part for each in groups[:-1] for part in self._connected(each)):
                size = sum(self._header(name).plain_size for name in group) if len(group) > 1 else 0
                if len(group) > 1 and group[0].level < level and size <= _MOST_MERGED_BYTES:
                    yield group

    def _connected(self, group: list[UnitName]) -> Iterator[list[UnitName]]:
        part: list[UnitName] = []
        for name in group:
            head = self._header(name)
            if part:
                before = self._header(part[-1])
                if (before.last, before.after) != (head.first, head.before):
                    yield part
                    part = []
            part.append(name)
        yield part

    def _merge(self, group: Sequence[UnitName], level: int, epoch: int, codec: str) -> None:
        first, last = group[0].first, group[-1].last
        builder = UnitBuilder(self._store_id, self._line, first, self._header(group[0]).before)
        runs = replay_units(self._destination, self._store_id, group, first, last)
        for kind, _, time_us, body in chain.from_iterable(runs):
            builder.add(kind, time_us, body)
        if builder.digest != self._header(group[-1]).after:
            raise CorruptionError(str(group[-1]), None, "its digest is not that of the units before it")
        unit, data = builder.encode(epoch=epoch, level=level, codec=codec)
        name = str(unit.header.name)
        self._destination.put_new(name, data)
        self._delete_merged(group, unit.header.name)

    def _delete_merged(self, names: Sequence[UnitName], into: UnitName) -> int:
        """Delete units of whose commits each is in another one, which is read back first. Returns how many went."""
        text = str(into)
        try:
            data = fetch_stored(self._destination, into)
            whole = decode_unit(text, data)
        except CorruptionError:
            # The units that it was made of are all there.
            self._destination.delete(text)
            raise
        # Durability: it may be of one that was killed before it had flushed it. The name is taken, so nothing changes.
        self._destination.put_new(text, data)
        digests = whole.digests({seqno for name in names for seqno in (name.first, name.last)})
        agreed: list[UnitName] = []
        for name in names:
            mine = self._header(name)
            # Durability: only what has the same digests. One of another chain stays: units may go on from it.
            if (digests[name.first], digests[name.last]) == (mine.before, mine.after):
                agreed.append(name)
                continue
            if fetch_unit(self._destination, name).commit(name.last) != whole.commit(name.last):
                raise CorruptionError(str(name), None, f"has other commits than {into}")
            self._other_chain.add((name, into))
        for name in agreed:
            self._destination.delete(str(name))
        return len(agreed)

    def _delete_covered(self, held: Held, until: Seqno) -> bool:
        """Go on where merging was cut off: delete what a unit of a higher level has. False if there is nothing."""
        for into in sorted(held.units, key=lambda name: -name.level):
            covered = [
                name
                for name in held.units
                if name.level < into.level and into.first <= name.first and name.last <= into.last <= until
                if (name, into) not in self._other_chain
            ]
            if covered and self._delete_merged(covered, into):
                return True
        return False


def _unit_stretches(held: Held, until: Seqno) -> list[Stretch]:
    """Commits that units have without a gap, up to `until`."""
    found: list[Stretch] = []
    for name in held.units:
        if name.last > until:
            continue
        if found and name.first <= found[-1].last:
            found[-1] = Stretch(found[-1].first, max(found[-1].last, name.last))
        else:
            found.append(Stretch(name.first, name.last))
    return found


class Pruning(NamedTuple):
    """What thinning deletes, and what then cannot be restored any more.

    Attributes:
        line: 8 bytes.
        keep_from: every moment from this one on stays.
        kept: the moments before it that stay, each that of a base.
        delete: names, units first. bytes: of these objects.
        unreachable: moments that can be restored now, and not afterwards.
    """

    line: bytes
    keep_from: Seqno
    kept: tuple[Seqno, ...]
    delete: tuple[str, ...]
    bytes: int
    unreachable: tuple[Stretch, ...]


def plan_pruning(destination: Destination, held: Held, keep: Keep, now_us: int) -> Pruning:
    """What is to go. Nothing is changed. BackupDestinationError if a moment that is to stay could not be restored.

    It reads the header of each base, a few units, and what `verify` has found damaged. That gives no moment, and it
    stays as long as a moment of its age, with what it needs: it may be brought back from a copy of the destination.
    """
    whole = held.without(known_damage(destination))
    moments = whole.stretches()
    if not moments:
        return Pruning(held.line, Seqno(0), (), (), 0, ())
    headers = {base: read_header(destination, str(base)) for base in whole.bases if whole.lineage(base) is not None}
    # One that was made within a checkpoint in parts needs a few commits to be a moment.
    times_us = {base: head.meta.time_us for base, head in headers.items() if whole.reach(head.seqno) >= base.seqno}
    oldest = held.stretches()[0].first
    since_us = _since_us(destination, whole, keep, now_us, times_us)
    keep_from = _keep_from(destination, whole, since_us, times_us, oldest)
    older = [base for base in times_us if base.seqno < keep_from]
    chosen = _thinned(older, times_us, keep)
    plan = whole.plan(max(keep_from, moments[0].first), begins=lambda base: headers[base].seqno)
    needed_bases = set(plan.bases) | {base for base in held.bases if base.seqno >= keep_from}
    # Consumers of a moment may still read what is before the oldest base.
    before = around(destination, whole, since_us).before if since_us > 0 else None
    needed_units = {name for name in held.units if name.last > min(plan.after, keep_from, before or 0)}
    for base in chosen:
        own = whole.plan(base.seqno, begins=lambda each: headers[each].seqno)
        needed_bases |= set(own.bases)
        if own.units:
            # These commits, and what tells that they follow each other.
            needed_units |= {name for name in held.units if name.first < base.seqno and name.last > own.after}
    for base in list(needed_bases):
        needed_bases |= set(held.lineage(base) or ())
    delete = [str(name) for name in held.units if name not in needed_units]
    delete += [str(base) for base in held.bases if base not in needed_bases]
    kept = tuple(sorted({base.seqno for base in chosen}))
    after = whole.without(set(delete))
    _prove(whole, after, keep_from, kept)
    size = sum(held.sizes[name] for name in delete)
    return Pruning(held.line, keep_from, kept, tuple(delete), size, tuple(_lost(moments, after.stretches())))


def _since_us(
    destination: Destination, held: Held, keep: Keep, now_us: int, times_us: dict[BaseName, int]
) -> int:
    """When the last `pitr_s` seconds began."""
    newest_us = max(times_us.values(), default=0)
    if held.units:
        last = str(max(held.units, key=lambda name: name.last))
        newest_us = max(newest_us, fetch_header(destination, last).last_time_us)
    return min(newest_us, now_us) - int(min(keep.pitr_s, _FOR_EVER_S) * 1e6)


def _keep_from(
    destination: Destination, held: Held, since_us: int, times_us: dict[BaseName, int], oldest: Seqno
) -> Seqno:
    """The oldest moment since that time that can be restored; `oldest` if all are later."""
    by_base = max((base.seqno for base, at_us in times_us.items() if at_us <= since_us), default=oldest)
    try:
        # The state at that time is that of the last commit before.
        found = seqno_at(destination, held, time_of(since_us)) if since_us > 0 else oldest
    except NotInBackup:
        found = by_base
    return max(found, by_base)


def _thinned(bases: list[BaseName], times_us: dict[BaseName, int], keep: Keep) -> set[BaseName]:
    """The last base of each of the newest days and months."""
    chosen: set[BaseName] = set()
    for count, form in ((keep.daily, "%Y-%m-%d"), (keep.monthly, "%Y-%m")):
        last: dict[str, BaseName] = {}
        for base in sorted(bases, key=lambda base: (base.seqno, base.generation)):
            last[time_of(times_us[base]).astimezone(UTC).strftime(form)] = base
        chosen |= set(list(last.values())[len(last) - count :] if count else ())
    return chosen


def _prove(before: Held, after: Held, keep_from: Seqno, kept: Sequence[Seqno]) -> None:
    remaining = after.stretches()
    must = [Stretch(max(each.first, keep_from), each.last) for each in before.stretches() if each.last >= keep_from]
    for stretch in [*must, *(Stretch(seqno, seqno) for seqno in kept)]:
        if not any(each.first <= stretch.first and stretch.last <= each.last for each in remaining):
            raise BackupDestinationError(
                f"nothing was pruned: the moments {stretch.first} to {stretch.last} are to be kept, and could not be "
                "restored afterwards"
            )


def _lost(before: Sequence[Stretch], after: Sequence[Stretch]) -> Iterator[Stretch]:
    for stretch in before:
        at: int = stretch.first
        for each in after:
            if each.last < at or each.first > stretch.last:
                continue
            if each.first > at:
                yield Stretch(Seqno(at), Seqno(each.first - 1))
            at = each.last + 1
        if at <= stretch.last:
            yield Stretch(Seqno(at), stretch.last)


def prune(destination: Destination, pruning: Pruning) -> None:
    """Delete what was planned. It may be cut off anywhere, and done again."""
    line = pruning.line.hex()

    def with_line(members: dict[str, Any]) -> dict[str, Any]:
        from_before = members.get(line, 0)
        return {**members, line: max(pruning.keep_from, from_before if isinstance(from_before, int) else 0)}

    if pruning.delete:
        # First, so that what is missing from here on is known to be missing on purpose.
        state.change(destination, state.KEPT, with_line)
    for name in pruning.delete:
        destination.delete(name)
