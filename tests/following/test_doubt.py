"""What fails once is looked at again, what fails for good is damage, and an interruption loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from following_fixtures import all_durable, rewrite
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal.engine.create import _MARK
from kvwal.files import system_files
from kvwal.keys import Seqno
from kvwal.pages.slots import choose_in


class Glitching(Wrapped):
    """Reads of a log, the first of which after `left` is set come back damaged."""

    left = 0

    def pread(self, size: int, offset: int) -> bytes:
        found: bytes = self.there.pread(size, offset)
        if Glitching.left and self.name.endswith(".log") and size > 100 and len(found) > 40:
            Glitching.left -= 1
            return found[:40] + bytes((found[40] ^ 1,)) + found[41:]
        return found


def test_what_fails_once_is_looked_at_again_and_is_damage_if_nothing_moved(db: kvwal.Store, path: str) -> None:
    # It stands for files.
    with kvwal.follow(path, files=WrappedFiles(system_files(), Glitching)) as live:  # type: ignore[arg-type]
        for n in range(3):
            db.put(b"key", b"%d" % n * 300)
            db.put(b"next", b"")
            Glitching.left = 1
            live.refresh()
            Glitching.left = 0
            live.refresh()
            assert live.get(b"key") == b"%d" % n * 300
        Glitching.left = 1 << 30
        try:
            db.put(b"key", b"last" * 300)
            db.checkpoint()
            with pytest.raises(kvwal.CorruptionError):
                live.refresh()
        finally:
            Glitching.left = 0
        # Reads go on from where it was, and it goes on when it can.
        assert live.get(b"key") == b"2" * 300
        live.refresh()
        assert live.get(b"key") == b"last" * 300


def test_slots_that_fail_once_are_looked_at_again(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def choose(raw: bytes, file: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise kvwal.CorruptionError("data", 0, "a read that went wrong")
        return choose_in(raw, file)

    with kvwal.follow(path) as live:
        monkeypatch.setattr("kvwal.pages.followed.choose_in", choose)
        db.put(b"key", b"1")
        db.checkpoint()
        failures = 1
        assert live.refresh() == 1
        db.put(b"key", b"2")
        db.checkpoint()
        failures = 2
        with pytest.raises(kvwal.CorruptionError):
            live.refresh()
        assert live.refresh() == 2


def test_each_commit_is_published_once_and_in_its_order(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.follow(path) as live:
        engine: Any = live.engine
        publish, published = type(engine._publisher).publish, [0]

        def note(publisher: Any, seqno: int, *args: Any) -> None:
            if publisher is engine._publisher:
                assert seqno == live.seqno + 1
                published.append(seqno)
            publish(publisher, seqno, *args)

        monkeypatch.setattr(type(engine._publisher), "publish", note)
        for n in range(12):
            db.put(b"key", b"%d" % n)
            all_durable(db)
            if n % 4 == 3:
                db.checkpoint()
            if n % 3:
                live.refresh()
        assert live.seqno == 12
        assert published == sorted(set(published))


def test_a_checkpoint_in_parts_is_shown_once_its_log_is_replayed(db: kvwal.Store, path: str) -> None:
    for n in range(4):
        db.put(b"%d" % n, b"first")
    pages: Any = db.engine._pages  # type: ignore[attr-defined]  # a private part, looked at
    with kvwal.follow(path) as before:
        assert before.refresh() == 3
        # The trees have a part of commits 3 and 4, and say so.
        db.put(b"2", b"second")
        pages.checkpoint([([b"0", b"3"], [b"first"] * 2)], seqno=Seqno(1), time_us=1, replay_through=Seqno(5))
        with kvwal.follow(path) as after:
            for live in (before, after):
                live.refresh()
                assert live.seqno == 5
                assert dict(live) == dict(db)
                # The trees have what came later: a moment before the last commit is read from an older base.
                for seqno in (2, 4):
                    with live.snapshot(at=seqno) as then:
                        assert dict(then) == {b"%d" % n: b"first" for n in range(seqno)}


def test_a_store_whose_erasing_was_cut_off_is_gone(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"value")
    all_durable(db)
    with kvwal.follow(path) as live:
        (Path(path) / "erasing").write_bytes(_MARK)
        for segment in Path(path).glob("*.log"):
            segment.unlink()
        with pytest.raises(kvwal.StoreRemovedError):
            live.refresh()
        with pytest.raises(kvwal.StoreNotFoundError):
            kvwal.follow(path)


def test_a_page_that_is_damaged_is_damage_here_too(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    rewrite(db, b"y")
    rewrite(db, b"z")
    with kvwal.follow(path, cache_bytes=256 << 10) as live:
        data = bytearray((Path(path) / "data").read_bytes())
        data[8192::4096] = bytes(byte ^ 1 for byte in data[8192::4096])
        (Path(path) / "data").write_bytes(data)
        with pytest.raises(kvwal.CorruptionError):
            live.get(b"1000")
        with pytest.raises(kvwal.CorruptionError):
            kvwal.follow(path)


def test_an_interruption_between_two_commits_loses_none(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.follow(path) as live:
        engine: Any = live.engine
        publish, left = type(engine._publisher).publish, [3]

        def interrupted(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            publish(*args)

        live.refresh()
        for n in range(5):
            db.put(b"%d" % n, b"")
        all_durable(db)
        monkeypatch.setattr(type(engine._publisher), "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.refresh()
        assert list(live) == [b"0", b"1"]
        live.refresh()
        assert list(live) == [b"0", b"1", b"2", b"3", b"4"]
