"""The store for asyncio: the same methods, awaited; commits of many tasks ride one flush.

    async with kvwal.aio.open("app.kv") as db:
        await db.put(b"user:1", b"ada")                 # durable when the line returns
        async with db.transaction() as txn:             # serializable
            txn.put(b"n", b"%d" % (int(await txn.get(b"n", b"0")) + 1))
        async for key, value in db.scan(prefix=b"user:"):
            print(key, value)
"""

from kvwal.aio.changes import AsyncBootstrap, AsyncChanges
from kvwal.aio.committer import committed_seqno
from kvwal.aio.consumer import AsyncConsumer
from kvwal.aio.cursor import AsyncCursor
from kvwal.aio.follower import AsyncFollowedTable, AsyncFollower
from kvwal.aio.index import AsyncIndex, AsyncIndexReading
from kvwal.aio.opening import Opening, follow, open, shared
from kvwal.aio.scanning import Scan
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.store import MAX_PENDING_BYTES, MAX_PENDING_COMMITS, AsyncStore
from kvwal.aio.table import AsyncTable
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.within import AsyncSnapshotTable, AsyncTransactionTable

__all__ = [
    "MAX_PENDING_BYTES",
    "MAX_PENDING_COMMITS",
    "AsyncBootstrap",
    "AsyncChanges",
    "AsyncConsumer",
    "AsyncCursor",
    "AsyncFollowedTable",
    "AsyncFollower",
    "AsyncIndex",
    "AsyncIndexReading",
    "AsyncSnapshot",
    "AsyncSnapshotTable",
    "AsyncStore",
    "AsyncTable",
    "AsyncTransaction",
    "AsyncTransactionTable",
    "Opening",
    "Scan",
    "committed_seqno",
    "follow",
    "open",
    "shared",
]
