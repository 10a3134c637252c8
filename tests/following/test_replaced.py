"""A store that is replaced by an older copy of itself: its follower never shows what two histories have together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import all_durable

import kvwal
from kvwal.engine.create import _MARK
from kvwal.engine.keeping import Keeping
from kvwal.files.names import segment_name
from kvwal.following import progress
from kvwal.keys import Seqno
from kvwal.log import Watch
from kvwal.log.chain import Chain
from kvwal.times import time_of

FOLLOWERS: dict[str, dict[str, Any]] = {"pin": {}, "no pin": {"pin": False}, "max_lag_s": {"max_lag_s": 0.2}}


def put_in_place(copy: Path, store: Path) -> None:
    """As `rsync -a --delete copy/ store/` does: each file under another name first, which is renamed then."""
    names = {each.name for each in copy.iterdir() if each.is_file()}
    for name in sorted(names):
        shutil.copy(copy / name, store / f"{name}.new")
        os.rename(store / f"{name}.new", store / name)
    for each in store.iterdir():
        if each.is_file() and each.name not in names:
            each.unlink()


@pytest.fixture
def copied(path: str, tmp_path: Path) -> tuple[Path, Path]:
    """A store that went on, and a copy of it from before that."""
    store, copy = Path(path), tmp_path / "copy"
    with kvwal.open(store, background=False) as db:
        for n in range(20):
            db.put(b"k%d" % n, b"before", durability="os")
    shutil.copytree(store, copy)
    with kvwal.open(store, background=False) as db:
        for n in range(100):
            db.put(b"lost%03d" % n, b"x", durability="os")
    return store, copy


def go_on(db: kvwal.Store, count: int, value: bytes = b"x") -> None:
    for n in range(count):
        db.put(b"else%03d" % n, value, durability="os")
    db.sync()
    all_durable(db)


@pytest.mark.parametrize("kind", FOLLOWERS)
@pytest.mark.parametrize("more", ["puts", "segments", "a checkpoint", "less than before"])
@pytest.mark.parametrize("background", [False, True])
def test_an_older_copy_in_its_place_is_another_store(
    copied: tuple[Path, Path], kind: str, more: str, background: bool
) -> None:
    store, copy = copied
    with kvwal.follow(store, **FOLLOWERS[kind]) as live:
        live.refresh()
        shown = dict(live)
        assert len(shown) == 120
        put_in_place(copy, store)
        with kvwal.open(store, background=background, segment_bytes=16 << 10) as db:
            go_on(db, 50 if more == "less than before" else 150, b"x" * 1000 if more == "segments" else b"x")
            if more == "a checkpoint":
                db.checkpoint()
            go_on(db, 10)
            for call in (live.refresh, lambda: live.wait(200, 1), live.lag, live.refresh):
                with pytest.raises(kvwal.StoreRemovedError):
                    call()
            assert live.seqno == 120
            if kind != "max_lag_s":
                assert dict(live) == shown
    with kvwal.follow(store, **FOLLOWERS[kind]) as again:
        assert b"else000" in again
        assert b"lost000" not in again


def test_feeds_and_past_moments_are_not_read_in_the_log_of_the_other_store(copied: tuple[Path, Path]) -> None:
    """Whose records are as long as those of before, and have the same numbers. The follower has not looked since."""
    store, copy = copied
    reads: list[Any] = [
        lambda live: list(live.changes(20)),
        lambda live: list(live.commits(after=20)),
        lambda live: list(live.versions(b"lost050")),
        lambda live: list(live.versions(b"else050")),
        lambda live: dict(live.snapshot(at=100)),
    ]
    with kvwal.follow(store) as live, kvwal.follow(store) as fed:
        began = fed.changes(20)
        assert next(began).key == b"lost000"
        going = fed.changes(20, follow=True)
        assert [next(going).key for _ in range(100)][-1] == b"lost099"
        # The other store has a commit of that time, too: its 20th.
        at = next(fed.commits(after=69)).time
        reads.append(lambda live: live.snapshot(at=at))
        put_in_place(copy, store)
        with kvwal.open(store, background=False) as db:
            go_on(db, 200)
            for read in reads:
                with pytest.raises(kvwal.StoreRemovedError):
                    read(live)
            with pytest.raises(kvwal.StoreRemovedError):
                next(going)
            # What it has read already is of the store that it follows.
            for n, change in enumerate(began):
                assert change.key == b"lost%03d" % (n + 1)
            assert live.seqno == fed.seqno == 120


def erase(store: Path) -> None:
    kvwal.open(store, "n").close()


def erase_in_part(store: Path) -> None:
    """As a writer does that is killed there."""
    (store / "erasing").write_bytes(_MARK)
    for segment in store.glob("*.log"):
        segment.unlink()


def write_anew(store: Path) -> None:
    """So much that the log begins later than what is asked for."""
    with kvwal.open(store, "n", segment_bytes=16 << 10, keep_history_s=0, background=False) as db:
        for _ in range(3):
            go_on(db, 300, b"x" * 300)
            db.checkpoint()
    assert not (store / segment_name(1)).exists()


@pytest.mark.parametrize("gone", [shutil.rmtree, erase, erase_in_part, write_anew])
@pytest.mark.parametrize("how", ["follow", "r"])
def test_a_store_that_is_gone_is_not_called_damaged_whatever_reads_its_log(
    copied: tuple[Path, Path], how: str, gone: Callable[[Path], object]
) -> None:
    store, _ = copied
    reads: list[Callable[[Any], object]] = [
        lambda live: list(live.changes(20)),
        lambda live: list(live.commits(after=20)),
        lambda live: list(live.history(20)),
        lambda live: list(live.versions(b"lost050")),
        lambda live: list(live.versions(b"lost050", since=60)),
        lambda live: list(live.diff(30, 100)),
        lambda live: dict(live.snapshot(at=100)),
        lambda live: dict(live.snapshot(at=time_of(1))),
        lambda live: live.bootstrap(),
        # What is refused, for which it looks what the log has.
        lambda live: live.changes(kvwal.Position(b"no store", 5)),
        lambda live: live.changes(999),
        lambda live: live.snapshot(at=kvwal.Position(b"no store", 5)),
    ]
    if how == "follow":
        reads.append(lambda live: live.wait(kvwal.Position(b"no store", 5), 0))
        reads.append(lambda live: next(live.changes(120, follow=True)))
    with ExitStack() as stack:
        # Each by one that has not looked since.
        opened: list[Any] = [
            stack.enter_context(kvwal.open(store, "r") if how == "r" else kvwal.follow(store, pin=False)) for _ in reads
        ]
        gone(store)
        for live, read in zip(opened, reads, strict=True):
            with pytest.raises(kvwal.StoreRemovedError):
                read(live)
            # What it reads without the log it goes on to show.
            assert live[b"k1"] == b"before"


def take_log(store: Path) -> None:
    for segment in store.glob("*.log"):
        segment.unlink()


def take_newest_segment(store: Path) -> None:
    max(store.glob("*.log")).unlink()


def take_all_but_the_oldest_segment(store: Path) -> None:
    for segment in sorted(store.glob("*.log"))[1:]:
        segment.unlink()


@pytest.mark.parametrize("how", ["follow", "r"])
@pytest.mark.parametrize("first", [take_log, take_newest_segment, take_all_but_the_oldest_segment])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_store_that_is_being_taken_apart_is_damaged_only_if_the_rest_stays(
    path: str, monkeypatch: pytest.MonkeyPatch, how: str, first: Callable[[Path], object], goes_on: bool
) -> None:
    """As `rm -r` does it, which comes to the page file last."""
    store, looks = Path(path), count()
    with kvwal.open(store, segment_bytes=16 << 10, keep_history_s=3600, background=False) as db:
        go_on(db, 60, b"x" * 1000)
    reads: list[Callable[[Any], object]] = [
        lambda live: list(live.changes(20)),
        lambda live: list(live.history(20)),
        lambda live: live.backup(f"{path}-backup"),
    ]
    if first is take_log:
        reads += [
            lambda live: list(live.versions(b"else050")),
            lambda live: live.changes(kvwal.Position(b"no store", 5)),
            lambda live: live.bootstrap(),
        ]
    if how == "follow":
        reads += [lambda live: live.refresh(), lambda live: live.wait(500, 0), lambda live: live.lag()]

    def sleep(seconds: float) -> None:
        if goes_on and next(looks) % 3 == 2:
            (store / "data").unlink(missing_ok=True)

    monkeypatch.setattr("kvwal.following.doubt.sleep", sleep)
    with ExitStack() as stack:
        for read in reads:
            shutil.copytree(store, f"{path}-whole")
            live: Any = stack.enter_context(kvwal.open(store, "r") if how == "r" else kvwal.follow(store, pin=False))
            first(store)
            with pytest.raises(kvwal.StoreRemovedError if goes_on else kvwal.CorruptionError):
                read(live)
            assert live[b"else001"] == b"x" * 1000
            shutil.rmtree(store)
            os.rename(f"{path}-whole", store)


@pytest.mark.parametrize("first", [take_log, lambda store: (store / "data").unlink()])
@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("how", ["follow", "r"])
def test_one_that_begins_to_follow_what_is_being_taken_apart_finds_no_store_or_damage(
    path: str, monkeypatch: pytest.MonkeyPatch, how: str, first: Callable[[Path], object], goes_on: bool
) -> None:
    store = Path(path)
    with kvwal.open(store, background=False) as db:
        go_on(db, 3)
    first(store)
    monkeypatch.setattr("kvwal.following.doubt.sleep", lambda _: goes_on and shutil.rmtree(store, ignore_errors=True))
    with pytest.raises(kvwal.StoreNotFoundError if goes_on else kvwal.CorruptionError):
        kvwal.follow(store) if how == "follow" else kvwal.open(store, "r")


@pytest.mark.parametrize("retires", [False, True])
def test_true_damage_is_told_beside_a_writer_that_makes_segments_and_retires_them(
    path: str, monkeypatch: pytest.MonkeyPatch, retires: bool
) -> None:
    store, now_s = Path(path), [0.0]
    with (
        kvwal.open(store, segment_bytes=16 << 10, keep_history_s=3600, background=False) as db,
        kvwal.follow(store, pin=False) as live,
    ):
        go_on(db, 1500, b"x" * 1000)
        segments = sorted(store.glob("*.log"))
        segments[-3].unlink()

        def sleep(seconds: float) -> None:
            now_s[0] += seconds
            go_on(db, 20, b"x" * 1000)
            if retires and len(segments) > 4:
                segments.pop(0).unlink()

        monkeypatch.setattr("kvwal.following.doubt.sleep", sleep)
        monkeypatch.setattr("kvwal.following.doubt.monotonic", lambda: now_s[0])
        position = int(segments[-4].stem)
        with pytest.raises(kvwal.CorruptionError, match="this segment is missing"):
            list(live.changes(position))
        assert now_s[0] < 1


@pytest.mark.parametrize("gone", [shutil.rmtree, erase_in_part])
def test_what_pins_an_old_moment_is_told_of_a_store_that_is_gone(path: str, gone: Callable[[Path], object]) -> None:
    store = Path(path)
    with kvwal.open(store, keep_history_s=3600, background=False) as db:
        go_on(db, 20)
        db.checkpoint()
    with kvwal.open(store, "r") as still:
        gone(store)
        assert [pin.purpose for pin in still.pins()] == ["window"]


def test_feeds_that_are_under_way_end_with_their_store(path: str) -> None:
    store = Path(path)
    with kvwal.open(store, segment_bytes=16 << 10, background=False) as db:
        go_on(db, 400, b"x" * 100)
    with kvwal.follow(store) as live:
        began: list[Any] = [live.changes(0), live.commits(), live.history()]
        for each in began:
            next(each)
        erase(store)
        for each in began:
            with pytest.raises(kvwal.StoreRemovedError):
                list(each)


@pytest.mark.parametrize("gone", [shutil.rmtree, erase])
@pytest.mark.parametrize("listing", [1, 2])
def test_a_store_may_go_at_each_look_at_its_log(
    copied: tuple[Path, Path], gone: Callable[[Path], object], listing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = copied
    real, listed = Chain.names, count(1)

    def names(self: Chain) -> list[Seqno]:
        found = real(self)
        if next(listed) == listing:
            gone(store)
        return found

    with kvwal.follow(store) as live:
        monkeypatch.setattr(Chain, "names", names)
        with pytest.raises(kvwal.StoreRemovedError):
            list(live.versions(b"lost050"))


def test_a_store_that_goes_while_one_begins_to_follow_it_was_never_there(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, copy = copied
    real = Keeping.refresh
    gone: list[Callable[[], object]] = [lambda: put_in_place(copy, store), lambda: erase_in_part(store)]

    def refresh(self: Keeping) -> None:
        if gone:
            gone.pop(0)()
        real(self)

    monkeypatch.setattr(Keeping, "refresh", refresh)
    with pytest.raises(kvwal.StoreNotFoundError):
        kvwal.follow(store)
    assert not gone


def test_files_that_were_written_over_in_place_say_less_than_is_shown(copied: tuple[Path, Path]) -> None:
    """As `cp copy/* store/` does: the page file is the same, and its newest segment ends before what is shown."""
    store, copy = copied
    with kvwal.follow(store, pin=False) as live:
        live.refresh()
        for each in copy.iterdir():
            if each.is_file():
                shutil.copy(each, store / each.name)
        with kvwal.open(store, background=False, segment_bytes=16 << 10) as db:
            go_on(db, 40, b"x" * 3000)
            assert len(list(store.glob("*.log"))) > 1
            with pytest.raises(kvwal.StoreRemovedError):
                live.refresh()
            assert live.seqno == 120


def test_a_store_that_is_replaced_while_one_begins_to_follow_it(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, copy = copied
    with kvwal.open(store, background=False) as db:
        db.checkpoint()
    real = Watch.look
    replaced: list[int] = []

    def look(self: Watch, *args: Any, **options: Any) -> bool:
        if not replaced:
            replaced.append(1)
            put_in_place(copy, store)
            with kvwal.open(store, background=False) as db:
                go_on(db, 200)
        return real(self, *args, **options)

    monkeypatch.setattr(Watch, "look", look)
    with kvwal.follow(store) as live, kvwal.open(store, background=False) as db:
        assert replaced
        assert dict(live) == dict(db)


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_store_that_is_moved_aside_for_another_one_is_replaced(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mv shop.kv shop.bad` and a restore do it. The path was relative, and the working directory is another one."""
    monkeypatch.setattr(progress, "_LOOKED_S", 0.05)
    monkeypatch.chdir(tmp_path)
    with kvwal.open("shop.kv") as db:
        db.put(b"k", b"old")
        all_durable(db)
        db.backup("backups")
    with kvwal.follow("shop.kv", **FOLLOWERS[kind]) as live, kvwal.open("shop.kv", "r") as still:
        monkeypatch.chdir("/")
        os.rename(tmp_path / "shop.kv", tmp_path / "shop.bad")
        time.sleep(0.06)
        # Nothing is there, as where a disk is away; then something that is no store.
        live.refresh()
        (tmp_path / "shop.kv").mkdir()
        time.sleep(0.06)
        live.refresh()
        assert live.lag().commits == 0
        (tmp_path / "shop.kv").rmdir()
        kvwal.restore(tmp_path / "backups", tmp_path / "shop.kv")
        with kvwal.open(tmp_path / "shop.kv") as db:
            after = db.put(b"k", b"new")
            for call in (lambda: live.wait(after + 9, 5), live.lag, live.refresh, live.refresh):
                time.sleep(0.06)
                with pytest.raises(kvwal.StoreRemovedError):
                    call()
            if kind == "max_lag_s":
                time.sleep(0.2)
                with pytest.raises(kvwal.StoreRemovedError):
                    live.get(b"k")
            else:
                assert live[b"k"] == b"old"
            with pytest.raises(kvwal.StoreRemovedError):
                still.engine.progress.refresh()  # type: ignore[attr-defined]  # it is read as a follower reads
        # It is there again.
        shutil.rmtree(tmp_path / "shop.kv")
        os.rename(tmp_path / "shop.bad", tmp_path / "shop.kv")
        live.refresh()
        assert live[b"k"] == b"old"
