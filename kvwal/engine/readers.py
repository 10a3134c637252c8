"""Who reads which moment: registered readers, and what stays because of them.

A reader is registered for as long as something refers to it and it was not released. It leaves by that alone: by one
assignment, or by being dropped, which runs no Python code. So a finalizer may release a reader whatever its thread was
doing, and an interruption leaves it registered or not, never half.
"""

from __future__ import annotations

import threading
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final, TypeAlias
from weakref import ref

from kvwal.keys import Seqno

if TYPE_CHECKING:
    from kvwal.engine.count import Census
    from kvwal.engine.version import Version

__all__ = ["Reader", "Readers"]

_tokens: Final = count(1)


class Reader:
    """A moment that stays readable while this is registered."""

    __slots__ = (
        "__weakref__",
        "censuses",
        "is_released",
        "owner",
        "purpose",
        "seqno",
        "since_us",
        "thread_name",
        "token",
        "version",
    )

    def __init__(self, version: Version, seqno: Seqno, purpose: str, since_us: int, owner: object) -> None:
        #: Whether it was given back.
        self.is_released = False
        self.token = next(_tokens)
        self.version = version
        self.seqno = seqno
        self.purpose = purpose
        self.since_us = since_us
        #: The store: while something reads, it is not collected, and so its lock not given to another process.
        self.owner = owner
        self.thread_name = threading.current_thread().name
        #: What counting at this moment has found out, by table.
        self.censuses: dict[Version, Census] = {}

    def register(self, *registries: Readers) -> None:
        """Enter the registries. Requires: State.lock."""
        entry = (self.seqno, self.token, ref(self))
        for registry in registries:
            registry.add(entry)

    def again(self, purpose: str) -> Reader:
        """A second reader of the same moment, not registered yet."""
        return Reader(self.version, self.seqno, purpose, self.since_us, self.owner)

    def release(self) -> None:
        """Leave the registries. Idempotent; takes no lock, so that a finalizer may call it."""
        self.is_released = True


_Entry: TypeAlias = tuple[Seqno, int, "ref[Reader]"]


def _is_registered(entry: _Entry) -> bool:
    reader = entry[2]()
    return reader is not None and not reader.is_released


class Readers:
    """Registered readers, and the oldest moment that they read. Requires, but for `all` and `len`: State.lock."""

    __slots__ = ("_heap", "_sweep_at", "newest")

    def __init__(self) -> None:
        # By seqno. Readers that have left stay until they come up, or there are too many of them.
        self._heap: list[_Entry] = []
        self._sweep_at = 64
        #: The newest moment that was ever registered.
        self.newest = Seqno(0)

    def __bool__(self) -> bool:
        return self.oldest() is not None

    def __len__(self) -> int:
        return sum(map(_is_registered, list(self._heap)))

    def add(self, entry: _Entry) -> None:
        """Register a reader, by its seqno, its token and a reference to it. O(log readers)."""
        if len(self._heap) >= self._sweep_at:
            self._heap = sorted(filter(_is_registered, self._heap))
            self._sweep_at = 2 * len(self._heap) + 64
        self.newest = max(self.newest, entry[0])
        heappush(self._heap, entry)

    def oldest(self) -> Seqno | None:
        """The oldest moment that a registered reader reads; None if there is none."""
        heap = self._heap
        while heap:
            if _is_registered(heap[0]):
                return heap[0][0]
            heappop(heap)
        return None

    def all(self) -> list[Reader]:
        """The registered readers, in the order they came."""
        readers = [reader for entry in list(self._heap) if (reader := entry[2]()) is not None]
        return sorted((each for each in readers if not each.is_released), key=lambda reader: reader.token)
