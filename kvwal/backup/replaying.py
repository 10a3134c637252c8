"""The commits of units in their order, and the proof that each unit follows the one before it.

The digest of a commit depends on where its chain of units began, and a line may have several chains: a backup that
begins before all units that are there begins one. Two units of one chain follow each other by their digests. Where the
chain changes, what came before is the same history if the last commit of it is also that of a unit, or a base, that the
next unit goes on from.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue

from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held
from kvwal.backup.fetching import fetch_header, fetch_stored, fetch_unit
from kvwal.backup.lines import start_of_chain
from kvwal.backup.names import UnitName
from kvwal.backup.port import Destination
from kvwal.backup.units import Unit, UnitCommit, UnitHeader, lone_digest, open_unit
from kvwal.errors import CorruptionError, FormatError, ObjectMissing
from kvwal.keys import Seqno
from kvwal.log.commits import Commits

__all__ = ["breaks", "replay_units"]


def replay_units(
    destination: Destination,
    store_id: bytes,
    units: Sequence[UnitName],
    after: Seqno,
    until: Seqno,
    held: Held | None = None,
    *,
    read: Callable[[int], object] = lambda size: None,
) -> Iterator[Commits]:
    """The commits beyond `after` up to `until`, of units that lead there, many at a time.

    Two units are in memory at most. A unit is proved once all its commits were given: what is made of them counts when
    this has come to its end.

    `held`: what the line has; without it the units are to be of one chain. `read`: told the bytes of each unit when it
    was done with. CorruptionError if a unit is damaged, of another store, or does not follow the one before it.
    """
    at, digest, last = after, None, None
    for name, unit in _opened(destination, units, read):
        header = unit.header
        if header.store_id != store_id:
            raise CorruptionError(str(name), 32, "is of another store")
        if header.first > at:
            raise CorruptionError(str(name), None, f"commits {at + 1} to {header.first} before it are missing")
        if digest is not None and unit.digest_at(at) != digest:
            if held is None or last is None or not _goes_on(destination, held, unit, last):
                raise _broken(name, at)
        for run in unit.proved_runs():
            begin = max(0, at + 1 - run.seqnos[0])
            if begin < len(run):
                last = UnitCommit(run.kinds[-1], run.seqnos[-1], run.times_us[-1], run.bodies[-1])
                end = min(len(run), until + 1 - run.seqnos[0])
                if begin < end:
                    yield run.part(begin, end)
        at, digest = max(at, header.last), header.after
        # The one behind the next one is fetched now.
        del unit
    if at < until:
        raise CorruptionError(str(units[-1]) if units else "units", None, f"commits {at + 1} to {until} are missing")


def _opened(
    destination: Destination, units: Sequence[UnitName], read: Callable[[int], object]
) -> Iterator[tuple[UnitName, Unit]]:
    """Each unit, opened. The next one is unpacked by another thread meanwhile."""

    def begin(name: UnitName) -> tuple[UnitName, int, Callable[[], Unit]]:
        data = fetch_stored(destination, name)
        return name, len(data), _opening(str(name), data)

    begun = map(begin, units)
    following = next(begun, None)
    while following is not None:
        name, size, opened = following
        following = next(begun, None)
        yield name, opened()
        read(size)


def _opening(name: str, data: bytes) -> Callable[[], Unit]:
    """Have a unit opened by another thread; returns what waits for it."""
    # Neither a `Thread` nor a pool: those wait in Python code over locks, which a signal handler that raises leaves
    # held. To begin, to put and to get are one C call each.
    opened: SimpleQueue[Unit | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            opened.put(open_unit(name, data))
        except BaseException as error:  # noqa: BLE001  # raised by who waits
            opened.put(error)

    def wait() -> Unit:
        unit = opened.get()
        if isinstance(unit, BaseException):
            raise unit
        return unit

    try:
        start_new_thread(run, ())
    except RuntimeError:
        # The interpreter ends, or there are too many.
        return partial(open_unit, name, data)
    return wait


def breaks(destination: Destination, held: Held, units: Sequence[UnitName]) -> Iterator[CorruptionError]:
    """Where a unit does not follow the one before it. Reads the headers, and units where those do not tell."""
    before: UnitHeader | None = None
    for name in units:
        try:
            header = fetch_header(destination, name)
            if before is not None and (before.last, before.after) != (header.first, header.before):
                unit = fetch_unit(destination, name)
                if unit.digest_at(before.last) != before.after:
                    text = str(before.name)
                    last = fetch_unit(destination, text).commit(before.last)
                    if not _goes_on(destination, held, unit, last):
                        yield _broken(name, before.last)
            before = header
        except CorruptionError as error:
            yield error
            before = None
        except ObjectMissing:
            # Merged, or pruned, since it was listed.
            before = None


def _broken(name: UnitName, at: Seqno) -> CorruptionError:
    return CorruptionError(str(name), None, f"does not follow what came up to commit {at}: other commits")


def _goes_on(destination: Destination, held: Held, unit: Unit, last: UnitCommit) -> bool:
    """Whether a unit of another chain goes on from this commit: the same one is there in the chain of the unit."""
    at, header = last.seqno, unit.header
    if header.first < at:
        return unit.commit(at) == last
    for name in held.units:
        if name.first < at <= name.last:
            try:
                other = fetch_unit(destination, name)
            except (CorruptionError, FormatError):
                continue
            if other.digest_at(at) == header.before and other.commit(at) == last:
                return True
    if header.before == start_of_chain(destination, header.store_id, header.line):
        # The chain begins behind a base.
        digest = lone_digest(last.kind, last.time_us, last.body)
        for base in held.bases:
            try:
                if base.seqno == at and read_header(destination, str(base)).commit == digest:
                    return True
            except (CorruptionError, FormatError):
                continue
    return False
