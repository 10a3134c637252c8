"""Lines in a destination: whence each came, and on which of them a moment is looked for.

A store that was restored has a line of its own, and its backups have that in their names. `lines/LINE` is an object of
JSON (see state.py) with `parent`, the line it left, in hex, and `fork`, the last commit that both have. A line without
such an object left none that is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvwal.backup.names import line_name
from kvwal.backup.port import Destination
from kvwal.backup.state import LINE_BYTES, dump, load
from kvwal.errors import CorruptionError, ObjectMissing
from kvwal.keys import Seqno

__all__ = ["Origin", "ancestry", "origin_of", "tell_line"]



class Origin(NamedTuple):
    """Whence a line came: the line that it left, and the last commit that both have."""

    parent: bytes
    fork: Seqno


def tell_line(destination: Destination, line: bytes, origin: Origin) -> None:
    """Say in the destination whence a line came. It is said once."""
    destination.put_new(line_name(line), dump({"parent": origin.parent.hex(), "fork": origin.fork}))


def origin_of(destination: Destination, line: bytes) -> Origin | None:
    """Whence a line came; None if it is not known to have left another. CorruptionError names the object."""
    name = line_name(line)
    try:
        members = load(name, destination.get(name))
    except ObjectMissing:
        return None
    try:
        parent, fork = bytes.fromhex(members["parent"]), members["fork"]
    except (LookupError, TypeError, ValueError):
        parent, fork = b"", -1
    if len(parent) != LINE_BYTES or type(fork) is not int or fork < 0:
        raise CorruptionError(name, None, "does not say whence the line came")
    return Origin(parent, Seqno(fork))


def ancestry(destination: Destination, line: bytes) -> Iterator[tuple[bytes, Seqno | None]]:
    """A line and those that it came from, each with the last commit that they have in common; None: all of them."""
    fork: Seqno | None = None
    seen: set[bytes] = set()
    while line not in seen:
        seen.add(line)
        yield line, fork
        origin = origin_of(destination, line)
        if origin is None:
            return
        fork = origin.fork if fork is None else min(fork, origin.fork)
        line = origin.parent
