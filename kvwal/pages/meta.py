"""The two meta slots: what a generation is, and which of two slots is believed.

Pages 0 and 1 of the page file are the slots; generation g lies in slot g % 2, zeros behind it.
Everything is little-endian.

    offset  size  field
         0     8  magic "kvwpages"
         8     2  format version: 1
        10     2  size of the meta: 512, checksum included
        12     4  page size: 4096
        16    16  store id
        32     8  generation
        40     8  seqno: the last commit that is wholly in the trees
        48     8  time, microseconds since 1970-01-01 UTC, of that commit
        56     8  time the store was created
        64     4  page count: pages of the file that this generation accounts for
        68     4  height: levels of table 0's tree; 0 for an empty one
        72    20  pointer to its root (format in node.py); zeros for an empty tree
        92     4  free list: first page; 0 for none
        96     4  free list: crc
       100     4  free list: length in pages
       104     8  required features (kvwal/features.py)
       112     8  optional features
       120     8  line
       128     8  session that wrote this generation
       136     8  wall clock at the flip, as the system said it
       144     8  replay through: the seqno that recovery must reach; never less than seqno
       152    20  pointer to the root of the catalogue (catalogue.py); zeros: table 0 alone
       172     4  its height
       176    20  pointer to the root of the base tree (bases.py); zeros: no bases
       196     4  its height
       200     4  dead list: first page; 0 for none
       204     4  dead list: crc
       208     4  dead list: length in pages
       212    84  of later versions: zeros
       296    16  version of kvwal that wrote it: ASCII, filled with zeros
       312   196  zeros
       508     4  CRC-32C of the bytes before

What makes a slot valid:

1. It begins with the magic, its size is 16 to 4096, and its last 4 bytes are the CRC-32C of those
   before. Every format version keeps magic, version and size where they are, and the CRC last.
2. The version is 1, and then the size is 512 and the page size 4096, no required feature is unknown, and zeros are
   zeros. A slot that holds 1 but not this is of a newer format. With an unknown optional feature the zeros may
   be anything: the next meta has the same bytes there (`Meta.unknown`).
3. The slot is the generation's: generation % 2. (A misplaced write has the wrong parity.)
4. Replay through is not less than seqno.

Which slot is believed is decided by the table `Row`, in `choose`. Older than the newest valid one is
believed only if it is the generation before it: pages that only still older ones reach are reused.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from crc32c import crc32c

from kvwal.errors import CorruptionError, FormatError
from kvwal.features import KNOWN_OPTIONAL, KNOWN_REQUIRED
from kvwal.files.names import DATA
from kvwal.keys import Seqno
from kvwal.pages.node import NO_POINTER, PAGE_SIZE, POINTER

__all__ = ["META_SIZE", "Choice", "Meta", "Row", "choose", "decode_meta", "encode_meta"]


# On disk: never change.
_MAGIC: Final = b"kvwpages"
_VERSION: Final = 1
_FRAME: Final = Struct("<8sHH")
_BODY: Final = Struct("<8sHHI16sQQQQII20sIIIQQ8sQQQ20sI" + "20sIIIIIQ32sQQQQQ" + "16s196x")
_CRC: Final = Struct("<I")
META_SIZE: Final = 512
assert _BODY.size + _CRC.size == META_SIZE
#: The fields of later versions, and where they and the zeros lie.
_RESERVED: Final = (0, 0, bytes(32), 0, 0, 0, 0, 0)
_UNKNOWN: Final = (slice(212, 296), slice(312, 508))
_NOTHING_UNKNOWN: Final = bytes(84 + 196)


@dataclass(frozen=True, slots=True)
class Meta:
    """One generation of the trees: everything needed to read it.

    `replay_through` is raised to `seqno` if it is less.
    """

    store_id: bytes
    generation: int
    seqno: Seqno
    time_us: int
    created_us: int
    page_count: int
    height: int = 0
    #: Packed pointer to the root of table 0; `NO_POINTER` for an empty tree.
    root: bytes = NO_POINTER
    free_page: int = 0
    free_crc: int = 0
    free_pages: int = 0
    required: int = 0
    optional: int = 0
    line: bytes = bytes(8)
    session: int = 0
    wall_us: int = 0
    #: Table 0 may hold parts of the commits up to this one: the trees are right once the log is replayed through it.
    replay_through: Seqno = Seqno(0)  # noqa: RUF009  # a NewType of int
    #: Packed pointer to the root of the catalogue; `NO_POINTER` where all tables but table 0 are empty.
    catalogue: bytes = NO_POINTER
    catalogue_height: int = 0
    #: Packed pointer to the root of the base tree; `NO_POINTER` where there are no bases.
    bases: bytes = NO_POINTER
    bases_height: int = 0
    #: What was freed since the newest base, and is reached by a base.
    dead_page: int = 0
    dead_crc: int = 0
    dead_pages: int = 0
    writer: str = ""
    #: What a newer version wrote where this one knows zeros.
    unknown: bytes = _NOTHING_UNKNOWN

    def __post_init__(self) -> None:
        if self.replay_through < self.seqno:
            object.__setattr__(self, "replay_through", self.seqno)

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return PAGE_SIZE

    @property
    def count(self) -> int:
        """Number of entries of table 0."""
        count: int = POINTER.unpack(self.root)[4]
        return count


class Row(enum.Enum):
    """What the two slots may look like, and what is done."""

    BOTH_VALID = "both slots hold valid, consecutive generations: the newer"
    GAP = "both slots are valid but not consecutive: the newer, and the other is of no use"
    ONE_TORN = "one slot is not valid: the other"
    NEWER_ROOT_BAD = "the root of the newer generation does not verify: the older"
    BOTH_BAD = "no slot is valid: corruption"
    ROOTS_BAD = "no believable slot has a root that verifies: corruption"
    FOREIGN = "the slots belong to different stores: corruption"
    NEWER_FORMAT = "a slot is of a newer format: not for this version"


@dataclass(frozen=True, slots=True)
class Choice:
    """The generation to start from."""

    row: Row
    meta: Meta
    #: The generation before it, if it can still be read.
    older: Meta | None
    #: One sentence for a report; empty when nothing is wrong.
    detail: str

    def __str__(self) -> str:
        name = self.row.name.lower()
        return f"{name}: {self.detail}" if self.detail else name


def encode_meta(meta: Meta) -> bytes:
    """The bytes of a slot, without the zeros behind them."""
    body = bytearray(
        _BODY.pack(
            _MAGIC,
            _VERSION,
            META_SIZE,
            PAGE_SIZE,
            meta.store_id,
            meta.generation,
            meta.seqno,
            meta.time_us,
            meta.created_us,
            meta.page_count,
            meta.height,
            meta.root,
            meta.free_page,
            meta.free_crc,
            meta.free_pages,
            meta.required,
            meta.optional,
            meta.line,
            meta.session,
            meta.wall_us,
            meta.replay_through,
            meta.catalogue,
            meta.catalogue_height,
            meta.bases,
            meta.bases_height,
            meta.dead_page,
            meta.dead_crc,
            meta.dead_pages,
            *_RESERVED,
            meta.writer.encode("ascii")[:16],
        )
    )
    body[_UNKNOWN[0]], body[_UNKNOWN[1]] = meta.unknown[:84], meta.unknown[84:]
    return bytes(body) + _CRC.pack(crc32c(body))


def decode_meta(slot: int, raw: bytes) -> Meta | str:
    """The meta in the page of a slot, or why there is none. FormatError if a newer version wrote it."""
    if len(raw) < META_SIZE:
        return "the slot lies beyond the end of the file"
    magic, version, size = _FRAME.unpack_from(raw)
    if magic != _MAGIC:
        return "the slot does not begin with the magic"
    if not 16 <= size <= len(raw) or crc32c(raw[: size - 4]) != _CRC.unpack_from(raw, size - 4)[0]:
        return "the checksum of the slot does not match"
    if version != _VERSION or size != META_SIZE:
        raise FormatError(
            f"the page file has format version {version}; this kvwal reads version {_VERSION}: use a newer kvwal"
        )
    _, _, _, page_size, *fields = _BODY.unpack_from(raw)
    if page_size != PAGE_SIZE:
        raise FormatError(f"the page file has pages of {page_size} bytes; this version of kvwal reads {PAGE_SIZE}")
    writer = fields[-1].rstrip(b"\0").decode("ascii", "replace")
    meta = Meta(*[*fields[:24], writer, raw[_UNKNOWN[0]] + raw[_UNKNOWN[1]]])
    if missing := meta.required & ~KNOWN_REQUIRED:
        bits = ", ".join(str(bit) for bit in range(64) if missing >> bit & 1)
        raise FormatError(f"the page file needs features that this kvwal does not know ({bits}): use a newer kvwal")
    if meta.unknown != _NOTHING_UNKNOWN and not meta.optional & ~KNOWN_OPTIONAL:
        raise FormatError("the page file has fields that this kvwal does not know: use a newer kvwal")
    if meta.generation % 2 != slot:
        return f"the slot holds generation {meta.generation}, which belongs in the other"
    if fields[16] < meta.seqno:
        return f"the slot asks for less of the log than its commit {meta.seqno}"
    return meta


def choose(slots: Sequence[Meta | str], root_fault: Callable[[Meta], str | None]) -> Choice:
    """Which generation to start from, by the table `Row`.

    Args:
        slots: what `decode_meta` made of the two slots.
        root_fault: why a generation's root does not verify; None if it does. May raise OSError,
            which passes through: a read that fails says nothing about the generation.

    Raises:
        CorruptionError: in the rows BOTH_BAD, ROOTS_BAD and FOREIGN.
    """
    valid = sorted((slot for slot in slots if isinstance(slot, Meta)), key=lambda meta: -meta.generation)
    faults = "; ".join(f"slot {i}: {slot}" for i, slot in enumerate(slots) if isinstance(slot, str))
    if not valid:
        raise CorruptionError(DATA, 0, f"neither meta slot can be used ({faults})")
    newer = valid[0]
    row, older, detail = Row.ONE_TORN, None, f"generation {newer.generation} is used alone: {faults}"
    if len(valid) == 2:
        if valid[1].store_id != newer.store_id:
            raise CorruptionError(DATA, 0, "the two meta slots belong to different stores")
        if valid[1].generation == newer.generation - 1:
            row, older, detail = Row.BOTH_VALID, valid[1], ""
        else:
            row, detail = Row.GAP, f"generation {newer.generation - 1} is missing from its slot"
    fault = root_fault(newer)
    if fault is None:
        return Choice(row, newer, older, detail)
    if older is not None and root_fault(older) is None:
        return Choice(
            Row.NEWER_ROOT_BAD,
            older,
            None,
            f"generation {older.generation} is used: the root of {newer.generation} {fault}",
        )
    page: int = POINTER.unpack(newer.root)[0]
    raise CorruptionError(DATA, page * PAGE_SIZE, f"the root of generation {newer.generation} {fault}")
