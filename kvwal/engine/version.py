"""A version: the memtable, the frozen one and the tree that belong together, and the read path over them.

A read descends from the newest source to the oldest: memtable, frozen memtable (being checkpointed, if any), tree. The
first that knows the key answers. This is the only place that says so; the store, snapshots, transactions, counts and
asyncio all read through a `Version`.

Requires: a reader of an older moment than now, or for longer than one call, is registered (see readers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvwal.engine.count import Below, Census, Counted, Extent, TreeBelow
from kvwal.engine.memtable import Memtable, Walk
from kvwal.engine.merge import Chunk, Pairs, RawChunk, Source, larger, merged, overlaid
from kvwal.engine.readers import Reader, Readers
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.keys import Seqno
from kvwal.pages import Tree

__all__ = ["SHORT", "Version"]

#: A longer range is read chunk by chunk.
SHORT: Final = 256


class Version:
    """Immutable but for the memtable, which the commit leader adds to, and the registrations."""

    __slots__ = ("__weakref__", "_parts", "frozen", "memtable", "readers", "tree")

    def __init__(self, memtable: Memtable, frozen: Memtable | None, tree: Tree) -> None:
        self.memtable = memtable
        self.frozen = frozen
        self.tree = tree
        #: Readers of this version: the tree's pages stay while there is one.
        self.readers = Readers()
        # Tables other than 0, as far as they were asked for.
        self._parts: dict[int, Version] = {}

    # -- tables ---------------------------------------------------------------------------------

    def table(self, table: int, tree: Tree | None = None) -> Version | None:
        """The read path of a table; None if no tree was given for it yet. With a tree: requires State.lock."""
        part = self._parts.get(table) if table else self
        if part is None and tree is not None:
            part = self._parts[table] = self._table_of(table, tree)
        return part

    def _table_of(self, table: int, tree: Tree) -> Version:
        # Those of its memtables that are not there are made, so that what is written later is seen as well.
        frozen = None if self.frozen is None else self.frozen.parts.of(table)
        return Version(self.memtable.parts.of(table), frozen, tree)

    # -- point reads ----------------------------------------------------------------------------

    def recall(self, key: bytes) -> Value | Missing:
        """The newest value as far as memory knows it; MISSING if the tree must answer. Requires: State.lock."""
        found = self.memtable.get(key)
        if found is MISSING and self.frozen is not None:
            found = self.frozen.get(key)
        return found

    def get(self, key: bytes, seqno: Seqno, *, cached_only: bool = False) -> Value:
        """The value as of `seqno`.

        With `cached_only` no file is read: NotCached is raised where one would have to be.
        """
        found = self.memtable.get_at(key, seqno)
        if found is MISSING and self.frozen is not None:
            found = self.frozen.get(key)
        if isinstance(found, Missing):
            return self.tree.peek(key) if cached_only else self.tree.get(key)
        return found

    # -- ranges ---------------------------------------------------------------------------------

    def cached_range(
        self, start: bytes | None, stop: bytes | None, most: int, *, reverse: bool
    ) -> tuple[Pairs, list[bytes], bool] | None:
        """The first pairs of a range, if they lie in memory: those of the tree, the newer keys, and whether it is all.

        Without a lock, since to bring keys into order may take long. `overlay` puts them together.
        """
        memtable = self.memtable
        if memtable.ranges or self.frozen is not None:
            return None
        # Newer keys may take some of them away; then these are missed, unless there are a few more.
        spare = (most >> 3) + 1 if memtable.latest else 0
        found = self.tree.cached_pairs(start, stop, most + spare, reverse=reverse)
        if found is None:
            return None
        pairs, ended = found
        keys: list[bytes] = []
        if memtable.latest:
            if not ended:
                # Beyond these pairs nothing is wanted.
                start, stop = (pairs[-1][0], stop) if reverse else (start, pairs[-1][0] + b"\0")
            # One more, to see whether they are all.
            keys = memtable.order.between(start, stop, after=None, reverse=reverse, most=most + 1)
        return pairs, keys, ended

    def overlay(
        self, pairs: Pairs, keys: list[bytes], ended: bool, most: int, *, reverse: bool
    ) -> tuple[Pairs, bool]:
        """What `cached_range` found, put together. Requires: State.lock, and that no commit was published since."""
        if keys:
            cut = len(keys) > most
            pairs = overlaid(pairs, keys, self.memtable.latest, cut=cut, reverse=reverse)
            ended = ended and not cut
        return pairs, ended

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
        """Chunks of a range as of `seqno`, in its direction.

        Args:
            own: a newest source on top: what a transaction wrote itself.
            walk: counts what was met.
            check: called now and then; raises what is to end the scan.
        """

        sources = [self._of_tree(start, stop, reverse=reverse)]
        for memtable in (self.frozen, self.memtable):
            if memtable:
                at = seqno if memtable is self.memtable else memtable.last_seqno
                found = memtable.chunks(at, start, stop, reverse=reverse, walk=walk, check=check)
                sources.append(Source(found, cover=memtable.ranges.at(at) or None))
        if own is not None:
            sources.append(own)
        return merged(sources, reverse=reverse)

    def _of_tree(self, start: bytes | None, stop: bytes | None, *, reverse: bool, keys: int = 1) -> Source:
        """The oldest source of a scan; if that is a long one, in chunks of at least this number of keys."""

        def between(start: bytes | None, stop: bytes | None) -> Iterator[RawChunk]:
            chunks = self.tree.chunks(start, stop, reverse=reverse)
            return chunks if keys == 1 else larger(chunks, keys)

        def from_there(beyond: bytes) -> Iterator[RawChunk]:
            return between(start, beyond) if reverse else between(beyond, stop)

        return Source(between(start, stop), deletes=False, seek=from_there, reverse=reverse)

    # -- counting -------------------------------------------------------------------------------

    def count(
        self,
        seqno: Seqno,
        start: bytes | None,
        stop: bytes | None,
        *,
        extent: Extent | None = None,
        reader: Reader | None = None,
    ) -> int:
        """Number of keys in [start, stop) as of `seqno`. O(log n), and a look-up for each key written since the last
        count.

        Args:
            extent: what the memtable had then, from `mark_count`; None for an older moment.
            reader: of an older moment; it keeps what counting this version finds out.
        """
        below: Below = TreeBelow(self.tree)
        frozen, memtable = self.frozen, self.memtable
        if frozen:
            below = Counted(frozen, frozen.last_seqno, below, _census_of(frozen), Extent.of(frozen), last=True)
        if not memtable:
            return below.count(start, stop)
        if extent is not None:
            return Counted(memtable, seqno, below, _census_of(memtable), extent).count(start, stop)
        census = None if reader is None else reader.censuses.get(self)
        if census is None:
            census = Census() if memtable.order.census is None else memtable.order.census.of_older_moment()
            if reader is not None:
                reader.censuses[self] = census
        return Counted(memtable, seqno, below, census, Extent.of(memtable)).count(start, stop)

    def mark_count(self, seqno: Seqno) -> Extent:
        """A count at the newest moment begins. Requires: State.lock, and a reader registered at `seqno`."""
        _census_of(self.memtable).mark(seqno)
        return Extent.of(self.memtable)


def _census_of(memtable: Memtable) -> Census:
    if memtable.order.census is None:
        memtable.order.census = Census()
    return memtable.order.census
