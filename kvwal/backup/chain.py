"""What a destination holds of a line of commits, and which bases and units give a moment.

A base of seqno S, together with those that it builds on, gives the moment S. Units that lead on from there without a
gap give every moment behind it. Units may overlap, since merged ones lie beside those that they were made of for a
while; digests tell that they agree (see replaying.py).

All of this is computed from names, so it costs one listing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Final, NamedTuple, TypeVar

from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.lines import start_of_chain
from kvwal.backup.names import BaseName, UnitName, parse_name
from kvwal.backup.port import Destination
from kvwal.backup.units import UnitCommit
from kvwal.errors import ArchiveDiverged, BackupDestinationError, CorruptionError, NotInBackup
from kvwal.keys import Seqno
from kvwal.times import time_of, us_of

__all__ = [
    "Around",
    "Gap",
    "Held",
    "Plan",
    "Stretch",
    "around",
    "digest_after",
    "held_lines",
    "list_held",
    "list_confirmed",
    "refuse_diverged",
    "seqno_at",
    "time_bounds",
]


class Stretch(NamedTuple):
    """Moments that can be restored: of commit `first`, of `last`, and of every one between."""

    first: Seqno
    last: Seqno


class Around(NamedTuple):
    """The last commit that is known to be at or before a time, and the first one that is known to be after it."""

    before: Seqno | None
    after: Seqno | None


class Gap(NamedTuple):
    """Commits whose moments cannot be restored, from `first` to `last`, both of them missing."""

    first: Seqno
    last: Seqno

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


class Plan(NamedTuple):
    """How a moment is restored: the bases in their order, and then the commits of the units beyond `after`.

    Attributes:
        bases: a full one first.
        units: they lead from `after` to `at` without a gap; the first and last may go beyond.
        after: what the bases have.
        at: the moment.
        bytes: of all these objects.
    """

    bases: tuple[BaseName, ...]
    units: tuple[UnitName, ...]
    after: Seqno
    at: Seqno
    bytes: int


# A listing passes over what is put behind it, so one with gaps is made again, at most so often.
_LOOKS: Final = 5
_N = TypeVar("_N", BaseName, UnitName)


def _as_named(base: BaseName) -> Seqno:
    return base.seqno


@dataclass(frozen=True, slots=True)
class Held:
    """What there is of one line, as it was listed. Of each revision only the newest.

    Attributes:
        line: 8 bytes.
        bases: by seqno, ascending.
        units: by first and last, ascending.
        sizes: by name, in bytes.
    """

    line: bytes
    bases: tuple[BaseName, ...]
    units: tuple[UnitName, ...]
    sizes: dict[str, int]

    def without(self, damaged: Container[str]) -> Held:
        """The same but for some objects, by their names."""
        return replace(
            self,
            bases=tuple(base for base in self.bases if str(base) not in damaged),
            units=tuple(unit for unit in self.units if str(unit) not in damaged),
        )

    def lineage(self, base: BaseName) -> tuple[BaseName, ...] | None:
        """The base with those that it builds on, a full one first; None if one of them is missing."""
        by_generation: dict[int, list[BaseName]] = {}
        for each in self.bases:
            by_generation.setdefault(each.generation, []).append(each)
        found = [base]
        while found[-1].parent:
            # Recovery may have set the store back, and a generation is there twice; none builds on later commits.
            parents = by_generation.get(found[-1].parent, [])
            i = bisect_right(parents, found[-1].seqno, key=_as_named)
            if not i:
                return None
            # Parents are of lesser generations, so this ends.
            found.append(parents[i - 1])
        return tuple(reversed(found))

    def units_from(self, after: Seqno, until: Seqno) -> tuple[UnitName, ...]:
        """Units that lead from `after` towards `until`, as few as there can be; they may end before it, at a gap."""
        chosen: list[UnitName] = []
        at, i, n = after, 0, len(self.units)
        best: UnitName | None = None
        while at < until:
            while i < n and self.units[i].first <= at:
                # Of those that reach equally far, the one of the highest level begins first.
                if best is None or self.units[i].last > best.last:
                    best = self.units[i]
                i += 1
            if best is None or best.last <= at:
                break
            chosen.append(best)
            at = best.last
        return tuple(chosen)

    def units_before(self, plan: Plan) -> tuple[UnitName, ...]:
        """Units that a plan does not have, and that lead to it from the oldest commit on without a gap.

        A restore reads those of them that a consumer of its moment has not handled.
        """
        begin = plan.after
        for unit in reversed(self.units):
            if unit.first < begin <= unit.last:
                begin = unit.first
        return tuple(unit for unit in self.units_from(begin, plan.at) if unit not in plan.units)

    def reach(self, after: Seqno) -> Seqno:
        """How far the units lead on from `after` without a gap."""
        units = self.units_from(after, Seqno(1 << 64))
        return units[-1].last if units else after

    def stretches(self) -> list[Stretch]:
        """All moments that can be restored, ascending; neighbours are one stretch."""
        found: list[Stretch] = []
        for base in self.bases:
            if self.lineage(base) is None:
                continue
            if found and base.seqno <= found[-1].last:
                continue
            stretch = Stretch(base.seqno, self.reach(base.seqno))
            if found and stretch.first == found[-1].last + 1:
                stretch = Stretch(found.pop().first, stretch.last)
            found.append(stretch)
        return found

    def gaps(self, mark: Seqno | None = None) -> list[Gap]:
        """What is missing between the oldest and the newest moment, and beyond that (see `lost_end`)."""
        found, end = self.stretches(), self.lost_end(mark)
        between = [Gap(Seqno(left.last + 1), Seqno(right.first - 1)) for left, right in pairwise(found)]
        return between if end is None else [*between, end]

    def lost_end(self, mark: Seqno | None = None) -> Gap | None:
        """What is missing beyond the newest moment: units are there for commits beyond it, or the mark names one.

        `mark`: of this line, read before the names were listed; None: there is none. A base is put before units that
        begin at it, so units beyond the newest moment lack others before them.
        """
        newest = self.newest()
        if newest is None:
            return None if mark is None else Gap(Seqno(0), mark)
        last = max([mark or newest, *(unit.last for unit in self.units)])
        return Gap(Seqno(newest + 1), last) if last > newest else None

    def newest(self) -> Seqno | None:
        """The newest moment; None if there is none."""
        found = self.stretches()
        return found[-1].last if found else None

    def last_with(self, seqno: Seqno | None) -> Seqno | None:
        """The last moment of the stretch that a commit is in, or is behind; None: of the first one."""
        found = self.stretches()
        i = bisect_right(found, seqno, key=lambda stretch: stretch.first) if seqno is not None else 1
        return found[max(i, 1) - 1].last if found else None

    def plan(self, at: Seqno, *, begins: Callable[[BaseName], Seqno] = _as_named) -> Plan:
        """How to restore the moment of commit `at`.

        `begins`: after which commit a base needs the units, if that is not its seqno. NotInBackup if it cannot be
        restored; the error has the bounds, and the nearest moments on both sides.
        """
        for base in reversed(self.bases[: bisect_right(self.bases, at, key=_as_named)]):
            bases = self.lineage(base)
            if bases is None:
                continue
            after = begins(base)
            units = self.units_from(after, at)
            if at <= after or (units and units[-1].last >= at):
                size = sum(self.sizes[str(name)] for name in (*bases, *units))
                return Plan(bases, units, after, at, size)
        raise self.refusal(at)

    def refusal(self, asked: Seqno | datetime, at: Seqno | None = None) -> Exception:
        """The error that says what there is instead. `at`: where that is, if a time was asked for."""
        found = self.stretches()
        if not found:
            return BackupDestinationError(f"the destination has no whole base of line {self.line.hex()}")
        place = at if at is not None else asked if isinstance(asked, int) else found[0].first
        i = bisect_left(found, place, key=lambda stretch: stretch.first)
        before = found[i - 1].last if i else None
        after = found[i].first if i < len(found) else None
        return NotInBackup(asked, found, nearest=(before, after))


def list_held(destination: Destination, line: bytes) -> Held:
    """What the destination has of a line. O(objects)."""
    bases: dict[BaseName, int] = {}
    units: dict[UnitName, int] = {}
    for name, size in destination.list_after(f"{line.hex()}/"):
        parsed = parse_name(name)
        if isinstance(parsed, BaseName):
            bases[parsed] = size
        elif isinstance(parsed, UnitName):
            units[parsed] = size
    bases, units = _newest_revisions(bases), _newest_revisions(units)
    sizes = {str(name): size for name, size in (*bases.items(), *units.items())}
    # Of two of one generation the last one is taken: a full one has less to read than a difference and those below it.
    by_seqno = sorted(bases, key=lambda base: (base.seqno, base.generation, -base.parent))
    by_first = sorted(units, key=lambda unit: (unit.first, unit.last, -unit.level))
    return Held(line, tuple(by_seqno), tuple(by_first), sizes)


def list_confirmed(destination: Destination, line: bytes, mark: Seqno | None) -> Held:
    """As `list_held`, and again where something is missing that may have come while the names were listed.

    `mark`: of this line, read before.
    """
    held = list_held(destination, line)
    for _ in range(_LOOKS):
        before = [gap.first for gap in held.gaps(mark)]
        if not before:
            break
        held = list_held(destination, line)
        # What was only passed over is there by now. An end that is lost grows while an archive goes on.
        if before == [gap.first for gap in held.gaps(mark)]:
            break
    return held


def _newest_revisions(named: dict[_N, int]) -> dict[_N, int]:
    newest: dict[tuple[object, ...], int] = {}
    for name in named:
        newest[name[:-1]] = max(name.revision, newest.get(name[:-1], 0))
    return {name: size for name, size in named.items() if name.revision == newest[name[:-1]]}


def held_lines(destination: Destination) -> list[bytes]:
    """The lines of which the destination has something, in no order that means anything. O(lines)."""
    found: list[bytes] = []
    after = ""
    while True:
        for name, _ in destination.list_after("", after):
            first = name.partition("/")[0]
            # "~" sorts behind all that a name has, so this goes on behind the whole line.
            after = f"{first}/~"
            if len(first) == 16 and parse_name(name) is not None:
                found.append(bytes.fromhex(first))
                break
        else:
            return found


def around(destination: Destination, held: Held, at_us: int, until: Seqno | None = None) -> Around:
    """The commits of units, up to `until`, that are nearest to a time. Reads about log2(units) headers and one unit."""
    units = held.units if until is None else tuple(unit for unit in held.units if unit.first < until)

    def first_time(unit: UnitName) -> int:
        name = str(unit)
        return fetch_header(destination, name).first_time_us

    i = bisect_right(units, at_us, key=first_time)
    beyond = Seqno(units[i].first + 1) if i < len(units) else None
    if not i:
        return Around(None, beyond)
    # That which goes furthest has all that the others have beyond its first commit.
    best = max(units[:i], key=lambda unit: unit.last)
    commits = fetch_unit(destination, best).commits()
    found = max((commit.seqno for commit in commits if commit.time_us <= at_us), default=None)
    if found is None:
        reason = f"its commits are later than its header, or that of {units[i - 1]} behind it, says"
        raise CorruptionError(str(best), None, reason)
    if until is not None and found >= until:
        return Around(until, None)
    if found < best.last:
        beyond = Seqno(found + 1)
    return Around(found, beyond)


def seqno_at(destination: Destination, held: Held, moment: datetime) -> Seqno:
    """The last commit at or before a time: times of commits, and not of objects, decide.

    NotInBackup if that moment is older than all units, or in a gap. Reads as `around`.
    """
    found, beyond = around(destination, held, us_of("at", moment))
    if found is None:
        raise held.refusal(moment, held.newest() if beyond is None else Seqno(beyond - 1))
    stretches = held.stretches()
    j = bisect_right(stretches, found, key=lambda stretch: stretch.first) - 1
    if j < 0 or found > stretches[j].last:
        raise held.refusal(moment, found)
    if found == stretches[j].last and j + 1 < len(stretches):
        # Some of the commits that are missing may have come before that time.
        raise held.refusal(moment, Seqno(found + 1))
    return found


def time_bounds(destination: Destination, held: Held) -> tuple[datetime, datetime] | None:
    """The times of the first and the last commit that a unit has; None without units. Reads two headers."""
    if not held.units:
        return None
    ends = held.units[0], max(held.units, key=lambda unit: unit.last)
    first, last = (fetch_header(destination, name) for name in ends)
    return time_of(first.first_time_us), time_of(last.last_time_us)


def digest_after(destination: Destination, store_id: bytes, held: Held, seqno: Seqno) -> bytes:
    """The digest that a unit which begins behind a commit goes on from: that of the units which lead there."""
    for name in held.units:
        if name.first < seqno <= name.last:
            return fetch_unit(destination, name).digest_at(seqno)
    return start_of_chain(destination, store_id, held.line)


def refuse_diverged(
    read_one: Callable[[Seqno], tuple[int, int, bytes] | None], destination: Destination, held: Held, durable: Seqno
) -> None:
    """ArchiveDiverged if a line has another history in the destination than in the store.

    That is told by commits that the store does not have, and by the last commit of the newest unit.

    Args:
        read_one: kind, time and body of a commit of the store; None if its log no longer has it.
        durable: the store's last commit. Asked for after listing.
    """
    beyond = max([0, *(unit.last for unit in held.units), *(base.seqno for base in held.bases)])
    units = sorted((unit for unit in held.units if unit.first < durable), key=lambda unit: (unit.last, unit.first))
    if beyond <= durable:
        if not units:
            return
        *_, last = _decoded(destination, units[-1])
        if _agrees(read_one, last):
            return
    for name in reversed(units):
        agreed = name.first
        for commit in _decoded(destination, name):
            if commit.seqno > durable or not _agrees(read_one, commit):
                break
            agreed = commit.seqno
        if agreed > name.first:
            raise ArchiveDiverged(agreed)
    raise ArchiveDiverged(min([durable, *(unit.first for unit in units), *(base.seqno for base in held.bases)]))


def _decoded(destination: Destination, name: UnitName) -> Iterator[UnitCommit]:
    return fetch_unit(destination, name).commits()


def _agrees(read_one: Callable[[Seqno], tuple[int, int, bytes] | None], commit: UnitCommit) -> bool:
    ours = read_one(commit.seqno)
    # One that is no longer known is not told apart.
    return ours is None or ours == (commit.kind, commit.time_us, commit.body)
