"""Of which store a destination is, also where `kvwal-archive`, which says so, is damaged or missing.

Each base and each unit says so as well.
"""

from __future__ import annotations

from contextlib import suppress

from kvwal.backup import state
from kvwal.backup.bases import read_header
from kvwal.backup.chain import held_lines, list_held
from kvwal.backup.fetching import fetch_header
from kvwal.backup.names import IDENTITY, BaseName
from kvwal.backup.port import Destination
from kvwal.errors import BackupDestinationError, CorruptionError, FormatError, ObjectMissing

__all__ = ["claim", "keep_claim", "known_store"]


def known_store(destination: Destination) -> tuple[bytes, bool]:
    """The id of the store, and whether `kvwal-archive` says it; else the objects of each line do, and do not differ.

    Raises as `identity_of` where they do not tell.
    """
    try:
        return state.identity_of(destination), True
    except (CorruptionError, BackupDestinationError):
        found = _said_by_objects(destination)
        if len(found) != 1:
            raise
        return found.pop(), False


def _said_by_objects(destination: Destination) -> set[bytes]:
    found: set[bytes] = set()
    for line in held_lines(destination):
        held = list_held(destination, line)
        for each in (*held.bases, *held.units):
            name = str(each)
            # One that is whole tells of its line.
            with suppress(CorruptionError, FormatError, ObjectMissing):
                if isinstance(each, BaseName):
                    found.add(read_header(destination, name).store_id)
                else:
                    found.add(fetch_header(destination, name).store_id)
                break
    return found


def claim(destination: Destination, store_id: bytes) -> None:
    """As `state.claim`; `kvwal-archive` is put anew where it is damaged or missing, and the objects are the store's."""
    try:
        found, is_said = known_store(destination)
    except BackupDestinationError:
        # Nothing is there yet.
        found, is_said = store_id, True
    if found != store_id:
        raise state.other_store(found, store_id)
    if not is_said:
        destination.delete(IDENTITY)
    state.claim(destination, store_id)


def keep_claim(destination: Destination, store_id: bytes) -> None:
    """As `claim`, for a destination that was claimed: one look where `kvwal-archive` still says so."""
    with suppress(CorruptionError, BackupDestinationError):
        if state.identity_of(destination) == store_id:
            return
    claim(destination, store_id)
