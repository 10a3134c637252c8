"""Runs of records: puts of one shape, one after the other, decoded by columns.

Most logs have long stretches of commits that are one put each, of keys of one length and values of one length. Their
records are cut by a few calls in C, in a fraction of the time of a loop.

Invariant: a run has exactly what a walk finds in its records one by one, each of which has verified and is in order. A
record of which that does not hold ends the run before it, and the walk says what is wrong with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from operator import ge, lt, ne
from typing import Final

from crc32c import crc32c

from kvwal.keys import Seqno
from kvwal.log.intents import ONE, ONE_KEY_OFFSET, PUT
from kvwal.log.record import COMMIT, RECORD_HEADER, RECORD_HEADER_BYTES, Record
from kvwal.log.segment import SegmentHeader

__all__ = ["LEAST_RECORDS", "MOST_RECORD_BYTES", "Run", "read_run"]

#: Fewer gain nothing; a power of two.
LEAST_RECORDS: Final = 8
#: Of larger records the copying of their bytes is what costs.
MOST_RECORD_BYTES: Final = 4 << 10
_MOST_RECORDS: Final = 256

_SEED: Final = 0xFFFFFFFF

# Where marker, body length, kind and the lengths of the put are: the same in all records of a run.
_SAME_BYTES: Final = (*range(4), *range(8, 16), *range(RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + ONE_KEY_OFFSET))


class Run:
    """Commits that are one put into table 0 each, as they were read and verified. Do not change it.

    Its columns have one entry for each commit.
    """

    __slots__ = ("keys", "offsets", "segment", "seqnos", "times_us", "values", "watermarks")

    def __init__(
        self,
        segment: Seqno,
        offsets: range,
        seqnos: tuple[Seqno, ...],
        watermarks: tuple[Seqno, ...],
        times_us: tuple[int, ...],
        keys: tuple[bytes, ...],
        values: tuple[bytes, ...],
    ) -> None:
        self.segment = segment
        #: Where each record begins; the step is their size, header included.
        self.offsets = offsets
        self.seqnos = seqnos
        self.watermarks = watermarks
        self.times_us = times_us
        self.keys = keys
        self.values = values

    def part(self, begin: int, end: int | None = None) -> Run:
        """Some of its commits, by place; at least one."""
        columns = self.offsets, self.seqnos, self.watermarks, self.times_us, self.keys, self.values
        return Run(self.segment, *(column[begin:end] for column in columns))  # type: ignore[arg-type]  # of one kind each

    def records(self) -> Iterator[Record]:
        """Its commits one by one."""
        columns = (self.seqnos, self.watermarks, self.times_us, self.offsets, self.keys, self.values)
        for seqno, watermark, time_us, offset, key, value in zip(*columns, strict=True):
            body = ONE.pack(1, PUT, len(key), len(value)) + key + value
            yield Record(COMMIT, seqno, watermark, time_us, self.segment, offset, body)


def read_run(chunk: bytes, at: int, header: SegmentHeader, base: int, last: int, until: int | None) -> Run | None:
    """The run that begins at this byte of a chunk, and follows the commit `last`. None: too few records of one shape.

    Requires: a whole record header with the segment's marker is there.

    Args:
        base: offset of the chunk in the segment.
        until: the last commit that it may have.
    """
    _, _, length, kind, *_ = RECORD_HEADER.unpack_from(chunk, at)
    size = RECORD_HEADER_BYTES + length
    n = min(_MOST_RECORDS, (len(chunk) - at) // size)
    if until is not None:
        n = min(n, until - last)
    if kind != COMMIT or length < ONE_KEY_OFFSET or size > MOST_RECORD_BYTES or n < LEAST_RECORDS:
        return None
    intents, op, key_bytes, value_bytes = ONE.unpack_from(chunk, at + RECORD_HEADER_BYTES)
    if intents != 1 or op != PUT or ONE_KEY_OFFSET + key_bytes + value_bytes != length:
        return None
    for i in _SAME_BYTES:
        # This byte of each record.
        column = chunk[at + i : at + n * size : size]
        same = column[:1]
        if column.count(same) != n:
            n -= len(column.lstrip(same))
            if n < LEAST_RECORDS:
                return None
    # A power of two, since each format is compiled.
    n = 1 << n.bit_length() - 1
    offsets = range(base + at, base + at + n * size, size)
    checked = _cutter(n, f"4xI{size - 8}s").unpack_from(chunk, at)
    seed = header.salt + base + at & _SEED
    seeds = range(seed, seed + n * size, size)
    crcs = tuple(map(crc32c, checked[1::2], seeds if seeds[-1] <= _SEED else [each & _SEED for each in seeds]))
    fields = _cutter(n, f"16xQQQ{ONE_KEY_OFFSET}x{key_bytes}s{value_bytes}s").unpack_from(chunk, at)
    seqnos, watermarks, times_us, keys, values = (fields[i::5] for i in range(5))
    following = tuple(range(last + 1, last + 1 + n))
    if crcs != checked[::2] or seqnos != following or not all(map(lt, watermarks, seqnos)):
        # One of the checks of a walk fails for each of these.
        bad = map(ne, crcs, checked[::2]), map(ne, seqnos, following), map(ge, watermarks, seqnos)
        n = next(i for i, failed in enumerate(map(any, zip(*bad, strict=True))) if failed)
        if not n:
            return None
    return Run(header.first_seqno, offsets[:n], seqnos[:n], watermarks[:n], times_us[:n], keys[:n], values[:n])


@lru_cache(maxsize=32)
def _cutter(n: int, record: str) -> struct.Struct:
    """What cuts these fields of n records, which follow one another."""
    return struct.Struct("<" + n * record)
