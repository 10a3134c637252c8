"""A place among the keys of an ordered map, which can be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from kvwal.db.handle import Closing
from kvwal.keys import KeyRange

__all__ = ["Cursor"]

K = TypeVar("K")
V = TypeVar("V")

class _Ordered(Protocol):
    def scan(
        self, start: Any = None, stop: Any = None, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]: ...


class Cursor(Closing, Generic[K, V]):
    """A place among the keys of a store, a snapshot, a transaction or a table. Made by their `cursor`.

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

    __slots__ = ("_at", "_behind", "_pair_of", "_range", "_raw", "_reverse", "_scan", "pair")

    def __init__(
        self,
        raw: Callable[[], _Ordered],
        range: Callable[[Any, Any], KeyRange],
        pair: Callable[[tuple[bytes, bytes]], tuple[K, V]],
    ) -> None:
        """`raw`: what is there, as bytes; `range`: the bytes of bounds; `pair`: what two bytes strings stand for."""
        self._raw = raw
        self._range = range
        self._pair_of = pair
        self.pair: tuple[K, V] | None = None
        # The bytes of the key that it is at. Decoded keys need not be equal to themselves.
        self._at: bytes | None = None
        # At no key: whether behind the last one. (And not before the first.)
        self._behind = False
        # What goes on in the direction that it went last.
        self._scan: Iterator[tuple[bytes, bytes]] = iter(())
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
        return self._go(self._range(None, None), reverse=False)

    def last(self) -> bool:
        """Go to the largest key."""
        return self._go(self._range(None, None), reverse=True)

    def seek(self, key: K) -> bool:
        """Go to `key`, or else to the smallest key above it."""
        return self._go(self._range(key, None), reverse=False)

    def seek_last(self, key: K) -> bool:
        """Go to `key`, or else to the largest key below it."""
        bounds = self._range(key, None)
        found = None if bounds.is_empty() else next(self._raw().scan(bounds.start, limit=1), None)
        if found is None or found[0] != bounds.start:
            return self._go(self._range(None, key), reverse=True)
        # What follows is not read yet.
        self._scan, self._reverse = iter(()), None
        return self._come_to(found)

    # -- moving it ----------------------------------------------------------------------------

    def next(self) -> bool:
        """Go to the next larger key; from before the first one to that."""
        if self._reverse is False:
            return self._step()
        if self._at is None:
            return False if self._behind else self.first()
        return self._go(KeyRange(self._at, self._range(None, None).stop), reverse=False, beyond=self._at)

    def prev(self) -> bool:
        """Go to the next smaller key; from behind the last one to that."""
        if self._reverse is True:
            return self._step()
        if self._at is None:
            return self.last() if self._behind else False
        return self._go(KeyRange(self._range(None, None).start, self._at), reverse=True)

    def _go(self, bounds: KeyRange, *, reverse: bool, beyond: bytes | None = None) -> bool:
        self._scan, self._reverse = self._raw().scan(*bounds, reverse=reverse), reverse
        return self._step(beyond)

    def _step(self, beyond: bytes | None = None) -> bool:
        found = next(self._scan, None)
        if found is not None and found[0] == beyond:
            # The key where it was is still there.
            found = next(self._scan, None)
        if found is not None:
            return self._come_to(found)
        self._behind = self._reverse is False
        self._scan, self._reverse, self._at, self.pair = iter(()), None, None, None
        return False

    def _come_to(self, found: tuple[bytes, bytes]) -> bool:
        self._at, self.pair = found[0], None
        # It goes on from there also if this raises.
        self.pair = self._pair_of(found)
        return True

    def __iter__(self) -> Iterator[tuple[K, V]]:
        """The pair that it is at, and those that follow. The cursor moves with it, and ends behind the last one."""
        going = self.pair is not None
        while going:
            yield self._pair()
            going = self.next()

    # -- ending -------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the moment that it reads. It may be placed again. Idempotent."""
        self._scan, self._reverse, self._at, self.pair = iter(()), None, None, None

    def __repr__(self) -> str:
        where = "at no key" if self.pair is None else f"at {self.pair[0]!r}"
        return f"<kvwal.Cursor {where}>"
