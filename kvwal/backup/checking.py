"""What a destination holds, told without its store: status, gaps and their names, and the proof of what is there.

A gap is "lost" until someone has looked into it and accepted it, with a reason: then it is "accepted", and does not
count as a problem any more. What thinning has taken on purpose is none (see keeping.py). Neither is what lies between
two backups that never had it: an archiver's mark, what was said of a gap, a unit that goes on from one that is
missing, and what was proved tell of what was there.

`verify` remembers what it has proved, and what it found damaged: see proofs.py. So the next one can begin with the
rest, and the status tells of the damage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from kvwal.backup import state
from kvwal.backup.bases import check_base, read_header
from kvwal.backup.chain import Gap, Held, Stretch, held_lines, list_confirmed, list_held, time_bounds
from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.forks import fork_findings
from kvwal.backup.lines import start_of_chain
from kvwal.backup.names import STATE, BaseName, UnitName, parse_name
from kvwal.backup.port import Destination
from kvwal.backup.proofs import Results, damaged, proved
from kvwal.backup.replaying import breaks, replay_units
from kvwal.errors import CorruptionError, Finding, FormatError, ObjectMissing, RefusedError
from kvwal.keys import Seqno
from kvwal.times import time_of

__all__ = [
    "ArchivedLine",
    "DestinationStatus",
    "KnownGap",
    "VerifiedArchive",
    "accept_gap",
    "lost_gaps",
    "status_of",
    "verify",
]

GapState: TypeAlias = Literal["lost", "accepted"]

# Results are written this often, so that a check that is cut off is not for nothing.
_SAVE_EVERY_S: Final = 30.0
# An archiver merges one window at a time, in more time than a listing takes.
_TRIES: Final = 20


class KnownGap(NamedTuple):
    """Commits whose moments cannot be restored, from `first` to `last`; `reason` in words."""

    first: Seqno
    last: Seqno
    state: GapState
    reason: str


@dataclass(frozen=True, slots=True)
class ArchivedLine:
    """What there is of one line.

    Attributes:
        line: 8 bytes.
        moments: stretches of moments that can be restored without what is known to be damaged, ascending.
        gaps: what is missing between them, and beyond the newest one up to the mark, but for what was thinned, and what
            no backup and no archiver has put there.
        thinned_before: below this commit only single bases are kept; 0: nothing was thinned.
        bases, units, bytes: of the objects.
        oldest_time, newest_time: of the oldest commit that a unit has, and of the newest that a unit or a base has;
            None where there is none.
    """

    line: bytes
    moments: tuple[Stretch, ...]
    gaps: tuple[KnownGap, ...]
    thinned_before: Seqno
    bases: int
    units: int
    bytes: int
    oldest_time: datetime | None
    newest_time: datetime | None


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """What a destination holds.

    Attributes:
        store_id: of the store, 16 bytes.
        lines: of each line that has something there.
        mark: line and seqno up to which an archiver has read all back; None: there was none.
        epoch: number of the last archiver's claim; 0: there was none.
        unverified: objects that `verify` has not proved yet. verified_time: when it last proved one.
        problems: what `verify` has found damaged, bases without one that they build on, and units that do not follow
            the one before them; what comes from there on may not be restored.
        ok: whether every gap is accepted, there is no problem, and there is a moment at all.
    """

    store_id: bytes
    lines: tuple[ArchivedLine, ...]
    mark: tuple[bytes, Seqno] | None
    epoch: int
    unverified: int
    verified_time: datetime | None
    problems: tuple[Finding, ...]
    ok: bool


def status_of(destination: Destination) -> DestinationStatus:
    """What a destination holds. O(objects); it reads names, headers of units, and the unit at the fork of a line."""
    store_id = state.identity_of(destination)
    _, marked = state.read_or_empty(destination, state.MARK)
    _, verified = state.read_or_empty(destination, state.VERIFIED)
    when, known = proved(verified), damaged(verified)
    lines: list[ArchivedLine] = []
    names: set[str] = set()
    problems = list(state.findings(destination))
    mark = state.mark_in(marked)
    for held in _listed(destination, mark):
        names |= held.sizes.keys()
        problems += _without_parent(destination, held)
        problems += (each for each in _breaks(destination, held) if each.file not in known)
        problems += fork_findings(destination, store_id, held)
        whole = held.without(known)
        try:
            bounds = _time_bounds(destination, whole, known)
        except CorruptionError as error:
            bounds = None, None
            if error.file not in {problem.file for problem in problems}:
                problems.append(error.finding)
            whole = whole.without({error.file})
        lines.append(
            ArchivedLine(
                held.line,
                tuple(whole.stretches()),
                tuple(_known_gaps(destination, held, _of_line(mark, held.line))),
                _thinned_before(destination, held),
                len(held.bases),
                len(held.units),
                sum(held.sizes.values()),
                *bounds,
            )
        )
    problems += (each.finding(name) for name, each in known.items() if name in names or name.startswith(STATE))
    epoch = marked.get("epoch", 0)
    times = [at_us for name, (at_us, _) in when.items() if name in names]
    is_lost = any(gap.state == "lost" for line in lines for gap in line.gaps)
    return DestinationStatus(
        store_id,
        tuple(lines),
        mark,
        epoch if isinstance(epoch, int) else 0,
        len(names - when.keys()),
        time_of(max(times)) if times else None,
        tuple(problems),
        any(line.moments for line in lines) and not is_lost and not problems,
    )


def _time_bounds(
    destination: Destination, held: Held, known: Container[str]
) -> tuple[datetime | None, datetime | None]:
    """Of what is there now, where something was merged or pruned since it was listed."""
    for _ in range(_TRIES):
        try:
            oldest, newest = time_bounds(destination, held) or (None, None)
            base = next((base for base in reversed(held.bases) if held.lineage(base) is not None), None)
            if base is not None and all(unit.last < base.seqno for unit in held.units):
                newest = time_of(read_header(destination, str(base)).meta.time_us)
            return oldest, newest
        except ObjectMissing:
            held = list_held(destination, held.line).without(known)
    return None, None


# -- the mark --------------------------------------------------------------------------------------


def _of_line(mark: tuple[bytes, Seqno] | None, line: bytes) -> Seqno | None:
    return mark[1] if mark is not None and mark[0] == line else None


def _listed(destination: Destination, mark: tuple[bytes, Seqno] | None) -> list[Held]:
    """What there is of each line, and of that of the mark in any case. The mark is read before, as it moves on."""
    lines = held_lines(destination)
    if mark is not None and mark[0] not in lines:
        lines.append(mark[0])
    return [list_confirmed(destination, line, _of_line(mark, line)) for line in lines]


# -- gaps ------------------------------------------------------------------------------------------


def _thinned_before(destination: Destination, held: Held) -> Seqno:
    _, kept = state.read_or_empty(destination, state.KEPT)
    seqno = kept.get(held.line.hex(), 0)
    return Seqno(seqno) if isinstance(seqno, int) else Seqno(0)


def _open_gaps(destination: Destination, held: Held, mark: Seqno | None) -> list[Gap]:
    """The gaps that are neither of thinning, nor between backups that never had their commits.

    If there are any, it reads how far thinning has gone, and what was said of gaps.
    """
    told = _told(destination, held) if mark is None else []
    if not (gaps := held.gaps(mark or max((each.last for each in told), default=None))):
        return []
    thinned = _thinned_before(destination, held)
    found = [Gap(Seqno(max(gap.first, thinned)), gap.last) for gap in gaps if gap.last >= thinned]
    return [gap for gap in found if _is_told(told, gap) or _was_there(destination, held, mark, gap)]


def _told(destination: Destination, held: Held) -> list[Gap]:
    """What was there, or was told to be lost, of a line without a mark: units that were proved, and are gone."""
    _, verified = state.read_or_empty(destination, state.VERIFIED)
    gone = (parse_name(name) for name in proved(verified) if name not in held.sizes)
    units = [each for each in gone if isinstance(each, UnitName) and each.line == held.line]
    told = [Gap(Seqno(each.first + 1), each.last) for each in units]
    # Where it is damaged, each gap counts: see `_was_there`.
    with suppress(CorruptionError):
        told += _entries(destination, held)
    return told


def _entries(destination: Destination, held: Held) -> list[Gap]:
    """What was said of gaps of a line."""
    _, members = state.read(destination, state.GAPS)
    entries = (*state.gaps_in(members, "lost"), *state.gaps_in(members, "accepted"))
    return [Gap(Seqno(each["first"]), Seqno(each["last"])) for each in entries if each["line"] == held.line.hex()]


def _is_told(told: list[Gap], gap: Gap) -> bool:
    return any(each.first <= gap.last and gap.first <= each.last for each in told)


def _was_there(destination: Destination, held: Held, mark: Seqno | None, gap: Gap) -> bool:
    """Whether commits of a gap were there, as far as what is there tells, or were to be there by an archiver."""
    end = held.lost_end(mark)
    if (end is not None and gap.last == end.last) or (mark is not None and gap.first <= mark <= gap.last):
        return True
    try:
        if _is_told(_entries(destination, held), gap):
            return True
    except CorruptionError:
        # It may have been said to be lost, or that this was accepted.
        return True
    # An archiver has put all from where it began up to the mark; and it began a chain of units there.
    tells_nothing = mark is not None and state.began_at(destination, held.line) <= gap.last < mark
    for name in _first_of_chains(held, gap):
        try:
            header = fetch_header(destination, name)
            if header.before != start_of_chain(destination, header.store_id, held.line):
                return True
        except ObjectMissing:
            # It was merged, or pruned, since it was listed.
            continue
        except (CorruptionError, FormatError):
            return True
        tells_nothing = False
    return tells_nothing


def _first_of_chains(held: Held, gap: Gap) -> Iterator[UnitName]:
    """The units that begin in a gap, or with the commit behind it, and that no unit leads to."""
    reached = Seqno(0)
    for first, units in groupby(held.units, key=lambda unit: unit.first):
        same = list(units)
        if reached < first and gap.first <= first <= gap.last + 1:
            yield from same
        reached = max(reached, *(unit.last for unit in same))


def _known_gaps(destination: Destination, held: Held, mark: Seqno | None) -> Iterator[KnownGap]:
    if not (gaps := _open_gaps(destination, held, mark)):
        return
    _, members = state.read_or_empty(destination, state.GAPS)
    for gap in gaps:
        entry = _entry_of(members, "accepted", held.line, gap)
        if entry is not None:
            yield KnownGap(*gap, "accepted", str(entry.get("reason", "")))
        else:
            entry = _entry_of(members, "lost", held.line, gap) or {}
            yield KnownGap(*gap, "lost", str(entry.get("reason", "objects are missing")))


def lost_gaps(destination: Destination, held: Held, mark: Seqno | None) -> tuple[Gap, ...]:
    """The gaps of a line that were not accepted. Reads what is known of gaps, if there are any.

    `mark`: of this line, from before it was listed.
    """
    return tuple(Gap(gap.first, gap.last) for gap in _known_gaps(destination, held, mark) if gap.state == "lost")


def _entry_of(members: dict[str, Any], kind: str, line: bytes, gap: Gap) -> dict[str, Any] | None:
    for entry in state.gaps_in(members, kind):
        if entry["line"] == line.hex() and entry["first"] <= gap.first and gap.last <= entry["last"]:
            return entry
    return None


def accept_gap(
    destination: Destination, first: Seqno, last: Seqno, reason: str, now_us: int, line: bytes | None = None
) -> None:
    """Accept that the moments of these commits are lost, for this reason. ValueError if they are no gap, or no reason.

    `line`: 8 bytes; None: the one that has this gap.
    """
    if not reason.strip():
        raise ValueError("a gap is accepted for a reason, which is kept with it")
    state.identity_of(destination)
    there: list[str] = []
    mark = state.mark_of(destination)
    for held in _listed(destination, mark):
        if line is not None and held.line != line:
            continue
        for gap in _open_gaps(destination, held, _of_line(mark, held.line)):
            there.append(str(gap))
            if gap == (first, last):
                entry = {"line": held.line.hex(), "first": first, "last": last, "reason": reason, "wall_us": now_us}

                def with_entry(members: dict[str, Any], entry: dict[str, Any] = entry) -> dict[str, Any]:
                    return {**members, "accepted": [*state.gaps_in(members, "accepted"), entry]}

                state.change(destination, state.GAPS, with_entry)
                return
    raise ValueError(f"{first}..{last} is no gap; there are: {', '.join(there) or 'none'}")


# -- proof -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifiedArchive:
    """What `verify` found.

    Attributes:
        checked: objects that were read and proved. skipped: that were proved before.
        left: that there was no time for.
        problems: what does not hold; the file is the object, or one of `state/`.
        gaps: moments that are lost, and not accepted.
        unsaved: why the results could not be remembered in the destination; None if they were.
    """

    checked: int
    skipped: int
    left: int
    problems: tuple[Finding, ...]
    gaps: tuple[KnownGap, ...]
    unsaved: str | None

    @property
    def ok(self) -> bool:
        """Whether all of it holds."""
        return not self.problems and not self.gaps


def verify(
    destination: Destination,
    *,
    deep: bool = False,
    since_last: bool = False,
    budget_s: float | None = None,
    now_us: Callable[[], int],
    monotonic_s: Callable[[], float],
    progress: Callable[[int, int], None] | None = None,
) -> VerifiedArchive:
    """Read objects and prove them; the one that was proved longest ago, or never, first.

    Args:
        deep: also replay the units in their order, and compare digests from one to the next, and with the mark.
        since_last: only what was not proved yet; with `deep`, not deeply.
        budget_s: at most for so long.
    """
    store_id = state.identity_of(destination)
    _, verified = state.read_or_empty(destination, state.VERIFIED)
    known = proved(verified)
    mark = state.mark_of(destination)
    held = _listed(destination, mark)
    names: dict[str, BaseName | UnitName] = {}
    for each in held:
        names |= {str(base): base for base in each.bases} | {str(unit): unit for unit in each.units}
    todo = sorted(names, key=lambda name: (known.get(name, (0, False))[0], name))
    if since_last:
        todo = [name for name in todo if name not in known or (deep and not known[name][1])]
    # They are not remembered: each look at them tells.
    problems = list(state.findings(destination))
    began_s = saved_s = monotonic_s()
    results = Results(names)
    unsaved = _remembered(destination, [each for each in held if _of_line(mark, each.line) is None], now_us)
    for name in todo:
        if budget_s is not None and monotonic_s() - began_s >= budget_s:
            break
        try:
            _prove(destination, store_id, name, names[name])
            results.done[name] = now_us(), False
        except ObjectMissing:
            # It was merged, or pruned, since. Whether something is missing then, the gaps tell.
            results.gone.add(name)
        except (CorruptionError, FormatError) as error:
            problems.append(error.finding if isinstance(error, CorruptionError) else Finding(name, None, str(error)))
            results.add(problems[-1], now_us(), deep=False)
        if progress is not None:
            progress(results.checked, len(todo))
        if monotonic_s() - saved_s >= _SAVE_EVERY_S:
            saved_s = monotonic_s()
            unsaved = _saved(destination, results)
    checked = results.checked
    left = len(todo) - checked
    if deep and not left:
        results.all_deep = True
        for each in held:
            for finding in _replayed(destination, store_id, each, results, now_us):
                problems.append(finding)
                results.add(finding, now_us(), deep=True)
    elif todo and not left:
        told = {problem.file for problem in problems}
        problems += [each for one in held for each in _breaks(destination, one) if each.file not in told]
    if not left and (deep or todo):
        problems += [each for one in held for each in fork_findings(destination, store_id, one)]
    unsaved = _saved(destination, results)
    mark = state.mark_of(destination)
    held = _listed(destination, mark)
    problems += [each for one in held for each in _without_parent(destination, one)]
    known_gaps = (gap for each in held for gap in _known_gaps(destination, each, _of_line(mark, each.line)))
    gaps = tuple(gap for gap in known_gaps if gap.state == "lost")
    return VerifiedArchive(checked, len(names) - len(todo), left, tuple(problems), gaps, unsaved)


def _remembered(destination: Destination, held: list[Held], now_us: Callable[[], int]) -> str | None:
    """Record the gaps of lines without a mark: what is remembered of the units may be all that tells. As `_saved`."""
    try:
        for each in held:
            for gap in lost_gaps(destination, each, None):
                state.record_gap(destination, each.line, *gap, now_us(), "objects are missing")
    except RefusedError as error:
        return error.strerror or str(error)
    except CorruptionError as error:
        # It is a finding, too.
        return str(error)
    return None


def _saved(destination: Destination, results: Results) -> str | None:
    """Remember the results; why that cannot be, where nothing may be written to the destination."""
    try:
        results.save(destination)
    except RefusedError as error:
        return error.strerror or str(error)
    return None


def _prove(destination: Destination, store_id: bytes, name: str, parsed: BaseName | UnitName) -> None:
    if isinstance(parsed, BaseName):
        own = check_base(destination, name).store_id
    else:
        own = fetch_unit(destination, name).header.store_id
    if own != store_id:
        raise CorruptionError(name, 32, "it is of another store")


def _replayed(
    destination: Destination, store_id: bytes, held: Held, results: Results, now_us: Callable[[], int]
) -> Iterator[Finding]:
    """Replay all units of a line, from each base that units follow; what does not hold.

    A replay ends at the first damage, and has not looked behind it: then not all was checked.
    """
    begin: Seqno | None = None
    for base in held.bases:
        if begin is not None and base.seqno <= begin:
            continue
        try:
            header = read_header(destination, str(base))
            units = held.units_from(header.seqno, Seqno(1 << 64))
            begin = units[-1].last if units else base.seqno
            if units:
                deque(replay_units(destination, store_id, units, units[0].first, begin, held), maxlen=0)
            for each in units:
                results.done[str(each)] = now_us(), True
        except CorruptionError as error:
            results.all_deep = False
            yield error.finding
        except (ObjectMissing, FormatError):
            # It was merged, or pruned, since it was listed; or it was told when it was proved alone.
            results.all_deep = False
    yield from _marked(destination, held, results)


def _marked(destination: Destination, held: Held, results: Results) -> Iterator[Finding]:
    """The mark names a digest: a unit is to have it, of whichever chain."""
    _, marked = state.read_or_empty(destination, state.MARK)
    seqno, digest = marked.get("seqno"), marked.get("digest")
    if marked.get("line") != held.line.hex() or not isinstance(seqno, int):
        return
    units = [name for name in held.units if name.first < seqno <= name.last]
    for name in units:
        try:
            if fetch_unit(destination, name).digest_at(Seqno(seqno)).hex() == digest:
                return
        except (CorruptionError, FormatError, ObjectMissing):
            results.all_deep = False
            return
    if units:
        yield Finding(state.MARK, None, f"commit {seqno} has another digest")


def _without_parent(destination: Destination, held: Held) -> Iterator[Finding]:
    """Bases of which one that they build on is missing; not those that thinning was to delete, and was cut off."""
    thinned = _thinned_before(destination, held)
    for base in held.bases:
        if base.seqno >= thinned and held.lineage(base) is None:
            yield Finding(str(base), None, "a base that it builds on is missing")


def _breaks(destination: Destination, held: Held) -> Iterator[Finding]:
    """Units that do not follow the one before them, from each base that units follow."""
    end = Seqno(0)
    for base in held.bases:
        if base.seqno >= end:
            units = held.units_from(base.seqno, Seqno(1 << 64))
            end = units[-1].last if units else end
            for error in breaks(destination, held, units):
                yield error.finding
