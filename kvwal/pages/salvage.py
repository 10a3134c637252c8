"""Reading what verifies of a damaged page file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvwal.errors import CorruptionError, Finding
from kvwal.pages.catalogue import Root, decode_entry
from kvwal.pages.node import PAGE_SIZE, POINTER, POINTER_SIZE, OverflowRef, decode_leaf
from kvwal.pages.pagefile import PageFile
from kvwal.pages.pager import Pager

__all__ = ["Salvaged", "salvage_pages"]


class Salvaged(NamedTuple):
    """Entries of a table that verify."""

    table: int
    keys: Sequence[bytes]
    values: Sequence[bytes]


def salvage_pages(page_file: PageFile) -> Iterator[Salvaged | Finding]:
    """Everything of the newest generation that verifies, table by table in key order, and what does not.

    A damaged node hides what is below it, of the catalogue too; a damaged overflow value hides its key. A page that
    cannot be read is damaged.
    """
    meta, reader = page_file.meta, page_file.pager.proving()
    roots = [(0, Root(meta.root, meta.height))]
    for part in _tree(reader, 0, Root(meta.catalogue, meta.catalogue_height)):
        if isinstance(part, Finding):
            yield replace(part, reason=f"the catalogue: {part.reason}: the tables below it")
            continue
        for key, value in zip(part.keys, part.values, strict=True):
            try:
                roots.append(decode_entry(key, value))
            except CorruptionError as error:
                yield error.finding
    for table, root in roots:
        yield from _tree(reader, table, root)


def _tree(reader: Pager, table: int, root: Root) -> Iterator[Salvaged | Finding]:
    if root.height:
        yield from _node(reader, table, root.pointer, root.height - 1)


def _node(reader: Pager, table: int, pointer: bytes, level: int) -> Iterator[Salvaged | Finding]:
    try:
        node = reader.node(pointer, 0, level, keep=False)
        keys, values = decode_leaf(node) if not level else ((), ())
    except CorruptionError as error:
        page, _, _, _, entries = POINTER.unpack(pointer)
        offset = page * PAGE_SIZE if error.offset is None and page else error.offset
        yield Finding(error.file, offset, f"{error.reason}; {entries} entries are lost")
        return
    if level:
        children = node[1]
        for at in range(0, len(children), POINTER_SIZE):
            yield from _node(reader, table, children[at : at + POINTER_SIZE], level - 1)
        return
    if not any(isinstance(value, OverflowRef) for value in values):
        yield Salvaged(table, keys, values)
        return
    # One at a time: each may be as large as memory.
    for key, value in zip(keys, values, strict=True):
        if isinstance(value, OverflowRef):
            try:
                value = reader.overflow(value)
            except CorruptionError as error:
                yield Finding(error.file, error.offset, f"{error.reason}; the value of key {key[:64]!r} is lost")
                continue
        yield Salvaged(table, (key,), (value,))
