"""The interface of the standard library's `shelve` over a kvwal store: `import kvwal.compat.shelve as shelve`.

Values are pickled, as `shelve` does. Warning: unpickling runs whatever code the bytes ask for, so open only a shelf
that you trust as much as your program.
"""

from __future__ import annotations

import shelve
from collections.abc import MutableMapping
from shelve import BsdDbShelf, Shelf
from typing import Any

from kvwal.compat import dbm
from kvwal.db.handle import Uncopied
from kvwal.files import PathArgument
from kvwal.options import Flag

__all__ = ["BsdDbShelf", "DbfilenameShelf", "Shelf", "open"]


def __getattr__(name: str) -> Any:
    # What a later Python adds, such as `ShelveError` in 3.15.
    return getattr(shelve, name)


class DbfilenameShelf(Uncopied, shelve.Shelf[Any]):
    """A shelf in a kvwal store: see `open`."""

    # Typeshed leaves them out.
    cache: MutableMapping[str, Any]
    dict: MutableMapping[bytes, bytes]

    def __init__(
        self,
        filename: PathArgument,
        flag: Flag = "c",
        protocol: int | None = None,
        writeback: bool = False,
        **options: Any,
    ) -> None:
        # From Python 3.15 on.
        codec = {name: options.pop(name) for name in ("serializer", "deserializer") if name in options}
        super().__init__(dbm.open(filename, flag, **options), protocol, writeback, **codec)

    def clear(self) -> None:
        """Remove everything, in one commit."""
        self.cache.clear()
        self.dict.clear()


def open(
    filename: PathArgument,
    flag: Flag = "c",
    protocol: int | None = None,
    writeback: bool = False,
    **options: Any,
) -> DbfilenameShelf:
    """Open a shelf: a mapping from str to whatever can be pickled.

    Args:
        filename: a directory.
        flag: as of `kvwal.compat.dbm.open`.
        protocol: of pickle; None for its default.
        writeback: keep what was read or put in memory, and put all of it again at `sync` and `close`.
        options: those of `kvwal.open`; from Python 3.15 on also `serializer` and `deserializer`.

    Raises as `kvwal.compat.dbm.open`.
    """
    return DbfilenameShelf(filename, flag, protocol, writeback, **options)
