"""A place among the keys of an ordered map, which can be moved."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Cursor"]

K = TypeVar("K")
V = TypeVar("V")
_K = TypeVar("_K")
_V_co = TypeVar("_V_co", covariant=True)


class _Ordered(Protocol[_K, _V_co]):
    def scan(
        self, start: _K | None = None, stop: _K | None = None, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[_K, _V_co]]: ...


class Cursor(Generic[K, V]):
    """A place among the keys of a store, a snapshot, a transaction or a table.

    It is at a pair, before the first one, or behind the last one. Each method that moves it returns whether it is at a
    pair then. To go on in one direction costs as much as a scan, of the moment at which it was placed (by `first`,
    `last`, `seek`, `seek_last`) or turned; to place it costs a look-up. That moment is held meanwhile: close it, or use
    it in a `with` block. For one thread at a time.

        with db.cursor() as cursor:
            cursor.seek(b"m")
            print(cursor.key, cursor.value)
            cursor.prev()

    Attributes:
        pair: the key and the value that it is at; None if it is at none.
    """

    __slots__ = ("_at", "_behind", "_reverse", "_scan", "_source", "pair")

    def __init__(self, source: _Ordered[Any, Any]) -> None:
        self._source = source
        self.pair: tuple[K, V] | None = None
        # The key that it was at last: what it goes on from.
        self._at: K | None = None
        # At no pair: whether behind the last one. (And not before the first.)
        self._behind = False
        # What goes on in the direction that it went last.
        self._scan: Iterator[tuple[K, V]] = iter(())
        self._reverse: bool | None = None

    @property
    def key(self) -> K:
        """The key that it is at. LookupError if it is at none."""
        return self._pair()[0]

    @property
    def value(self) -> V:
        """The value of that key, as of when the cursor came to it. LookupError if it is at none."""
        return self._pair()[1]

    def _pair(self) -> tuple[K, V]:
        if self.pair is None:
            raise LookupError("the cursor is at no key; place it with first(), last() or seek()")
        return self.pair

    # -- placing it ---------------------------------------------------------------------------

    def first(self) -> bool:
        """Go to the smallest key."""
        return self._go(self._source.scan(), reverse=False)

    def last(self) -> bool:
        """Go to the largest key."""
        return self._go(self._source.scan(reverse=True), reverse=True)

    def seek(self, key: K) -> bool:
        """Go to `key`, or else to the smallest key above it."""
        return self._go(self._source.scan(key), reverse=False)

    def seek_last(self, key: K) -> bool:
        """Go to `key`, or else to the largest key below it."""
        if self._go(self._source.scan(key, limit=1), reverse=False) and self.key == key:
            # What follows is not read yet.
            self._reverse = None
            return True
        return self._go(self._source.scan(stop=key, reverse=True), reverse=True)

    # -- moving it ----------------------------------------------------------------------------

    def next(self) -> bool:
        """Go to the next larger key; from before the first one to that."""
        if self._reverse is False:
            return self._step()
        if self.pair is None:
            return False if self._behind else self.first()
        scan = self._source.scan(self._at)
        return self._go(scan, reverse=False, beyond=self._at)

    def prev(self) -> bool:
        """Go to the next smaller key; from behind the last one to that."""
        if self._reverse is True:
            return self._step()
        if self.pair is None:
            return self.last() if self._behind else False
        return self._go(self._source.scan(stop=self._at, reverse=True), reverse=True)

    def _go(self, scan: Iterator[tuple[K, V]], *, reverse: bool, beyond: K | None = None) -> bool:
        self._scan, self._reverse = scan, reverse
        moved = self._step()
        # It may be that the key where it was is still there.
        return self._step() if moved and beyond is not None and self._at == beyond else moved

    def _step(self) -> bool:
        pair = next(self._scan, None)
        self.pair = pair
        if pair is not None:
            self._at = pair[0]
            return True
        self._behind = self._reverse is False
        self._scan, self._reverse = iter(()), None
        return False

    def __iter__(self) -> Iterator[tuple[K, V]]:
        """The pair that it is at, and those that follow. The cursor moves with it, and ends behind the last one."""
        going = self.pair is not None
        while going:
            yield self._pair()
            going = self.next()

    # -- ending -------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the moment that it reads. It may be placed again. Idempotent."""
        self._scan, self._reverse, self.pair = iter(()), None, None

    def __enter__(self) -> Cursor[K, V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "at no key" if self.pair is None else f"at {self.pair[0]!r}"
        return f"<kvwal.Cursor {where}>"
