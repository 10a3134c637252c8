"""The two meta slots of a page file: made, read, confirmed, and written over in turns.

The bytes of a slot, and which of the two counts, are in meta.py. Generation g has slot g % 2, so that what is written
is always over the generation that is not the newest.

Durability: what each of these functions writes is on disk when it returns. After an OSError it is unknown whether it
is; after an interruption it can be done again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from crc32c import crc32c

from kvwal.features import VERSION
from kvwal.files import Directory, File, is_of_medium
from kvwal.files.names import DATA, temporary_name
from kvwal.keys import Seqno
from kvwal.pages.meta import Choice, Meta, Row, choose, decode_meta, encode_meta
from kvwal.pages.node import PAGE_SIZE, POINTER, node_fault

__all__ = ["choose_in", "confirm_slots", "create_page_file", "read_slots", "salvage_slots", "write_slot"]

_T = TypeVar("_T")


def create_page_file(
    directory: Directory, store_id: bytes, *, time_us: int, line: bytes = bytes(8), mode: int = 0o600
) -> None:
    """Make an empty page file: generations 0 and 1. Durable on return, and there whole or not at all."""
    temporary = temporary_name(DATA)
    if directory.kind(temporary) is not None:
        directory.unlink(temporary)
    file = directory.open(temporary, create=True, mode=mode)
    try:
        empty = Meta(store_id, 0, Seqno(0), time_us, time_us, 2, line=line, wall_us=time_us, writer=VERSION)
        slots = [encode_meta(replace(empty, generation=generation)) for generation in (0, 1)]
        file.pwrite(b"".join(slot.ljust(PAGE_SIZE, b"\0") for slot in slots), 0)
        file.sync()
    finally:
        file.close()
    directory.rename(temporary, DATA)
    directory.sync()


def read_slots(file: File) -> Choice:
    """Read the two slots, and the root of the generation that is chosen. Raises as `choose` does."""
    return choose_in(file.pread(2 * PAGE_SIZE, 0), file)


def salvage_slots(file: File) -> Choice:
    """As `read_slots`, but a slot that cannot be read is none, and a root that cannot be read does not verify."""

    def slot_of(slot: int) -> Meta | str:
        raw = _unless_unreadable(lambda: file.pread(PAGE_SIZE, slot * PAGE_SIZE))
        return raw if isinstance(raw, str) else decode_meta(slot, raw)

    return choose([slot_of(0), slot_of(1)], lambda meta: _unless_unreadable(lambda: _root_fault(file, meta)))


def _unless_unreadable(read: Callable[[], _T]) -> _T | str:
    try:
        return read()
    except OSError as error:
        if not is_of_medium(error):
            raise
        return f"cannot be read: {error}"


def choose_in(raw: bytes, file: File) -> Choice:
    """The same of slots that were read from the file."""
    slots = [decode_meta(slot, raw[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]) for slot in (0, 1)]
    return choose(slots, lambda meta: _root_fault(file, meta))


def _root_fault(file: File, meta: Meta) -> str | None:
    if not meta.height:
        return None
    page, crc, pages, _, _ = POINTER.unpack(meta.root)
    raw = file.pread(pages * PAGE_SIZE, page * PAGE_SIZE)
    if len(raw) < pages * PAGE_SIZE:
        return "lies beyond the end of the file"
    if crc32c(raw, page) != crc:
        return "does not match its checksum"
    return node_fault(raw, meta.height - 1)


def confirm_slots(file: File, choice: Choice) -> None:
    """Make sure of the generation that was found at open, before anything is written over."""
    if choice.row is Row.BOTH_VALID:
        write_slot(file, choice.meta)
    else:
        file.pwrite(bytes(PAGE_SIZE), (choice.meta.generation + 1) % 2 * PAGE_SIZE)
        file.datasync()


def write_slot(file: File, meta: Meta) -> None:
    """Write a generation's meta into its slot."""
    file.pwrite(encode_meta(meta).ljust(PAGE_SIZE, b"\0"), meta.generation % 2 * PAGE_SIZE)
    file.datasync()
