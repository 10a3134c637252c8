"""The limits: what no store can beat. They are shown beside the peers and never count as one.

- `pwrite+fdatasync`: appends key and value to a preallocated file, and flushes it at "commit". No check
  sum, no index, nothing to read back. fdatasync of a preallocated file is one data flush without a
  metadata commit (man 2 fdatasync, man 3 posix_fallocate).
- `dict`: a dict in memory. No durability at all.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from bench.data import Pair
from bench.peers.base import How, Kind, NotOffered, Peer

__all__ = ["BareDict", "BareFile"]

_FILE_BYTES = 256 << 20


class BareFile(Peer):
    """An append position in a preallocated file; it wraps around at the end."""

    name = "pwrite+fdatasync"
    kind: ClassVar[Kind] = "limit"
    persistent: ClassVar[bool] = False

    @classmethod
    def version(cls) -> str:
        return f"Python {platform.python_version()}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        os.makedirs(path, exist_ok=True)
        self._fd = os.open(os.path.join(path, "bare"), os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._fd, 0, _FILE_BYTES)
        os.fsync(self._fd)
        self._at = 0
        self.settings = {
            "file": f"{_FILE_BYTES >> 20} MiB, posix_fallocate",
            "flush": "fdatasync" if how.durability == "commit" else "none",
        }

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        if self._at + len(data) > _FILE_BYTES:
            self._at = 0
        os.pwrite(self._fd, data, self._at)
        self._at += len(data)

    def putter(self) -> Callable[[bytes, bytes], object]:
        if self.how.threads > 1:
            raise NotOffered("one thread only")
        fd, pwrite, flush = self._fd, os.pwrite, os.fdatasync
        at = 0
        if self.how.durability != "commit":

            def put(key: bytes, value: bytes) -> None:
                nonlocal at
                data = key + value
                if at + len(data) > _FILE_BYTES:
                    at = 0
                pwrite(fd, data, at)
                at += len(data)

            return put

        def put_durably(key: bytes, value: bytes) -> None:
            nonlocal at
            data = key + value
            if at + len(data) > _FILE_BYTES:
                at = 0
            pwrite(fd, data, at)
            at += len(data)
            flush(fd)

        return put_durably

    def writer(self) -> Callable[[list[Pair]], object]:
        def write(pairs: list[Pair]) -> None:
            self._append(b"".join([part for pair in pairs for part in pair]))
            if self.how.durability == "commit":
                os.fdatasync(self._fd)

        return write

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        if self.how.filled:
            return
        super().load(pairs, ascending=ascending)

    def executor_note(self) -> str:
        raise NotOffered("one thread only")

    def tail_is_logged(self) -> None:
        raise NotOffered("nothing to recover")


class BareDict(Peer):
    """A dict."""

    name = "dict"
    kind: ClassVar[Kind] = "limit"
    persistent: ClassVar[bool] = False

    @classmethod
    def version(cls) -> str:
        return f"Python {platform.python_version()}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        self._dict: dict[bytes, bytes] = {}
        self.settings = {"durability": "none"}

    def close(self) -> None:
        self._dict.clear()

    def putter(self) -> Callable[[bytes, bytes], object]:
        if self.how.durability == "commit":
            raise NotOffered("not durable")
        return self._dict.__setitem__

    def writer(self) -> Callable[[list[Pair]], object]:
        if self.how.durability == "commit":
            raise NotOffered("not durable")
        return self._dict.update

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        self._dict.update(pairs)

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return self._dict.get

    def many_getter(self) -> Callable[[list[bytes]], object]:
        get = self._dict.get
        return lambda keys: list(map(get, keys))

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        # A dict has no order; this is the cost of handing out the pairs one by one.
        return iter(self._dict.items())

    def incrementer(self) -> Callable[[bytes], object]:
        raise NotOffered("no transactions")

    def executor_note(self) -> str:
        raise NotOffered("not durable")

    def tail_is_logged(self) -> None:
        raise NotOffered("nothing to recover")
