"""What a table is asked to write, written once for threads and for tasks.

Each method is a coroutine over a `Way`, which looks up and commits. The way of a task awaits; that of a thread waits,
and never suspends, so that `at_once` has the result with the first step.

No code of a codec runs in the commit leader: what it calls knows bytes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import starmap
from operator import methodcaller
from typing import Any, Final, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, overload

from kvwal.batch import SAME_INDEX_KEYS, WriteBatch
from kvwal.engine.operations import Update, adding, decode_counter, keep_expiry, set_expiry
from kvwal.engine.request import Newest, Operation
from kvwal.engine.tables import InDefaultTable, InTable, MakeTable
from kvwal.engine.value import MISSING, Value
from kvwal.errors import IndexesChangedError, TableNotFoundError
from kvwal.expiring import Expiring, expire_us, plain
from kvwal.keys import STAMP, KeyRange, Seqno
from kvwal.log import extension_of
from kvwal.options import Durability
from kvwal.tables.spec import TableSpec, is_stamped

__all__ = ["How", "Target", "Way", "Writing", "at_once", "bring_back", "into", "made", "put_bytes", "remove"]

_T = TypeVar("_T")
_P = ParamSpec("_P")
K = TypeVar("K")
V = TypeVar("V")


# Pairs that `popitem` decodes before it knows which one it takes, and what their values may have.
_MOST_AHEAD: Final = 64
_AHEAD_BYTES: Final = 1 << 16

_START = methodcaller("send", None)


def at_once(function: Callable[_P, Coroutine[Any, Any, _T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The result of a coroutine that never suspends."""
    try:
        # Made and begun by one C call: interrupted in between, it would warn that it was never awaited.
        next(map(_START, starmap(partial(function, *args, **kwargs), ((),))))
    except StopIteration as end:
        result: _T = end.value
        return result
    raise AssertionError("it waits for something")


class How:
    """How a commit is to be made: see `Store.put`."""

    __slots__ = ("durability", "extension")

    def __init__(self, durability: Durability | None = None, meta: Mapping[str, str] | None = None) -> None:
        self.durability = durability
        self.extension = extension_of(meta)


_AS_USUAL: Final = How()


class Target(NamedTuple):
    """A table that is known: its id, what `WriteBatch.names` is to be, the default expiry (0: none), and whether there
    is an index of it.
    """

    id: int
    names: object
    lasts_us: int
    is_indexed: bool


class Way(Protocol):
    """How a table is looked up and written: by a thread, or by a task.

    Attributes:
        ahead: how many pairs a `popitem` decodes before it knows which one it takes.
    """

    ahead: int

    def now_us(self) -> int:
        """The clock by which entries expire."""
        ...

    async def to_write(self) -> Target | None:
        """See `StoredTable.to_write`."""
        ...

    async def read(self, key: bytes) -> Value:
        """The value of a key now."""
        ...

    async def read_edge(self, bounds: KeyRange, most: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """The first pairs of a range now, or in reverse the last ones, `most` of them at the most."""
        ...

    async def put(self, key: bytes, value: bytes, durability: Durability | None) -> Seqno | None:
        """Put a value if the table is known; None if it is not. The quickest way. See `StoredTable.put`."""
        ...

    async def index_keys(self, writes: Mapping[bytes, Value]) -> dict[int, dict[bytes, bytes]] | None:
        """What `WriteBatch.index_keys` is to be for these writes; None if the table has no index."""
        ...

    async def commit(self, batch: WriteBatch, how: How) -> Seqno:
        """Commit a batch, which stays as it is from here on."""
        ...

    async def operate(self, operation: Operation, how: How) -> Seqno:
        """Commit what an operation writes, and `StoredTable.ask_again`."""
        ...


def into(puts: WriteBatch, part: WriteBatch) -> None:
    """Add puts to those of another batch."""
    for key, value in puts.writes.items():
        assert value is not None, "it is a put"
        if puts.stamped is not None and key in puts.stamped:
            part.put_stamped(key[: -STAMP.size], value)
        elif type(value) is Expiring:
            part.put_until(key, value.value, value.expires_us)
        else:
            part.put(key, value)


async def _write(way: Way, spec: TableSpec[Any, Any], fill: Callable[[WriteBatch], None], how: How) -> Seqno:
    """Commit what `fill` writes to a batch, nothing of which sets an expiry; it may be called twice.

    Makes the table if that puts something.
    """
    found = await way.to_write()
    # Where there is a default expiry, the leader knows what it replaces.
    if found is not None and not found.lasts_us:
        batch = WriteBatch()
        batch.names = found.names
        fill(batch.part(found.id))
        try:
            return await way.commit(batch, how)
        except TableNotFoundError:
            pass  # It was dropped, or is just being dropped.
    likely = WriteBatch()
    fill(likely)
    return await _operate(way, spec, lambda newest, part: fill(part), how, likely.writes)


async def _operate(
    way: Way,
    spec: TableSpec[Any, Any],
    fill: Callable[[Newest, WriteBatch], None],
    how: How,
    likely: Mapping[bytes, Value] | None,
) -> Seqno:
    """Commit what `fill` writes to a batch, knowing what is newest in the table. Never a conflict.

    `likely`: all that it may put; None if that is not known: IndexesChangedError then, if the table has an index.
    """
    if spec.is_default:
        return await way.operate(InDefaultTable(fill, way.now_us, how.extension), how)
    while True:
        keys = None if likely is None else await way.index_keys(likely)
        operation = InTable(spec.name, spec.asked, partial(_fill, fill, keys), way.now_us, how.extension)
        try:
            return await way.operate(operation, how)
        except IndexesChangedError:
            if likely is None:
                raise
            # Once more, with the keys for the new index.


def _fill(
    fill: Callable[[Newest, WriteBatch], None],
    keys: dict[int, dict[bytes, bytes]] | None,
    newest: Newest,
    part: WriteBatch,
) -> None:
    fill(newest, part)
    if part.index_keys is None:
        part.index_keys = keys


async def _change(
    way: Way,
    spec: TableSpec[Any, Any],
    key: bytes,
    function: Callable[[Value], Value],
    how: How = _AS_USUAL,
    *,
    likely: Value = None,
    is_known: bool = True,
    keeps_expiry: bool = False,
    was_read: bool = False,
) -> tuple[Value, Value]:
    """Change one value; returns the old and the new one. See `kvwal.engine.operations.Update`.

    `likely`: what it puts, if it puts something; `is_known`: see `_operate`. `was_read`: just now.

    Requires: key and new value have passed `as_key` and `as_value`.
    """
    # Read first, so that the commit leader need not read a page.
    if not was_read:
        await way.read(key)
    found = await way.to_write()
    if found is not None and not (found.lasts_us or found.is_indexed):
        update = Update(key, function, how.extension, found.id, found.names, keeps_expiry=keeps_expiry)
        try:
            await way.operate(update, how)
        except TableNotFoundError:
            pass  # It was dropped or renamed, or an index was declared.
        else:
            return update.old, update.new
    old: Value = None
    new: Value = None

    def fill(newest: Newest, part: WriteBatch) -> None:
        nonlocal old, new
        old = newest.get(key)
        new = function(old)
        if new is not old:
            part.writes[key] = new
            if keeps_expiry:
                keep_expiry(newest, part, key)

    await _operate(way, spec, fill, how, {key: likely} if is_known else None)
    return old, new


async def remove(way: Way, spec: TableSpec[K, Any], key: K) -> bool:
    """Remove a key, and return whether it was there. Atomic, and never a conflict."""
    return (await _change(way, spec, spec.encode_key(key), lambda old: None))[0] is not None


async def bring_back(way: Way, spec: TableSpec[Any, Any], key: bytes, value: Value, how: How) -> Seqno:
    """Put a value that there was, as bytes, to expire when it was to; None: delete it."""
    if value is None:
        return await _write(way, spec, lambda part: part.delete(key), how)
    data = plain(value)
    assert data is not None
    expires_us = value.expires_us if type(value) is Expiring else None
    if spec.is_default and expires_us is None:
        return await put_bytes(way, spec, key, data, how)
    # That it never expires is said too: else it would get the table's default.
    return await _operate(way, spec, lambda newest, part: part.put_until(key, data, expires_us), how, {key: data})


async def put_bytes(way: Way, spec: TableSpec[Any, Any], key: bytes, value: bytes, how: How) -> Seqno:
    """Put a value. Both have passed `as_key` and `as_value`."""
    return await _write(way, spec, lambda part: part.put(key, value), how)


async def made(way: Way, spec: TableSpec[Any, Any]) -> Target:
    """The table; an empty one is made if there is none."""
    while (found := await way.to_write()) is None:
        await way.operate(MakeTable(spec.name, spec.asked), _AS_USUAL)
    return found


async def _take_edge(way: Way, spec: TableSpec[K, V], bounds: KeyRange, *, reverse: bool) -> tuple[K, V] | None:
    """Delete the first pair of a range, or in reverse the last one, and return it; None if there is none.

    What cannot be decoded stays. So the commit leader takes only what was decoded before it is asked. Where several
    take from one range at a time, others may go first: then as many pairs are decoded ahead as that takes.
    """
    if bounds.is_empty():
        return None
    while True:
        ahead = way.ahead
        likely: dict[bytes, bytes] = {}
        decoded: dict[bytes, tuple[K, V]] = {}
        for key, value in await way.read_edge(bounds, ahead, reverse=reverse):
            try:
                decoded[key] = spec.pair((key, value))
            except Exception:  # a codec may raise anything
                if not decoded:
                    raise
                break
            likely[key] = value
        pair: tuple[bytes, bytes] | None = None

        def fill(newest: Newest, part: WriteBatch, likely: dict[bytes, bytes] = likely) -> None:
            nonlocal pair
            pair = newest.edge(*bounds, reverse=reverse)
            if pair is not None and likely.get(pair[0]) == pair[1]:
                part.writes[pair[0]] = None

        await _operate(way, spec, fill, _AS_USUAL, {})
        if pair is None:
            return None
        if likely.get(pair[0]) == pair[1]:
            way.ahead = max(ahead - 1, 1 + list(likely).index(pair[0]))
            return decoded[pair[0]]
        is_large = sum(map(len, likely.values())) > _AHEAD_BYTES
        way.ahead = max(1, ahead // 2) if is_large else min(2 * ahead, _MOST_AHEAD)


def _if_absent(new: bytes, now: Value) -> Value:
    return new if now is None else now


def _instead(expected: Value, new: Value, now: Value) -> Value:
    return new if now == expected else now


class Writing(Generic[K, V]):
    """The writes of a table."""

    __slots__ = ()

    _spec: TableSpec[K, V]
    _way: Way

    async def put(
        self,
        key: K,
        value: V,
        *,
        expire_s: float | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno. As `Store.put`; TypeError for values of other types.

        The last part of a tuple may be `kvwal.SEQNO`: see `kvwal.Table.put`.
        """
        spec, how = self._spec, How(durability, meta)
        if expire_s is None and not is_stamped(spec.key, key):
            encoded, data = spec.encode_key(key), spec.encode_value(value)
            seqno = await self._way.put(encoded, data, durability) if meta is None else None
            return await put_bytes(self._way, spec, encoded, data, how) if seqno is None else seqno
        puts = WriteBatch()
        if expire_s is None:
            spec.put_into(puts, key, value)
            return await _write(self._way, spec, partial(into, puts), how)
        spec.put_into(puts, key, value, self._way.now_us() + expire_us(expire_s))
        return await _operate(self._way, spec, lambda newest, part: into(puts, part), how, puts.writes)

    async def touch(
        self,
        key: K,
        *,
        expire_s: float | None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never); its value stays. As `Store.touch`."""
        encoded = self._spec.encode_key(key)
        expires_us = None if expire_s is None else self._way.now_us() + expire_us(expire_s)
        how = How(durability, meta)
        await self._way.read(encoded)
        found = False

        def fill(newest: Newest, part: WriteBatch) -> None:
            nonlocal found
            found = set_expiry(newest, part, encoded, None, expires_us)
            part.index_keys = SAME_INDEX_KEYS

        await _operate(self._way, self._spec, fill, how, {})
        return found

    async def delete(
        self, key: K, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first.

        Where there is no table nothing is committed, and the last visible seqno is returned.
        """
        encoded = self._spec.encode_key(key)
        return await _write(self._way, self._spec, lambda part: part.delete(encoded), How(durability, meta))

    async def delete_range(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Remove every key of a range (see `scan`). One small record however many keys there are.

        Returns as `delete`.
        """
        bounds = self._spec.bounds(start, stop, prefix, False, None)
        how = How(durability, meta)
        return await _write(self._way, self._spec, lambda part: part.delete_range(bounds.start, bounds.stop), how)

    async def update(
        self,
        other: Mapping[K, V] | Iterable[tuple[K, V]] = (),
        /,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> None:
        """Put every pair of a mapping or of an iterable, in one commit. None of them if one cannot be stored."""
        puts = self._spec.puts(other)
        await _write(self._way, self._spec, partial(into, puts), How(durability, meta))

    async def clear(self) -> None:
        """Remove every key, in one commit; the table stays."""
        await self.delete_range()

    # -- writes that depend on what is there --------------------------------------------------

    async def setdefault(self, key: K, default: V = None) -> V:  # type: ignore[assignment]  # as `MutableMapping` has it
        """The value of `key`; if there is none, put `default` first. Atomic, and never a conflict."""
        spec = self._spec
        encoded = spec.encode_key(key)
        value = await self._way.read(encoded)
        if value is None:
            other = spec.encode_value(default)
            # Read again before it is put: what cannot be is refused.
            own = spec.value.decode(other)
            value = (await _change(self._way, spec, encoded, partial(_if_absent, other), likely=other))[0]
            if value is None:
                return own
        return spec.value.decode(value)

    @overload
    async def pop(self, key: K) -> V: ...
    @overload
    async def pop(self, key: K, default: V) -> V: ...
    @overload
    async def pop(self, key: K, default: _T) -> V | _T: ...
    async def pop(self, key: K, default: object = MISSING) -> object:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic.

        A value that cannot be decoded stays (CodecError).
        """
        way, spec = self._way, self._spec
        encoded = spec.encode_key(key)
        while True:
            # Decoded here, before it is removed: the commit leader runs no code of a codec.
            old = await way.read(encoded)
            value = default if old is None else spec.value.decode(old)
            function = partial(_instead, old, None)
            if (await _change(way, spec, encoded, function, was_read=True))[0] == old:
                break
        if old is None and default is MISSING:
            raise KeyError(key)
        return value

    async def popitem(
        self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None, last: bool = True
    ) -> tuple[K, V]:
        """Remove the pair with the largest key (with `last=False` the smallest), of a range or of all, and return it.

        KeyError if there is none. Atomic, and never a conflict, however many take from one queue. A pair that cannot be
        decoded stays (CodecError).
        """
        bounds = self._spec.bounds(start, stop, prefix, False, None)
        pair = await _take_edge(self._way, self._spec, KeyRange(bounds.start or b"", bounds.stop), reverse=last)
        if pair is None:
            raise KeyError("popitem(): there is no key")
        return pair

    async def put_if_absent(
        self, key: K, value: V, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> bool:
        """Set `key` to `value` if it is not there. Returns whether it was set. Atomic, and never a conflict."""
        spec = self._spec
        encoded, new = spec.encode_key(key), spec.encode_value(value)
        how, absent = How(durability, meta), partial(_if_absent, new)
        return (await _change(self._way, spec, encoded, absent, how, likely=new))[0] is None

    async def compare_and_set(
        self,
        key: K,
        expected: V | None,
        value: V | None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` (None: delete it) if its value is `expected` (None: if it is not there).

        Returns whether it was. What is compared are values, not bytes. Atomic, and never a conflict. As after `put`,
        another value expires by the default of the table, or never: `touch` it. A value that is None itself, as JSON's
        null, is neither compared nor put by it: do that in a transaction.
        """
        spec = self._spec
        encoded, new = spec.encode_key(key), None if value is None else spec.encode_value(value)
        how = How(durability, meta)
        while True:
            # Decoded here: the commit leader runs no code of a codec.
            old = await self._way.read(encoded)
            # A value that is None, as JSON's null, is there.
            if (old is None) != (expected is None):
                return False
            if old is not None and spec.value.decode(old) != expected:
                return False
            if (await _change(self._way, spec, encoded, partial(_instead, old, new), how, likely=new))[0] == old:
                return True

    async def add(
        self, key: K, delta: int, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> int:
        """Add to a counter and return what it is then. A missing one counts as 0. Atomic, and never a conflict.

        For tables with values of type `int` or `kvwal.codecs.counter`: 8 bytes, little-endian, signed. TypeError for
        others; OverflowError if the sum does not fit. Nothing is changed then.
        """
        added = adding(delta)
        spec = self._spec
        if spec.value.name != "counter":
            raise TypeError(f"the values of table {spec.name!r} are {spec.value.name}, and no counters")
        way, encoded, how = self._way, spec.encode_key(key), How(durability, meta)
        change = partial(_change, way, spec, encoded, how=how, keeps_expiry=True)
        while True:
            if await way.index_keys({}) is None:
                with suppress(IndexesChangedError):
                    return decode_counter((await change(added, is_known=False))[1])
            # What an index has of it is to be known before the commit leader has it.
            old = await way.read(encoded)
            new = added(old)
            if (await change(partial(_instead, old, new), likely=new))[0] == old:
                return decode_counter(new)
