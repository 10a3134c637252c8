"""What is different between two moments, by what the log says was changed between them.

Only keys that a commit between the two wrote, that lie in a range one deleted, or that were due between the two, can
differ: those are read at both moments. So it costs as much as was changed, and not as much as there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from heapq import merge
from itertools import groupby
from typing import NamedTuple

from kvwal.db.mapping import Bounds
from kvwal.engine.engine import Engine
from kvwal.engine.expiry import due_rows, queued_keys
from kvwal.engine.readers import Reader
from kvwal.engine.value import Value
from kvwal.expiring import Expiring, judged
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno, disjoint
from kvwal.log import SegmentCursor
from kvwal.log.intents import is_of_users

__all__ = ["Difference", "differences"]


class Difference(NamedTuple):
    """A key that two moments have different values of.

    Attributes:
        key: its bytes.
        old, new: its value at the first and at the second moment; None where it is not there.
    """

    key: bytes
    old: bytes | None
    new: bytes | None


def past_value(engine: Engine, key: bytes, at: Seqno | datetime, table: int) -> Value:
    """The value of a key of a table at a moment; None if it was not there, or has expired since.

    One that is going to expire is an `Expiring`. Raises as `Past.reader`.
    """
    _refuse_own(table)
    reader = engine.upkeep.past.reader(at, "get")
    try:
        value = engine.reads.lasting(key, table=table, reader=reader)
    finally:
        reader.release()
    has_expired = type(value) is Expiring and judged(value, engine.reads.moments.clock.now_us()) is None
    return None if has_expired else value


def _refuse_own(table: int) -> None:
    if not is_of_users(table):
        raise ValueError(f"table {table} is the store's own; its past is not for users")


def differences(
    engine: Engine, a: Seqno | datetime, b: Seqno | datetime | None, bounds: Bounds, table: int, owner: object
) -> Iterator[Difference]:
    """See `Store.diff`, which has checked the arguments."""
    _refuse_own(table)
    past, moments = engine.upkeep.past, engine.reads.moments
    # All of the log, until it is known what is needed: a reader of now holds none.
    whole = past.hold_log(None)
    old = past.reader(a, "diff", owner)
    try:
        new = moments.reader("diff", owner=owner) if b is None else past.reader(b, "diff", owner)
        held = past.hold_log(min(old.seqno, new.seqno))
    except BaseException:
        old.release()
        raise
    finally:
        whole.close()
    return _differences(engine, old, new, bounds, table, held)


def _differences(
    engine: Engine, old: Reader, new: Reader, bounds: Bounds, table: int, held: SegmentCursor
) -> Iterator[Difference]:
    reads = engine.reads
    try:
        first, last = (old, new) if old.seqno < new.seqno else (new, old)
        for key in _changed(engine, first, last, bounds, table):
            before, after = reads.read_at(old, key, table=table), reads.read_at(new, key, table=table)
            if before != after:
                yield Difference(key, before, after)
    finally:
        held.close()
        old.release()
        new.release()


def _changed(engine: Engine, first: Reader, last: Reader, bounds: Bounds, table: int) -> Iterator[bytes]:
    """The keys that may differ, in the direction of the bounds, each once."""
    reads, reverse = engine.reads, bounds.reverse
    stretches = engine.upkeep.past.stretches(table, first.seqno, last.seqno)
    sources = [_keys(stretch.chunks(bounds.start, bounds.stop, reverse=reverse)) for stretch in stretches]
    wanted = KeyRange(bounds.start or b"", bounds.stop)
    for deleted in disjoint(each for stretch in stretches for each in stretch.ranges):
        clipped = deleted.clip(wanted)
        if clipped is not None:
            again = reads.moments.again(first, "diff")
            sources.append(_keys(reads.chunks(again, *clipped, reverse=reverse, table=table)))
    low_us, high_us = sorted((first.at_us, last.at_us))
    # At the time 0 nothing expires.
    if low_us:
        again = reads.moments.again(first, "diff")
        rows = reads.chunks(again, *due_rows(low_us + 1, high_us), reverse=False, table=SYSTEM_TABLE)
        due = (key for key in queued_keys(rows, table) if bounds.contains(key))
        sources.append(iter(sorted(due, reverse=reverse)))
    for key, _ in groupby(merge(*sources, reverse=reverse)):
        yield key


def _keys(chunks: Iterable[tuple[Sequence[bytes], object]]) -> Iterator[bytes]:
    for keys, _ in chunks:
        yield from keys
