"""The read path of past moments: the tree of a base, and what the log says was changed since.

Nothing is replayed. A read asks the log's key indexes for the newest change of a key between base and moment, and the
tree where there is none. A scan merges what each segment changed, in key order, over the tree.

Requires: while one is read, the pages of its generation are pinned, and the log behind it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvwal.engine.count import Extent
from kvwal.engine.memtable import Memtable, Walk
from kvwal.engine.merge import Chunk, Pairs, Source, merged
from kvwal.engine.range_map import Cover
from kvwal.engine.readers import Reader
from kvwal.engine.value import Value
from kvwal.engine.version import Version
from kvwal.keys import Seqno
from kvwal.log import KeyHistory, SegmentCursor
from kvwal.pages import NotCached, Tree

__all__ = ["PastVersion"]


# Of the tree, in a long scan: as many as there are of a segment.
_CHUNK_KEYS: Final = 512


class PastVersion(Version):
    """A table of all moments from that of its tree on, for as long as it holds the log."""

    __slots__ = ("_history", "_hold", "_table")

    def __init__(self, tree: Tree, history: KeyHistory, hold: SegmentCursor, table: int = 0) -> None:
        """`hold` is let go of when this is collected."""
        super().__init__(Memtable(tree.meta.seqno), None, tree)
        self._history = history
        self._hold = hold
        self._table = table

    def _table_of(self, table: int, tree: Tree) -> Version:
        return PastVersion(tree, self._history, self._hold, table)

    def let_go(self) -> None:
        """Hold the log no more: there is no reader."""
        self._hold.close()

    def get(self, key: bytes, seqno: Seqno, *, cached_only: bool = False) -> Value:
        """The value as of `seqno`. With `cached_only` NotCached is raised: the log has to be read."""
        if cached_only:
            raise NotCached
        found = self._history.last(self._table, key, self.tree.meta.seqno, seqno)
        return self.tree.get(key) if found is None else found.value

    def cached_range(
        self, start: bytes | None, stop: bytes | None, most: int, *, reverse: bool
    ) -> tuple[Pairs, list[bytes], bool] | None:
        """None: the log has to be read."""
        return None

    def chunks(
        self,
        seqno: Seqno,
        start: bytes | None,
        stop: bytes | None,
        *,
        reverse: bool,
        own: Source | None = None,
        walk: Walk | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[Chunk]:
        """Chunks of a range as of `seqno`, in its direction. See `Version.chunks`; nothing is written to the past."""
        assert own is None, "a transaction reads a past moment"
        sources = [self._of_tree(start, stop, reverse=reverse, keys=_CHUNK_KEYS)]
        for stretch in self._history.stretches(self._table, self.tree.meta.seqno, seqno):
            # They hide what is older, and none of its own keys.
            sources += (Source(iter(()), cover=Cover(cover)) for cover in stretch.covers)
            sources.append(Source(stretch.chunks(start, stop, reverse=reverse)))
        return merged(sources, reverse=reverse)

    def count(
        self,
        seqno: Seqno,
        start: bytes | None,
        stop: bytes | None,
        *,
        extent: Extent | None = None,
        reader: Reader | None = None,
    ) -> int:
        """Number of keys in [start, stop) as of `seqno`. O(keys in the range), since nothing is known of changes."""
        if seqno == self.tree.meta.seqno:
            return self.tree.count(start, stop)
        return sum(len(keys) for keys, _ in self.chunks(seqno, start, stop, reverse=False))
