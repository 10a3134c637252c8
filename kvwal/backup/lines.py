"""Lines in a destination: whence each came, and on which of them a moment is looked for.

A store that was restored has a line of its own, and its backups have that in their names. `lines/LINE` is an object of
JSON (see state.py) with `parent`, the line it left, in hex, `fork`, the last commit that both have, and `digest`, that
of this commit alone, in hex; it is missing if it was not known when the line began. A line without such an object left
none that is known.

A chain of units of the line begins with `start_of_chain`, which has that digest in it. So its first unit names what was
before it, also where that is no longer there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from kvwal.backup.names import line_name
from kvwal.backup.port import Destination
from kvwal.backup.state import LINE_BYTES, dump, fetch, load
from kvwal.backup.units import line_digest
from kvwal.errors import CorruptionError, ObjectMissing
from kvwal.keys import Seqno

__all__ = ["Origin", "ancestry", "origin_of", "start_of_chain", "tell_line"]

_DIGEST_BYTES: Final = 32


class Origin(NamedTuple):
    """Whence a line came: the line that it left, the last commit that both have, and the digest of that, if known."""

    parent: bytes
    fork: Seqno
    digest: bytes | None = None


def tell_line(destination: Destination, line: bytes, origin: Origin) -> None:
    """Say in the destination whence a line came. It is said once."""
    members: dict[str, Any] = {"parent": origin.parent.hex(), "fork": origin.fork}
    if origin.digest is not None:
        members["digest"] = origin.digest.hex()
    destination.put_new(line_name(line), dump(members))


def origin_of(destination: Destination, line: bytes) -> Origin | None:
    """Whence a line came; None if it is not known to have left another. CorruptionError names the object."""
    name = line_name(line)
    try:
        members = load(name, fetch(destination, name))
    except ObjectMissing:
        return None
    try:
        parent, fork = bytes.fromhex(members["parent"]), members["fork"]
        digest = bytes.fromhex(members["digest"]) if "digest" in members else None
    except (LookupError, TypeError, ValueError):
        parent, fork, digest = b"", -1, None
    sizes = len(parent), _DIGEST_BYTES if digest is None else len(digest)
    if sizes != (LINE_BYTES, _DIGEST_BYTES) or type(fork) is not int or fork < 0:
        raise CorruptionError(name, None, "does not say whence the line came")
    return Origin(parent, Seqno(fork), digest)


def start_of_chain(destination: Destination, store_id: bytes, line: bytes) -> bytes:
    """The digest before the first commit that is archived of a line. CorruptionError as `origin_of`."""
    origin = origin_of(destination, line)
    return line_digest(store_id, line, None if origin is None else origin.digest)


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
