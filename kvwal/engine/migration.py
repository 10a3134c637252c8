"""How far the values of a table have been brought to a newer version: a row of table 1 for each such table.

The key is the kind 12 and the table's id (u32, big-endian). The value is JSON:

| member | |
|---|---|
| v | 1 |
| from, to | name and version of the codec: the version that the table remembered before, and the one that is written |
| next | base64: the values of all keys below are of version `to`, but for those that could not be read |
| examined, rewritten, unreadable | counts of values |

The row only saves work: where it is missing, or is not valid, a migration begins at the first key.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Final

from kvwal.errors import FormatError
from kvwal.keys import MAX_KEY_BYTES

__all__ = ["MigrationRow", "decode_migration", "encode_migration", "migration_key"]

# On disk: never change.
_KIND: Final = b"\x0c"
_TABLE = struct.Struct(">I")
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class MigrationRow:
    """What is stored of a migration. The fields are those of the table above."""

    codec: str
    first: int
    to: int
    next: bytes = b""
    examined: int = 0
    rewritten: int = 0
    unreadable: int = 0


def migration_key(table: int) -> bytes:
    """The key of a table's row."""
    return _KIND + _TABLE.pack(table)


def encode_migration(row: MigrationRow) -> bytes:
    """The row as bytes."""
    members = {
        "v": _VERSION,
        "from": [row.codec, row.first],
        "to": [row.codec, row.to],
        "next": b64encode(row.next).decode(),
        "examined": row.examined,
        "rewritten": row.rewritten,
        "unreadable": row.unreadable,
    }
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode_migration(value: bytes) -> MigrationRow | None:
    """What `encode_migration` was given; None for bytes that are none. FormatError for a newer version's."""
    try:
        members = json.loads(value)
        version = members["v"]
        if type(version) is int and version > _VERSION:
            raise FormatError(f"a migration was begun in version {version}, which this kvwal does not know")
        [codec, first], [_, to] = members["from"], members["to"]
        counts = [members[name] for name in ("examined", "rewritten", "unreadable")]
        at = b64decode(members["next"], validate=True)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    if version != _VERSION or type(codec) is not str or len(at) > MAX_KEY_BYTES:
        return None
    if not all(type(number) is int and number >= 0 for number in (version, first, to, *counts)):
        return None
    return MigrationRow(codec, first, to, at, *counts)
