"""Named tables: their rows in table 1, and commits that write to a table by its name.

The row of a table has the key kind 1 and then the name; its value is JSON: the id, and the codecs that the table was
made with. One row of kind 2 has the next ids. A table is made by the commit that first writes to it.

A commit by name is an operation: the leader looks the name up among what is newest. That takes a little longer than a
commit to an id, so one whose id was known goes the short way.

Invariant: no commit writes to a table that was dropped before it, or by a name that meant another table before it. The
leader refuses what comes the short way when the names have changed since it was asked for (`Names.now`), also in its
own group: it has to go by name. A commit for ids is refused if one of them was dropped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.engine.indexes import FIRST_DERIVED_ID, building_key, decode_indexes, encode_building, state_keys
from kvwal.engine.migration import migration_key
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.readers import Reader
from kvwal.engine.reads import Reads
from kvwal.engine.request import Newest
from kvwal.engine.row_cache import IndexedTable, IndexedTables
from kvwal.engine.state import State
from kvwal.engine.value import Value
from kvwal.errors import CorruptionError, Error, FormatError, TableCodecError, TableExistsError, TableNotFoundError
from kvwal.expiring import MOST_US, Expiring
from kvwal.files.names import DATA
from kvwal.keys import KeyRange
from kvwal.log import Extension, is_of_users

if TYPE_CHECKING:
    from kvwal.engine.indexing import Indexes

__all__ = [
    "MAX_NAME_BYTES",
    "NEXT_IDS_KEY",
    "Asked",
    "ROWS",
    "CodecName",
    "Drop",
    "InDefaultTable",
    "InTable",
    "MakeTable",
    "Rename",
    "TableRow",
    "Tables",
    "as_table_name",
    "check_codecs",
    "decode_row",
    "encode_ids",
    "encode_row",
    "indexed_after",
    "keep_asked",
    "make_row",
    "next_ids",
    "refuse_own",
    "row_key",
    "told_apart",
]

# On disk: never change.
_KIND: Final = b"\x01"
NEXT_IDS_KEY: Final = b"\x02"
#: The keys of the rows of tables in table 1.
ROWS: Final = KeyRange(_KIND, NEXT_IDS_KEY)
_NEXT_IDS = struct.Struct("<II")
_FIRST_ID: Final = 16
_VERSION: Final = 1

MAX_NAME_BYTES: Final = 255
# Keys of a commit whose former expiry is looked up, at most.
_MOST_RENEWED: Final = 64


@dataclass(frozen=True, slots=True)
class CodecName:
    """What a table remembers of a codec: its name and version. A codec also says which `oldest` version it reads."""

    name: str
    version: int
    oldest: int = field(default=0, compare=False)

    def reads(self, other: CodecName) -> bool:
        """Whether this codec reads what that one wrote."""
        return self.name == other.name and (self.oldest or self.version) <= other.version <= self.version

    def __str__(self) -> str:
        return self.name if self.version == 1 else f"{self.name} (version {self.version})"


def told_apart(one: CodecName, other: CodecName) -> tuple[str, str]:
    """The texts of two codecs that differ: of one name they have both versions, also the first."""
    if one.name != other.name:
        return str(one), str(other)
    return f"{one.name} (version {one.version})", f"{other.name} (version {other.version})"


@dataclass(frozen=True, slots=True)
class TableRow:
    """What is stored of a table.

    `expire_us`: after how long what is put without an `expire_s` expires; 0: not at all. `others`: members of a newer
    version, which are kept.
    """

    name: str
    id: int
    key: CodecName
    value: CodecName
    others: dict[str, Any] = field(default_factory=dict)
    expire_us: int = 0


def refuse_own(tables: Iterable[int]) -> None:
    """ValueError if a table is the store's own: a user does not write to it."""
    for table in tables:
        if not is_of_users(table):
            raise ValueError(f"table {table} is the store's own; write to a table of yours: see Table.id")


def as_table_name(name: str, what: str = "a table's name") -> str:
    """The name, if a table, or what else has one, may have it. TypeError, ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"{what} is a str, not {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be encodable in UTF-8") from None
    if not 1 <= size <= MAX_NAME_BYTES:
        raise ValueError(f"{what} has 1 to {MAX_NAME_BYTES} bytes in UTF-8, not {size}")
    return name


def row_key(name: str) -> bytes:
    """The key of a table's row."""
    return _KIND + name.encode()


def encode_row(row: TableRow) -> bytes:
    """The row as bytes."""
    codecs = {part: [codec.name, codec.version] for part, codec in (("key", row.key), ("value", row.value))}
    members = {**row.others, "v": _VERSION, "id": row.id, **codecs}
    if row.expire_us:
        members["expire_us"] = row.expire_us
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# The commit leader asks for the same rows over and over.
@lru_cache(maxsize=64)
def decode_row(key: bytes, value: bytes) -> TableRow:
    """What `encode_row` was given. CorruptionError for bytes that are none, FormatError for a newer version's."""
    try:
        name, members = key[1:].decode(), json.loads(value)
        version = members.pop("v")
        if version != _VERSION and isinstance(version, int):
            raise FormatError(f"the row of table {name!r} is of version {version}, which this kvwal does not know")
        table_id, key_codec, value_codec = members.pop("id"), members.pop("key"), members.pop("value")
        expire_us = members.pop("expire_us", 0)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise _damaged(key) from None
    is_id = type(table_id) is int and _FIRST_ID <= table_id < FIRST_DERIVED_ID
    is_expiry = type(expire_us) is int and 0 <= expire_us <= MOST_US
    if not is_expiry or not is_id or key[:1] != _KIND or not 1 <= len(key) - 1 <= MAX_NAME_BYTES:
        raise _damaged(key)
    # A row with an index that is not understood is of no use: the index would go stale.
    decode_indexes(name, members)
    return TableRow(name, table_id, _codec(key, key_codec), _codec(key, value_codec), members, expire_us)


def _codec(key: bytes, found: object) -> CodecName:
    match found:
        case [str(name), int(version)]:
            return CodecName(name, version)
    raise _damaged(key)


def _damaged(key: bytes) -> CorruptionError:
    return CorruptionError(DATA, None, f"the row of table {key[1:]!r} is not valid")


def indexed_after(indexed: IndexedTables, system: WriteBatch) -> IndexedTables:
    """Which tables have indexes after a commit that writes this to table 1.

    Those of a dropped table stay: nothing is written to its id any more.
    """
    found: dict[int, IndexedTable] = {}
    for key, value in system.writes.items():
        if key[:1] == _KIND and value is not None:
            # Of a newer version, or no row at all: such a table is never written to.
            with suppress(Error):
                row = decode_row(key, value)
                found[row.id] = IndexedTable(row.name, decode_indexes(row.name, row.others))
    if not any(table.indexes or id_ in indexed for id_, table in found.items()):
        return indexed
    return {id_: table for id_, table in {**indexed, **found}.items() if table.indexes}


def _row(newest: Newest, name: str) -> TableRow | None:
    key = row_key(name)
    value = newest.table(SYSTEM_TABLE).get(key)
    return None if value is None else decode_row(key, value)


def encode_ids(found: int, derived: int) -> bytes:
    """The row of the next ids: of a table, and of what is derived from one."""
    return _NEXT_IDS.pack(found, derived)


def next_ids(value: Value) -> tuple[int, int]:
    """What `encode_ids` was given; the first ones, if there is no row. CorruptionError."""
    if value is None:
        return _FIRST_ID, FIRST_DERIVED_ID
    if len(value) != _NEXT_IDS.size:
        raise CorruptionError(DATA, None, "the row of the next table ids is not valid")
    found, derived = _NEXT_IDS.unpack(value)
    if not (_FIRST_ID <= found < FIRST_DERIVED_ID <= derived):
        raise CorruptionError(DATA, None, "the row of the next table ids is not valid")
    return found, derived


class Asked(NamedTuple):
    """What is asked of a table beside its name: codecs, and the default expiry. `expire_us`: None for what the row has;
    0: none.
    """

    key: CodecName
    value: CodecName
    expire_us: int | None = None

    def is_met_by(self, row: TableRow) -> bool:
        """Whether the row says this already."""
        return (row.key, row.value) == self[:2] and self.expire_us in (None, row.expire_us)

    def lasts_us(self, row: TableRow) -> int:
        """After how long what is put without an `expire_s` expires; 0: not at all."""
        return row.expire_us if self.expire_us is None else self.expire_us


def make_row(name: str, asked: Asked, get: Callable[[bytes], Value], system: WriteBatch) -> TableRow:
    """Write the row of a new table, and the next ids, to table 1, of which `get` knows the newest values."""
    found, derived = next_ids(get(NEXT_IDS_KEY))
    if found + 1 >= FIRST_DERIVED_ID:
        raise ValueError("there have been 2,147,483,631 tables; no id is left")
    row = TableRow(name, found, asked.key, asked.value, expire_us=asked.expire_us or 0)
    system.put(NEXT_IDS_KEY, encode_ids(found + 1, derived))
    system.put(row_key(name), encode_row(row))
    return row


class _Nothing:
    """A table that does not exist yet."""

    names: Final = None

    def get(self, key: bytes) -> Value:
        del key
        return None

    raw = get

    def edge(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> tuple[bytes, bytes] | None:
        del start, stop, reverse
        return None

    def first_pairs(self, start: bytes | None, stop: bytes | None, *, most: int) -> list[tuple[bytes, bytes]]:
        del start, stop, most
        return []

    def is_empty(self) -> bool:
        return True

    def table(self, table: int) -> Newest:
        raise AssertionError(f"table {table} of a table")


class InTable:
    """A commit to a table by its name, which makes the table if something is put into it.

    `row` says afterwards which table it is; None if there is none, and nothing was put.
    """

    __slots__ = ("_asked", "_fill", "_name", "_now_us", "extension", "row")

    dropped: Final = None

    def __init__(
        self,
        name: str,
        asked: Asked,
        fill: Callable[[Newest, WriteBatch], None],
        now_us: Callable[[], int],
        extension: Extension | None = None,
    ) -> None:
        """`fill` writes to a batch what the commit is to write to the table, of which it gets what is newest.

        `now_us`: the clock from which a default expiry counts.
        """
        self._name = name
        self._asked = asked
        self._fill = fill
        self._now_us = now_us
        #: What the commit says of itself beside its writes.
        self.extension = extension
        self.row: TableRow | None = None

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write. TableCodecError if the table has other codecs."""
        batch = WriteBatch()
        self.row = row = _row(newest, self._name)
        if row is not None:
            check_codecs(row, self._asked)
            part, found = batch.table(row.id), newest.table(row.id)
            self._fill(found, part)
            if not len(batch):
                return None
            renew(found, part, self._asked.lasts_us(row), self._now_us)
            if not self._asked.is_met_by(row):
                keep_asked(row, self._asked, batch.table(SYSTEM_TABLE))
            return batch
        part = WriteBatch()
        self._fill(_Nothing(), part)
        renew(_Nothing(), part, self._asked.expire_us or 0, self._now_us)
        puts = {key: value for key, value in part.writes.items() if value is not None}
        if not puts:
            return None
        system = newest.table(SYSTEM_TABLE)
        self.row = row = make_row(self._name, self._asked, system.get, batch.table(SYSTEM_TABLE))
        made = batch.table(row.id)
        made.writes.update(puts)
        made.stamped, made.queue = part.stamped, part.queue
        return batch


def renew(newest: Newest, part: WriteBatch, lasts_us: int, now_us: Callable[[], int]) -> None:
    """Give puts the default expiry, if there is one, and take what their keys had before out of the queue.

    Of many keys not the latter, since each is a read: their rows go when they are due.
    """
    if lasts_us:
        part.expire_others(now_us() + lasts_us)
    if part.queue is not None and len(part.queue) <= _MOST_RENEWED:
        for key, before_us in part.queue.items():
            found = newest.raw(key) if not before_us else None
            if type(found) is Expiring:
                part.queue[key] = found.expires_us


class MakeTable:
    """Make an empty table, if there is none of this name; else let it know of newer codecs."""

    __slots__ = ("_asked", "_name")

    extension: Final = None

    dropped: Final = None

    def __init__(self, name: str, asked: Asked) -> None:
        self._name = name
        self._asked = asked

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        rows = batch.table(SYSTEM_TABLE)
        row = _row(newest, self._name)
        if row is None:
            make_row(self._name, self._asked, newest.table(SYSTEM_TABLE).get, rows)
        else:
            check_codecs(row, self._asked)
            keep_asked(row, self._asked, rows)
        return batch if len(batch) else None


class InDefaultTable:
    """A commit to table 0: arguments as of `InTable`."""

    __slots__ = ("_fill", "_now_us", "extension")

    dropped: Final = None

    def __init__(
        self, fill: Callable[[Newest, WriteBatch], None], now_us: Callable[[], int], extension: Extension | None
    ) -> None:
        self._fill = fill
        self._now_us = now_us
        self.extension = extension

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        self._fill(newest, batch)
        renew(newest, batch, 0, self._now_us)
        return batch if len(batch) else None


def check_codecs(row: TableRow, asked: Asked) -> None:
    """TableCodecError if a table was made with other codecs than these, but for older versions that these read."""
    for what, has, codec in (("keys", row.key, asked.key), ("values", row.value, asked.value)):
        if not codec.reads(has):
            raise TableCodecError(row.name, what, *told_apart(has, codec))


def keep_asked(row: TableRow, asked: Asked, system: WriteBatch) -> None:
    """Let the row say what is asked, if it says something else.

    Before values of a newer version are written: then what cannot read them is refused. Another default expiry takes
    the place of the former one.
    """
    if not asked.is_met_by(row):
        changed = replace(row, key=asked.key, value=asked.value, expire_us=asked.lasts_us(row))
        system.put(row_key(row.name), encode_row(changed))
        if row.value != asked.value:
            # An upcaster may change what the function of an index reads: it is built anew.
            for index in decode_indexes(row.name, row.others):
                system.put(building_key(index.id), encode_building(b""))


class Drop:
    """Drop a table: everything in it, and its row. TableNotFoundError."""

    __slots__ = ("_id", "_name", "dropped", "extension")

    def __init__(self, row: TableRow, extension: Extension | None = None) -> None:
        self._name = row.name
        self._id = row.id
        #: See `Operation`.
        self.dropped: int | None = None
        self.extension = extension

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        row = _row(newest, self._name)
        if row is None or row.id != self._id:
            raise TableNotFoundError(self._name)
        batch = WriteBatch()
        self.dropped = row.id
        batch.table(row.id).delete_range()
        # What indexes have goes with the range.
        for index in decode_indexes(row.name, row.others):
            for key in state_keys(index.id):
                batch.table(SYSTEM_TABLE).delete(key)
        batch.table(SYSTEM_TABLE).delete(row_key(self._name))
        if newest.table(SYSTEM_TABLE).get(migration_key(row.id)) is not None:
            batch.table(SYSTEM_TABLE).delete(migration_key(row.id))
        return batch


class Rename:
    """Give a table another name. TableNotFoundError, TableExistsError."""

    __slots__ = ("_name", "_new", "extension")

    dropped: Final = None

    def __init__(self, name: str, new: str, extension: Extension | None = None) -> None:
        self._name = name
        self._new = new
        self.extension = extension

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        row = _row(newest, self._name)
        if row is None:
            raise TableNotFoundError(self._name)
        if self._new == self._name:
            return None
        if _row(newest, self._new) is not None:
            raise TableExistsError(self._new)
        batch = WriteBatch()
        batch.table(SYSTEM_TABLE).delete(row_key(self._name))
        renamed = replace(row, name=self._new)
        batch.table(SYSTEM_TABLE).put(row_key(self._new), encode_row(renamed))
        return batch


class Tables:
    """The named tables of one open store. Thread-safe: each change is one step."""

    __slots__ = ("_state", "indexes", "reads")

    def __init__(self, state: State, reads: Reads) -> None:
        self._state = state
        #: Of all tables.
        self.reads = reads
        state.cache.names.indexed_after = indexed_after
        #: Their indexes.
        self.indexes: Indexes

    def row(self, name: str, *, cached_only: bool = False) -> TableRow | None:
        """The row of a table now; None if there is none. `cached_only`: as in `Reads.read`."""
        self._state.refuse_if_gone()
        key = row_key(name)
        value = self.reads.read(key, table=SYSTEM_TABLE, cached_only=cached_only)
        return None if value is None else decode_row(key, value)

    def row_at(self, reader: Reader, name: str) -> TableRow | None:
        """The same as of a reader."""
        key = row_key(name)
        value = self.reads.read_at(reader, key, table=SYSTEM_TABLE)
        return None if value is None else decode_row(key, value)

    def rows(self, reader: Reader) -> list[tuple[str, TableRow | Error]]:
        """The rows of all tables as of a reader, by name, or what is wrong with one. The reader is given back."""
        rows: list[tuple[str, TableRow | Error]] = []
        for keys, values in self.reads.chunks(reader, *ROWS, reverse=False, table=SYSTEM_TABLE):
            for key, value in zip(keys, values, strict=True):
                name = key[1:].decode(errors="backslashreplace")
                try:
                    rows.append((name, decode_row(key, value)))
                except (CorruptionError, FormatError) as error:
                    rows.append((name, error))
        return rows
