"""Past moments for tasks: the same answers as for threads."""

from __future__ import annotations

from pathlib import Path

import pytest
from aio_fixtures import run

import kvwal
import kvwal.aio


def test_past_moments_differences_and_reverts(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "a.kv", keep_history_s=1e6) as db:
            await db.update({b"a": b"1", b"b": b"2"})
            await db.delete_range(b"a", b"b")
            await db.put(b"b", b"3")
            async with db.snapshot(at=1) as snapshot:
                assert snapshot.seqno == 1
                assert await snapshot.get(b"a") == b"1"
                assert await snapshot.get_many([b"b", b"x"]) == [b"2", None]
                assert [pair async for pair in snapshot.scan()] == [(b"a", b"1"), (b"b", b"2")]
                assert await snapshot.count() == 2
            assert (db.window.oldest, db.window.newest) == (0, 3)
            assert [each async for each in db.diff(1)] == [(b"a", b"1", None), (b"b", b"2", b"3")]
            assert [each async for each in db.diff(1, 3, prefix=b"b")] == [(b"b", b"2", b"3")]
            changes = [change async for change in db.changes(previous=True, expand=True)]
            assert [(each.kind, each.key, each.previous) for each in changes[2:]] == [
                ("delete", b"a", b"1"),
                ("put", b"b", b"2"),
            ]
            assert await db.revert(b"b", to=1, meta={"why": "by mistake"}) == 4
            assert await db.get(b"b") == b"2"
            with pytest.raises(ValueError, match="no commit 9"):
                db.snapshot(at=9)
        with pytest.raises(kvwal.ClosedError):
            db.snapshot(at=1)

    run(main())


def test_a_moment_means_the_table_that_had_the_name_then(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "a.kv", keep_history_s=1e6) as db:
            users = db.table("users", str, int)
            before = await users.put("ada", 1)
            await db.drop_table("users")
            assert [each async for each in users.diff(before)] == [("ada", 1, None)]
            with pytest.raises(TypeError):
                await users.versions("ada", limit="x")  # type: ignore[arg-type]  # that is what is wrong
            with pytest.raises(ValueError, match="no commit 99"):
                await users.revert("ada", to=99)
            await users.put("bob", 2)
            await users.revert("ada", to=before)
            await users.revert("bob", to=before)
            assert [pair async for pair in users.scan()] == [("ada", 1)]

    run(main())
