"""Every name that a store gives to a file, made and parsed here, and nowhere else.

The table is in docs/format.md. A name that is not in it is foreign: kvwal never removes it, however much it looks like
one of a store's. Names that only later versions use are known: they are taken for a store's, and left alone.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = [
    "ASK",
    "DATA",
    "ENGINE",
    "ENGINE_SOCKET",
    "ERASING",
    "LOCK",
    "NOW",
    "POISONED",
    "READERS",
    "RESERVE",
    "SALVAGING",
    "SPARE",
    "STATUS",
    "index_name",
    "index_names",
    "is_erasable",
    "is_known",
    "is_pin",
    "is_temporary",
    "is_temporary_pin",
    "keys_name",
    "numbers",
    "pin_name",
    "segment_name",
    "temporary_name",
]

DATA: Final = "data"
#: Says who holds the store's lock.
LOCK: Final = "lock"
#: There while an old store is being erased for flag "n": the next writable open finishes that.
ERASING: Final = "erasing"
#: There while a salvage makes the store: what is there is a part.
SALVAGING: Final = "salvaging"
#: Space held for the time when the disk is full.
RESERVE: Final = "reserve"
#: A write or flush of the last writer failed.
POISONED: Final = "poisoned"
#: The next segment of the log, made ahead of time.
SPARE: Final = "spare.tmp"

#: A directory, for what followers share with the writer.
READERS: Final = "readers"
#: In it: the control page.
NOW: Final = "now"
#: And when the status was asked for; and the status.
ASK: Final = "ask"
STATUS: Final = "status"

# Of later versions.
ENGINE: Final = "engine"
ENGINE_SOCKET: Final = "engine.sock"

_TEMPORARY: Final = ".tmp"
_PIN: Final = ".pin"
_NUMBERED: Final = re.compile(r"([0-9]{20})\.(log|idx|keys)")
_NAMED: Final = frozenset((DATA, LOCK, ERASING, SALVAGING, RESERVE, READERS, ENGINE, ENGINE_SOCKET, POISONED))


def segment_name(first_seqno: int) -> str:
    """The segment of the log that begins with this commit."""
    return f"{first_seqno:020d}.log"


def index_name(first_seqno: int) -> str:
    """The sparse index of that segment."""
    return f"{first_seqno:020d}.idx"


def keys_name(first_seqno: int) -> str:
    """The key index of that segment."""
    return f"{first_seqno:020d}.keys"


def index_names(first_seqno: int) -> tuple[str, str]:
    """What is derived from that segment."""
    return index_name(first_seqno), keys_name(first_seqno)


def temporary_name(name: str) -> str:
    """What a file is called until it is whole."""
    return name + _TEMPORARY


def pin_name(unique: str) -> str:
    """The file of a pin, in `readers/`."""
    return unique + _PIN


def is_pin(name: str) -> bool:
    """Whether a file in `readers/` is a pin."""
    return name.endswith(_PIN)


def is_temporary_pin(name: str) -> bool:
    """Whether a pin is being made under this name, or was when its process died."""
    return name.endswith(_PIN + _TEMPORARY)


def numbers(name: str) -> tuple[int, str] | None:
    """The first seqno of a file that belongs to a segment, and "log", "idx" or "keys"; None for another name."""
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def is_temporary(name: str) -> bool:
    """Whether a file of a store is being made under this name, or was when its writer died."""
    made = name.removesuffix(_TEMPORARY)
    return name == SPARE or (made != name and (made in _NAMED or numbers(made) is not None))


def is_erasable(name: str) -> bool:
    """Whether flag "n" erases it: what the old store held, and not what every store has."""
    return name in (DATA, POISONED, SALVAGING) or numbers(name) is not None or is_temporary(name)


def is_known(name: str) -> bool:
    """Whether it is a name of a store, and no foreign one."""
    return name in _NAMED or is_erasable(name)
