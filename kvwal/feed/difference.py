"""What is different between two moments, by what the log says was changed between them.

Only keys that a commit between the two wrote, that lie in a range one deleted, or that were due between the two, can
differ: those are read at both moments. So it costs as much as was changed, and not as much as there is.

Where a name means two tables at the two moments, the log says nothing of what differs: both are read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from heapq import merge
from itertools import groupby, repeat
from typing import NamedTuple, TypeAlias

from kvwal.db.mapping import Bounds
from kvwal.engine.engine import Engine
from kvwal.engine.expiry import due_rows, queued_keys
from kvwal.engine.readers import Reader
from kvwal.engine.state import UnlessGone
from kvwal.engine.value import Value
from kvwal.expiring import Expiring, judged
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno, disjoint
from kvwal.log import SegmentCursor
from kvwal.log.intents import is_of_users

__all__ = ["Difference", "TableAt", "differences", "past_value", "users_table"]

TableAt: TypeAlias = Callable[[Reader], int | None]
"""Which table is meant at the moment of a reader, by its id; None: there is none then."""


class Difference(NamedTuple):
    """A key that two moments have different values of.

    Attributes:
        key: its bytes.
        old, new: its value at the first and at the second moment; None where it is not there.
    """

    key: bytes
    old: bytes | None
    new: bytes | None


def past_value(engine: Engine, key: bytes, at: Seqno | datetime, table_at: TableAt) -> Value:
    """The value of a key of a table at a moment; None if it was not there, or has expired since.

    One that is going to expire is an `Expiring`. Raises as `Past.reader`, and what `table_at` raises.
    """
    reader = engine.upkeep.past.reader(at, "get")
    try:
        table = table_at(reader)
        value = None if table is None else engine.reads.lasting(key, table=table, reader=reader)
    finally:
        reader.release()
    has_expired = type(value) is Expiring and judged(value, engine.reads.moments.clock.now_us()) is None
    return None if has_expired else value


def users_table(table: int) -> TableAt:
    """The table that has this id, at any moment. ValueError if it is the store's own."""
    if not is_of_users(table):
        raise ValueError(f"table {table} is the store's own; its past is not for users")
    return lambda reader: table


def differences(
    engine: Engine, a: Seqno | datetime, b: Seqno | datetime | None, bounds: Bounds, table_at: TableAt, owner: object
) -> Iterator[Difference]:
    """See `Store.diff`, which has checked the arguments. Raises also what `table_at` raises."""
    past, moments = engine.upkeep.past, engine.reads.moments
    # All of the log, until it is known what is needed: a reader of now holds none.
    whole = past.hold_log(None)
    readers: list[Reader] = []
    try:
        with UnlessGone(engine.state):
            readers.append(old := past.reader(a, "diff", owner))
            readers.append(new := moments.reader("diff", owner=owner) if b is None else past.reader(b, "diff", owner))
            tables = table_at(old), table_at(new)
            held = past.hold_log(min(old.seqno, new.seqno))
    except BaseException:
        for reader in readers:
            reader.release()
        raise
    finally:
        whole.close()
    return _differences(engine, old, new, bounds, tables, held)


def _differences(
    engine: Engine, old: Reader, new: Reader, bounds: Bounds, tables: tuple[int | None, int | None], held: SegmentCursor
) -> Iterator[Difference]:
    table, other = tables
    try:
        with UnlessGone(engine.state):
            if table != other:
                both = _pairs(engine, old, bounds, table), _pairs(engine, new, bounds, other)
                yield from _of_two(*both, reverse=bounds.reverse)
            elif table is not None:
                yield from _of_one(engine, old, new, bounds, table)
    finally:
        held.close()
        old.release()
        new.release()


def _of_one(engine: Engine, old: Reader, new: Reader, bounds: Bounds, table: int) -> Iterator[Difference]:
    """What one table differs by, by what was changed in it."""
    reads, (first, last) = engine.reads, (old, new) if old.seqno < new.seqno else (new, old)
    for key in _changed(engine, first, last, bounds, table):
        before, after = reads.read_at(old, key, table=table), reads.read_at(new, key, table=table)
        if before != after:
            yield Difference(key, before, after)


def _pairs(engine: Engine, reader: Reader, bounds: Bounds, table: int | None) -> Iterator[tuple[bytes, bytes]]:
    """What is in the range as of a reader, in the direction of the bounds; nothing, where there is no table."""
    if table is None or bounds.is_empty():
        return
    again = engine.reads.moments.again(reader, "diff")
    for keys, values in engine.reads.chunks(again, bounds.start, bounds.stop, reverse=bounds.reverse, table=table):
        yield from zip(keys, values, strict=True)


def _of_two(
    old: Iterator[tuple[bytes, bytes]], new: Iterator[tuple[bytes, bytes]], *, reverse: bool
) -> Iterator[Difference]:
    """What two walks in the same direction differ by."""
    both = merge(zip(old, repeat(False)), zip(new, repeat(True)), key=_key_of, reverse=reverse)
    for key, found in groupby(both, _key_of):
        values = {is_new: value for (_, value), is_new in found}
        if values.get(False) != values.get(True):
            yield Difference(key, values.get(False), values.get(True))


def _key_of(entry: tuple[tuple[bytes, bytes], bool]) -> bytes:
    return entry[0][0]


def _changed(engine: Engine, first: Reader, last: Reader, bounds: Bounds, table: int) -> Iterator[bytes]:
    """The keys that may differ, in the direction of the bounds, each once."""
    reads, reverse = engine.reads, bounds.reverse
    stretches = engine.upkeep.past.stretches(table, first.seqno, last.seqno)
    sources = [_keys(stretch.chunks(bounds.start, bounds.stop, reverse=reverse)) for stretch in stretches]
    wanted = KeyRange(bounds.start or b"", bounds.stop)
    deleted = disjoint(
        clipped for stretch in stretches for each in stretch.ranges if (clipped := each.clip(wanted)) is not None
    )
    sources.append(_held(engine, first, deleted[::-1] if reverse else deleted, table, reverse))
    low_us, high_us = sorted((first.at_us, last.at_us))
    # At the time 0 nothing expires.
    if low_us:
        again = reads.moments.again(first, "diff")
        rows = reads.chunks(again, *due_rows(low_us + 1, high_us), reverse=False, table=SYSTEM_TABLE)
        due = (key for key in queued_keys(rows, table) if bounds.contains(key))
        sources.append(iter(sorted(due, reverse=reverse)))
    for key, _ in groupby(merge(*sources, reverse=reverse)):
        yield key


def _held(
    engine: Engine, first: Reader, ranges: Sequence[KeyRange], table: int, reverse: bool
) -> Iterator[bytes]:
    """The keys of these ranges as of a reader, one range after the other."""
    for bounds in ranges:
        again = engine.reads.moments.again(first, "diff")
        yield from _keys(engine.reads.chunks(again, *bounds, reverse=reverse, table=table))


def _keys(chunks: Iterable[tuple[Sequence[bytes], object]]) -> Iterator[bytes]:
    for keys, _ in chunks:
        yield from keys
