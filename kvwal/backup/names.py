"""Every name of an object in a destination, made and parsed here, and nowhere else.

| name | object |
|---|---|
| `kvwal-archive` | whose destination it is |
| `LINE/base/SEQNO-GENERATION-PARENT.rREVISION` | a base: the pages of a generation; of parent 0 all of them |
| `LINE/unit/LEVEL/FIRST-LAST.rREVISION` | a unit: the commits beyond FIRST up to LAST |
| `lines/LINE` | where a line began |
| `state/...` | what the archiver and the checks remember; replaced by `swap` |

LINE is 16 hexadecimal digits, LEVEL one digit, REVISION a number without leading zeros, all others are 20 digits. So
names sort by their first number. A name that is not in the table is foreign.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from kvwal.keys import Seqno

__all__ = ["IDENTITY", "MAX_LEVEL", "STATE", "BaseName", "UnitName", "line_name", "parse_name"]

# On disk: never change.
IDENTITY: Final = "kvwal-archive"
STATE: Final = "state/"
MAX_LEVEL: Final = 3
_BASE: Final = re.compile(r"([0-9a-f]{16})/base/([0-9]{20})-([0-9]{20})-([0-9]{20})\.r(0|[1-9][0-9]{0,9})")
_UNIT: Final = re.compile(r"([0-9a-f]{16})/unit/([0-3])/([0-9]{20})-([0-9]{20})\.r(0|[1-9][0-9]{0,9})")
_MOST: Final = (1 << 64) - 1
_MOST_REVISION: Final = (1 << 32) - 1


class BaseName(NamedTuple):
    """Which base it is. `seqno`: commits up to this one are in it. `parent`: its generation; 0: there is none."""

    line: bytes
    seqno: Seqno
    generation: int
    parent: int
    revision: int = 0

    def __str__(self) -> str:
        numbers = f"{self.seqno:020d}-{self.generation:020d}-{self.parent:020d}"
        return f"{self.line.hex()}/base/{numbers}.r{self.revision}"


class UnitName(NamedTuple):
    """Which commits it has: those beyond `first`, up to `last`."""

    line: bytes
    level: int
    first: Seqno
    last: Seqno
    revision: int = 0

    def __str__(self) -> str:
        return f"{self.line.hex()}/unit/{self.level}/{self.first:020d}-{self.last:020d}.r{self.revision}"


def line_name(line: bytes) -> str:
    """The object that says where a line began."""
    return f"lines/{line.hex()}"


def parse_name(name: str) -> BaseName | UnitName | None:
    """What the name says; None if it is neither a base's nor a unit's, or says what cannot be."""
    found = _UNIT.fullmatch(name)
    if found is not None:
        first, last, revision = int(found[3]), int(found[4]), int(found[5])
        if first < last <= _MOST and revision <= _MOST_REVISION:
            return UnitName(bytes.fromhex(found[1]), int(found[2]), Seqno(first), Seqno(last), revision)
        return None
    found = _BASE.fullmatch(name)
    if found is not None:
        seqno, generation, parent, revision = (int(found[i]) for i in range(2, 6))
        if max(seqno, generation) <= _MOST and parent < generation and revision <= _MOST_REVISION:
            return BaseName(bytes.fromhex(found[1]), Seqno(seqno), generation, parent, revision)
    return None
