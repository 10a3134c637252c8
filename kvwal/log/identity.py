"""Whose log is it: the store's identity as the segments tell it, when the page file cannot."""

from __future__ import annotations

from typing import Final

from kvwal.files import Files
from kvwal.log.record import segment_name
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader, decode_header, list_segments

__all__ = ["store_id_of_log"]

# Where the header has it; see the table in segment.py.
_ID_AT: Final = slice(16, 32)


def store_id_of_log(files: Files, directory: str) -> bytes | None:
    """The store_id of the newest segment whose header verifies; None if there is none."""
    for first_seqno in reversed(list_segments(files, directory)):
        file = files.open(files.join(directory, segment_name(first_seqno)))
        try:
            page = file.pread(HEADER_PAGE_BYTES, 0)
        finally:
            file.close()
        store_id = page[_ID_AT]
        if isinstance(decode_header(page, first_seqno, store_id), SegmentHeader):
            return store_id
    return None
