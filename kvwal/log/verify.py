"""Proof of a log: everything in it is read and decoded, and all that is wrong is listed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from kvwal.errors import CorruptionError, Finding, FormatError, RefusedError
from kvwal.files.names import index_name, keys_name, segment_name
from kvwal.keys import Seqno
from kvwal.log.chain import Chain, FoundSegment, link_failure, link_of
from kvwal.log.index import load_index
from kvwal.log.kept import KeptFiles, OpenFile
from kvwal.log.key_table import KeyTable
from kvwal.log.keys import DamagedIndex, KeyIndex
from kvwal.log.reader import read_segment, start_of
from kvwal.log.segment import HeaderFault, SegmentHeader
from kvwal.log.tail import TailRow, Verdict, describe, judge

__all__ = ["verify_log"]

_ATTEMPTS: Final = 10


def verify_log(chain: Chain) -> list[Finding]:
    """Everything that is damaged, and key indexes that are. A torn tail is not damage. A writer may be at work."""
    found: list[Finding] = []
    for _ in range(_ATTEMPTS):
        before = _headers(chain)
        found = list(_verify(chain))
        # A writer may have put a segment in the place of an empty one of the same name, made one or retired one
        # meanwhile: then what was seen may be half of the one and half of the other.
        if not found or _headers(chain) == before:
            break
    return found


def _headers(chain: Chain) -> list[tuple[Seqno, SegmentHeader | HeaderFault | None]]:
    headers: list[tuple[Seqno, SegmentHeader | HeaderFault | None]] = []
    for name in chain.names():
        try:
            headers.append((name, chain.load(name).header))
        except RefusedError:
            raise
        except OSError:
            headers.append((name, None))
    return headers


def _verify(chain: Chain) -> Iterator[Finding]:
    segments: list[FoundSegment] = []
    unreadable: set[int] = set()
    for name in chain.names():
        try:
            segments.append(chain.load(name))
        except RefusedError:
            raise  # No descriptor, or no permission: that says nothing about the bytes.
        except OSError as error:
            unreadable.add(name)
            yield Finding(segment_name(name), None, f"cannot be read: {error}")
    for i, segment in enumerate(segments):
        link = link_of(segments, i, reaches=True)
        row, verdict = judge(link)
        # One that cannot be read is not missing.
        if verdict in (Verdict.CORRUPT, Verdict.FORMAT) and link.slot.next not in unreadable:
            yield _finding(link_failure(segment, link, row, verdict), segment.name)
        if isinstance(segment.header, SegmentHeader):
            following = segment.slot.next or (segments[i + 1].first_seqno if i + 1 < len(segments) else None)
            yield from _verify_segment(chain, segment, None if following is None else following - 1)


def _verify_segment(chain: Chain, segment: FoundSegment, until: int | None) -> Iterator[Finding]:
    seqnos: dict[int, int] = {}
    skipped: list[int] = []
    table: KeyTable | None = None
    if until is not None and chain.directory.kind(keys_name(segment.first_seqno)) == "file":
        table = KeyTable(segment.known)
    try:
        for record in read_segment(chain, segment, start_of(segment.known), until=until, skipped=skipped):
            seqnos[record.offset] = record.seqno
            try:
                record.batch()
                record.meta()
                if table is not None:
                    deque(table.extend((record,)), maxlen=0)
            except (CorruptionError, FormatError) as error:
                table = None
                yield _finding(error, segment.name)
    except (CorruptionError, FormatError) as error:
        yield _finding(error, segment.name)
        return
    except RefusedError:
        raise
    except OSError as error:
        yield Finding(segment.name, None, f"cannot be read: {error}")
        return
    for offset in skipped:
        yield Finding(segment.name, offset, describe(TailRow.DAMAGED_MARK))
    # An index that is no index was torn by a crash, and is not used. One that is must tell the truth.
    index = load_index(chain.directory, segment.known)
    if index is not None and any(seqnos.get(o) != s for s, o in zip(index.seqnos, index.offsets, strict=True)):
        yield Finding(index_name(segment.first_seqno), None, "the index lies about where commits are; remove it")
    if table is not None and until is not None:
        yield from _verify_keys(chain, segment.known, until, table)


def _verify_keys(chain: Chain, header: SegmentHeader, last: int, table: KeyTable) -> Iterator[Finding]:
    """The key index of a segment, held against the keys of the segment. It is not flushed, so a crash may tear it."""
    name, files = keys_name(header.first_seqno), KeptFiles(chain.directory)
    try:
        file = files.open_anew(name)
        index = KeyIndex.load(files, header, last)
        if index is not None:
            index.check()
            if not table.fits() or not _has(file, table.encode(header, last, with_marks=index.has_marks)):
                yield Finding(name, None, "the key index lies about the keys of its segment; it is derived: remove it")
            return
        reason = "the key index is not as it was written"
    except FileNotFoundError:
        return  # It was retired meanwhile.
    except DamagedIndex:
        reason = "a block of the key index is not as it was written"
    except RefusedError:
        raise
    except OSError as error:
        reason = f"the key index cannot be read: {error}"
    finally:
        files.close_all()
    yield Finding(name, None, f"{reason}; it is derived, and is made again when it is needed", is_derived=True)


def _has(file: OpenFile, pieces: Iterator[bytes]) -> bool:
    """Whether a file is these pieces. Of the same keys the same index is made, byte by byte."""
    offset = 0
    for piece in pieces:
        if file.pread(len(piece), offset) != piece:
            return False
        offset += len(piece)
    return offset == file.size()


def _finding(error: Exception, file: str) -> Finding:
    return error.finding if isinstance(error, CorruptionError) else Finding(file, None, str(error))
