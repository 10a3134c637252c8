"""How an `AsyncStore` and its tables commit: refused once it is closing, and large batches are encoded by a worker."""

from __future__ import annotations

import asyncio
from typing import Final

from kvwal.aio.committer import Committer
from kvwal.aio.workers import Workers
from kvwal.batch import WriteBatch
from kvwal.engine.engine import Engine
from kvwal.engine.request import CommitRequest, Operation
from kvwal.engine.writes import LonePut
from kvwal.errors import IndexesChangedError
from kvwal.keys import Seqno
from kvwal.log import Extension
from kvwal.options import Durability

__all__ = ["Commits"]

# Encoding this much takes about a millisecond: more is left to a worker.
_ENCODE_IN_LOOP_KEYS: Final = 2_000
_ENCODE_IN_LOOP_BYTES: Final = 1 << 20


class Commits:
    """Commits of one `AsyncStore`. In the loop's thread."""

    __slots__ = ("_committer", "_engine", "_workers", "closing")

    def __init__(self, engine: Engine, committer: Committer, workers: Workers) -> None:
        self._engine = engine
        self._committer = committer
        self._workers = workers
        #: The end of closing; None as long as `close` was not called.
        self.closing: asyncio.Future[None] | None = None

    def refuse_if_closing(self) -> None:
        """ClosedError once `close` was called."""
        if self.closing is not None:
            raise self._committer.over()

    async def put(
        self, key: bytes, value: bytes, durability: Durability | None, table: int = 0, names: object = None
    ) -> Seqno:
        """Commit a put alone. Requires: key and value have passed `as_key` and `as_value`. `names`: see `LonePut`."""
        self.refuse_if_closing()
        put = LonePut(key, value, table, names)
        return await self._committer.commit(CommitRequest(put, sync=self._engine.wants_sync(durability)))

    async def batch(
        self, batch: WriteBatch, durability: Durability | None, extension: Extension | None
    ) -> Seqno:
        """Commit a batch. Requires: it stays as it is, since the pipeline looks at it after the flush."""
        self.refuse_if_closing()
        sync = self._engine.wants_sync(durability)
        encoded = self._engine.tables.indexes.encoded
        while True:
            if len(batch) > _ENCODE_IN_LOOP_KEYS or batch.size() > _ENCODE_IN_LOOP_BYTES:
                writes = await self._workers.submit(encoded, batch, extension)
            else:
                writes = encoded(batch, extension, cached_only=True)
            try:
                return await self._committer.commit(CommitRequest(writes, sync=sync)) or self._engine.state.seqno
            except IndexesChangedError:
                pass  # Once more, with the keys for the new index.

    async def operation(self, operation: Operation, durability: Durability | None) -> Seqno:
        """Commit what an operation writes."""
        self.refuse_if_closing()
        request = CommitRequest(sync=self._engine.wants_sync(durability), operation=operation)
        return await self._committer.commit(request) or self._engine.state.seqno
