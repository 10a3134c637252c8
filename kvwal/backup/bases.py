"""Bases: the pages of one generation as an object, all of them or those that an earlier base does not have.

Little-endian. One page of header, the table of extents, the pages, and the SHA-256 of all before:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwbase1` |
| 8 | 2 | version | 1 |
| 10 | 2 | size | of the header: 4096 |
| 12 | 4 | rows | of the table |
| 16 | 8 | required | features that a reader must know (`kvwal/features.py`) |
| 24 | 8 | optional | features that a reader may pass over |
| 32 | 16 | store_id | |
| 48 | 8 | line | |
| 56 | 8 | generation | |
| 64 | 8 | parent | generation of the base that this is a difference of; 0: it is full |
| 72 | 8 | parent_seqno | replay_through of that base |
| 80 | 8 | seqno | the last commit that is wholly in the trees |
| 88 | 8 | replay_through | trees and log are a state from this commit on |
| 96 | 8 | size | of the whole object |
| 104 | 32 | table digest | SHA-256 of the table |
| 136 | 512 | meta | of the generation, without what a base does not have (`_bare`) |
| 648 | 32 | commit | `commit_digest` (units.py) of commit replay_through, behind zeros; zeros: not known |
| 680 | 3412 | - | zeros |
| 4092 | 4 | crc | CRC-32C of the header before it |

The table is in reach.py. The pages follow ascending by number; what an overflow value leaves of its last page is zeros.
So the same generation gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from struct import Struct, error
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.backup.chain import Held
from kvwal.backup.names import BaseName, parse_name
from kvwal.backup.port import Destination
from kvwal.backup.reach import ROW_BYTES, Extents, Reach, Table, read_pages, span
from kvwal.errors import CorruptionError, FormatError
from kvwal.features import BASES, KNOWN_OPTIONAL, KNOWN_REQUIRED, unknown_bits
from kvwal.keys import Seqno
from kvwal.pages.meta import Meta, decode_meta, encode_meta
from kvwal.pages.node import NO_POINTER, PAGE_SIZE
from kvwal.pages.pager import Pager

__all__ = [
    "BaseHeader",
    "base_of",
    "chain_of",
    "check_base",
    "encode_base",
    "pages_of",
    "reach_of",
    "read_header",
    "read_table",
]

# On disk: never change.
_MAGIC: Final = b"kvwbase1"
_VERSION: Final = 1
HEADER: Final = Struct("<8sHHIQQ16s8sQQQQQQ32s512s32s3412s")
CRC: Final = Struct("<I")
_HEADER_BYTES: Final = PAGE_SIZE
_DIGEST_BYTES: Final = 32
assert HEADER.size + CRC.size == _HEADER_BYTES
_ZEROS: Final = bytes(3412)

# Read at once.
_RUN_BYTES: Final = 1 << 20


class BaseHeader(NamedTuple):
    """What the header of a base says; the table of the module has the fields."""

    rows: int
    required: int
    optional: int
    store_id: bytes
    line: bytes
    generation: int
    parent: int
    parent_seqno: Seqno
    seqno: Seqno
    replay_through: Seqno
    size: int
    table_digest: bytes
    meta: Meta
    commit: bytes

    @property
    def pages_at(self) -> int:
        """Where the pages begin."""
        return _HEADER_BYTES + self.rows * ROW_BYTES


def base_of(header: BaseHeader, revision: int = 0) -> BaseName:
    """What its object is called."""
    return BaseName(header.line, header.replay_through, header.generation, header.parent, revision)


def _bare(meta: Meta) -> Meta:
    """A meta without what a base does not have: free pages, bases, and which open wrote it when."""
    return replace(
        meta,
        free_page=0,
        free_crc=0,
        free_pages=0,
        bases=NO_POINTER,
        bases_height=0,
        dead_page=0,
        dead_crc=0,
        dead_pages=0,
        session=0,
        wall_us=0,
        required=meta.required & ~BASES,
    )


def encode_base(
    pager: Pager, meta: Meta, parent: BaseName | None, rows: Table, extents: Extents, commit: bytes
) -> Iterator[bytes | bytearray]:
    """A base of a generation, piece by piece, with these new extents. CorruptionError if a page does not verify."""
    bare, table = _bare(meta), rows.encode()
    size = _HEADER_BYTES + len(table) + extents.page_bytes() + _DIGEST_BYTES
    above = (0, 0) if parent is None else (parent.generation, parent.seqno)
    head = HEADER.pack(
        _MAGIC,
        _VERSION,
        _HEADER_BYTES,
        len(rows),
        bare.required,
        bare.optional,
        bare.store_id,
        bare.line,
        bare.generation,
        *above,
        bare.seqno,
        bare.replay_through,
        size,
        hashlib.sha256(table).digest(),
        encode_meta(bare),
        commit,
        _ZEROS,
    )
    head += CRC.pack(crc32c(head))
    digest = hashlib.sha256(head)
    yield head
    digest.update(table)
    yield table
    for _, pages in read_pages(lambda size, offset: pager.pread(size, offset // PAGE_SIZE), extents):
        digest.update(pages)
        yield pages
    yield digest.digest()


def read_header(destination: Destination, name: str) -> BaseHeader:
    """The header of a base. CorruptionError, which names the object, if it is damaged; FormatError if it is newer."""
    named = parse_name(name)
    if not isinstance(named, BaseName):
        raise CorruptionError(name, None, "it does not have the name of a base")
    raw = destination.get(name, start=0, size=_HEADER_BYTES)
    try:
        magic, version, size, *fields = HEADER.unpack_from(raw)
        (crc,) = CRC.unpack_from(raw, HEADER.size)
    except error:
        raise CorruptionError(name, None, "it is shorter than its header") from None
    if magic != _MAGIC or crc != crc32c(raw[: HEADER.size]):
        raise CorruptionError(name, 0, "the checksum of its header does not match")
    if version != _VERSION or size != _HEADER_BYTES:
        raise FormatError(f"{name} is a base of version {version}, which this kvwal does not know")
    rows, required, optional, store_id, line, generation, *numbers, digest, raw_meta, commit, zeros = fields
    if missing := unknown_bits(required, KNOWN_REQUIRED):
        raise FormatError(f"{name} needs features that this kvwal does not know ({missing}): use a newer kvwal")
    if zeros != _ZEROS and not optional & ~KNOWN_OPTIONAL:
        raise FormatError(f"{name} has fields that this kvwal does not know: use a newer kvwal")
    meta = decode_meta(generation % 2, raw_meta)
    if isinstance(meta, str):
        raise CorruptionError(name, 136, f"its meta: {meta}")
    header = BaseHeader._make((rows, required, optional, store_id, line, generation, *numbers, digest, meta, commit))
    of_header = store_id, line, generation, header.seqno, header.replay_through
    of_meta = meta.store_id, meta.line, meta.generation, meta.seqno, meta.replay_through
    if base_of(header, named.revision) != named or of_meta != of_header:
        raise CorruptionError(name, 0, "its header says something else than its name or its meta")
    if header.size < header.pages_at + _DIGEST_BYTES:
        raise CorruptionError(name, 96, "its size is less than that of its header, table and digest")
    return header


def read_table(destination: Destination, name: str, header: BaseHeader) -> Table:
    """The table of a base. CorruptionError, which names the object."""
    size = header.rows * ROW_BYTES
    raw = destination.get(name, start=_HEADER_BYTES, size=size)
    if len(raw) != size or hashlib.sha256(raw).digest() != header.table_digest:
        raise CorruptionError(name, _HEADER_BYTES, "its table does not match its digest")
    table = Table.decode(raw)
    end = 2
    extents = table.new()
    for page, size in zip(extents.pages, extents.sizes, strict=True):
        if page < end or page + span(size) > header.meta.page_count:
            raise CorruptionError(name, _HEADER_BYTES, f"its table has an extent at page {page} that cannot be there")
        end = page + span(size)
    if header.size != header.pages_at + extents.page_bytes() + _DIGEST_BYTES:
        raise CorruptionError(name, _HEADER_BYTES, "its size is not that of its table and pages")
    return table


def chain_of(destination: Destination, held: Held, base: BaseName) -> list[tuple[BaseName, BaseHeader]]:
    """A base with those that it builds on, a full one first, by their headers. CorruptionError names what is missing
    or damaged.
    """
    names = held.lineage(base)
    if names is None:
        raise CorruptionError(str(base), None, "a base that it builds on is missing")
    chain = [(name, read_header(destination, str(name))) for name in names]
    for (name, header), (below, _) in zip(chain[1:], chain, strict=False):
        # Recovery may have set a store back, and its generation is there twice.
        if (header.parent, header.parent_seqno) != (below.generation, below.seqno):
            raise CorruptionError(str(name), 64, "the base that it builds on is missing, and another one is there")
    for name, header in chain:
        if held.sizes[str(name)] != header.size:
            raise CorruptionError(str(name), None, f"it has {held.sizes[str(name)]} bytes instead of {header.size}")
    return chain


def reach_of(destination: Destination, name: BaseName, header: BaseHeader, parent: Reach | None) -> Reach:
    """What the generation of a base reaches, with what its parent reaches. CorruptionError names the object."""
    try:
        return Reach(read_table(destination, str(name), header), parent)
    except ValueError as error:
        raise CorruptionError(str(name), header.pages_at, str(error)) from None


def check_base(destination: Destination, name: str) -> BaseHeader:
    """Read a whole base and prove it: each page, and all of it. Raises as `read_header`."""
    header = read_header(destination, name)
    digest = hashlib.sha256()
    for start in range(0, header.size - _DIGEST_BYTES, _RUN_BYTES):
        size = min(_RUN_BYTES, header.size - _DIGEST_BYTES - start)
        raw = destination.get(name, start=start, size=size)
        if len(raw) != size:
            raise CorruptionError(name, start, "it is cut short")
        digest.update(raw)
    if destination.get(name, start=header.size - _DIGEST_BYTES, size=_DIGEST_BYTES + 1) != digest.digest():
        raise CorruptionError(name, None, "it does not match its digest")
    extents = read_table(destination, name, header).new()
    for _ in pages_of(destination, name, header, extents):
        pass
    return header


def pages_of(
    destination: Destination, name: str, header: BaseHeader, extents: Extents
) -> Iterator[tuple[int, bytes | bytearray]]:
    """The pages that a base has, proved; see `read_pages`."""
    return read_pages(
        lambda size, offset: destination.get(name, start=offset, size=size), extents, name, header.pages_at
    )
