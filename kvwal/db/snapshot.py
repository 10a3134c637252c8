"""A snapshot: the store as it was at one commit, for as long as it is held.

It costs a registration and pins what it needs: the memtable of its moment, and the pages of its
generation. Both are bounded: what is written after the next checkpoint's freeze goes to another
memtable, so a long-held snapshot does not grow. `Store.pins` shows who holds what since when.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.few import Pairs
from kvwal.engine.merge import Chunk, Level, merged
from kvwal.engine.present import Present, View
from kvwal.errors import ClosedError
from kvwal.keys import Seqno

__all__ = ["Snapshot", "chunks_of"]


def chunks_of(present: Present, view: View, bounds: Bounds, own: Level | None = None) -> Iterator[Chunk]:
    """Chunks of a range as of a view, which is given back when the iteration ends or is dropped.

    `own` is a newest level on top: what a transaction wrote itself.
    """
    chunks = _chunks(present, view, bounds, own)
    # A generator that never started would not run its finally: start it, up to the first yield.
    next(chunks)
    return chunks


def _chunks(present: Present, view: View, bounds: Bounds, own: Level | None) -> Iterator[Chunk]:
    try:
        yield [], []
        levels = present.ordered_levels(view, bounds.start, bounds.stop, reverse=bounds.reverse)
        if own is not None:
            levels.append(own)
        yield from merged(levels, reverse=bounds.reverse)
    except ClosedError:
        # The page file only knows that it is closed; after a fork that is not the whole story.
        present.refuse_if_gone()
        raise
    finally:
        present.release(view)


class Snapshot(OrderedMapping):
    """A read-only ordered map of one moment.

    Use it in a `with` block, or `close` it; a forgotten one is released when it is collected. All
    methods may be called from any thread. They raise `ClosedError` once it, or its store, is closed.
    """

    __slots__ = ("__weakref__", "_present", "_view", "seqno")

    def __init__(self, present: Present, since_us: int, *, owner: object) -> None:
        self._view: View | None = None
        self._present = present
        self._view = present.view("snapshot", since_us, owner=owner)
        #: The last commit this snapshot contains.
        self.seqno: Seqno = self._view.seqno

    def _open_view(self) -> View:
        if self._view is None:
            raise ClosedError("this snapshot is closed; take another with Store.snapshot()")
        return self._view

    def _read(self, key: bytes) -> bytes | None:
        try:
            return self._present.read_at(self._open_view(), key)
        finally:
            # Closed by another thread meanwhile, what was read may be of no moment at all: say that it is closed.
            self._open_view()

    def _few(self, bounds: Bounds) -> Pairs | None:
        seqno = self._open_view().seqno
        return self._present.few(bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        view = self._open_view()
        # The iterator has a registration of its own, so that it may outlive the snapshot.
        return chunks_of(self._present, self._present.again(view, "scan"), bounds)

    def _count(self) -> int:
        return sum(len(keys) for keys, _ in self._chunks(Bounds(None, None, None, False, None)))

    def close(self) -> None:
        """Let go of the moment. Idempotent."""
        view, self._view = self._view, None
        if view is not None:
            self._present.release(view)

    def __enter__(self) -> Snapshot:
        self._open_view()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot at seqno {self.seqno}{' (closed)' if self._view is None else ''}>"
