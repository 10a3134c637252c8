"""Reading the page file as verified nodes, through the page cache.

What leaves a `Pager` was checked against the crc in its pointer; a cached node was checked when it came in.

Invariant: a page is written only after its cached content, whichever generation it belonged to, was
dropped (`Cache.forget`). The crc in the cache's key makes a mistake there improbable, not impossible.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from crc32c import crc32c

from kvwal.errors import CorruptionError, closed
from kvwal.expiring import Expiring
from kvwal.files import is_of_medium
from kvwal.files.names import DATA
from kvwal.pages.cache import Cache
from kvwal.pages.node import ADDRESS, OVERFLOW_REF, PAGE_SIZE, POINTER, ExpiringRef, decode_inner, node_fault

__all__ = ["Pager", "ProvingPager"]

#: No more is read at once without a look at the size of the file, which costs a system call.
_MOST_UNASKED_BYTES: Final = 1 << 20


class PagesFile(Protocol):
    """What reading pages needs of a file, as `kvwal.files.File` says it."""

    def pread(self, size: int, offset: int) -> bytes: ...
    def size(self) -> int: ...
    def close(self) -> None: ...


class Pager:
    """Reads nodes. All methods are thread-safe."""

    def __init__(self, file: PagesFile, cache_bytes: int) -> None:
        self.file = file
        self.cache = Cache(cache_bytes)
        self.closed = False

    def pread(self, size: int, page: int) -> bytes:
        """Up to `size` bytes from the beginning of a page, not verified. ClosedError after `close`."""
        try:
            if size > _MOST_UNASKED_BYTES:
                # What is on disk says so, and may say anything: memory is taken for what is there.
                size = min(size, max(0, self.file.size() - page * PAGE_SIZE))
            return self.file.pread(size, page * PAGE_SIZE)
        except (OSError, ValueError):
            if self.closed:
                raise closed() from None
            raise

    def read(self, page: int, size: int, crc: int) -> bytes:
        """`size` verified bytes from the beginning of a page. CorruptionError if they do not verify."""
        return _verified(self.pread(size, page), page, size, crc)

    def leaf(self, raw: bytes, page: int, size: int, crc: int) -> bytes:
        """The leaf in bytes that were read with `pread`. CorruptionError if they do not verify."""
        return _node(_verified(raw, page, size, crc), page, 0)

    def node(self, pointers: bytes, at: int, level: int, *, keep: bool = True) -> Any:
        """The node that the packed pointer at offset `at` points to: bytes of a leaf or `Leaf`, or `Inner`.

        Args:
            level: which level the node must have; 0 is a leaf.
            keep: whether it stays in the cache.
        """
        cache = self.cache
        address: int = ADDRESS.unpack_from(pointers, at)[0]
        found = cache.old.get(address)
        if found is None:
            found = cache.young.get(address)
            if found is not None:
                return found
            cache.misses += 1
            page, crc, pages, _, _ = POINTER.unpack_from(pointers, at)
            if not page:
                raise CorruptionError(DATA, None, f"a pointer of level {level + 1} points nowhere")
            found = _node(self.read(page, pages * PAGE_SIZE, crc), page, level)
            if level:
                found = decode_inner(found)
            elif not cache.admits(address):
                return found
        if keep:
            cache.keep(address, found)
        return found

    def overflow(self, ref: bytes) -> bytes:
        """The value behind an overflow reference. CorruptionError if it does not verify."""
        cache = self.cache
        address: int = ADDRESS.unpack_from(ref)[0]
        found: bytes | None = cache.get(address)
        if found is None:
            page, crc, length, _ = OVERFLOW_REF.unpack(ref)
            cache.misses += 1
            found = self.read(page, length, crc)
        if len(found) <= cache.limit_bytes >> 6:
            cache.keep(address, found)
        return Expiring(found) if type(ref) is ExpiringRef else found

    def uncached(self) -> Pager:
        """A reader of the same file that has nothing cached: for what must see the disk."""
        return Pager(self.file, 0)

    def proving(self) -> ProvingPager:
        """The same for what lists damage."""
        return ProvingPager(self.file, 0)

    def close(self) -> None:
        """Release the file and the cache. A forked child may call it."""
        self.closed = True
        self.cache.resize(0)
        self.file.close()


class ProvingPager(Pager):
    """A pager for which a page that cannot be read is damaged, like one that does not verify."""

    def pread(self, size: int, page: int) -> bytes:
        """As `Pager.pread`. CorruptionError if the medium fails."""
        try:
            return super().pread(size, page)
        except OSError as error:
            if not is_of_medium(error):
                raise
            raise CorruptionError(DATA, page * PAGE_SIZE, f"page {page} cannot be read: {error}") from error


def _verified(raw: bytes, page: int, size: int, crc: int) -> bytes:
    if len(raw) == size and crc32c(raw, page) == crc:
        return raw
    what = f"the checksum of page {page} does not match"
    if len(raw) != size:
        what = f"the file ends inside or before page {page}"
    raise CorruptionError(DATA, page * PAGE_SIZE, what)


def _node(raw: bytes, page: int, level: int) -> bytes:
    fault = node_fault(raw, level)
    if fault:
        raise CorruptionError(DATA, page * PAGE_SIZE, f"page {page} {fault}")
    return raw
