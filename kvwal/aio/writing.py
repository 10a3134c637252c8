"""Writing to a store, for tasks. As `kvwal.api.writing`, for threads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Never, TypeVar, overload

from kvwal.aio.commits import Commits
from kvwal.aio.opened import AsyncOpened
from kvwal.batch import Updates, WriteBatch
from kvwal.engine.operations import PopEdge, SetExpiry, Update, adding, decode_counter
from kvwal.engine.own_commits import OwnCommits, block_of
from kvwal.engine.tables import refuse_own
from kvwal.engine.value import MISSING
from kvwal.expiring import expire_us
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, Bound, BytesLike, KeyRange, Seqno, as_key, as_value
from kvwal.log import extension_of
from kvwal.options import Durability

__all__ = ["AsyncWriting"]

_T = TypeVar("_T")


class AsyncWriting(AsyncOpened):
    """The part of `AsyncStore` that writes."""

    __slots__ = ()

    _commits: Commits

    async def put(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        expire_s: float | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno. Arguments and errors as in `Store.put`.

        Waits for its turn while `max_pending_commits` are pending. Cancellation: see `AsyncStore`.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if expire_s is not None:
            return (await self._set_expiry(key, value, expire_s, durability, meta))[0]
        if meta is not None:
            batch = WriteBatch()
            batch.writes[key] = value
            return await self._commits.batch(batch, durability, extension_of(meta))
        return await self._commits.put(key, value, durability)

    async def _set_expiry(
        self,
        key: bytes,
        value: bytes | None,
        expire_s: float | None,
        durability: Durability | None,
        meta: Mapping[str, str] | None,
    ) -> tuple[Seqno, bool]:
        expires_us = None if expire_s is None else self._reads.moments.clock.now_us() + expire_us(expire_s)
        setting = SetExpiry(key, value, expires_us, extension_of(meta))
        # Read first, so that the commit leader need not read a page.
        await self._read(key)
        return await self._commits.operation(setting, durability), setting.found

    async def touch(
        self,
        key: BytesLike,
        *,
        expire_s: float | None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never): see `Store.touch`."""
        return (await self._set_expiry(as_key(key), None, expire_s, durability, meta))[1]

    async def delete(
        self, key: BytesLike, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first."""
        batch = WriteBatch()
        batch.delete(key)
        return await self._commits.batch(batch, durability, extension_of(meta))

    async def delete_range(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Remove every key from `start` on (None: the first), up to but without `stop` (None: the end).

        Returns the commit's seqno.
        """
        batch = WriteBatch()
        batch.delete_range(start, stop)
        return await self._commits.batch(batch, durability, extension_of(meta))

    async def commit(
        self, batch: WriteBatch, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Commit a batch, whole or not at all; it reads nothing, so it never conflicts. Returns its seqno.

        What is committed is the batch as it is at the call. An empty batch commits nothing, and the last visible
        seqno is returned.
        """
        if batch.others:
            refuse_own(batch.others)
        # A copy: the pipeline looks at it once more after the flush, and other tasks run until then.
        return await self._commits.batch(batch.copy(), durability, extension_of(meta))

    @asynccontextmanager
    async def batch(
        self, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> AsyncIterator[WriteBatch]:
        """`async with db.batch() as batch:` collects writes, and commits them on clean exit, none on an exception."""
        extension = extension_of(meta)
        batch = WriteBatch()
        batch.now_us = self._reads.moments.clock.now_us
        yield batch
        if batch.others:
            refuse_own(batch.others)
        await self._commits.batch(batch.copy(), durability, extension)

    async def update(
        self,
        other: Updates = (),
        /,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
        **keywords: Never,
    ) -> None:
        """Put every pair of what `dict.update` takes, in one commit: see `Store.update`."""
        batch = WriteBatch()
        batch.update(other, **keywords)
        await self._commits.batch(batch, durability, extension_of(meta))

    async def clear(self) -> None:
        """Remove every key, in one commit."""
        await self.delete_range()

    # -- writes that depend on what is there ------------------------------------------------------

    async def _update(
        self,
        key: bytes,
        function: Callable[[bytes | None], bytes | None],
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Update:
        update = Update(key, function, extension_of(meta))
        # Read first, so that the commit leader need not read a page.
        await self._read(key)
        await self._commits.operation(update, durability)
        return update

    async def setdefault(self, key: BytesLike, default: BytesLike | None = None) -> bytes:
        """The value of `key`; if there is none, put `default` first. Atomic, and never a conflict."""
        checked = as_key(key)
        value = await self._read(checked)
        if value is None:
            other = as_value(default)
            value = (await self._update(checked, lambda old: other if old is None else old)).new
            assert value is not None
        return value

    @overload
    async def pop(self, key: BytesLike) -> bytes: ...
    @overload
    async def pop(self, key: BytesLike, default: bytes) -> bytes: ...
    @overload
    async def pop(self, key: BytesLike, default: _T) -> bytes | _T: ...
    async def pop(self, key: BytesLike, default: object = MISSING) -> object:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic."""
        checked = as_key(key)
        value = (await self._update(checked, lambda old: None)).old
        if value is not None:
            return value
        if default is MISSING:
            raise KeyError(checked)
        return default

    async def popitem(
        self, start: Bound = None, stop: Bound = None, *, last: bool = True
    ) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key (with `last=False` the smallest), of a range or of all, and return it.

        KeyError if there is none. Atomic, and never a conflict, however many tasks take from one queue.
        """
        bounds = KeyRange.of(start, stop)
        await (self.last if last else self.first)(*bounds)
        taking = PopEdge(bounds, reverse=last)
        await self._commits.operation(taking, None)
        if taking.pair is None:
            raise KeyError("popitem(): there is no key")
        return taking.pair

    async def put_if_absent(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` if it is not there. Returns whether it was set. Atomic, and never a conflict."""
        checked, new = as_key(key), as_value(value)
        return (await self._update(checked, lambda old: new if old is None else old, durability, meta)).old is None

    async def compare_and_set(
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
        update = await self._update(checked, lambda old: new if old == wanted else old, durability, meta)
        return update.old == wanted

    async def add(
        self,
        key: BytesLike,
        delta: int,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> int:
        """Add to a counter and return what it is then: see `Store.add`. Atomic, and never a conflict."""
        checked, added = as_key(key), adding(delta)
        update = Update(checked, added, extension_of(meta), keeps_expiry=True)
        await self._read(checked)
        await self._commits.operation(update, durability)
        return decode_counter(update.new)

    def own_commits(self) -> OwnCommits:
        """`with db.own_commits() as own:` tells which commits this task makes in the block, and those it starts there.

        A plain `with`: see `Store.own_commits`.
        """
        self._refuse_if_over()
        return block_of(self._engine.queue.events)
