"""Who reads which moment: registered readers, and what stays because of them.

A reader is registered for as long as something refers to it and it was not released. Being registered is one entry in
each of a few dicts, made and taken away by single C calls: so a finalizer may release a reader whatever its thread was
doing, and an interruption leaves it registered or not, never half.
"""

from __future__ import annotations

import threading
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final
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
        "_registries",
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
        self._registries: tuple[Readers, ...] = ()
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
        self._registries = registries
        for registry in registries:
            registry.add(self)

    def again(self, purpose: str) -> Reader:
        """A second reader of the same moment, not registered yet."""
        return Reader(self.version, self.seqno, purpose, self.since_us, self.owner)

    def release(self) -> None:
        """Leave the registries. Idempotent; takes no lock, so that a finalizer may call it."""
        self.is_released = True
        for registry in self._registries:
            registry.remove(self)


class Readers:
    """Registered readers, and the oldest moment that they read.

    A reader that is dropped leaves by the callback of a weak reference, which runs no Python code, because what a
    signal handler raises in a finalizer is lost.
    """

    __slots__ = ("_entries", "_heap", "newest")

    def __init__(self) -> None:
        self._entries: set[ref[Reader]] = set()
        # The same by seqno; entries of readers that have left stay until they come up.
        self._heap: list[tuple[Seqno, int, ref[Reader]]] = []
        #: The newest moment that was ever registered.
        self.newest = Seqno(0)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, reader: Reader) -> None:
        """Register. Requires: State.lock. O(log readers)."""
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = sorted(entry for entry in self._heap if entry[2] in self._entries)
        entry = ref(reader, self._entries.discard)
        # First: its hash is kept in it from here on, so it is found when the reader is gone.
        self._entries.add(entry)
        heappush(self._heap, (reader.seqno, reader.token, entry))
        self.newest = max(self.newest, reader.seqno)

    def remove(self, reader: Reader) -> None:
        """Take a registration back. From any thread, at any time."""
        self._entries.discard(ref(reader))

    def oldest(self) -> Seqno | None:
        """The oldest moment that a registered reader reads; None if there is none. Requires: State.lock."""
        heap, entries = self._heap, self._entries
        while heap:
            if heap[0][2] in entries:
                return heap[0][0]
            heappop(heap)
        return None

    def all(self) -> list[Reader]:
        """The registered readers, in the order they came."""
        readers = [reader for entry in list(self._entries) if (reader := entry()) is not None]
        return sorted(readers, key=lambda reader: reader.token)
