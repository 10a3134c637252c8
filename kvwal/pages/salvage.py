"""Reading what verifies of a damaged page file."""

from __future__ import annotations

from collections.abc import Iterator

from kvwal.errors import CorruptionError
from kvwal.pages.check import Problem
from kvwal.pages.node import POINTER, POINTER_SIZE, OverflowRef, decode_leaf
from kvwal.pages.pagefile import PageFile
from kvwal.pages.pager import Pager

__all__ = ["salvage_pages"]


def salvage_pages(page_file: PageFile) -> Iterator[tuple[list[bytes], list[bytes]] | Problem]:
    """Everything of the newest generation that verifies, in key order, and a `Problem` for what does not.

    A damaged node hides what is below it; a damaged overflow value hides its key.
    """
    meta = page_file.meta
    if meta.height:
        yield from _salvage(page_file.uncached(), meta.root, meta.height - 1)


def _salvage(reader: Pager, pointer: bytes, level: int) -> Iterator[tuple[list[bytes], list[bytes]] | Problem]:
    try:
        node = reader.node(pointer, 0, level, keep=False)
    except CorruptionError as error:
        entries = POINTER.unpack(pointer)[4]
        yield Problem(error.file, error.offset, f"{error.reason}; {entries} entries are lost")
        return
    if level:
        children = node[1]
        for at in range(0, len(children), POINTER_SIZE):
            yield from _salvage(reader, children[at : at + POINTER_SIZE], level - 1)
        return
    keys, values = decode_leaf(node)
    if not any(type(value) is OverflowRef for value in values):
        yield keys, values
        return
    # One at a time: each may be as large as memory.
    for key, value in zip(keys, values, strict=True):
        if type(value) is OverflowRef:
            try:
                value = reader.overflow(value)
            except CorruptionError as error:
                yield Problem(error.file, error.offset, f"{error.reason}; the value of key {key[:64]!r} is lost")
                continue
        yield [key], [value]
