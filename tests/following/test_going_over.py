"""A follower goes over to a newer generation: what is interrupted, fails or looks back just then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from following_fixtures import PATH, Primary, all_durable
from store_fixtures import Interruption

import kvwal
from kvwal.pages import pagefile

HISTORY: dict[str, Any] = {"keep_history_s": 3600, "history_base_bytes": 1}


def _rewritten(primary: Primary, rounds: int) -> dict[int, bytes]:
    """All pages change in each round, which a checkpoint ends. The value of a key by commit."""
    found = {}
    for n in range(rounds):
        value = b"%d" % n * 300
        primary.db.update({b"%04d" % key: value for key in range(300)})
        found[primary.db.last_seqno] = value
        primary.db.checkpoint()
    return found


def _at_once(follower: kvwal.Follower, at: int, wait_s: float) -> tuple[threading.Thread, list[Any]]:
    """Another thread looks back; it is waited for as long as that does not wait for this one."""
    found: list[Any] = []

    def look() -> None:
        try:
            with follower.snapshot(at=at) as then:
                found.append(then.get(b"0007"))
        except kvwal.Error as error:
            found.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(wait_s)
    return thread, found


def _once(owner: Any, name: str, before: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something done before the next call of a method."""
    called, left = getattr(owner, name), [before]

    def call(*args: Any) -> Any:
        if left:
            left.pop()()
        return called(*args)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("error", [Interruption, FileNotFoundError])
def test_bases_are_those_of_the_generation_that_is_read(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = Primary(**HISTORY)
    _rewritten(primary, 1)
    with primary.follow() as live:
        _rewritten(primary, 12)

        def fail() -> None:
            raise error

        _once(live.engine._keeping, "refresh", fail, monkeypatch)
        if error is Interruption:
            with pytest.raises(Interruption):
                live.refresh()
        live.refresh()
        bases = [base.generation for base in primary.db.engine._keeping.bases]
        assert len(bases) > 2
        assert [base.generation for base in live.engine._keeping.bases] == bases
    primary.db.close()


def test_a_moment_that_there_is_is_found_before_the_bases_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    primary = Primary(**HISTORY, keep_history_bytes=1 << 21)
    _rewritten(primary, 1)
    with primary.follow() as live:
        values = _rewritten(primary, 30)
        all_durable(primary.db)
        at = primary.db.window.oldest
        assert live.seqno < at < primary.db.last_seqno
        looked: list[Any] = []
        _once(live.engine._keeping, "refresh", lambda: looked.extend(_at_once(live, at, 0.2)), monkeypatch)
        live.refresh()
        thread, found = looked
        thread.join(10)
        assert found == [values[at]]
    primary.db.close()


def test_what_reads_the_past_reads_it_as_the_generation_that_it_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as the newer one, which does not know whether the pages of that one have been written over."""
    primary = Primary(keep_history_s=3600)
    (value,) = _rewritten(primary, 1).values()
    at = primary.db.put(b"a", b"")
    primary.db.put(b"b", b"")
    all_durable(primary.db)
    with primary.follow() as live:
        assert live.seqno > at
        _rewritten(primary, 6)
        looked: list[Any] = []
        _once(live.engine._succession, "go_over", lambda: looked.extend(_at_once(live, at, 0.2)), monkeypatch)
        live.refresh()
        thread, found = looked
        thread.join(10)
        assert found == [value] or isinstance(found[0], kvwal.SnapshotTooOld)
    primary.db.close()


def test_a_check_of_a_generation_that_the_writer_writes_over_finds_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read the newest one, and now comes to the one before, whose pages are for the next but one."""
    primary = Primary()
    _rewritten(primary, 3)
    flip, looked = pagefile.write_slot, []

    def check(*args: Any) -> None:
        looked.append(still.verify())
        flip(*args)

    with kvwal.open(PATH, "r", files=primary.disk) as still:
        assert still.verify().ok
        _rewritten(primary, 1)
        monkeypatch.setattr(pagefile, "write_slot", check)
        _rewritten(primary, 1)
        assert [report.problems for report in looked] == [()]

    began: list[int] = []

    def overtake(done: int, total: int) -> None:
        """It has begun: the slot of the generation before goes."""
        if not began:
            began.append(done)
            _rewritten(primary, 1)

    monkeypatch.setattr(pagefile, "write_slot", flip)
    with kvwal.open(PATH, "r", files=primary.disk) as still:
        assert still.verify(progress=overtake).ok
        assert began
    primary.db.close()


def test_readers_of_a_generation_that_it_went_over_to_are_told_that_its_pages_are_gone() -> None:
    primary = Primary()
    _rewritten(primary, 1)
    with primary.follow() as live:
        _rewritten(primary, 1)
        live.refresh()
        assert live.rebases == 1
        with live.snapshot() as then, live.snapshot() as other:
            assert then.get(b"0007") is not None
            _rewritten(primary, 4)
            live.refresh()
            for reader, key in ((other, b"0299"), (then, b"0007")):
                with pytest.raises(kvwal.SnapshotTooOld):
                    reader.get(key)
    primary.db.close()
