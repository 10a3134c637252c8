"""Making a page file of pages that came from elsewhere: its free list, and its two metas."""

from __future__ import annotations

from array import array
from dataclasses import replace

from crc32c import crc32c

from kvwal.features import VERSION
from kvwal.files import File
from kvwal.pages.freelist import FreeList, encode_free_list, encoded_size
from kvwal.pages.meta import Meta, encode_meta
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pager import Pager
from kvwal.pages.rebuild import rebuilt

__all__ = ["finish_page_file"]


def finish_page_file(file: File, meta: Meta) -> None:
    """Write what a page file needs beside the pages that a generation reaches, which are there. Not flushed.

    It becomes that generation and the next one, which are the same: without bases, and with a free list of what is not
    reached. It ends behind the last page that is there, however many the meta says: so that number alone takes neither
    memory nor space. CorruptionError if an inner node does not verify, or lies outside of the file. Requires: the meta
    has none of these either.
    """
    meta = replace(meta, page_count=max(2, -(-file.size() // PAGE_SIZE)))
    found, _ = rebuilt(Pager(file, 0), meta, (), lambda: None)
    free = FreeList(array("Q", [place for freed in found.held for place in freed.places]), ())
    if free.free:
        pages = -(-encoded_size(free.extents(), 1) // PAGE_SIZE)
        raw = encode_free_list(free).ljust(pages * PAGE_SIZE, b"\0")
        page = meta.page_count
        file.pwrite(raw, page * PAGE_SIZE)
        meta = replace(
            meta, page_count=page + pages, free_page=page, free_pages=pages, free_crc=crc32c(raw, page)
        )
    for generation in (meta.generation, meta.generation + 1):
        slot = encode_meta(replace(meta, generation=generation, writer=VERSION))
        file.pwrite(slot.ljust(PAGE_SIZE, b"\0"), generation % 2 * PAGE_SIZE)
    file.truncate(meta.page_count * PAGE_SIZE)
