"""Tables beside table 0: the catalogue says where their trees begin, and a checkpoint merges into all of them.

The catalogue is a tree like any other, which the meta points to. Its keys are table ids, 4 bytes big-endian. Its values
are little-endian:

    offset  size  field
         0    20  pointer to the root of the table's tree (format in node.py), never zeros
        20     4  height of that tree
        24     4  flags: zero

A table without entries has no entry here. Table 0 never has: its root is in the meta, so that it pays nothing.
An entry of another size or with a pointer to nowhere is damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from struct import Struct
from typing import Final, NamedTuple

from kvwal.errors import CorruptionError
from kvwal.features import KEYSPACES
from kvwal.files.names import DATA
from kvwal.keys import KeyRange, disjoint
from kvwal.pages.compact import far_keys
from kvwal.pages.freelist import Freed
from kvwal.pages.merge import Columns, Merge, MergeJob
from kvwal.pages.meta import Meta
from kvwal.pages.node import NO_POINTER
from kvwal.pages.pager import Pager
from kvwal.pages.tree import Tree
from kvwal.pages.writer import PageWriter

__all__ = [
    "EMPTY",
    "ENTRY",
    "Changes",
    "Root",
    "decode_entry",
    "merge_tables",
    "root_of",
    "roots",
    "table_beside",
    "tables_beside",
]

# On disk: never change.
ENTRY: Final = Struct("<20sII")
_ID_BYTES: Final = 4


class Root(NamedTuple):
    """Where a tree begins: the packed pointer to its root, and its height."""

    pointer: bytes
    height: int


EMPTY: Final = Root(NO_POINTER, 0)


class Changes(NamedTuple):
    """What a checkpoint does to one table.

    Attributes:
        updates: runs of keys and their values (None: delete), sorted by key, no key twice. Read as a stream.
        ranges: deleted before the updates apply, in any order. All keys: the table is gone.
        expiring: whether values of the updates may expire.
    """

    updates: Iterable[Columns] = ()
    ranges: Sequence[KeyRange] = ()
    expiring: bool = False


def decode_entry(key: bytes, value: bytes) -> tuple[int, Root]:
    """Table id and root of an entry. CorruptionError if it is none."""
    if len(key) == _ID_BYTES and len(value) == ENTRY.size:
        pointer, height, _ = ENTRY.unpack(value)
        table = int.from_bytes(key, "big")
        if table and height and pointer[:4] != NO_POINTER[:4]:
            return table, Root(pointer, height)
    raise CorruptionError(DATA, None, f"the catalogue has an entry {key.hex()} that names no table")


def root_of(pager: Pager, meta: Meta, table: int) -> Root:
    """The tree of a table. CorruptionError if the catalogue does not verify."""
    if not table:
        return Root(meta.root, meta.height)
    return _root_in(Tree(pager, meta, meta.catalogue, meta.catalogue_height), table)


def table_beside(tree: Tree, table: int) -> Tree:
    """The tree of a table other than 0 in the generation of another tree. CorruptionError as `root_of`."""
    meta = tree.meta
    return tree.beside(*_root_in(tree.beside(meta.catalogue, meta.catalogue_height), table))


def tables_beside(tree: Tree) -> Iterator[int]:
    """The tables other than 0 that have entries in the generation of a tree. CorruptionError as `root_of`."""
    meta = tree.meta
    for keys, values in tree.beside(meta.catalogue, meta.catalogue_height).chunks():
        yield from (table for table, _ in map(decode_entry, keys, values))


def _root_in(catalogue: Tree, table: int) -> Root:
    key = table.to_bytes(_ID_BYTES, "big")
    value = catalogue.get(key)
    return EMPTY if value is None else decode_entry(key, value)[1]


def roots(pager: Pager, meta: Meta) -> Iterator[tuple[int, Root]]:
    """Id and tree of each table that has entries, table 0 first. CorruptionError if the catalogue does not verify."""
    if meta.height:
        yield 0, Root(meta.root, meta.height)
    for keys, values in Tree(pager, meta, meta.catalogue, meta.catalogue_height).chunks():
        yield from map(decode_entry, keys, values)


def merge_tables(
    pager: Pager,
    writer: PageWriter,
    freed: Freed,
    draft: Meta,
    changes: Mapping[int, Changes],
    *,
    limit: int | None,
    yield_to_writers: Callable[[], None],
) -> Meta:
    """Merge the changes into the trees of `draft`, and move what lies behind `limit`; the draft with its new roots."""

    def merged(root: Root, change: Changes) -> Root:
        rewrites = [] if limit is None else far_keys(pager, root.pointer, root.height, limit, yield_to_writers)
        if change is _NO_CHANGES and not rewrites:
            return root
        job = MergeJob(
            change.updates, disjoint(change.ranges), rewrites, limit, yield_to_writers, change.expiring
        )
        return Root(*Merge(pager, writer, freed, job).run(*root))

    root = merged(Root(draft.root, draft.height), changes.get(0, _NO_CHANGES))
    draft = replace(draft, root=root.pointer, height=root.height)
    tables = {table: root_of(pager, draft, table) for table in changes if table}
    if limit is not None:
        tables.update((table, root) for table, root in roots(pager, draft) if table)
    entries: Columns = ([], [])
    for table, before in sorted(tables.items()):
        after = merged(before, changes.get(table, _NO_CHANGES))
        if after != before:
            entries[0].append(table.to_bytes(_ID_BYTES, "big"))
            entries[1].append(ENTRY.pack(*after, 0) if after.height else None)
    root = merged(Root(draft.catalogue, draft.catalogue_height), Changes([entries]) if entries[0] else _NO_CHANGES)
    required = draft.required | (KEYSPACES if root.height else 0)
    return replace(draft, catalogue=root.pointer, catalogue_height=root.height, required=required)


_NO_CHANGES: Final = Changes()
