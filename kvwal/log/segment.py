"""The segment: a preallocated file of records, and its header page.

The first 4096 bytes are the header page; records follow, one after the other. Little-endian, no padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwallog` |
| 8 | 2 | version | 1 |
| 10 | 2 | size | of this header, CRC included: 256 |
| 12 | 4 | form | 0: plain records |
| 16 | 16 | store_id | the store this log belongs to |
| 32 | 8 | first_seqno | the first commit of the segment; its file name says the same |
| 40 | 8 | created_us | ascending time: no record in it is older, none before it is younger |
| 48 | 4 | salt | random; seeds the CRC of everything in this file |
| 52 | 4 | marker | random, no byte of it zero; opens every record |
| 56 | 8 | capacity | size of the file as it was preallocated |
| 64 | 8 | previous | first_seqno of the segment before, 0 if there was none |
| 72 | 8 | required | features that a reader must know; see `kvwal/features.py` |
| 80 | 8 | optional | features that a reader may pass over |
| 88 | 8 | line | of its first commit |
| 96 | 8 | session | that made it; later ones may go on in it |
| 104 | 8 | wall_us | the raw wall clock when it was made |
| 112 | 4 | revision | 0 |
| 116 | 136 | - | zeros: fields that `docs/format.md` reserves |
| 252 | 4 | crc | CRC-32C of the header before it |

At 2048 of the header page is the successor slot, all zeros until it is written, always with the same bytes:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwalnxt` |
| 8 | 8 | next | first_seqno of the segment that follows this one |
| 16 | 4 | crc | CRC-32C of the slot before it, seeded with the salt |

A header is valid when
1. magic and CRC are right (the CRC is the last 4 of `size` bytes, in every version),
2. version, size, form and all required features are known: otherwise it is of a newer format, whatever else it says,
3. bytes that have to be zero are, unless an optional feature is not known, which may use them,
4. its store_id is the store's,
5. its first_seqno is the one in the file's name.

Invariant: no byte of a segment but those of the slot is written twice, and the file is never renamed again.
A segment gets its name only when its header (and, after a recovery, the records it starts with) is on disk.
Durability: a segment that exists attests that every commit before its first is on disk.
What a segment holds of its successor's commits, or behind them, is superseded and never looked at.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.features import KNOWN_OPTIONAL, KNOWN_REQUIRED, unknown_bits
from kvwal.files import Directory, is_of_medium
from kvwal.files.names import index_names, numbers, segment_name
from kvwal.keys import Seqno

__all__ = [
    "HEADER_PAGE_BYTES",
    "SLOT_OFFSET",
    "HeaderFault",
    "IndexSizes",
    "SegmentHeader",
    "SegmentInfo",
    "Slot",
    "decode_header",
    "decode_slot",
    "encode_header",
    "encode_slot",
    "list_segments",
    "newest_segment",
    "new_marker",
    "newer_features",
    "replay_count",
    "store_id_of_log",
    "unneeded_bytes",
]

# On disk: never change.
MAGIC: Final = b"kvwallog"
VERSION: Final = 1
HEADER_PAGE_BYTES: Final = 4096
SLOT_OFFSET: Final = 2048
SLOT_MAGIC: Final = b"kvwalnxt"
_PLAIN: Final = 0

HEADER = struct.Struct("<8sHHI16sQQIIQQQQ8sQQIIQQIIQIIQII32sQ32s4s")
SLOT = struct.Struct("<8sQ")
CRC = struct.Struct("<I")
HEADER_BYTES: Final = 256
SLOT_BYTES: Final = 20
# Where revision and the fields begin that are not built yet: integers and bytes, all zero.
_BUILT_BYTES: Final = 112
_RESERVED: Final = (0,) * 12 + (bytes(32), 0, bytes(32), bytes(4))
assert HEADER.size + CRC.size == HEADER_BYTES
assert SLOT.size + CRC.size == SLOT_BYTES

_NO_SLOT: Final = bytes(SLOT_BYTES)


class SegmentHeader(NamedTuple):
    """What the header of a segment says."""

    store_id: bytes
    first_seqno: Seqno
    created_us: int
    salt: int
    marker: int
    capacity: int
    previous: Seqno
    required: int = 0
    optional: int = 0
    line: bytes = bytes(8)
    session: int = 0
    wall_us: int = 0


class HeaderFault(enum.Enum):
    """Why a header cannot be used."""

    DAMAGED = enum.auto()
    NEWER = enum.auto()
    FOREIGN = enum.auto()
    MISPLACED = enum.auto()


class Slot(NamedTuple):
    """What the successor slot holds: `next` if it is valid, nothing yet, or damage."""

    next: Seqno | None
    damaged: bool


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment as others see it.

    Attributes:
        first_seqno: its first commit, and its name.
        size: bytes of the file.
        created_us: when it was made, in ascending time; 0 if its header could not be read.
        wall_us: what the wall clock said then.
        sealed: nothing more will be written to it.
        previous: first seqno of the segment before, as it says; 0 if there was none.
    """

    first_seqno: Seqno
    size: int
    created_us: int
    wall_us: int
    sealed: bool
    previous: Seqno = Seqno(0)  # noqa: RUF009  # immutable

    @property
    def name(self) -> str:
        """The name of its file."""
        return segment_name(self.first_seqno)


def new_marker(random: bytes) -> int:
    """A marker out of four random bytes. None of its own is zero, so a search flies over empty space."""
    return int.from_bytes(bytes(byte % 255 + 1 for byte in random), "little")


def encode_header(header: SegmentHeader) -> bytes:
    """The whole header page, with an empty slot."""
    store_id, *rest = header
    data = HEADER.pack(MAGIC, VERSION, HEADER_BYTES, _PLAIN, store_id, *rest, *_RESERVED)
    return (data + CRC.pack(crc32c(data))).ljust(HEADER_PAGE_BYTES, b"\0")


def decode_header(page: bytes, name_seqno: int, store_id: bytes | None) -> SegmentHeader | HeaderFault:
    """The header, or why it is none. Without a store_id, any store's will do."""
    if len(page) < HEADER_PAGE_BYTES or page[:8] != MAGIC:
        return HeaderFault.DAMAGED
    version, size, form = struct.unpack_from("<HHI", page, 8)
    # Where the CRC stands is said by the size, so that a newer header is not taken for a damaged one.
    if not 16 <= size <= SLOT_OFFSET or CRC.unpack_from(page, size - 4)[0] != crc32c(page[: size - 4]):
        return HeaderFault.DAMAGED
    if (version, size, form) != (VERSION, HEADER_BYTES, _PLAIN):
        return HeaderFault.NEWER
    header = SegmentHeader(*HEADER.unpack_from(page)[4:16])
    if header.required & ~KNOWN_REQUIRED:
        return HeaderFault.NEWER
    if any(page[_BUILT_BYTES : HEADER_BYTES - 4]) and not header.optional & ~KNOWN_OPTIONAL:
        return HeaderFault.NEWER
    if store_id not in (None, header.store_id):
        return HeaderFault.FOREIGN
    if header.first_seqno != name_seqno:
        return HeaderFault.MISPLACED
    return header


def newer_features(page: bytes) -> str:
    """Which features make a header page one of a newer format, to be put behind a sentence; "" if none does."""
    if page[8:12] != struct.pack("<HH", VERSION, HEADER_BYTES):
        return ""
    bits = unknown_bits(HEADER.unpack_from(page)[11], KNOWN_REQUIRED)
    return f" (required features {', '.join(map(str, bits))})" if bits else ""


def encode_slot(salt: int, next_seqno: int) -> bytes:
    """The bytes of the slot that name the successor."""
    data = SLOT.pack(SLOT_MAGIC, next_seqno)
    return data + CRC.pack(crc32c(data, salt))


def decode_slot(page: bytes, salt: int) -> Slot:
    """What the slot of this header page says."""
    data = page[SLOT_OFFSET : SLOT_OFFSET + SLOT_BYTES]
    if data == _NO_SLOT:
        return Slot(None, damaged=False)
    magic, next_seqno = SLOT.unpack_from(data)
    if magic != SLOT_MAGIC or CRC.unpack_from(data, SLOT.size)[0] != crc32c(data[: SLOT.size], salt):
        return Slot(None, damaged=True)
    return Slot(next_seqno, damaged=False)


def list_segments(directory: Directory) -> list[Seqno]:
    """First seqnos of the segments there are by name, ascending."""
    return sorted(Seqno(found[0]) for name in directory.names() if (found := numbers(name)) and found[1] == "log")


def newest_segment(directory: Directory) -> list[Seqno]:
    """The last one of `list_segments`, if there is one. Of others no more is looked at than how their names end."""
    logs = [name for name in directory.names() if name.endswith(".log")]
    while logs:
        # Numbers have one length.
        newest = max(logs)
        if found := numbers(newest):
            return [Seqno(found[0])]
        logs.remove(newest)
    return []


class IndexSizes:
    """The bytes of the index files of one log. Thread-safe.

    They are looked at when they are asked for first. The one that writes and removes them says so from the beginning.
    """

    __slots__ = ("_directory", "_is_whole", "_sizes")

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        # By name. Each change is one step of a dict.
        self._sizes: dict[str, int] = {}
        self._is_whole = False

    def written(self, name: str, size: int) -> None:
        """An index file of this name has this size now."""
        self._sizes[name] = size

    def removed(self, name: str) -> None:
        """There is no index file of this name any more."""
        self._sizes.pop(name, None)

    def added_to(self, segments: Sequence[SegmentInfo]) -> list[SegmentInfo]:
        """The segments, each with the size of its indexes in its own."""
        if not self._is_whole:
            self._look()
        get = self._sizes.get
        return [
            replace(segment, size=segment.size + sum(get(name, 0) for name in index_names(segment.first_seqno)))
            for segment in segments
        ]

    def _look(self) -> None:
        for name in self._directory.names():
            found = numbers(name)
            if found is not None and found[1] != "log" and name not in self._sizes:
                # One that was removed just now, or cannot be looked at, counts as nothing.
                with suppress(OSError):
                    file = self._directory.open(name)
                    try:
                        self._sizes.setdefault(name, file.size())
                    finally:
                        file.close()
        self._is_whole = True


def replay_count(segments: Sequence[SegmentInfo], after: Seqno) -> int:
    """How many of a log's segments a replay of what is beyond `after` would read."""
    return sum(segment.first_seqno > after + 1 for segment in segments[1:]) + 1


def unneeded_bytes(segments: Sequence[SegmentInfo], after: Seqno, until: Seqno) -> int:
    """Bytes of a log's segments that have commits beyond `after`, and none beyond `until`."""
    # Each ends where the next one begins.
    return sum(
        segment.size
        for segment, following in pairwise(segments)
        if after + 1 < following.first_seqno <= until + 1
    )


def store_id_of_log(directory: Directory, *, salvages: bool = False) -> bytes | None:
    """The store_id of the newest segment whose header verifies; None if there is none.

    `salvages`: a header that cannot be read is passed over, as one that does not verify is.
    """
    for first_seqno in reversed(list_segments(directory)):
        try:
            page = _header_page(directory, first_seqno)
        except OSError as error:
            if salvages and is_of_medium(error):
                continue
            raise
        header = decode_header(page, first_seqno, None)
        if isinstance(header, SegmentHeader):
            return header.store_id
    return None


def _header_page(directory: Directory, first_seqno: Seqno) -> bytes:
    file = directory.open(segment_name(first_seqno))
    try:
        return file.pread(HEADER_PAGE_BYTES, 0)
    finally:
        file.close()
