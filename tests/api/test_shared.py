"""One open store for each directory and process: found by any path, counted, closed by its last holder."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import run
from store_fixtures import interrupted_at, problems_of, run_threads

import kvwal
import kvwal.aio
from kvwal import ClosedError, LockedError, ReentrancyError, Store, UsageError
from kvwal.api import shared as module
from kvwal.engine import engine as engine_module
from kvwal.testing import SimulatedDisk

OPTIONS: dict[str, Any] = {"durability": "os", "background": False}


def shares() -> int:
    return len(module._registry.shares)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    assert not shares()
    yield
    assert not shares()
    assert not module._registry.dropped
    assert not module._registry.lock._is_owned()


def assert_closed(path: Path) -> None:
    kvwal.open(path, "w", background=False).close()


def test_a_store_is_found_by_any_path_of_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.kv"
    (tmp_path / "link.kv").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    with kvwal.shared(path) as one, kvwal.shared("a.kv") as two, kvwal.shared(b"./link.kv/", "w") as three:
        one[b"k"] = b"v"
        assert two[b"k"] == three[b"k"] == b"v"
        assert one.engine is two.engine is three.engine
        assert isinstance(one, Store)
        assert "3" in repr(one)
        path.rename(tmp_path / "moved.kv")
        with kvwal.shared("moved.kv") as four, kvwal.shared("a.kv") as other:
            assert four[b"k"] == b"v"
            assert not other
        with pytest.raises(LockedError):
            kvwal.open("moved.kv")
    assert_closed(tmp_path / "moved.kv")
    assert_closed(path)


def test_only_the_last_close_closes_and_each_holder_is_closed_by_its_own(tmp_path: Path) -> None:
    holders = [kvwal.shared(tmp_path / "a.kv", **OPTIONS) for _ in range(3)]
    snapshot = holders[0].snapshot()
    for number, holder in enumerate(holders):
        holder[b"k"] = b"%d" % number
        for _ in range(2):
            holder.close()
        assert holder.closed
        uses: list[Callable[[], Any]] = [
            lambda holder=holder: holder[b"k"],
            lambda holder=holder: holder.get(b"k"),
            lambda holder=holder: holder.put(b"k", b""),
            lambda holder=holder: holder.update({b"k": b""}),
            lambda holder=holder: list(holder),
            lambda holder=holder: len(holder),
            lambda holder=holder: b"k" in holder,
            lambda holder=holder: holder.snapshot(),
            lambda holder=holder: holder.transaction(),
            lambda holder=holder: holder.run(len),
            lambda holder=holder: list(holder.changes()),
            lambda holder=holder: holder.__enter__(),
        ]
        for use in uses:
            with pytest.raises(ClosedError):
                use()
        assert repr(holder).endswith("closed>")
        assert all(not other.closed for other in holders[number + 1 :])
        if number < 2:
            assert not snapshot, "it goes on until the store is closed"
    with pytest.raises(ClosedError):
        len(snapshot)
    with kvwal.open(tmp_path / "a.kv", "r") as db:
        assert db[b"k"] == b"2"


def test_what_was_made_with_a_holder_goes_on_until_the_last_one_is_closed(tmp_path: Path) -> None:
    one, other = (kvwal.shared(tmp_path / "s", durability="os") for _ in range(2))
    table, snapshot, feed = one.table("t", str, int), one.snapshot(), one.consumer("mailer", timeout_s=0)
    table["a"] = 1
    one.close()
    with pytest.raises(ClosedError):
        one.table("t", str, int)
    table["b"] = 2
    assert dict(other.table("t", str, int)) == {"a": 1, "b": 2}
    assert dict(snapshot) == {}
    other.sync()
    assert len(next(feed).changes) == 2
    other.close()
    for use in (lambda: table.put("c", 3), lambda: table["a"], lambda: snapshot.get(b"a"), lambda: next(feed)):
        with pytest.raises(ClosedError):
            use()


def test_other_options_than_those_of_the_open_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.shared(path, durability="os", cache_bytes=1 << 20) as db:
        for flag, options, text in (
            ("c", {}, "durability='os', and 'commit' is asked for"),
            ("c", {"durability": "os", "cache_bytes": 2 << 20}, "cache_bytes=1048576, and 2097152 is asked for"),
            ("r", {"durability": "os"}, "not only to read"),
            ("n", {"durability": "os"}, 'flag "n" cannot erase it'),
        ):
            with pytest.raises(UsageError, match=text):
                kvwal.shared(path, flag, **options)  # type: ignore[arg-type]
        for wrong in ({"cache": 1}, {"cache_bytes": "1"}):
            with pytest.raises(TypeError):
                kvwal.shared(path, durability="os", **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="flag"):
            kvwal.shared(path, "x")  # type: ignore[arg-type]
        for flag in ("c", "w"):
            kvwal.shared(path, flag, 0o644, durability="os", cache_bytes=1 << 20, parents=True).close()  # type: ignore[arg-type]
        kvwal.shared(path, durability="os").close()
        assert not db.closed
    with kvwal.shared(path, "r"), kvwal.shared(path, "r"), pytest.raises(UsageError, match="only to read"):
        kvwal.shared(path)
    kvwal.shared(path, "n").close()


def test_what_fails_to_open_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(kvwal.StoreNotFoundError):
        kvwal.shared(tmp_path / "missing.kv", "r")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kvwal.FormatError):
        kvwal.shared(tmp_path / "file")
    with kvwal.open(tmp_path / "a.kv"), pytest.raises(LockedError, match="already open in this process"):
        kvwal.shared(tmp_path / "a.kv")


def test_a_store_of_another_file_system_is_shared_too() -> None:
    disk = SimulatedDisk()
    with kvwal.shared("/a", files=disk, background=False) as one, kvwal.shared("/a/", files=disk) as two:
        assert one.engine is two.engine
        with kvwal.shared("/b", files=disk, background=False) as other:
            assert other.engine is not one.engine


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
@pytest.mark.parametrize("background", [False, True])
def test_threads_that_open_close_and_drop_share_and_never_meet_a_lock(
    tmp_path: Path, seed: int, background: bool
) -> None:
    paths = [tmp_path / "a.kv", tmp_path / "b.kv"]
    interval_s = sys.getswitchinterval()

    def work(number: int) -> int:
        rng = random.Random(seed + number)
        for turn in range(300):
            db = kvwal.shared(rng.choice(paths), durability="os", background=background)
            db.add(b"n", 1)
            db.put(b"%d %d" % (number, turn), b"")
            if rng.random() < 0.6:
                db.close()
            del db
        return 300

    sys.setswitchinterval(1e-5)
    try:
        total = sum(run_threads(*(lambda number=number: work(number) for number in range(6))))
    finally:
        sys.setswitchinterval(interval_s)
    found = 0
    for path in paths:
        with kvwal.shared(path) as db:
            assert not problems_of(db)
            found += db.add(b"n", 0)
    assert found == total


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_holders_that_are_collected_count_down(tmp_path: Path) -> None:
    one, two = kvwal.shared(tmp_path / "a.kv"), kvwal.shared(tmp_path / "a.kv")
    one[b"k"] = b"v"
    snapshot = one.snapshot()
    del one
    gc.collect()
    assert two[b"k"] == snapshot[b"k"] == b"v"
    two.close()
    assert snapshot[b"k"] == b"v", "it still holds the store"
    with pytest.raises(LockedError):
        kvwal.open(tmp_path / "a.kv")
    del snapshot
    gc.collect()
    assert_closed(tmp_path / "a.kv")
    with kvwal.shared(tmp_path / "a.kv") as again:
        assert again[b"k"] == b"v"


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_a_holder_may_be_collected_in_any_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finalizer then runs in a thread that owns the registry's lock, and waits for nothing."""
    registry = module._registry
    find = registry._find

    def collecting(path: str, options: Any) -> Any:
        forgotten.clear()
        assert registry.lock._is_owned()
        assert len(registry.dropped) == 1
        return find(path, options)

    forgotten = [kvwal.shared(tmp_path / "a.kv", **OPTIONS)]
    monkeypatch.setattr(module._Registry, "_find", lambda self, path, options: collecting(path, options))
    with kvwal.shared(tmp_path / "b.kv", **OPTIONS):
        assert_closed(tmp_path / "a.kv")


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_a_finalizer_leaves_a_store_alone_that_another_thread_is_closing(tmp_path: Path) -> None:
    forgotten = [kvwal.shared(tmp_path / "a.kv", durability="os")]
    engine = forgotten[0].engine
    owned, done = threading.Event(), threading.Event()

    def closing() -> None:
        with engine.lock:
            owned.set()
            done.wait(20)

    thread = threading.Thread(target=closing)
    thread.start()
    owned.wait(20)
    forgotten.clear()
    assert not engine.is_closed
    assert shares() == 1
    done.set()
    thread.join()
    with kvwal.shared(tmp_path / "a.kv", **OPTIONS) as db:
        assert db.engine is not engine
    assert engine.is_closed
    before = list(engine_module._abandoned)
    assert engine.abandon(), "it is let go of already"
    assert engine_module._abandoned == before


def test_a_close_from_within_a_section_is_finished_by_the_call_that_it_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = module._Registry._find
    other = kvwal.shared(tmp_path / "a.kv", **OPTIONS)
    refused = []

    def closing(self: Any, path: str, options: Any) -> Any:
        other.close()
        try:
            kvwal.shared(tmp_path / "c.kv")
        except ReentrancyError as error:
            refused.append(error)
        return find(self, path, options)

    monkeypatch.setattr(module._Registry, "_find", closing)
    with kvwal.shared(tmp_path / "b.kv", **OPTIONS):
        assert_closed(tmp_path / "a.kv")
    assert refused


def use(path: Path) -> None:
    kvwal.shared(path, **OPTIONS).close()


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_an_interruption_anywhere_leaves_nothing_that_a_later_call_does_not_finish(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    use(path)
    step, interrupted = 1, 0
    while interrupted_at(step, lambda: use(path)) is not None:
        interrupted += 1
        gc.collect()
        use(path)
        assert not shares(), step
        assert_closed(path)
        # Opening has 2,000 places of its own.
        step += max(1, step // 12)
    assert interrupted > 60


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_an_interruption_anywhere_of_one_holder_leaves_the_other_ones(tmp_path: Path) -> None:
    with kvwal.shared(tmp_path / "a.kv", **OPTIONS) as other:
        (share,) = module._registry.shares.values()
        step = 1
        while interrupted_at(step, lambda: use(tmp_path / "a.kv")) is not None:
            assert len(share.holders) == 1, step
            step += 1
        assert step > 200
        other[b"k"] = b"v"
    assert_closed(tmp_path / "a.kv")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_none_and_opens_its_own(tmp_path: Path) -> None:
    with kvwal.shared(tmp_path / "a.kv") as db:
        owned = threading.Event()

        def hold() -> None:
            with module._registry.lock:
                owned.set()
                done.wait(20)

        done = threading.Event()
        thread = threading.Thread(target=hold)
        thread.start()
        owned.wait(20)
        pid = os.fork()
        if not pid:
            code = 1
            signal.alarm(20)
            try:
                with pytest.raises(kvwal.ForkedError):
                    db.get(b"k")
                db.close()
                with pytest.raises(kvwal.ForkedError):
                    db.get(b"k")
                with kvwal.shared(tmp_path / "b.kv") as mine:
                    mine[b"k"] = b"v"
                assert not shares()
                with pytest.raises(LockedError):
                    kvwal.shared(tmp_path / "a.kv")
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        done.set()
        thread.join()
        db[b"k"] = b"v"


def test_the_store_is_closed_when_the_interpreter_exits(tmp_path: Path) -> None:
    program = "import sys, kvwal\nheld = [kvwal.shared(sys.argv[1]) for _ in range(2)]\nheld[0][b'k'] = b'v'"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "a.kv")], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    with kvwal.open(tmp_path / "a.kv") as db:
        assert db[b"k"] == b"v"
        assert "clean" in db.recovery.detail


def test_loops_threads_and_tasks_share_a_store(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"

    async def main(number: int) -> None:
        async with kvwal.aio.shared(path, **OPTIONS) as one, kvwal.aio.shared(path, **OPTIONS) as two:
            await asyncio.gather(*(each.add(b"n", 1) for each in (one, two) for _ in range(50)))
            assert one.store.engine is two.store.engine
            await one.close()
            assert await two.add(b"n", 0) >= 100

    def work() -> None:
        for _ in range(20):
            with kvwal.shared(path, **OPTIONS) as db:
                db.add(b"n", 1)

    run_threads(work, *(lambda number=number: run(main(number)) for number in range(3)))
    with kvwal.open(path) as db:
        assert db.add(b"n", 0) == 320
