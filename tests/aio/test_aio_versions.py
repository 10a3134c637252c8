"""The versions of a key for tasks: the same list, and the same refusals."""

from __future__ import annotations

from typing import Any

import pytest
from aio_fixtures import run

import kvwal.aio
from kvwal import ClosedError, SnapshotTooOld
from kvwal.testing import SimulatedDisk


def opened(**options: Any) -> Any:
    small = {"background": False, "segment_bytes": 1 << 16, "keep_history_bytes": 0}
    return kvwal.aio.open("/kv", **{"files": SimulatedDisk(), **small, **options})


def test_versions_are_a_list_in_the_same_order() -> None:
    async def main() -> None:
        async with opened() as db:
            for number in range(5):
                await db.put(b"k", b"%d" % number)
            await db.delete_range(b"a", b"z")
            found = await db.versions(b"k")
            assert [(version.seqno, version.kind) for version in found] == [(6, "range")] + [
                (seqno, "put") for seqno in (5, 4, 3, 2, 1)
            ]
            assert found == list(db.store.versions(b"k"))
            part = await db.versions(b"k", since=2, until=4, reverse=False, limit=2)
            assert [version.value for version in part] == [b"1", b"2"]
            assert await db.versions(b"k", table=16) == []
            assert db.store.engine._log.holds() == []

    run(main())


def test_what_is_not_kept_and_a_closed_store_are_refused() -> None:
    async def main() -> None:
        async with opened() as db:
            for _ in range(3):
                await db.put(b"k", bytes(100_000))
                await db.checkpoint()
            with pytest.raises(SnapshotTooOld):
                await db.versions(b"k", since=1)
            with pytest.raises(TypeError):
                await db.versions("k")
        with pytest.raises(ClosedError):
            await db.versions(b"k")

    run(main())
