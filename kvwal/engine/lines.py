"""The rows of lines: from which line a store's own came, and after which commit.

A restore makes a new line. The row of that line is the first commit on it: under the key kind 9 and then the line, JSON
with the parent line (base64), the last commit that both have, its digest (base64; missing if no object had the commit),
why, and the wall clock. Rows travel with the store, so those of all lines that it came from are there, but for that of
the line it was created on, which has none.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Final, NamedTuple

from kvwal.engine.reads import Reads
from kvwal.errors import CorruptionError
from kvwal.files.names import DATA
from kvwal.keys import SYSTEM_TABLE, Seqno

__all__ = ["LineRow", "decode_line", "encode_line", "fork_of", "parent_of"]

# On disk: never change.
_KIND: Final = b"\x09"
_VERSION: Final = 1
_LINE_BYTES: Final = 8
_DIGEST_BYTES: Final = 32


class LineRow(NamedTuple):
    """What is stored of a line.

    Attributes:
        line: of the store. parent: the line that it left.
        fork: the last commit that both have.
        why: "restore".
        wall_us: the wall clock when it was made.
        digest: that of the commit `fork` alone, as a base names its last commit; None if it is not known.
    """

    line: bytes
    parent: bytes
    fork: Seqno
    why: str
    wall_us: int
    digest: bytes | None = None


def encode_line(row: LineRow) -> tuple[bytes, bytes]:
    """Key and value of a row."""
    parent = b64encode(row.parent).decode()
    members = {"v": _VERSION, "parent": parent, "fork": row.fork, "why": row.why, "wall_us": row.wall_us}
    if row.digest is not None:
        members["digest"] = b64encode(row.digest).decode()
    return _KIND + row.line, json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def decode_line(key: bytes, value: bytes) -> LineRow | None:
    """What `encode_line` was given; None for a row of a newer version. CorruptionError for bytes that are none."""
    try:
        members = json.loads(value)
        if type(members["v"]) is int and members["v"] != _VERSION:
            return None
        parent, fork = b64decode(members["parent"], validate=True), members["fork"]
        why, wall_us = members["why"], members["wall_us"]
        digest = b64decode(members["digest"], validate=True) if "digest" in members else None
        sizes = len(parent), _DIGEST_BYTES if digest is None else len(digest)
        numbers = type(fork) is int and fork >= 0 and type(wall_us) is int
        if sizes == (_LINE_BYTES, _DIGEST_BYTES) and numbers and type(why) is str:
            return LineRow(key[len(_KIND) :], parent, Seqno(fork), why, wall_us, digest)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise CorruptionError(DATA, None, f"the row of line {key[len(_KIND) :].hex()} is damaged")


def parent_of(reads: Reads, line: bytes) -> LineRow | None:
    """Whence a line came; None for the one that the store was created on. CorruptionError if its row is damaged."""
    key = _KIND + line
    value = reads.read(key, table=SYSTEM_TABLE)
    return None if value is None else decode_line(key, value)


def fork_of(reads: Reads, own: bytes, line: bytes) -> Seqno | None:
    """The last commit that another line has in common with the store's own; None if it is not one that this came from.

    Commits up to there are the same on both.
    """
    fork: Seqno | None = None
    seen: set[bytes] = set()
    while own != line and own not in seen:
        seen.add(own)
        row = parent_of(reads, own)
        if row is None:
            return None
        # A restore of a restored store may have gone back behind the first one.
        fork = row.fork if fork is None else min(fork, row.fork)
        own = row.parent
    return fork if own == line else None
