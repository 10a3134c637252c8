"""Writing to a store: each method is a commit of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Never, TypeVar, overload

from kvwal.api.opened import Opened
from kvwal.batch import Updates, WriteBatch
from kvwal.engine.engine import Engine
from kvwal.engine.operations import PopEdge, SetExpiry, Update, adding, decode_counter
from kvwal.engine.own_commits import OwnCommits, block_of
from kvwal.engine.request import CommitRequest, Operation
from kvwal.engine.tables import refuse_own
from kvwal.engine.value import MISSING
from kvwal.engine.writes import LonePut
from kvwal.errors import DiskFullError, IndexesChangedError
from kvwal.expiring import expire_us
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, Bound, BytesLike, KeyRange, Seqno, as_key, as_value
from kvwal.log import Extension, extension_of
from kvwal.options import Durability

__all__ = ["Writing"]

_T = TypeVar("_T")


class Writing(Opened, MutableMapping[bytes, bytes]):
    """The part of `Store` that writes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._pressure = engine.pressure
        self._put = engine.queue.put
        self._syncs = engine.wants_sync(None)
        self._clock = engine.reads.moments.clock

    def put(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        expire_s: float | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno.

        Args:
            key: 0 to 65,535 bytes.
            value: up to 1 GiB.
            expire_s: seconds from this call on, more than 0, after which the key is absent. None: it does not expire.
            durability: for this commit, if it is to be another than the store's. A weaker one may still be flushed
                along with others.
            meta: pairs to keep with the commit, such as who made it and why; at most 4 KiB, in UTF-8 and with 4 bytes
                for each pair. `commits` and `changes` show them.

        Raises TypeError or ValueError for what cannot be stored, ReadOnlyError, ClosedError, DiskFullError (nothing
        was written), PoisonedError.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if meta is not None or expire_s is not None:
            return self._put_with(key, value, expire_s, durability, extension_of(meta))
        if self._pressure.is_on:
            self._pressure.relieve(deleting=False)
        sync = self._syncs if durability is None else self.engine.wants_sync(durability)
        try:
            return self._put(key, value, sync)
        except DiskFullError:
            if not self._pressure.free_space():
                raise
        return self.engine.commit(CommitRequest(LonePut(key, value), sync=sync))

    def _put_with(
        self,
        key: bytes,
        value: bytes,
        expire_s: float | None,
        durability: Durability | None,
        extension: Extension | None,
    ) -> Seqno:
        if expire_s is None:
            batch = WriteBatch()
            batch.writes[key] = value
            return self._commit(batch, durability, extension)
        return self._set_expiry(key, value, expire_s, durability, extension)[0]

    def __setitem__(self, key: BytesLike, value: BytesLike) -> None:
        self.put(key, value)

    def delete(
        self, key: BytesLike, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first."""
        batch = WriteBatch()
        batch.delete(key)
        return self.commit(batch, durability=durability, meta=meta)

    def delete_range(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Remove every key from `start` on (None: the first), up to but without `stop` (None: the end).

        One small record however many keys there are. Returns the commit's seqno.
        """
        batch = WriteBatch()
        batch.delete_range(start, stop)
        return self.commit(batch, durability=durability, meta=meta)

    def commit(
        self, batch: WriteBatch, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Commit a batch, whole or not at all; it reads nothing, so it never conflicts. Returns its seqno.

        An empty batch commits nothing, whatever `meta` says, and the last visible seqno is returned. ValueError for a
        batch with a table of the store's own.
        """
        if batch.others:
            refuse_own(batch.others)
        return self._commit(batch, durability, extension_of(meta))

    def _commit(self, batch: WriteBatch, durability: Durability | None, extension: Extension | None) -> Seqno:
        engine = self.engine
        sync = engine.wants_sync(durability)
        while True:
            try:
                writes = engine.tables.indexes.encoded(batch, extension, shared=True)
                return engine.commit(CommitRequest(writes, sync=sync))
            except IndexesChangedError:
                pass  # Once more, with the keys for the new index.

    @contextmanager
    def batch(
        self, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Iterator[WriteBatch]:
        """`with db.batch() as batch:` collects writes and commits them on clean exit, none of them on an exception."""
        extension = extension_of(meta)
        batch = WriteBatch()
        batch.now_us, batch.store = self._clock.now_us, self._state
        yield batch
        if batch.others:
            refuse_own(batch.others)
        self._commit(batch, durability, extension)

    def update(
        self,
        other: Updates = (),
        /,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
        **keywords: Never,
    ) -> None:
        """Put every pair of what `dict.update` takes, in one commit. None of them if one cannot be stored.

        TypeError for other keyword arguments: keys are bytes.
        """
        batch = WriteBatch()
        batch.update(other, **keywords)
        self.commit(batch, durability=durability, meta=meta)

    def clear(self) -> None:
        """Remove every key, in one commit."""
        self.delete_range()

    # -- writes that depend on what is there ------------------------------------------------------

    def _commit_operation(self, operation: Operation, durability: Durability | None) -> Seqno:
        return self.engine.commit(CommitRequest(sync=self.engine.wants_sync(durability), operation=operation))

    def _update(
        self,
        key: bytes,
        function: Callable[[bytes | None], bytes | None],
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Update:
        update = Update(key, function, extension_of(meta))
        # Read first, so that the commit leader need not read a page.
        self._read(key)
        self._commit_operation(update, durability)
        return update

    def __delitem__(self, key: BytesLike) -> None:
        checked = as_key(key)
        if self._update(checked, lambda old: None).old is None:
            raise KeyError(checked)

    def setdefault(self, key: BytesLike, default: BytesLike | None = None) -> bytes:
        """The value of `key`; if there is none, put `default` first. Atomic, and never a conflict."""
        checked = as_key(key)
        value = self._read(checked)
        if value is None:
            other = as_value(default)
            value = self._update(checked, lambda old: other if old is None else old).new
            assert value is not None
        return value

    @overload
    def pop(self, key: BytesLike) -> bytes: ...
    @overload
    def pop(self, key: BytesLike, default: bytes) -> bytes: ...
    @overload
    def pop(self, key: BytesLike, default: _T) -> bytes | _T: ...
    def pop(self, key: BytesLike, default: object = MISSING) -> object:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic."""
        checked = as_key(key)
        value = self._update(checked, lambda old: None).old
        if value is None:
            if default is MISSING:
                raise KeyError(checked)
            return default
        return value

    def popitem(
        self, start: Bound = None, stop: Bound = None, *, last: bool = True
    ) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key (with `last=False` the smallest), of a range or of all, and return it.

        KeyError if there is none. Atomic, and never a conflict, however many threads take from one queue.
        """
        bounds = KeyRange.of(start, stop)
        (self.last if last else self.first)(*bounds)
        taking = PopEdge(bounds, reverse=last)
        self._commit_operation(taking, None)
        if taking.pair is None:
            raise KeyError("popitem(): there is no key")
        return taking.pair

    def _set_expiry(
        self,
        key: bytes,
        value: bytes | None,
        expire_s: float | None,
        durability: Durability | None,
        extension: Extension | None,
    ) -> tuple[Seqno, bool]:
        expires_us = None if expire_s is None else self._clock.now_us() + expire_us(expire_s)
        setting = SetExpiry(key, value, expires_us, extension)
        # Read first, so that the commit leader need not read a page.
        self._lasting(key)
        seqno = self._commit_operation(setting, durability)
        return seqno, setting.found

    def touch(
        self,
        key: BytesLike,
        *,
        expire_s: float | None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never); its value stays.

        Returns whether it is there: what has expired is not, and does not come back. Atomic, and never a conflict.
        """
        return self._set_expiry(as_key(key), None, expire_s, durability, extension_of(meta))[1]

    def put_if_absent(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` if it is not there. Returns whether it was set. Atomic, and never a conflict."""
        checked, new = as_key(key), as_value(value)
        return self._update(checked, lambda old: new if old is None else old, durability, meta).old is None

    def compare_and_set(
        self,
        key: BytesLike,
        expected: BytesLike | None,
        value: BytesLike | None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` (None: delete it) if its value is `expected` (None: if it is not there).

        Returns whether it was. Atomic, and never a conflict. As after `put`, another value does not expire: `touch` it.
        """
        checked = as_key(key)
        wanted = None if expected is None else as_value(expected)
        new = None if value is None else as_value(value)
        return self._update(checked, lambda old: new if old == wanted else old, durability, meta).old == wanted

    def add(
        self,
        key: BytesLike,
        delta: int,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> int:
        """Add to a counter and return what it is then. A missing one counts as 0. Atomic, and never a conflict.

        It expires when it would have before.

        A counter is 8 bytes, little-endian, signed. TypeError if the value has another length, OverflowError if the sum
        does not fit; nothing is changed then.
        """
        checked, added = as_key(key), adding(delta)
        update = Update(checked, added, extension_of(meta), keeps_expiry=True)
        self._read(checked)
        self._commit_operation(update, durability)
        return decode_counter(update.new)

    def own_commits(self) -> OwnCommits:
        """`with db.own_commits() as own:` tells which commits this thread makes in the block: `own.first`, `own.last`.

        So every write has its seqno, also where the call returns something else: `add`, `update`, `db[key] = value`,
        `run`, and what others do with this store in the block. Blocks nest. Meanwhile each put of the store, of any
        thread, takes about as long as with a listener.
        """
        self.engine.state.refuse_if_gone()
        return block_of(self.engine.queue.events)
