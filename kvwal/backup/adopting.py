"""What an archiver makes sure of before it relies on what a destination holds already."""

from __future__ import annotations

from dataclasses import replace

from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held
from kvwal.backup.fetching import fetch_stored, fetch_unit
from kvwal.backup.port import Destination
from kvwal.backup.units import decode_unit
from kvwal.errors import BackupDestinationError, CorruptionError
from kvwal.keys import Seqno

__all__ = ["adopt", "without_damaged_end"]


def adopt(destination: Destination, store_id: bytes, held: Held, marked: Seqno | None, position: Seqno) -> None:
    """Make sure of what was found: it may be of one that was killed before it had read it back, or flushed it.

    NotInBackup if that moment is one by names only: a base of a checkpoint in parts lacks the units that it needs.
    """
    plan = held.plan(position, begins=lambda base: read_header(destination, str(base)).seqno)
    for base in plan.bases:
        # Durability: the name is taken, so this changes nothing, and what has it is durable when it returns.
        if destination.put_new(str(base), b""):
            destination.delete(str(base))
            raise BackupDestinationError(f"{base} was deleted meanwhile")
    for name in held.units_from(plan.after if marked is None else max(plan.after, min(marked, position)), position):
        try:
            data = fetch_stored(destination, name)
            unit = decode_unit(str(name), data)
        except CorruptionError:
            # Beyond the mark nothing relies on it: its commits are put anew.
            destination.delete(str(name))
            raise
        if unit.header.store_id != store_id:
            raise BackupDestinationError(f"{name} is of another store")
        destination.put_new(str(name), data)


def without_damaged_end(destination: Destination, held: Held, most: Seqno | None = None) -> Held:
    """The same without the units that go furthest, as far as they are damaged, and end at `most` or before."""
    units = sorted(held.units, key=lambda unit: (unit.last, unit.first))
    while units and (most is None or units[-1].last <= most):
        try:
            fetch_unit(destination, units[-1])
            break
        except CorruptionError:
            units.pop()
    left = set(units)
    return replace(held, units=tuple(unit for unit in held.units if unit in left))
