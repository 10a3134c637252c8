"""Which moment of which line is restored, and from which objects.

A moment is looked for on a line and on those that it came from, on each of these up to where it was left. Without a
line that is the one with the newest commit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeAlias

from kvwal.backup.bases import read_header
from kvwal.backup.chain import Around, Gap, Held, Plan, Stretch, around, held_lines, list_confirmed, list_held
from kvwal.backup.checking import lost_gaps
from kvwal.backup.fetching import fetch_header
from kvwal.backup.forks import refuse_other_fork
from kvwal.backup.lines import ancestry, origin_of
from kvwal.backup.names import BaseName, UnitName, parse_name
from kvwal.backup.port import Destination
from kvwal.backup.state import mark_of
from kvwal.errors import (
    BackupDestinationError,
    CorruptionError,
    FormatError,
    NotInBackup,
    ObjectMissing,
    SnapshotTooOld,
)
from kvwal.keys import Seqno, as_int
from kvwal.positions import Position
from kvwal.times import time_of, us_of

__all__ = ["Chosen", "Moment", "advice", "as_moment", "choose"]

#: What a user may ask for: "latest", a seqno, "before:SEQNO", a position, or a time.
Moment: TypeAlias = int | datetime | str
_BEFORE: Final = "before:"
# The last ones of these are named.
_ADVISED_STRETCHES: Final = 3


@dataclass(frozen=True, slots=True)
class Chosen:
    """A moment, and how it is restored.

    Attributes:
        line: the one that has it. held: what there is of that.
        plan: the objects.
    """

    line: bytes
    held: Held
    plan: Plan


def as_moment(at: Moment) -> int | datetime | Literal["latest"]:
    """What is asked for. TypeError, ValueError for what cannot be that."""
    if isinstance(at, datetime):
        us_of("at", at)
        return at
    if not isinstance(at, str):
        return as_int("at", at, 0) if not isinstance(at, Position) else at
    if at == "latest":
        return "latest"
    number = at.removeprefix(_BEFORE)
    if number != at and number.isdecimal() and int(number):
        return int(number) - 1
    raise ValueError(
        f'at is "latest", "before:SEQNO", a seqno, a position or a datetime, not {at!r}; Position.parse and '
        "datetime.fromisoformat read what is text"
    )


def choose(
    destination: Destination, at: int | datetime | Literal["latest"], damaged: Collection[str] = ()
) -> Chosen:
    """The newest objects that give a moment. NotInBackup, with both bounds and the nearest moments, if none do.

    Also for the latest one, where commits beyond it were there, as far as what is there and the mark tell, and that
    they are lost was not accepted.

    `damaged`: names of objects that are not to be used. They count where it is asked which moment is the latest.
    """
    # Before names are listed, as an archive moves it on.
    mark = mark_of(destination) if isinstance(at, datetime) or at == "latest" else None
    line = at.line if isinstance(at, Position) else _newest_line(destination)
    lines = [
        (
            # What a listing passed over would be lost.
            list_confirmed(destination, each, _marked_on(mark, each))
            if at == "latest"
            else list_held(destination, each),
            fork,
        )
        for each, fork in ancestry(destination, line)
    ]
    # The last commit that each line has of those that are looked for.
    stretches = sorted({each for held, fork in lines for each in _clipped(held.stretches(), fork)})
    if not stretches:
        raise BackupDestinationError(f"there is no whole backup of line {line.hex()} in the destination")
    # A line may begin with an older base than the last one of the line that it left.
    asked = max(each.last for each in stretches) if at == "latest" else at
    elsewhere = _lost_elsewhere(destination, line, mark)
    if isinstance(asked, datetime):
        before, after = _around(destination, lines, asked)
        if (
            before is None
            or (_marked(lines, mark) > before if after is None else after != before + 1)
            or (elsewhere is not None and elsewhere.first <= before + 1)
        ):
            # Some of the commits that are missing may have come before that time.
            raise _refusal(asked, stretches, Seqno(0 if before is None else before + 1), destination, lines)
        seqno = before
    else:
        seqno = Seqno(int(asked))
    if at == "latest":
        lost, is_gap = (elsewhere, True) if elsewhere is not None else _lost_end(destination, lines, mark, seqno)
        if lost is not None:
            raise NotInBackup(lost.last, _joined(stretches), nearest=(seqno, None), lost=lost, can_accept=is_gap)
    for i, (held, fork) in enumerate(lines):
        try:
            if fork is None or seqno <= fork:
                if damaged:
                    held = held.without(damaged)
                plan = held.plan(seqno, begins=lambda base: read_header(destination, str(base)).seqno)
                _refuse_other_fork(destination, [each.line for each, _ in lines[:i]], held)
                return Chosen(held.line, held, plan)
        except (SnapshotTooOld, BackupDestinationError):
            # It may be on a line that this came from.
            continue
    raise _refusal(asked, stretches, seqno)


def _refuse_other_fork(destination: Destination, left: Sequence[bytes], held: Held) -> None:
    """ForkDiverged if a line does not have the history that the lines which come from it have up to their fork."""
    origins = [(origin, line) for line in left if (origin := origin_of(destination, line)) is not None]
    if origins:
        # Up to the oldest of the forks they have the same commits.
        origin, line = min(origins, key=lambda each: each[0].fork)
        refuse_other_fork(destination, line, origin, held)


def advice(
    destination: Destination, at: int | datetime | Literal["latest"], damaged: str, others: Container[str] = ()
) -> str:
    """What to restore where an object that a moment needs is damaged: one of the moments before it.

    `others`: that are damaged.
    """
    parsed = parse_name(damaged)
    before: list[Stretch] = []
    if parsed is not None:
        last = parsed.first if isinstance(parsed, UnitName) else Seqno(parsed.seqno - 1)
        try:
            line = at.line if isinstance(at, Position) else _newest_line(destination)
            lines = [(list_held(destination, each), fork) for each, fork in ancestry(destination, line)]
        except (CorruptionError, FormatError, ObjectMissing):
            return "Say on which line the moment is (LINE:SEQNO), or restore from another destination"
        found = {each for held, fork in lines for each in _clipped(held.without(others).stretches(), fork)}
        before = _clipped(_joined(sorted(found)), last)
    if not before:
        return "Restore from another destination: no moment of this one is known to do without it"
    moments = ", ".join(f"{each.first} to {each.last}" for each in before[-_ADVISED_STRETCHES:])
    return (
        f"Restore an earlier moment, which does not need it (there are those of commits {moments}), or restore from "
        "another destination"
    )


def _newest_line(destination: Destination) -> bytes:
    newest: tuple[int, Seqno, bytes] | None = None
    lines = held_lines(destination)
    if len(lines) == 1:
        # Nothing is read, so that damage is met only where it matters.
        return lines[0]
    for line in lines:
        held = list_held(destination, line)
        times = [(read_header(destination, str(base)).meta.time_us, base.seqno) for base in held.bases[-1:]]
        last = max(held.units, key=lambda unit: unit.last, default=None)
        if last is not None:
            name = str(last)
            times.append((fetch_header(destination, name).last_time_us, last.last))
        if times:
            found = (*max(times), line)
            newest = found if newest is None else max(newest, found)
    if newest is None:
        raise BackupDestinationError("there is no backup in the destination yet")
    return newest[2]


def _lost_end(
    destination: Destination,
    lines: Sequence[tuple[Held, Seqno | None]],
    mark: tuple[bytes, Seqno] | None,
    newest: Seqno,
) -> tuple[Gap | None, bool]:
    """What is lost of these lines beyond their newest moment, and was not accepted; and whether it can be accepted.

    A base is put behind those that it builds on, and before units that begin at it: so whatever is there of a later
    commit tells that something is lost.
    """
    for held, fork in lines:
        marked = _marked_on(mark, held.line)
        known = max([marked or Seqno(0), *(unit.last for unit in held.units), *(base.seqno for base in held.bases)])
        last = known if fork is None else min(known, fork)
        if last <= newest:
            continue
        end = held.lost_end(marked)
        # What a base alone tells of is no gap of the line.
        is_gap = end is not None and end.last == known
        if end is None or not is_gap or _is_lost(destination, held, marked, end):
            return Gap(Seqno(newest + 1), last), is_gap
    return None, False


def _lost_elsewhere(destination: Destination, line: bytes, mark: tuple[bytes, Seqno] | None) -> Gap | None:
    """What is lost of the end of the mark's line, and was not accepted, if that is not the line with the newest commit.

    With it, that one could be the newest: so also where the other one came from it, and left it before that.
    """
    if mark is None or mark[0] == line:
        return None
    held = list_confirmed(destination, *mark)
    end = held.lost_end(mark[1])
    if end is None or not _is_lost(destination, held, mark[1], end):
        return None
    if held.newest() is None:
        # What it has in common with the line that it came from is not its own.
        with suppress(CorruptionError):
            origin = origin_of(destination, held.line)
            return end if origin is None else Gap(min(Seqno(origin.fork + 1), end.last), end.last)
    return end


def _is_lost(destination: Destination, held: Held, mark: Seqno | None, end: Gap) -> bool:
    """Whether the end of a line is not only missing, and that was not accepted."""
    # What is open may begin later, where pruning had gone further than what is left.
    return end.last in [gap.last for gap in lost_gaps(destination, held, mark)]


def _clipped(stretches: list[Stretch], fork: Seqno | None) -> list[Stretch]:
    if fork is None:
        return stretches
    return [Stretch(each.first, min(each.last, fork)) for each in stretches if each.first <= fork]


def _around(destination: Destination, lines: Sequence[tuple[Held, Seqno | None]], at: datetime) -> Around:
    """What is known of the commits around a time: of a line, and of those it came from up to where it left them."""
    at_us = us_of("at", at)
    before: list[Seqno] = []
    after: list[Seqno] = []

    def add(found: Around) -> None:
        before.extend(() if found.before is None else (found.before,))
        after.extend(() if found.after is None else (found.after,))

    def time_us(base: BaseName) -> int:
        return read_header(destination, str(base)).meta.time_us

    for held, fork in lines:
        add(around(destination, held, at_us, fork))
        # A base alone has a time as well.
        bases = [each for each in held.bases if held.lineage(each) is not None and (fork is None or each.seqno <= fork)]
        n = bisect_right(bases, at_us, key=time_us)
        add(Around(bases[n - 1].seqno if n else None, bases[n].seqno if n < len(bases) else None))
    return Around(max(before, default=None), min(after, default=None))


def _marked(lines: Sequence[tuple[Held, Seqno | None]], mark: tuple[bytes, Seqno] | None) -> Seqno:
    """The last commit of these lines that was there, as the mark says; 0 if it says nothing of them."""
    for held, fork in lines:
        if (marked := _marked_on(mark, held.line)) is not None:
            return marked if fork is None else min(marked, fork)
    return Seqno(0)


def _marked_on(mark: tuple[bytes, Seqno] | None, line: bytes) -> Seqno | None:
    return mark[1] if mark is not None and mark[0] == line else None


def _refusal(
    at: int | datetime,
    stretches: list[Stretch],
    place: Seqno,
    destination: Destination | None = None,
    lines: Sequence[tuple[Held, Seqno | None]] = (),
) -> NotInBackup:
    """With a destination and its lines it says when the nearest moments were."""
    i = bisect_left(stretches, place, key=lambda stretch: stretch.first)
    before = max((each.last for each in stretches[:i]), default=None)
    after = stretches[i].first if i < len(stretches) else None
    times: tuple[datetime | None, datetime | None] = (None, None)
    if destination is not None:
        times = _time_of(destination, lines, before), _time_of(destination, lines, after)
    return NotInBackup(at, _joined(stretches), nearest=(before, after), nearest_times=times)


def _time_of(
    destination: Destination, lines: Sequence[tuple[Held, Seqno | None]], seqno: Seqno | None
) -> datetime | None:
    """When the commit was made with which a base or a unit ends; None if there is none, or its object is damaged."""
    for held, fork in lines:
        if seqno is None or (fork is not None and seqno > fork):
            continue
        try:
            for base in held.bases:
                if base.seqno == seqno:
                    return time_of(read_header(destination, str(base)).meta.time_us)
            for unit in held.units:
                if unit.last == seqno:
                    name = str(unit)
                    return time_of(fetch_header(destination, name).last_time_us)
        except (CorruptionError, FormatError, ObjectMissing):
            continue
    return None


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """The same, those of two lines as one where one line goes on from the other."""
    joined: list[Stretch] = []
    for each in stretches:
        if joined and each.first <= joined[-1].last + 1:
            each = Stretch(joined[-1].first, max(joined.pop().last, each.last))
        joined.append(each)
    return joined
