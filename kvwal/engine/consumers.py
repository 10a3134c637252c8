"""Consumers as a store keeps them: a row of table 1 for each, and its hold on the log.

The row, under the key kind 3 and then the name, little-endian:

| at | type | field |
|---|---|---|
| 0 | u8 | version, 1 |
| 1 | u8 | zero |
| 2 | u16 | bytes of the error |
| 4 | 8 B | line of the position |
| 12 | u64 | seqno of the position: the last commit that was handled |
| 20 | u64 | epoch: how often the consumer was taken over |
| 28 | u64 | created, wall clock in us |
| 36 | u64 | most bytes of log it may hold; 2^64 - 1: no limit |
| 44 | u64 | most age of what it holds, in us; the same |
| 52 | 32 B | SHA-256 of the filter |
| 84 | - | the last error, UTF-8; nothing after a success |

Rules:
- A row is only written by the commit leader, from the newest one (`RowChange`), so of two owners one is fenced.
- Durability: a hold moves only when the row that says so is on disk. So what a reopened store goes on after is held.
- The oldest commit that was set aside is held by a hold of its own (see parked.py), within the same limits: so it costs
  the consumer itself nothing that it is not taken up.
- Every hold is there before anything of the log may be retired: an engine makes this before its first checkpoint.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.engine.lines import fork_of
from kvwal.engine.parked import MAX_ERROR_BYTES, SYSTEM_TABLE, ParkedCommits, decode_parked, error_bytes, keep
from kvwal.engine.reads import Reads
from kvwal.engine.recovery import Recovered
from kvwal.engine.request import Newest
from kvwal.errors import CorruptionError, FeedGap, FormatError, read_only
from kvwal.files.names import DATA
from kvwal.keys import KeyRange, Seqno
from kvwal.log import Extension, Hold, Limits, SegmentInfo, SegmentLog, unneeded_bytes
from kvwal.log.columns import Columns
from kvwal.log.intents import PUT, TABLE_BYTES, TABLES
from kvwal.log.record import COMMIT

__all__ = [
    "MAX_NAME_BYTES",
    "ROWS",
    "ConsumerRow",
    "Consumers",
    "Owner",
    "RowChange",
    "asked_for",
    "asked_since",
    "decode_row",
    "encode_row",
    "row_key",
]

# On disk: never change.
_KIND: Final = b"\x03"
#: The keys of the rows of consumers, and of what they have set aside.
ROWS: Final = KeyRange(_KIND, b"\x05")
_TABLE: Final = SYSTEM_TABLE.to_bytes(TABLE_BYTES, "little")
_VERSION: Final = 1
_FIXED = struct.Struct("<BBH8sQQQQQ32s")
assert _FIXED.size == 84
_NO_LIMIT: Final = (1 << 64) - 1

MAX_NAME_BYTES: Final = 255
_DEFAULT_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class ConsumerRow:
    """What is stored of a consumer. The fields are those of the table above."""

    name: str
    line: bytes
    position: Seqno
    epoch: int
    created_us: int
    limits: Limits
    filter_hash: bytes
    last_error: str = ""


def row_key(name: str) -> bytes:
    """The key of a consumer's row."""
    return _KIND + name.encode()


def encode_row(row: ConsumerRow) -> bytes:
    """The row as bytes. An error that is too long is cut."""
    error = error_bytes(row.last_error)
    limits = (_NO_LIMIT if limit is None else limit for limit in row.limits)
    fixed = _FIXED.pack(
        _VERSION, 0, len(error), row.line, row.position, row.epoch, row.created_us, *limits, row.filter_hash
    )
    return fixed + error


def decode_row(key: bytes, value: bytes) -> ConsumerRow:
    """What `encode_row` was given. CorruptionError for bytes that are none, FormatError for a newer version's."""
    if value[:1] > bytes([_VERSION]):
        raise FormatError(f"the row of consumer {key[1:]!r} is of version {value[0]}, which this kvwal does not know")
    if len(value) < _FIXED.size or value[0] != _VERSION:
        raise _damaged(key, "is cut short")
    _, zero, size, line, position, epoch, created_us, max_bytes, max_us, filter_hash = _FIXED.unpack_from(value)
    if zero or size > MAX_ERROR_BYTES or len(value) != _FIXED.size + size:
        raise _damaged(key, "does not have the length that it says")
    try:
        name, error = key[1:].decode(), value[_FIXED.size :].decode()
    except UnicodeDecodeError:
        raise _damaged(key, "is not UTF-8") from None
    if key[:1] != _KIND or not 1 <= len(key) - 1 <= MAX_NAME_BYTES:
        raise _damaged(key, "has no name")
    limits = Limits(*(None if limit == _NO_LIMIT else limit for limit in (max_bytes, max_us)))
    return ConsumerRow(name, line, Seqno(position), epoch, created_us, limits, filter_hash, error)


def asked_for(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Seqno]]:
    """The commits beyond which consumers still read, lost ones too, of rows of table 1 in `ROWS`, each with its key."""
    for key, value in rows:
        with suppress(FormatError):
            is_parked = key[:1] != _KIND
            yield key, Seqno(decode_parked(key, value).seqno - 1) if is_parked else decode_row(key, value).position


def asked_since(asked: dict[bytes, Seqno], commits: Iterable[tuple[int, bytes]]) -> set[Seqno]:
    """Bring what rows ask for, by their keys, to behind these commits, each given by its kind and body.

    Returns what rows that these put ask for, also those that were replaced or deleted since. A row that is not valid
    asks for nothing.
    """
    found = set[Seqno]()
    for kind, body in commits:
        # Where no four bytes are the number of table 1, the column of tables does not have it.
        if kind & TABLES and _TABLE in body:
            with suppress(ValueError):
                columns = Columns(body, kind & ~COMMIT)
                tables, ranges = columns.tables or (), columns.ranges
                for deleted in (each for table, each in zip(tables, ranges, strict=False) if table == SYSTEM_TABLE):
                    for key in list(filter(deleted.contains, asked)):
                        del asked[key]
                n = len(ranges)
                written = zip(tables[n:], columns.ops[n:], columns.keys[n:], columns.values()[n:], strict=True)
                for table, op, key, value in written:
                    if table == SYSTEM_TABLE and ROWS.contains(key):
                        asked.pop(key, None)
                        put = dict(asked_for([(key, value)] if op == PUT else ()))
                        asked.update(put)
                        found.update(put.values())
    return found


def _damaged(key: bytes, reason: str) -> CorruptionError:
    return CorruptionError(DATA, None, f"the row of consumer {key[1:]!r} {reason}")


@dataclass(slots=True, eq=False)
class Owner:
    """Whose a consumer is while it is in use.

    Attributes:
        thread: the name of the thread that asked for it.
        scanned: the last commit that it has looked at.
        polled_s: when it asked for commits last, by the monotonic clock.
    """

    thread: str
    scanned: Seqno
    polled_s: float


class RowChange:
    """A commit of a consumer: its row, made of the newest one, and what a projection writes with it.

    The commit leader evaluates it, so no other commit comes between. `row` is afterwards what the row is then.
    """

    __slots__ = ("_batch", "_change", "_key", "extension", "row")

    dropped: Final = None

    def __init__(
        self,
        name: str,
        change: Callable[[ConsumerRow | None], ConsumerRow | None],
        batch: WriteBatch | None = None,
        extension: Extension | None = None,
    ) -> None:
        """`change` gets the newest row (None: there is none) and returns what it is to be (None: none), or raises."""
        self._key = row_key(name)
        self._change = change
        self._batch = WriteBatch() if batch is None else batch
        #: What the commit says of itself.
        self.extension = extension
        self.row: ConsumerRow | None = None

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        value = newest.table(SYSTEM_TABLE).get(self._key)
        old = None if value is None else decode_row(self._key, value)
        self.row = row = self._change(old)
        batch = self._batch
        if row == old:
            return batch if len(batch) else None
        if row is None:
            batch.table(SYSTEM_TABLE).delete(self._key)
        else:
            batch.table(SYSTEM_TABLE).put(self._key, encode_row(row))
        return batch


class Consumers:
    """The consumers of one open store. Thread-safe.

    A consumer that holds no log, though it has a row, is lost: what comes after its position may be gone.
    """

    def __init__(self, recovered: Recovered, reads: Reads) -> None:
        """CorruptionError if a row is not valid."""
        self._state = recovered.state
        self._directory = recovered.directory
        self._log = log = recovered.log
        self._reader, self._pages = recovered.reader, recovered.pages
        self._reads = reads
        #: The line of the positions.
        self.line = recovered.pages.meta.line
        self._holds: dict[str, Hold] = {}
        #: The owner of each consumer that is in use, by name. Each change is one step of a dict.
        self.owners: dict[str, Owner] = {}
        #: What they have set aside.
        self.parked = ParkedCommits(recovered, reads)
        if log is not None:
            for row in self.rows():
                self._hold_again(row)
                self.parked.hold(row.name, self.parked.of(row.name), row.limits)
            log.retention.drop_late(log.segments())

    def rows(self) -> list[ConsumerRow]:
        """The rows now, by name. A row of a newer version is left out."""
        rows: list[ConsumerRow] = []
        self._state.refuse_if_gone()
        reads, bounds = self._reads, (_KIND, bytes([_KIND[0] + 1]))
        for keys, values in reads.moments.now.begun(
            lambda: reads.chunks(reads.moments.reader("consumers"), *bounds, reverse=False, table=SYSTEM_TABLE)
        ):
            for key, value in zip(keys, values, strict=True):
                try:
                    rows.append(decode_row(key, value))
                except FormatError:
                    continue
        return rows

    def row(self, name: str) -> ConsumerRow | None:
        """The row of one consumer now; None if there is none."""
        self._state.refuse_if_gone()
        key = row_key(name)
        value = self._reads.read(key, table=SYSTEM_TABLE)
        return None if value is None else decode_row(key, value)

    def default_limits(self) -> Limits:
        """What a consumer may hold by default: 1 GiB, or 10 % of the free space if that is less."""
        return Limits(min(_DEFAULT_BYTES, self._directory.free_bytes() // 10), None)

    def log(self) -> SegmentLog:
        """The log. ClosedError once the store is closed; ReadOnlyError in a store that has none to write."""
        self._state.refuse_if_gone()
        if self._log is None:
            raise read_only()
        return self._log

    def segments(self) -> list[SegmentInfo]:
        """The segments of the log, oldest first."""
        self._state.refuse_if_gone()
        return self._reader.segments() if self._log is None else self._log.segments()

    def held_bytes(self, after: Seqno) -> int:
        """Bytes of the segments that recovery does not need, and that a hold on what is beyond `after` keeps, with what
        the indexes of these take.
        """
        older = self._pages.older
        self._state.refuse_if_gone()
        segments = (self._reader if self._log is None else self._log).segments(with_indexes=True)
        return unneeded_bytes(segments, after, Seqno(0) if older is None else older.seqno)

    # -- holds --------------------------------------------------------------------------------

    def _hold_again(self, row: ConsumerRow) -> None:
        """Hold what is beyond the position of a row. Without effect if that is gone: it is lost."""
        log = self.log()
        newest = log.last_seqno if row.line == self.line else fork_of(self._reads, self.line, row.line)
        if newest is not None and row.position <= newest:
            try:
                self.keep_hold(row.name, self._hold(row.name, row.position, row.limits))
            except FeedGap:
                return

    def begin_hold(self, name: str, after: Seqno | None, limits: Limits | None) -> Hold:
        """Hold what is beyond `after` for a consumer, before its row says so, or for an archive; None: all there is.

        `limits`: None: it is dropped for nothing, also on a full disk.

        FeedGap if it is not all kept.
        """
        log = self.log()
        if after is not None and after > log.last_seqno:
            raise FeedGap(after, log.segments()[0].first_seqno, log.last_seqno)
        return self._hold(name, after, limits)

    def _hold(self, name: str, after: Seqno | None, limits: Limits | None) -> Hold:
        log = self.log()
        return log.retention.hold(name, after, log.segments(), log.last_seqno, log.last_time_us, limits)

    def keep_hold(self, name: str, hold: Hold | None) -> None:
        """From here on this is the consumer's hold, in place of one that it may have; None: it holds nothing."""
        keep(self._holds, name, hold)

    def hold(self, name: str) -> Hold | None:
        """What holds log for a consumer; None: it is lost."""
        hold = self._holds.get(name)
        return hold if hold is not None and hold.is_held else None
