"""What readers see now: the current version and its seqno, and the lock under which both change.

In front of the version stands the row cache, so that a hot get is one dict hit without a lock. How the state is read,
changed and replaced is said elsewhere: reads.py, readers.py, publish.py, succession.py. These rules are for all of
them:

- `lock` guards everything here except a look into the rows. It is never held during I/O, and no other lock is taken
  under it: it is the last of the lock order (docs/architecture.md). It is held for microseconds, but for a commit of
  many keys, and for steps that come seldom: `RowCache.shrink` (about 15 ms), packing in `History.record` (1 to 2 ms).
- `horizon` is raised before the rows change, `seqno` after: a reader that took a row and still finds `horizon` at its
  own seqno knows that the row is not from its future.
- A section that looks at what is visible calls `finish` first: no section may see a commit that an interruption left
  half visible.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from kvwal.engine.memtable import Memtable
from kvwal.engine.row_cache import RowCache
from kvwal.engine.version import Version
from kvwal.keys import Seqno
from kvwal.locks import Lock, locked, new_lock
from kvwal.pages import PageFile

__all__ = ["State", "UnlessGone"]


class UnlessGone:
    """A block that reads files without a lock: where it fails, and the store is closed by then, that is why.

    It was closed by another thread; of it the files only know that they are closed, or that others have their numbers.
    """

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        self._state = state

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Neither an end nor an interruption is a failure.
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            self._state.refuse_if_gone()


class State:
    """What is visible now of one open store."""

    def __init__(self, pages: PageFile, *, cache_bytes: int) -> None:
        meta = pages.meta
        self.lock = new_lock()
        # Guards the order of keys in each memtable.
        self._order_lock = new_lock()
        # Looked for anew each time, since a follower has another page cache for each generation.
        self.cache: Final = RowCache(cache_bytes, lambda size: pages.pager.cache.resize(size))
        self.seqno: Seqno = meta.seqno
        self.horizon: Seqno = meta.seqno
        pages.pins.hold(self, {meta.generation})
        self.version = Version(Memtable(meta.seqno, *self.locks()), None, pages.tree(meta))
        #: Whether a put needs nothing but its value in two dicts: no reader, range, transaction, gap or count wants
        #: more. Set by each commit that is published while it is not.
        self.plain = False
        #: What publishes a commit that was interrupted as it became visible, and its arguments. Whichever section comes
        #: next calls it. (No `partial`: as that is made another interruption may come.)
        self.unfinished: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._gone: Callable[[], Exception] | None = None

    def locks(self) -> tuple[Lock, Lock]:
        """The lock, and that of the order of keys in all memtables: those that the commit leader may wait for."""
        return self.lock, self._order_lock

    def finish(self) -> None:
        """Publish what an interruption left half visible: no section may see that. Requires: lock."""
        unfinished = self.unfinished
        if unfinished is not None:
            publish, arguments = unfinished
            publish(*arguments)
            self.unfinished = None

    # -- ending ---------------------------------------------------------------------------------

    @locked
    def close(self, reason: Callable[[], Exception]) -> None:
        """Refuse readers from now on with the error that `reason` makes. No section is under way when this returns."""
        self.refuse(reason)

    def refuse(self, reason: Callable[[], Exception]) -> None:
        """The same without the lock: the calling thread may be in a section, or one that a fork left behind."""
        self._gone = reason
        # A get looks into the rows first: without rows it comes to `Reads.read`, which refuses.
        self.cache.clear()

    def refuse_if_gone(self) -> None:
        """Raise the reason if the store is closed, or was left behind by a fork."""
        if self._gone is not None:
            raise self._gone()
