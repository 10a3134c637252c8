"""The page file as verified nodes: reading through a cache, writing in long runs.

Rules:

- Whatever leaves `Pager` has been checked against the crc in its pointer; a cached node was checked
  when it came in.
- A hit takes no lock. The cache is two dicts, young and old: a miss and a hit in old go into young,
  and when young has taken half the budget it becomes old and the old one is dropped.
- Once the cache is full, a leaf comes in when it is read again within as many other leaves as the
  cache may hold. Leaves that are read once leave those alone that are read often; and to keep a leaf
  costs more than to read it (fresh memory has to be mapped): a seventh of a get anywhere among 3 million keys.
- Leaves are cached as the bytes read, or decoded where a scan found room for that (`keep_decoded`);
  inner nodes decoded (separators as a list for bisect, pointers packed), short overflow values as
  they are.

Invariant: a page is written only after its cached content, whatever generation it was of, was
dropped (`forget`). The crc in the cache's key makes a mistake there improbable, not impossible.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Final

from crc32c import crc32c

from kvwal.errors import ClosedError, CorruptionError
from kvwal.files import Buffer, File
from kvwal.pages.freelist import Allocator
from kvwal.pages.meta import DATA_FILE
from kvwal.pages.node import (
    ADDRESS,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    Inner,
    Leaf,
    OverflowRef,
    decode_inner,
    node_fault,
)

__all__ = ["NotCached", "PageWriter", "Pager", "PageWriteError"]

# What an entry costs beside the node: its key (36 bytes) and its share of a dict that may be a
# third full (24 bytes an entry, up to 4 an index, each times 4 at worst).
_ENTRY_COST: Final = 36 + 112
#: Object header of bytes, and what the allocator rounds up.
_BYTES_COST: Final = 33 + 8
#: tuple, list, generation
_INNER_COST: Final = 64 + 72 + 32
#: tuple; for each column a list; for each pair, whether it is made yet or not, a tuple and its place
_LEAF_COST: Final = 64
_COLUMN_COST: Final = 72
_PAIR_COST: Final = 64 + 8
#: Written in one call; more gains nothing.
_RUN_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(PAGE_SIZE)


class NotCached(Exception):  # not an error: the answer needs a page that is not in memory
    """Only a read of the file can tell. Users never see it."""


class Pager:
    """Reads nodes. All methods are thread-safe."""

    def __init__(self, file: File, cache_bytes: int) -> None:
        self.file = file
        self.closed = False
        self.cache_bytes = cache_bytes
        #: address -> leaf bytes, `Leaf`, `Inner` or overflow value. Read without the lock, written under it.
        self.young: dict[int, Any] = {}
        self._old: dict[int, Any] = {}
        # Leaves that were read and not kept.
        self._once: set[int] = set()
        self._lock = threading.Lock()
        self._young_bytes = 0
        self._old_bytes = 0
        #: Counted without a lock: near enough for statistics.
        self.hits = 0
        self.misses = 0

    def pread(self, size: int, page: int) -> bytes:
        """Up to `size` bytes from the beginning of a page, not verified. ClosedError after `close`."""
        try:
            return self.file.pread(size, page * PAGE_SIZE)
        except (OSError, ValueError):
            if self.closed:
                raise ClosedError("the store is closed; open it again to read") from None
            raise

    def read(self, page: int, size: int, crc: int) -> bytes:
        """`size` verified bytes from the beginning of a page. CorruptionError if they do not verify."""
        try:
            raw = self.file.pread(size, page * PAGE_SIZE)
        except (OSError, ValueError):
            if self.closed:
                raise ClosedError("the store is closed; open it again to read") from None
            raise
        if len(raw) != size or crc32c(raw, page) != crc:
            raise _damage(page, size, raw)
        return raw

    def leaf(self, raw: bytes, page: int, size: int, crc: int) -> bytes:
        """The leaf in bytes that were read with `pread`. CorruptionError if they do not verify."""
        if len(raw) != size or crc32c(raw, page) != crc:
            raise _damage(page, size, raw)
        fault = node_fault(raw, 0)
        if fault:
            raise CorruptionError(DATA_FILE, page * PAGE_SIZE, f"page {page} {fault}")
        return raw

    def cached(self, address: int) -> Any | None:
        """What is cached there, without counting or keeping it."""
        found = self.young.get(address)
        return self._old.get(address) if found is None else found

    def node(self, pointers: bytes, at: int, level: int, *, keep: bool = True) -> Any:
        """The node that the packed pointer at offset `at` points to: bytes of a leaf or `Leaf`, or `Inner`.

        Args:
            level: which level the node must have; 0 is a leaf.
            keep: whether it stays in the cache.
        """
        address: int = ADDRESS.unpack_from(pointers, at)[0]
        found = self._old.get(address)
        if found is None:
            found = self.young.get(address)
            if found is not None:
                return found
            self.misses += 1
            page, crc, pages, _, _ = POINTER.unpack_from(pointers, at)
            if not page:
                raise CorruptionError(DATA_FILE, None, f"a pointer of level {level + 1} points nowhere")
            raw = self.read(page, pages * PAGE_SIZE, crc)
            fault = node_fault(raw, level)
            if fault:
                raise CorruptionError(DATA_FILE, page * PAGE_SIZE, f"page {page} {fault}")
            if level:
                found = decode_inner(raw)
            elif self._old_bytes and not self._is_read_again(address):
                return raw
            else:
                found = raw
        if keep:
            self._keep(address, found)
        return found

    def _is_read_again(self, address: int) -> bool:
        once = self._once
        if address in once:
            once.discard(address)
            return True
        if len(once) > self.cache_bytes // (2 * PAGE_SIZE):
            self._once = once = set()
        once.add(address)
        return False

    def overflow(self, ref: bytes) -> bytes:
        """The value behind an overflow reference."""
        address: int = ADDRESS.unpack_from(ref)[0]
        found: bytes | None = self.cached(address)
        if found is None:
            page, crc, length, _ = OVERFLOW_REF.unpack(ref)
            self.misses += 1
            found = self.read(page, length, crc)
        if len(found) <= self.cache_bytes >> 6:
            self._keep(address, found)
        return found

    def generations(self) -> tuple[dict[int, Any], dict[int, Any]]:
        """Young and old, for one look at many entries."""
        return self.young, self._old

    def keep_decoded(self, address: int, leaf: Leaf) -> None:
        """Keep a leaf decoded if there is room for it, and where it is the first to go: no scan empties the cache."""
        half = self.cache_bytes >> 1
        least = len(leaf[0]) * 2 * _BYTES_COST
        if self._old_bytes + least > half and address not in self.young:
            return
        with self._lock:
            more = cost = _cost(leaf)
            if (raw := self.young.get(address)) is not None:
                more = cost - _cost(raw)
                # Not more than three quarters: what is young should stay a while.
                if self._young_bytes + more <= half - (half >> 2):
                    self.young[address] = leaf
                    self._young_bytes += more
                elif self._old_bytes + cost <= half:
                    # In this order: whoever reads without the lock finds the one or the other.
                    self._old[address] = leaf
                    self._old_bytes += cost
                    del self.young[address]
                    self._young_bytes -= cost - more
                return
            if (raw := self._old.get(address)) is not None:
                more = cost - _cost(raw)
            if self._old_bytes + more <= half:
                self._old[address] = leaf
                self._old_bytes += more

    def resize(self, cache_bytes: int) -> None:
        """Change the budget, by little at a time: what is too much now goes when the next node comes in."""
        with self._lock:
            self.cache_bytes = cache_bytes
            if self._young_bytes + self._old_bytes > cache_bytes:
                self._old = {}
                self._old_bytes = 0

    def _keep(self, address: int, node: bytes | Leaf | Inner) -> None:
        cost = _ENTRY_COST + _BYTES_COST + len(node) if type(node) is bytes else _cost(node)
        half = self.cache_bytes >> 1
        if cost > half:
            return
        with self._lock:
            if address in self.young:
                return
            if self._young_bytes + cost > half:
                # A reader may still look into the dict that is dropped: it finds there what is true.
                self._old = self.young
                self._old_bytes = self._young_bytes
                self.young = {}
                self._young_bytes = 0
            elif self._old.pop(address, None) is not None:
                self._old_bytes -= cost
            self.young[address] = node
            self._young_bytes += cost

    def forget(self, addresses: Iterable[int]) -> None:
        """Drop what is cached under these: their pages may be written from now on."""
        with self._lock:
            for address in addresses:
                node = self.young.pop(address, None)
                if node is not None:
                    self._young_bytes -= _cost(node)
                node = self._old.pop(address, None)
                if node is not None:
                    self._old_bytes -= _cost(node)

    def used_bytes(self) -> int:
        """Memory taken by the cache, objects included."""
        return self._young_bytes + self._old_bytes

    def close(self) -> None:
        """Release the file and the cache. Takes no lock: in a forked child nobody may be there to give it back."""
        self.closed = True
        self.young = {}
        self._old = {}
        self._young_bytes = self._old_bytes = 0
        self.file.close()


def _damage(page: int, size: int, raw: bytes) -> CorruptionError:
    what = "the checksum of" if len(raw) == size else "the file ends inside or before"
    end = " does not match" if len(raw) == size else ""
    return CorruptionError(DATA_FILE, page * PAGE_SIZE, f"{what} page {page}{end}")


def _cost(node: bytes | Leaf | Inner) -> int:
    if type(node) is tuple:
        if isinstance(node[1], list):
            keys, values, _, _ = node
            columns = 3 * _COLUMN_COST + len(keys) * (2 * (_BYTES_COST + 8) + _PAIR_COST)
            return _ENTRY_COST + _LEAF_COST + columns + sum(map(len, keys)) + sum(map(len, values))
        separators, pointers, _ = node
        return (
            _ENTRY_COST
            + _INNER_COST
            + _BYTES_COST
            + len(pointers)
            + len(separators) * (_BYTES_COST + 8)
            + sum(map(len, separators))
        )
    return _ENTRY_COST + _BYTES_COST + len(node)


class PageWriteError(Exception):
    """A write failed. Tells it from a failed read; `PageFile.checkpoint` turns it into what users see."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class PageWriter:
    """Writes the nodes of one checkpoint into pages that nothing refers to. Not thread-safe.

    Nothing it writes matters before the meta is flipped, so a failure needs no clean-up on disk.
    """

    def __init__(self, file: File, allocator: Allocator, generation: int) -> None:
        self._file = file
        self._allocator = allocator
        self.generation = generation
        self._run: list[Buffer] = []
        self._run_at = 0
        self._run_end = 0

    def node(self, data: bytes, flags: int, count: int) -> bytes:
        """Write a node; the packed pointer to it."""
        pages = -(-len(data) // PAGE_SIZE)
        data = data.ljust(pages * PAGE_SIZE, b"\0")
        page = self._place(self._allocator.take(pages), pages)
        crc = crc32c(data, page)
        self._run.append(data)
        return POINTER.pack(page, crc, pages, flags, count)

    def overflow(self, value: bytes) -> OverflowRef:
        """Write a value into an extent of its own; the reference to it."""
        pages = -(-len(value) // PAGE_SIZE)
        page = self._place(self._allocator.take(pages), pages)
        self._run.append(value)
        padding = pages * PAGE_SIZE - len(value)
        if padding:
            self._run.append(_ZEROS[:padding])
        return OverflowRef(OVERFLOW_REF.pack(page, crc32c(value, page), len(value), self.generation))

    def at(self, page: int, data: bytes) -> int:
        """Write whole pages at a place that was taken before; their crc."""
        self._place(page, len(data) // PAGE_SIZE)
        self._run.append(data)
        return crc32c(data, page)

    def _place(self, page: int, pages: int) -> int:
        """Make what comes next go to these pages."""
        if page != self._run_end or (self._run_end - self._run_at + pages) * PAGE_SIZE > _RUN_BYTES:
            self.flush()
            self._run_at = page
        self._run_end = page + pages
        return page

    def flush(self) -> None:
        """Hand everything to the file. Not durable on return. PageWriteError if that fails."""
        run, self._run = self._run, []
        if not run:
            return
        at = self._run_at * PAGE_SIZE
        size = self._run_end * PAGE_SIZE - at
        self._run_at = self._run_end
        try:
            if size <= _RUN_BYTES:
                self._file.pwrite(b"".join(run), at)
            else:
                # A large value is not copied.
                self._file.pwrite_all(run, at)
        except OSError as failure:
            raise PageWriteError(failure) from failure
