"""Merging ordered sources into one ordered stream: pure rules, no files, no locks.

A *chunk* is two sequences of equal length, keys and values, in the direction of the scan. Sources come oldest first. A
newer source wins over an older one by key, its None values hide the key, and its cover (deleted ranges) hides the keys
of all older sources.

Whole chunks are passed through untouched where only one source has keys, because a `zip` of two lists costs 0.05 us an
entry and anything that touches entries one by one ten times as much. Short ranges that lie in memory have a shorter
way: `overlaid` puts the few newer keys over the pairs of the tree at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from kvwal.engine.range_map import Cover
from kvwal.engine.value import Value

__all__ = ["Chunk", "Pairs", "RawChunk", "Source", "chunks_in", "larger", "merged", "overlaid"]

RawChunk: TypeAlias = tuple[Sequence[bytes], Sequence[bytes | None]]
Chunk: TypeAlias = tuple[Sequence[bytes], Sequence[bytes]]
Pairs: TypeAlias = list[tuple[bytes, bytes]]

# With at most an eighth as many keys as pairs, the keys are put in one by one; with more, by way of a dict.
_SPARSE: Final = 8
# The same of keys of newer sources and a chunk: with at most half as many.
_HALF: Final = 2


class Source:
    """One ordered source of a merge."""

    __slots__ = ("_chunks", "_reverse", "_seek", "cover", "covers", "deletes", "keys", "values")

    def __init__(
        self,
        chunks: Iterator[RawChunk],
        *,
        cover: Cover | None = None,
        deletes: bool = True,
        seek: Callable[[bytes], Iterator[RawChunk]] | None = None,
        reverse: bool = False,
    ) -> None:
        """`cover` hides older sources. `deletes`: values may be None. `seek` goes on behind a key that it is given: at
        it, or in reverse before it.
        """
        self._chunks = chunks
        self._seek = seek
        self._reverse = reverse
        # Looking for None values costs as much as the rest of a scan.
        self.deletes = deletes
        self.cover = cover
        #: What hides keys of this source.
        self.covers: Sequence[Cover] = ()
        self.keys: Sequence[bytes] = ()
        self.values: Sequence[bytes | None] = ()

    def fill(self) -> bool:
        """Make sure there are keys to take; False at the end of the source."""
        while not self.keys:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self.keys, self.values = self._visible(*chunk) if self.covers else chunk
        return True

    def _visible(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> RawChunk:
        """The chunk less what newer sources hide. What is hidden beyond its end is passed over, not read."""
        end = keys[-1]
        for cover in self.covers:
            if keys:
                keys, values = cover.hide(keys, values)
        if not keys and self._seek is not None:
            for cover in self.covers:
                stretch = cover.stretch(end)
                if stretch is not None:
                    beyond = stretch.start if self._reverse else stretch.stop
                    self._chunks = iter(()) if beyond is None else self._seek(beyond)
                    break
        return keys, values

    def take_all(self) -> RawChunk:
        """Take what `fill` found."""
        taken = self.keys, self.values
        self.keys, self.values = (), ()
        return taken

    def take(self, boundary: bytes, *, reverse: bool) -> RawChunk:
        """Take what lies up to and including the boundary, in the direction of the scan."""
        keys, values = self.keys, self.values
        if (keys[-1] >= boundary) if reverse else (keys[-1] <= boundary):
            return self.take_all()
        # Keys descend in a reverse scan; negating the comparison by counting from the other end.
        count = len(keys) - bisect_left(keys[::-1], boundary) if reverse else bisect_right(keys, boundary)
        self.keys, self.values = keys[count:], values[count:]
        return keys[:count], values[:count]


def merged(sources: Sequence[Source], *, reverse: bool) -> Iterator[Chunk]:
    """Chunks of what the newest source that knows a key says of it, without the deleted ones."""
    for index, source in enumerate(sources):
        # Every newer one hides, whether or not it still has keys.
        source.covers = [newer.cover for newer in sources[index + 1 :] if newer.cover is not None]
    active = list(sources)
    while True:
        active = [source for source in active if source.fill()]
        if not active:
            return
        if len(active) == 1:
            keys, values = active[0].take_all()
            deletes = active[0].deletes
        else:
            keys, values, deletes = _next_of(active, reverse)
        if deletes and None in values:
            kept = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
            if not kept:
                continue
            yield [key for key, _ in kept], [value for _, value in kept]
        else:
            # No None is left; the checker cannot know.
            yield keys, values  # type: ignore[misc]


def _next_of(sources: list[Source], reverse: bool) -> tuple[Sequence[bytes], Sequence[bytes | None], bool]:
    """The next chunk of several sources that have keys, and whether its values may be None."""
    boundary = (max if reverse else min)(source.keys[-1] for source in sources)
    parts: list[RawChunk] = []
    deletes = False
    for source in sources:
        first = source.keys[0]
        if (first < boundary) if reverse else (first > boundary):
            continue
        keys, values = source.take(boundary, reverse=reverse)
        if keys:
            parts.append((keys, values))
            deletes = deletes or source.deletes
    keys, values = parts[0]
    changes = sum(len(part_keys) for part_keys, _ in parts[1:])
    if changes and _HALF * changes <= len(keys) and not reverse:
        keys, values = _with_changes(keys, values, parts[1:])
    elif changes:
        newest: dict[bytes, bytes | None] = {}
        for part_keys, part_values in parts:
            newest.update(zip(part_keys, part_values, strict=True))
        keys = sorted(newest, reverse=reverse)
        values = list(map(newest.__getitem__, keys))
    return keys, values, deletes


def _with_changes(keys: Sequence[bytes], values: Sequence[bytes | None], parts: list[RawChunk]) -> RawChunk:
    """A chunk with those of newer parts, which have few keys, oldest first, put in one by one."""
    keys, values = list(keys), list(values)
    for part_keys, part_values in parts:
        at = 0
        for key, value in zip(part_keys, part_values, strict=True):
            at = bisect_left(keys, key, at)
            if at < len(keys) and keys[at] == key:
                values[at] = value
            else:
                keys.insert(at, key)
                values.insert(at, value)
    return keys, values


def larger(chunks: Iterator[RawChunk], most: int) -> Iterator[RawChunk]:
    """The same in chunks of at least `most` keys, by and by, since how much the reader wants is not known.

    A merge takes something from each source for each chunk of any, however few keys it has.
    """
    want = 1
    keys: list[bytes] = []
    values: list[bytes | None] = []
    for chunk_keys, chunk_values in chunks:
        if not keys and len(chunk_keys) >= want:
            yield chunk_keys, chunk_values
        else:
            keys += chunk_keys
            values += chunk_values
            if len(keys) < want:
                continue
            yield keys, values
            keys, values = [], []
        want = min(2 * max(want, len(chunk_keys)), most)
    if keys:
        yield keys, values


def chunks_in(pairs: Pairs) -> Iterator[Chunk]:
    """The pairs as chunks."""
    return iter([([key for key, _ in pairs], [value for _, value in pairs])] if pairs else ())


def overlaid(pairs: Pairs, keys: list[bytes], values: dict[bytes, Value], *, cut: bool, reverse: bool) -> Pairs:
    """Keys of a newer table over the pairs of an older one, in the direction of the range.

    Args:
        pairs, keys: in that direction. May be changed.
        cut: there are more keys, of which nothing is known. Pairs beyond those that are known are left out.
    """
    if reverse:
        pairs.reverse()
        keys.reverse()
        if cut:
            del pairs[: bisect_left(pairs, (keys[0],))]
    elif cut:
        del pairs[bisect_left(pairs, (keys[-1] + b"\0",)) :]
    pairs = _updated(pairs, keys, values)
    if reverse:
        pairs.reverse()
    return pairs


def _updated(pairs: Pairs, keys: list[bytes], values: dict[bytes, Value]) -> Pairs:
    """Both in one sorted run, without what is deleted."""
    if len(keys) * _SPARSE > len(pairs):
        entries: dict[bytes, Value] = dict(pairs)
        entries.update((key, values[key]) for key in keys)
        return [(key, value) for key in sorted(entries) if (value := entries[key]) is not None]
    for key in keys:
        value = values[key]
        # A tuple of the key alone comes right before its pair.
        at = bisect_left(pairs, (key,))
        there = at < len(pairs) and pairs[at][0] == key
        if value is not None:
            pairs[at : at + there] = [(key, value)]
        elif there:
            del pairs[at]
    return pairs
