"""Whether a line comes from where it says, by the commit at its fork, and by the unit that it begins with.

A line names the commit behind which it left another one by its digest: of that commit alone, since the digest of a
chain of units depends on where the chain began, and destinations differ in that. It is compared with the units, or the
base, of the other line that have this commit. Where none has it any more nothing can be told, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvwal.backup import state
from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held, list_held
from kvwal.backup.fetching import fetch_header, fetch_unit
from kvwal.backup.lines import Origin, origin_of, start_of_chain, tell_line
from kvwal.backup.names import line_name
from kvwal.backup.port import Destination
from kvwal.backup.units import lone_digest
from kvwal.engine.lines import parent_of
from kvwal.engine.reads import Reads
from kvwal.errors import CorruptionError, Finding, ForkDiverged, FormatError, ObjectMissing

__all__ = ["fork_findings", "refuse_other_fork", "tell_fork"]

# Of a commit that the log did not have when the base was made.
_UNKNOWN = bytes(32)


def tell_fork(destination: Destination, line: bytes, reads: Reads) -> None:
    """Have the destination say whence the line of a store came, if it left another, by its row.

    ForkDiverged if the destination says something else; or if it says nothing yet, and the line that this one left has
    another commit there at the fork. Where it was said before, restores and checks look at that.
    """
    row = parent_of(reads, line)
    if row is None:
        return
    origin = Origin(row.parent, row.fork, row.digest)
    try:
        found = origin_of(destination, line)
    except CorruptionError:
        # The row knows it.
        destination.delete(line_name(line))
        found = None
    if found is None:
        refuse_other_fork(destination, line, origin)
        tell_line(destination, line, origin)
    elif found != origin:
        raise ForkDiverged(line, origin.parent, origin.fork)


def refuse_other_fork(destination: Destination, line: bytes, origin: Origin, held: Held | None = None) -> None:
    """ForkDiverged if the line that this one left has another commit at the fork. Reads a base's header, or a unit.

    Args:
        origin: whence the line came.
        held: what there is of the line that is to have this commit; None: it is the one that was left.
    """
    if origin.digest is None:
        return
    held = list_held(destination, origin.parent) if held is None else held
    if _is_other(destination, held, origin):
        raise ForkDiverged(line, held.line, origin.fork)


def _is_other(destination: Destination, held: Held, origin: Origin) -> bool:
    """Whether there is a commit of that number, and none has the digest."""
    found = False
    for digest in _commits(destination, held, origin):
        if digest == origin.digest:
            return False
        found = True
    return found


def _commits(destination: Destination, held: Held, origin: Origin) -> Iterator[bytes]:
    """The digests of the commit at the fork, of each object that has it. One that is damaged is passed over."""
    for base in held.bases:
        try:
            if base.seqno == origin.fork and (digest := read_header(destination, str(base)).commit) != _UNKNOWN:
                yield digest
        except (CorruptionError, FormatError, ObjectMissing):
            continue
    for name in held.units:
        if name.first < origin.fork <= name.last:
            try:
                commit = fetch_unit(destination, name).commit(origin.fork)
            except (CorruptionError, FormatError, ObjectMissing):
                continue
            yield lone_digest(commit.kind, commit.time_us, commit.body)


def fork_findings(destination: Destination, store_id: bytes, held: Held) -> Iterator[Finding]:
    """What does not hold of where a line says that it came from. Reads a unit or two."""
    name = line_name(held.line)
    try:
        origin = origin_of(destination, held.line)
        if origin is None or origin.digest is None:
            return
        refuse_other_fork(destination, held.line, origin)
        if _is_other(destination, held, origin):
            yield Finding(name, None, f"the line itself has another commit {origin.fork}, at its fork")
        yield from _first_unit(destination, store_id, held)
    except ForkDiverged as error:
        yield Finding(name, None, str(error))
    except CorruptionError as error:
        yield error.finding


def _first_unit(destination: Destination, store_id: bytes, held: Held) -> Iterator[Finding]:
    """It begins a chain, and so names the commit at the fork, unless what was before it has been pruned."""
    try:
        _, kept = state.read(destination, state.KEPT)
    except CorruptionError:
        # Which lines were pruned is not known, as the status says.
        return
    if not held.units or held.line.hex() in kept:
        return
    name = str(held.units[0])
    try:
        before = fetch_header(destination, name).before
    except (CorruptionError, FormatError, ObjectMissing):
        return
    if before != start_of_chain(destination, store_id, held.line):
        yield Finding(name, 104, "the first unit of the line names another commit as the one that the line left")
