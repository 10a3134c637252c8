"""The version of kvwal, and feature bits: what a file may hold that a version of kvwal must know, or may pass over.

Meta and segment header carry two sets of them. A required bit that is not known is refused as `FormatError`, also for
reading; an optional one that is not known is kept. `docs/format.md` lists them all, also those not built yet.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BASES", "EXPIRY", "EXTENSIONS", "KEYSPACES", "KNOWN_OPTIONAL", "KNOWN_REQUIRED", "VERSION", "unknown_bits"]

VERSION: Final = "0.1.0"

# On disk: never change.
#: Tables other than 0 are in the tree or in kept log.
KEYSPACES: Final = 1 << 0
#: There are values that expire: puts with expiry, and leaves of kind 3.
EXPIRY: Final = 1 << 1
#: There are records with an extension block.
EXTENSIONS: Final = 1 << 2
#: There are bases, whose pages a writer must not reuse.
BASES: Final = 1 << 6

KNOWN_REQUIRED: Final = KEYSPACES | EXPIRY | EXTENSIONS | BASES
KNOWN_OPTIONAL: Final = 0

def unknown_bits(features: int, known: int) -> list[int]:
    """The numbers of the bits that are set and not known, ascending."""
    return [bit for bit in range(64) if (features & ~known) >> bit & 1]
