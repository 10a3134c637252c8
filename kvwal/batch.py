"""Writes that belong together: the keys, values and ranges of one commit.

A `WriteBatch` is kept in a canonical form that the log, the memtable and the pages all rely on:

Invariant: `ranges` are applied first, then `writes`. A `delete_range` therefore takes the writes it
covers out of `writes`, and a later put of such a key goes in again and wins.
Invariant: keys and values are exactly `bytes` (never a subclass but `Expiring`, never a view of the caller's memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, Never, Protocol, TypeAlias, cast

from sortedcontainers import SortedList

from kvwal.errors import UsageError
from kvwal.expiring import Expiring, expire_us
from kvwal.keys import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    PENDING_SEQNO,
    STAMP,
    Bound,
    BytesLike,
    KeyRange,
    as_int,
    as_key,
    as_value,
)

__all__ = ["MAX_TABLE_ID", "SAME_INDEX_KEYS", "Updates", "WriteBatch", "checked_pairs", "pairs_of"]

# On disk: never raise without a new format version; a table's id is stored in 4 bytes.
MAX_TABLE_ID: Final = (1 << 32) - 1


class _HasKeys(Protocol):
    """A mapping, or what `dict.update` takes for one: a database of `dbm`, for one."""

    def keys(self) -> Iterable[BytesLike]: ...
    def __getitem__(self, key: Any, /) -> BytesLike: ...


#: What `update` takes: what `dict.update` takes, without keyword arguments.
Updates: TypeAlias = _HasKeys | Iterable[tuple[BytesLike, BytesLike]]


#: As `WriteBatch.index_keys`: the values that are put have the index keys of those that are there.
SAME_INDEX_KEYS: Final[Mapping[int, Mapping[bytes, bytes | None]]] = MappingProxyType({})


def _at_the_commit() -> int:
    return 0


class WriteBatch:
    """An ordered set of puts and deletes that is committed whole or not at all.

    It reads nothing, so committing it never conflicts. Later calls win over earlier ones. Not
    thread-safe; may be committed more than once.
    """

    __slots__ = (
        "_order",
        "from_commit",
        "index_keys",
        "names",
        "now_us",
        "others",
        "queue",
        "ranges",
        "stamped",
        "store",
        "writes",
    )

    def __init__(self) -> None:
        #: The newest value of each key written; None stands for a delete.
        self.writes: dict[bytes, bytes | None] = {}
        # What `order` made of which dict.
        self._order: tuple[dict[bytes, bytes | None], SortedList[bytes]] | None = None
        #: Ranges deleted before `writes` take effect.
        self.ranges: list[KeyRange] = []
        #: By what names its tables were found, as `Names.now` was then: if these have changed, its commit is refused.
        #: None: it is for ids.
        self.names: object = None
        #: Keys, as they are in `writes`, whose last 12 bytes the commit fills in; None: there are none.
        self.stamped: set[bytes] | None = None
        #: By the id of an index of its table: the index keys of each of its puts (see kvwal/engine/indexes.py). None:
        #: nothing is known of indexes.
        self.index_keys: Mapping[int, Mapping[bytes, bytes | None]] | None = None
        #: Keys whose expiry is set, and when they were to expire before (0: not known, or not at all); None: there are
        #: none. A commit writes their rows of the queue.
        self.queue: dict[bytes, int] | None = None
        #: The clock from which `expire_s` counts. One that stands at 0 in a batch that was made by hand, which knows no
        #: store: there it counts from the commit on.
        self.now_us: Callable[[], int] = _at_the_commit
        #: Keys whose values expire so long after the commit as they say; None: there are none.
        self.from_commit: set[bytes] | None = None
        #: The open store that began it, or that found the table that it writes to by its name; None: made by hand, or
        #: for the id of a table.
        self.store: object = None
        #: Writes to tables other than the default one, by table id; made by `table`. Each may be empty.
        self.others: dict[int, WriteBatch] | None = None

    def put(self, key: BytesLike, value: BytesLike, *, expire_s: float | None = None) -> None:
        """Set `key` to `value`. TypeError or ValueError if either cannot be stored.

        `expire_s`: seconds after which the key is absent, from this call on, in a batch of `Store.batch`; in one made
        by hand from each of its commits on. See `Store.put`.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if expire_s is not None:
            self.put_until(key, value, self.now_us() + expire_us(expire_s))
            if self.now_us is _at_the_commit:
                if self.from_commit is None:
                    self.from_commit = set()
                self.from_commit.add(key)
            return
        self.writes[key] = value

    def counted(self, now_us: Callable[[], int]) -> WriteBatch:
        """The same for a commit now: each `expire_s` that counts from then has become a time. It stays as it is."""
        if self.from_commit is None and all(part.from_commit is None for part in (self.others or {}).values()):
            return self
        batch, at_us = self.copy(), now_us()
        for part in (batch, *(batch.others or {}).values()):
            keys, part.from_commit = part.from_commit, None
            for key in keys or ():
                value = part.writes.get(key)
                if type(value) is Expiring:
                    part.put_until(key, value.value, at_us + value.expires_us)
        return batch

    def put_until(self, key: bytes, value: bytes, expires_us: int | None, before_us: int = 0) -> None:
        """Set `key` to `value`, which expires at that time (None: never). Both have passed `as_key` and `as_value`.

        `before_us`: when the key was to expire before, so that the commit takes that out of the queue; 0: not known.
        """
        self.writes[key] = value if expires_us is None else Expiring.of(value, expires_us)
        if self.queue is None:
            self.queue = {}
        self.queue[key] = before_us
        if self.from_commit is not None:
            self.from_commit.discard(key)

    def expire_others(self, expires_us: int) -> None:
        """Let what is put without an expiry of its own expire at that time."""
        set_already = self.queue or {}
        for key, value in self.writes.items():
            if value is not None and type(value) is bytes and key not in set_already:
                self.put_until(key, value, expires_us)

    def sets_expiry(self) -> bool:
        """Whether an expiry is set, in any table."""
        return self.queue is not None or any(part.queue is not None for part in (self.others or {}).values())

    __setitem__ = put

    def put_stamped(self, head: BytesLike, value: BytesLike) -> None:
        """Set a new key to `value`: `head`, and 12 bytes that say which commit wrote it, and as which of its keys.

        They are the seqno, big-endian in 8 bytes, and a number in 4: from 0 on for each such key of a commit, by table
        and then in the order of these calls. So keys with one head are unique, and ascend in the order of commits.
        """
        if self.stamped is None:
            self.stamped = set()
        checked, ordinal = as_key(head), len(self.stamped)
        # One that is there already was put as it is, and stays so.
        while (key := as_key(checked + STAMP.pack(PENDING_SEQNO, ordinal))) in self.writes:
            ordinal += 1
        if type(value) is Expiring:
            self.put_until(key, value.value, value.expires_us)
        else:
            self.put(key, value)
        self.stamped.add(key)

    def has_stamped(self) -> bool:
        """Whether a key is to be filled in when this is committed, in any table."""
        return self.stamped is not None or any(part.stamped is not None for part in (self.others or {}).values())

    def filled(self, seqno: int) -> WriteBatch:
        """The same writes with all keys filled in, for the commit of this number."""
        batch = self.copy()
        ordinal = 0
        for part in (batch, *(part for _, part in batch.parts())):
            stamped, part.stamped = part.stamped, None
            if stamped is not None:
                writes: dict[bytes, bytes | None] = {}
                filled: dict[bytes, bytes] = {}
                for key, value in part.writes.items():
                    if key in stamped:
                        filled[key] = key[: -STAMP.size] + STAMP.pack(seqno, ordinal)
                        if part.queue is not None and key in part.queue:
                            part.queue[filled[key]] = part.queue.pop(key)
                        ordinal += 1
                    writes[filled.get(key, key)] = value
                part.writes = writes
                if part.index_keys:
                    part.index_keys = {
                        index: {filled.get(key, key): value for key, value in keys.items()}
                        for index, keys in part.index_keys.items()
                    }
        return batch

    def delete(self, key: BytesLike) -> None:
        """Remove `key` if it is there."""
        self.writes[as_key(key)] = None

    def delete_range(self, start: Bound = None, stop: Bound = None) -> None:
        """Remove every key from `start` on (None: the first) up to but without `stop` (None: the end)."""
        bounds = KeyRange.of(start, stop)
        if bounds.is_empty():
            return
        writes = self.writes
        if writes and not self.ranges:
            # Most often it is the only one.
            contains = bounds.contains
            self.writes = {key: value for key, value in writes.items() if not contains(key)}
        elif writes:
            order = self.order()
            gone = list(order.irange(*bounds, (True, False)))
            if gone:
                # Another dict: a thread may be looking at this one, and an interruption leaves it as it is.
                rest = writes.copy()
                self._order = None
                for key in gone:
                    order.remove(key)
                    del rest[key]
                self.writes = rest
                self._order = rest, order
        self.ranges.append(bounds)

    def order(self) -> SortedList[bytes]:
        """The keys of `writes`, in order: the same list at each call. O(log n) for each key that is new since the last.

        Requires: no key has been taken out of `writes` since, but by `delete_range`.
        """
        writes = self.writes
        # Interrupted, or by two threads at once, it is made anew.
        found, self._order = self._order, None
        order = found[1] if found is not None and found[0] is writes else SortedList[bytes]()
        new: list[bytes] = []
        # A thread may add one meanwhile. A dict has new keys at its end.
        while len(new) != (count := len(writes) - len(order)):
            new = list(islice(reversed(writes), count))
        order.update(new)
        self._order = writes, order
        return order

    def update(self, other: Updates = (), /, **keywords: Never) -> None:
        """Put every pair of a mapping, of what has `keys` and `[]`, or of an iterable; none if one cannot be stored."""
        self.writes.update(checked_pairs(other, **keywords))

    def table(self, table_id: int) -> WriteBatch:
        """The writes of this batch to another table, which are committed with it: the same object at each call.

        Args:
            table_id: number of the table, `Table.id`; the batch itself writes to table 0. Tables of the store's own,
                those below 16 and from 2,147,483,648 on, are refused by the commit.

        Raises: TypeError, ValueError for an id that cannot be right; UsageError on what `table` returned.
        """
        if type(table_id) is not int or not 1 <= table_id <= MAX_TABLE_ID:
            table_id = as_int("table_id", table_id, 1, MAX_TABLE_ID)
        if self.others is None:
            self.others = {}
        batch = self.others.get(table_id)
        if batch is None:
            batch = self.others[table_id] = _TableBatch()
            batch.now_us = self.now_us
        return batch

    def part(self, table_id: int) -> WriteBatch:
        """What this batch writes to a table: itself for table 0. See `table`."""
        return self.table(table_id) if table_id else self

    def is_for(self, store: object) -> bool:
        """Whether no table that it writes to was found by its name in another open store than this one."""
        return all(part.store in (None, store) for part in (self.others or {}).values())

    def is_of(self, store: object) -> bool:
        """The same, and no other open store began it."""
        return self.store in (None, store) and self.is_for(store)

    def copy(self) -> WriteBatch:
        """The same writes in a batch of its own: what is changed in one is not changed in the other."""
        other = type(self)()
        other.writes = dict(self.writes)
        other.ranges = list(self.ranges)
        other.stamped = None if self.stamped is None else set(self.stamped)
        other.names = self.names
        other.store = self.store
        # Each is replaced, and never changed.
        other.index_keys = self.index_keys
        other.now_us = self.now_us
        other.queue = None if self.queue is None else dict(self.queue)
        other.from_commit = None if self.from_commit is None else set(self.from_commit)
        if self.others is not None:
            other.others = {table_id: batch.copy() for table_id, batch in self.others.items()}
        return other

    __copy__ = copy

    def clear(self) -> None:
        """Forget everything, the writes to other tables too."""
        self.writes = {}
        self.ranges = []
        self.stamped = self.queue = self.index_keys = self.from_commit = None
        if self.others is not None:
            # They stay usable by whom `table` gave them to.
            for batch in self.others.values():
                batch.clear()

    def parts(self) -> list[tuple[int, WriteBatch]]:
        """The writes to tables other than the default one, ascending, without those that write nothing."""
        others = self.others
        if not others:
            return []
        # One, most often, which needs no sorting.
        found = others.items() if len(others) == 1 else sorted(others.items())
        return [(table, part) for table, part in found if part.writes or part.ranges]

    def size(self) -> int:
        """Bytes of its keys, values and bounds, of all tables."""
        size = sum(map(len, self.writes)) + sum(map(len, filter(None, self.writes.values())))
        if self.ranges:
            size += sum(len(start) + len(stop or b"") for start, stop in self.ranges)
        return size if self.others is None else size + sum(part.size() for part in self.others.values())

    def __len__(self) -> int:
        """Number of keys and ranges in the batch, of all tables."""
        own = len(self.writes) + len(self.ranges)
        return own if self.others is None else own + sum(map(len, self.others.values()))

    def __repr__(self) -> str:
        tables = f" of {len(self.others) + 1} tables" if self.others else ""
        return f"<WriteBatch of {len(self)} keys and ranges{tables}>"


def checked_pairs(other: Updates, **keywords: Never) -> dict[bytes, bytes]:
    """The pairs of what `update` takes. TypeError or ValueError if one cannot be stored."""
    for name in keywords:
        raise TypeError(
            f"update takes no keyword argument {name!r}, since keys are bytes; use update({{b{name!r}: ...}})"
        )
    return {
        (k if type(k) is bytes and len(k) <= MAX_KEY_BYTES else as_key(k)): (
            v if type(v) is bytes and len(v) <= MAX_VALUE_BYTES else as_value(v)
        )
        for k, v in pairs_of(other)
    }


def pairs_of(other: Any) -> Iterable[tuple[Any, Any]]:
    """The pairs of what `dict.update` takes: a mapping, what has `keys` and `[]`, or an iterable of pairs."""
    if isinstance(other, Mapping):
        return other.items()
    if hasattr(other, "keys"):
        return [(key, other[key]) for key in other.keys()]  # noqa: SIM118  # it need not be iterable
    return cast(Iterable[tuple[Any, Any]], other)


class _TableBatch(WriteBatch):
    """What a batch writes to a table other than the default one."""

    __slots__ = ()

    def table(self, table_id: int) -> WriteBatch:
        raise UsageError("the writes to a table have no tables of their own; call table() of the batch they came from")
