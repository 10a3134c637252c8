"""The interface of the standard library's `shelve` over a kvwal store: `import kvwal.compat.shelve as shelve`.

Values are pickled, as `shelve` does. Warning: unpickling runs whatever code the bytes ask for, so open only a shelf
that you trust as much as your program.
"""

from __future__ import annotations

import atexit
import shelve
import weakref
from collections.abc import MutableMapping
from shelve import BsdDbShelf, Shelf
from typing import Any

from kvwal.api.opened import alive, close_each
from kvwal.compat import dbm
from kvwal.db.handle import Uncopied
from kvwal.files import PathArgument, call_in_forked_child
from kvwal.finalizing import quiet_at_exit
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
        _open_shelves[id(self)] = self

    def clear(self) -> None:
        """Remove everything, in one commit."""
        self.cache.clear()
        self.dict.clear()

    @quiet_at_exit
    def __del__(self) -> None:
        if not self._has_nothing_to_write():
            self.close()

    def _has_nothing_to_write(self) -> bool:
        """Whether its store is closed, and nothing is lost by that; or it was never opened."""
        database = getattr(self, "dict", None)
        if database is None or (isinstance(database, dbm.Database) and database.closed):
            return not getattr(self, "cache", None)
        return False


# By id, since a mapping has no hash.
_open_shelves: weakref.WeakValueDictionary[int, DbfilenameShelf] = weakref.WeakValueDictionary()


def _tell_child() -> None:
    for shelf in alive(_open_shelves):
        # The parent writes it.
        shelf.cache.clear()
    _open_shelves.clear()


def _close_all() -> None:
    """Write what is cached where it can be written, before the stores are closed."""
    close_each(shelf for shelf in alive(_open_shelves) if _can_be_written(shelf))


def _can_be_written(shelf: DbfilenameShelf) -> bool:
    database: object = shelf.dict
    if isinstance(database, dbm.Database):
        return not database.closed and not database._store.read_only
    return not shelf._has_nothing_to_write()


call_in_forked_child(_tell_child)
# What is registered later is called first: the stores have been, by an import above.
atexit.register(_close_all)


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
