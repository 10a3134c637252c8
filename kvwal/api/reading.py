"""Reading what is newest: what a store and a follower have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar, overload

from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs
from kvwal.keys import BytesLike, as_key

__all__ = ["Reading"]

_T = TypeVar("_T")


class Reading(OrderedMapping):
    """The newest moment of an engine as an ordered map."""

    def __init__(self, engine: Engine) -> None:
        #: What it reads.
        self.engine = engine
        self._state = engine.state
        self._reads = engine.reads
        self._cache = engine.state.cache

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for what is not bytes-like."""
        # Hot path: one dict hit, no lock. Whatever is not a row raises here and takes the long way, where everything is
        # checked: a wrong type, a key without a hash, a memoryview that may be written to (whose hash is a ValueError).
        try:
            value = self._cache.rows[key]  # type: ignore[index]  # what is no row raises
        except (KeyError, TypeError, ValueError):
            value = self._reads.read(as_key(key))
        return default if value is None else value

    def __getitem__(self, key: BytesLike) -> bytes:
        try:
            value = self._cache.rows[key]  # type: ignore[index]  # what is no row raises
        except (KeyError, TypeError, ValueError):
            value = self._reads.read(as_key(key))
        if value is None:
            raise KeyError(as_key(key))
        return value

    def _read(self, key: bytes) -> bytes | None:
        try:
            return self._cache.rows[key]
        except KeyError:
            return self._reads.read(key)

    def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        state = self._state
        wanted = keys if isinstance(keys, list | tuple) else list(keys)
        seqno = state.seqno
        try:
            # One C call over rows that all are the newest; if nothing was published meanwhile, they are of one moment.
            found = list(map(self._cache.rows.__getitem__, wanted))
            if state.horizon == seqno:
                return found
        except (KeyError, TypeError, ValueError):
            pass  # Not all of them are rows: take the way below.
        return self._reads.moments.now.again(lambda: self._get_many(wanted))

    def _get_many(self, wanted: Iterable[BytesLike]) -> list[bytes | None]:
        with Snapshot(self.engine, owner=self) as snapshot:
            return snapshot.get_many(wanted)

    def _lasting(self, key: bytes) -> bytes | None:
        return self._reads.lasting(key)

    def _may_expire(self) -> bool:
        return self._reads.moments.clock.in_use

    def _cached(self, bounds: Bounds) -> Pairs | None:
        return self._reads.cached_range(bounds.start, bounds.stop, bounds.limit, None, reverse=bounds.reverse)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        reads = self._reads

        def walk() -> Iterator[Chunk]:
            reader = reads.moments.reader("scan", owner=self)
            return reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse)

        return self._reads.moments.now.begun(walk)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return self._reads.count(start, stop)

    def _key_at(self, rank: int) -> bytes | None:
        return self._reads.key_at(rank)
