"""Ranks, the n-th key, counts of ranges and cursors, for tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import kvwal
import kvwal.aio


def test_positions_and_a_cursor(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", durability="os") as db:
            await db.update((b"%03d" % number, b"%d" % number) for number in range(0, 600, 2))
            await db.checkpoint()
            await db.update((b"%03d" % number, b"%d" % number) for number in range(1, 100, 2))
            order = [b"%03d" % number for number in [*range(100), *range(100, 600, 2)]]
            async with db.snapshot() as snapshot, db.transaction() as txn:
                for source in (db, snapshot, txn):
                    assert await source.count() == len(order)
                    assert await source.count(b"090", b"110") == 15
                    assert await source.count(prefix=b"5") == 50
                    assert await source.rank(b"0995") == 100
                    assert await source.key_at(-1) == order[-1]
                    assert await source.key_at(1, prefix=b"2") == b"202"
                    with pytest.raises(IndexError):
                        await source.key_at(len(order))
                    async with source.cursor() as cursor:
                        assert cursor.pair is None
                        assert not await cursor.prev()
                        assert await cursor.next()
                        assert (cursor.key, cursor.value) == (b"000", b"0")
                        assert await cursor.seek(b"101")
                        assert cursor.key == b"102"
                        assert await cursor.prev()
                        assert cursor.key == b"100"
                        assert await cursor.seek_last(b"2011")
                        assert cursor.pair == (b"200", b"200")
                        assert await cursor.last()
                        assert not await cursor.next()
                        assert repr(cursor) == "<kvwal.aio.AsyncCursor at no key>"
                        assert await cursor.first()
                    assert cursor.pair is None
                txn.put_stamped(b"e", b"v")
            assert await db.key_at(-1) == b"e" + (txn.commit_seqno or 0).to_bytes(8, "big") + bytes(4)
            late = db.cursor()
            await late.first()
        with pytest.raises(kvwal.ClosedError):
            await late.next()
        with pytest.raises(kvwal.ClosedError):
            await db.rank(b"a")

    asyncio.run(main())
