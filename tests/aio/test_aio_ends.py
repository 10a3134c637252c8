"""The store for asyncio among loops, threads, signals and processes: clean ends, whatever comes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import SLOW_S, Gate, GatedFile, GatedFiles, ready, run
from wrapped_files import WrappedFiles

import kvwal
import kvwal.aio
import kvwal.aio.workers
from kvwal.aio import AsyncStore, committed_seqno
from kvwal.aio.committer import Committer
from kvwal.aio.workers import Workers, to_the_end
from kvwal.testing import SimulatedDisk

# -- loops, threads, processes ----------------------------------------------------------------


def test_another_loop_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"a", b"1")

            async def elsewhere() -> None:
                for use in (lambda: db.put(b"b", b""), db.sync, db.count, db.checkpoint):
                    with pytest.raises(kvwal.UsageError, match="another event loop"):
                        await use()
                for call in (db.scan, db.snapshot, db.transaction):
                    with pytest.raises(kvwal.UsageError, match="another event loop"):
                        call()
                with pytest.raises(kvwal.UsageError):
                    await db.close()

            await asyncio.to_thread(asyncio.run, elsewhere())
            assert await db.get(b"a") == b"1"
            assert await db.get(b"b") is None

    run(main())


def test_several_loops_and_threads_share_a_store(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as store:

        async def work(name: bytes) -> None:
            async with AsyncStore(store) as db:
                assert db.store is store
                await asyncio.gather(*(db.put(b"%s%d" % (name, number), b"") for number in range(200)))

        def put(name: bytes) -> None:
            for number in range(50):
                store.put(b"%s%d" % (name, number), b"")

        threads = [threading.Thread(target=lambda name=name: asyncio.run(work(name))) for name in (b"a", b"b", b"c")]
        threads += [threading.Thread(target=put, args=(name,)) for name in (b"d", b"e")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store) == 700
        assert not store.closed


def test_without_a_loop_there_is_no_store_for_it(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as store, pytest.raises(RuntimeError, match="no running event loop"):
        AsyncStore(store)


async def ended(making: Any) -> Any:
    """What it returns or raises. What waits for ever may not be awaited: some of it cannot be cancelled either."""
    task = asyncio.ensure_future(making)
    done, _ = await asyncio.wait([task], timeout=SLOW_S / 3)
    assert done, "it waits for ever"
    return task.result() if task.exception() is None else task.exception()


def filled(store: kvwal.Store) -> None:
    """Keys on pages of which few are in memory: most reads are a worker's."""
    store.update({b"%04d" % number: b"x" * 500 for number in range(2000)})
    store.checkpoint()


def test_after_its_close_a_wrapper_refuses_commits_of_what_was_begun_before(tmp_path: Path) -> None:
    async def main(store: kvwal.Store) -> None:
        db = AsyncStore(store)
        txns = [db.transaction() for _ in range(2)]
        for txn in txns:
            txn.put(b"txn", b"")
        assert await txns[0].commit() == 1

        async def large() -> None:
            async with db.batch() as batch:
                for number in range(3000):
                    batch.put(b"%d" % number, b"")

        # A worker has it when the wrapper is closed.
        batch = asyncio.ensure_future(large())
        await asyncio.sleep(0)
        await db.close()
        for late in (batch, txns[1].commit(), db.put(b"a", b""), db.sync()):
            assert isinstance(await ended(late), kvwal.ClosedError)
        assert store.last_seqno == 1
        store.put(b"after", b"")

    with kvwal.open(tmp_path / "s") as store:
        run(main(store))


def test_after_its_close_a_wrapper_reads_nothing_be_it_cached_or_not(tmp_path: Path) -> None:
    async def main(store: kvwal.Store) -> None:
        db = AsyncStore(store)
        table = db.table("t", str, str)
        await table.put("a", "1")
        await db.put(b"a", b"1")
        assert await db.get(b"a") == b"1"
        closing = asyncio.ensure_future(db.close())
        await asyncio.sleep(0)
        for closed in (False, True):
            of_store = (lambda: db.get(b"a"), lambda: db.get(b"a", b"x"), lambda: db.get(b"b"), lambda: db.get_many([]))
            for read in (*of_store, lambda: table.get("a"), lambda: table.get_many(["a"])):
                with pytest.raises(kvwal.ClosedError):
                    await read()
            assert closing.done() is closed
            await closing
        assert store[b"a"] == b"1"
        async with AsyncStore(store) as other:
            assert await other.get(b"a") == b"1"

    with kvwal.open(tmp_path / "s", durability="os") as store:
        run(main(store))


def test_what_was_begun_before_a_wrapper_was_closed_is_read_on(tmp_path: Path) -> None:
    async def main(store: kvwal.Store) -> None:
        db = AsyncStore(store)
        txn, snapshot, scan = db.transaction(), db.snapshot(), db.scan()
        await db.close()
        assert await ended(txn.get(b"0100")) == b"x" * 500
        assert await ended(snapshot.get(b"1000")) == b"x" * 500
        assert await ended(asyncio.gather(*(snapshot.get(b"%04d" % number) for number in range(0, 2000, 100))))
        assert len(await ended(read_all(scan))) == 2000
        await snapshot.close()

    async def read_all(scan: Any) -> list[Any]:
        return [pair async for pair in scan]

    with kvwal.open(tmp_path / "s") as store:
        filled(store)
    before = threading.active_count()
    with kvwal.open(tmp_path / "s", background=False) as store:
        run(main(store))
        while threading.active_count() > before:
            threading.Event().wait(0.01)


def test_a_transaction_keeps_the_wrapper_that_it_was_begun_with(tmp_path: Path) -> None:
    async def main(store: kvwal.Store) -> None:
        txn, other, snapshot = begun(store)
        gc.collect()
        txn.put(b"a", b"1")
        assert await ended(txn.commit()) == store.last_seqno
        assert await ended(other.get(b"0100")) == b"x" * 500
        del txn, other
        gc.collect()
        assert await ended(snapshot.get(b"1000")) == b"x" * 500

    def begun(store: kvwal.Store) -> tuple[Any, ...]:
        db = AsyncStore(store)
        return db.transaction(), db.transaction(), db.snapshot()

    with kvwal.open(tmp_path / "s") as store:
        filled(store)
    with kvwal.open(tmp_path / "s") as store:
        run(main(store))


def test_a_loop_that_is_stopped_and_closed_with_commits_pending_leaves_the_store_usable(tmp_path: Path) -> None:
    files: Any = GatedFiles()
    gate: Gate = files.gate
    with kvwal.open(tmp_path / "s", files=files, background=False) as store:
        loop = asyncio.new_event_loop()

        async def main() -> None:
            db = AsyncStore(store)
            gate.close()
            tasks.append(loop.create_task(db.put(b"begun", b"")))
            await gate.reached()
            tasks.append(loop.create_task(db.put(b"waiting", b"")))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[Any]] = []
        loop.run_until_complete(main())
        for task in tasks:
            # The test destroys them on purpose.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gate.open()
        store.put(b"after", b"")
        assert sorted(store) == [b"after", b"begun"]


def test_tasks_that_are_pending_when_the_loop_ends_are_settled(tmp_path: Path) -> None:
    """asyncio.run cancels what is left: no hang, and nothing half-known."""
    outcomes: list[int | None] = []

    async def put(db: AsyncStore, key: bytes) -> None:
        try:
            await db.put(key, b"")
        except asyncio.CancelledError as error:
            outcomes.append(committed_seqno(error))
            raise

    async def main(store: kvwal.Store) -> None:
        db = AsyncStore(store)
        for number in range(50):
            asyncio.ensure_future(put(db, b"%d" % number))  # noqa: RUF006
            if number == 25:
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    with kvwal.open(tmp_path / "s") as store:
        asyncio.run(main(store))
        assert len(store) == sum(seqno is not None for seqno in outcomes) + store.last_seqno - len(
            [seqno for seqno in outcomes if seqno is not None]
        )


def python(source: str, *args: object, timeout_s: float = SLOW_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, args)], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_a_program_that_forgets_to_close_ends_cleanly(tmp_path: Path) -> None:
    source = """
import asyncio, sys, kvwal.aio
async def main():
    global db, left
    db = await kvwal.aio.open(sys.argv[1])
    await asyncio.gather(*(db.put(b"%d" % n, b"") for n in range(100)))
    [key async for key in db]
    left = asyncio.ensure_future(db.put(b"left", b""))
asyncio.run(main())
print("end")
"""
    result = python(source, tmp_path / "s")
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
    with kvwal.open(tmp_path / "s") as db:
        assert db.recovery.cut_bytes == 0
        assert len(db) >= 100


def test_a_forgotten_store_warns_and_lets_its_threads_end(tmp_path: Path) -> None:
    async def main() -> None:
        before = threading.active_count()
        db = await kvwal.aio.open(tmp_path / "s", background=False)
        await db.put(b"a", b"")
        await db.first()
        gc.collect()
        with pytest.warns(ResourceWarning, match="never closed"):
            del db
        while threading.active_count() > before:
            await asyncio.sleep(0.01)
        async with kvwal.aio.open(tmp_path / "s") as db:
            assert await db.get(b"a") == b""

    run(main())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_keyboard_interrupt_ends_the_program_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    source = """
import asyncio, sys, kvwal.aio
async def main():
    async with kvwal.aio.open(sys.argv[1]) as db:
        async def work(name):
            number = 0
            while True:
                seqno = await db.put(b"%d.%d" % (name, number), b"")
                number += 1
                acknowledged[name] = number
        print("ready", flush=True)
        await asyncio.gather(*(work(name) for name in range(50)))
acknowledged = {}
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print(*(acknowledged[name] for name in range(50)))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SLOW_S)
    assert process.returncode == 0, err
    assert err == ""
    with kvwal.open(tmp_path / "s", "r") as db:
        for name, count in enumerate(map(int, out.split())):
            assert all(b"%d.%d" % (name, number) in db for number in range(count))


class _CancelledWhenLookedAt(asyncio.Future):  # type: ignore[type-arg]  # it has parameters only for a type checker
    """Every `every`th look at a future that is pending is followed by its cancellation.

    That is what `asyncio.run` does to the main task, and through it to all that it awaits, out of its handler of
    SIGINT: between any two instructions of the loop's thread.
    """

    every = 3
    looks = 0

    def _looked(self, answer: bool) -> bool:
        if not super().done():
            type(self).looks += 1
            if self.looks % self.every == 0:
                self.cancel()
        return answer

    def done(self) -> bool:
        return self._looked(super().done())

    def cancelled(self) -> bool:
        return self._looked(super().cancelled())


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_cancellation_out_of_a_signal_handler_is_as_good_as_any(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_CancelledWhenLookedAt, "every", every)
    complaints: list[dict[str, Any]] = []
    written: set[int] = set()

    async def put(db: AsyncStore, number: int) -> None:
        try:
            await db.put(b"%d" % number, b"")
        except asyncio.CancelledError as error:
            if committed_seqno(error) is None:
                raise
        written.add(number)

    def future_for(module: str, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        # Not for asyncio's own: it looks first, and then sets.
        return _CancelledWhenLookedAt(loop=loop) if module.startswith("kvwal.") else asyncio.Future(loop=loop)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with kvwal.aio.open(tmp_path / "s", max_pending_commits=5) as db:
            await db.put(b"a", b"")
            committer = db._committer
            monkeypatch.setattr(loop, "create_future", lambda: future_for(sys._getframe(1).f_globals["__name__"], loop))
            puts = [asyncio.ensure_future(put(db, number)) for number in range(40)]
            reads = [asyncio.ensure_future(db.first()) for _ in range(40)]
            ends = [asyncio.ensure_future(committer.drain()) for _ in range(4)]
            await asyncio.wait([*puts, *reads, *ends])
            monkeypatch.undo()
            assert all(task.cancelled() or task.exception() is None for task in (*puts, *reads, *ends))
            assert (committer.pending_commits, committer.pending_bytes, len(committer._turns)) == (0, 0, 0)
            await db.put(b"b", b"")

    run(main())
    assert complaints == []
    with kvwal.open(tmp_path / "s", "r") as db:
        assert {number for number in range(40) if b"%d" % number in db} == written
    assert _CancelledWhenLookedAt.looks


def test_an_interruption_while_results_go_out_leaves_no_task_asleep(tmp_path: Path) -> None:
    """KeyboardInterrupt out of the loop itself; the loop is run again afterwards."""

    class Struck:
        """A future at whose turn a signal comes, twice."""

        def __init__(self, future: Any) -> None:
            self._future = future
            self._strikes = 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._future, name)

        def set_result(self, result: Any) -> None:
            if self._strikes:
                self._strikes -= 1
                raise KeyboardInterrupt
            self._future.set_result(result)

    with kvwal.open(tmp_path / "s") as store:
        loop = asyncio.new_event_loop()
        tasks: list[asyncio.Task[Any]] = []

        async def main() -> None:
            db = AsyncStore(store)
            committer = db._committer
            work = committer._work

            def struck(group: Any) -> None:
                work(group)
                request = list(group.entries)[10]
                future, size = group.entries[request]
                group.entries[request] = (Struck(future), size)

            committer._work = struck  # type: ignore[method-assign]
            tasks.extend(loop.create_task(db.put(b"%d" % number, b"")) for number in range(20))
            await asyncio.wait(tasks)
            await db.close()

        whole = loop.create_task(main())
        interrupted = 0
        while not whole.done():
            try:
                loop.run_until_complete(whole)
            except KeyboardInterrupt:
                interrupted += 1
        loop.close()
        assert interrupted == 2
        assert sorted(task.result() for task in tasks) == list(range(1, 21))


def interrupted_once(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, *, call: int = 1) -> list[Any]:
    """At an entry of this function, at first the next one, a signal comes; what is returned is empty then."""
    function = getattr(where, name)
    left = [KeyboardInterrupt] * call

    def struck(*args: Any) -> Any:
        if left:
            interruption = left.pop()
            if not left:
                raise interruption
        return function(*args)

    monkeypatch.setattr(where, name, struck)
    return left


def run_again(main: Any) -> int:
    """Run it in a loop that is run again after each interruption. How many came."""
    loop = asyncio.new_event_loop()
    whole = loop.create_task(main)
    interrupted = 0
    while not whole.done():
        try:
            loop.run_until_complete(whole)
        except KeyboardInterrupt:
            interrupted += 1
    loop.close()
    whole.result()
    return interrupted


def test_an_interruption_of_what_brings_results_leaves_no_task_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        workers = Workers(asyncio.get_running_loop())
        try:
            for run_it in (workers.submit, to_the_end):
                interrupted_once(monkeypatch, kvwal.aio.workers, "resolve")
                assert await ended(run_it(int, 1)) == ((1, None) if run_it is to_the_end else 1)
            # A task that waits to the end is cancelled with all, as at the end of `asyncio.run`.
            left = interrupted_once(monkeypatch, Workers, "_answer")
            task = asyncio.ensure_future(workers.to_the_end(int, 2))
            while left:
                await asyncio.sleep(0)
            task.cancel()
            assert (await ended(task))[0] == 2
            assert workers._waiting == 0
        finally:
            workers.stop()

    assert run_again(main()) == 3


@pytest.mark.parametrize("call", [1, 2], ids=["the hand-over", "the end"])
def test_a_close_sees_the_commits_of_which_an_interruption_kept_it_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    async def main() -> None:
        db = await kvwal.aio.open(tmp_path / "s", background=False)
        interrupted_once(monkeypatch, Committer, "_go_on", call=call)
        put = asyncio.ensure_future(db.put(b"a", b"1"))
        while not interrupted:
            await asyncio.sleep(0)
        put.cancel()
        assert await ended(db.close()) is None
        assert await ended(asyncio.wait([put])) == ({put}, set())
        assert db.store.closed

    interrupted: list[bool] = []
    loop = asyncio.new_event_loop()
    whole = loop.create_task(main())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(whole)
    interrupted.append(True)
    loop.run_until_complete(whole)
    loop.close()
    with kvwal.open(tmp_path / "s", "r") as store:
        # The first one keeps it from being begun.
        assert list(store.items()) == [(b"a", b"1")][: call - 1]


_INTERRUPTED_ANYWHERE = """
import asyncio, gc, sys
import kvwal, kvwal.aio.committer, kvwal.aio.store
from kvwal.aio import AsyncStore, committed_seqno

FILES = (kvwal.aio.committer.__file__, kvwal.aio.store.__file__)
DEADLINE_S = float(sys.argv[2])

class Interruption:
    # By a signal handler that raises, at the nth line of these files that the loop's thread comes to, or call in them.
    def __init__(self, nth):
        self.left, self.at = nth, None

    def enter(self, frame, event, arg):
        return self.step(frame, event, arg) if frame.f_code.co_filename in FILES else None

    def step(self, frame, event, arg):
        if event in ("call", "line"):
            self.left -= 1
            if not self.left:
                self.at = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                sys.settrace(None)
                raise SystemExit
        return self.step

def run(loop, making, what):
    stop = loop.call_later(DEADLINE_S, loop.stop)
    try:
        return loop.run_until_complete(making)
    except RuntimeError as error:
        sys.exit(f"{what} does not end: {error}")
    finally:
        stop.cancel()

async def made(store):
    return AsyncStore(store, max_pending_commits=2)

async def put(db, key):
    async with db.transaction() as txn:
        txn.put(key + b"a", b"")
        txn.put(key + b"b", b"")

async def work(db, tasks, nth):
    for number in range(5):
        tasks[b"%d.%d" % (nth, number)] = asyncio.ensure_future(put(db, b"%d.%d" % (nth, number)))
    asyncio.ensure_future(db.sync())
    await asyncio.sleep(0)
    # One in its turn, and, in the next step, one that is begun.
    tasks[b"%d.4" % nth].cancel()
    await asyncio.sleep(0)
    tasks[b"%d.0" % nth].cancel()
    await asyncio.wait(tasks.values())
    await db.close()

def interrupted(store, nth):
    loop, tasks = asyncio.new_event_loop(), {}
    # It would tell of what was interrupted.
    loop.set_exception_handler(lambda loop, context: None)
    db = run(loop, made(store), "the beginning")
    interruption = Interruption(nth)
    main = loop.create_task(work(db, tasks, nth))
    sys.settrace(interruption.enter)
    try:
        run(loop, main, "the work")
    except SystemExit:
        if interruption.at is None:
            raise
    finally:
        sys.settrace(None)
    at = interruption.at
    # As `asyncio.run` at its end.
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        run(loop, asyncio.wait(left), f"a task, after {at},")
    run(loop, db.close(), f"the close, after {at},")
    assert (db.pending_commits, db._committer.pending_bytes) == (0, 0), at
    for key, task in tasks.items():
        there = key + b"a" in store
        assert (key + b"b" in store) is there, at
        error = run(loop, told(task), "a task that is done")
        if not isinstance(error, SystemExit):
            assert there is (error is None or committed_seqno(error) is not None), (at, key, error)
    loop.close()
    return at

async def told(task):
    try:
        await task
    except BaseException as error:
        return error

# What raises in a finalizer is printed.
gc.disable()
with kvwal.open(sys.argv[1], background=False, durability="os") as store:
    nth = 1
    while interrupted(store, nth) is not None:
        nth += 1
print(nth)
"""


def test_an_interruption_at_any_line_of_a_commit_leaves_no_task_and_no_close_waiting(tmp_path: Path) -> None:
    result = python(_INTERRUPTED_ANYWHERE, tmp_path / "s", SLOW_S, timeout_s=10 * SLOW_S)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 100


@pytest.mark.parametrize("lost", [{1}, {2}, {1, 2}], ids=["the hand-over", "the end", "the hand-over and its timer"])
def test_a_commit_ends_where_an_interruption_comes_as_what_ends_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: set[int]
) -> None:
    go_on, calls = Committer._go_on, [0]

    def struck(committer: Committer) -> None:
        calls[0] += 1
        if calls[0] in lost:
            raise KeyboardInterrupt
        go_on(committer)

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", background=False) as db:
            monkeypatch.setattr("kvwal.aio.committer._LOST_S", 0.01)
            monkeypatch.setattr(Committer, "_go_on", struck)
            puts = {asyncio.ensure_future(db.put(b"a", b"1"))}
            while calls[0] < max(lost):
                await asyncio.sleep(0)
            if len(lost) > 1:
                # It brings those before it to their end.
                await asyncio.sleep(0.01)
                puts.add(asyncio.ensure_future(db.put(b"b", b"1")))
            assert await ended(asyncio.wait(puts)) == (puts, set())

    assert run_again(main()) == len(lost)


def without_threads(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """From here on no thread of this name starts: the names of those that were refused."""
    start = threading.Thread.start
    refused: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


def test_commits_for_which_no_thread_starts_are_refused_and_those_after_them_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            with monkeypatch.context() as patch:
                refused = without_threads(patch, "kvwal-aio-committer")
                for times in (1, 2):
                    tasks = [asyncio.ensure_future(db.put(b"%d" % number, b"")) for number in range(5)]
                    await asyncio.wait(tasks, timeout=SLOW_S)
                    for task in tasks:
                        with pytest.raises(kvwal.RefusedError, match="no thread 'kvwal-aio"):
                            task.result()
                    assert (len(refused), db.pending_commits, db._committer.pending_bytes) == (times, 0, 0)
            assert await db.put(b"a", b"1") == 1
            assert [key async for key in db] == [b"a"]

    run(main())


def test_a_read_for_which_no_thread_starts_is_refused_and_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        workers = Workers(asyncio.get_running_loop())
        done: list[int] = []
        try:
            # More than there are ever threads; and, once they were told to end, those of one job each.
            for stopped in (False, True):
                if stopped:
                    workers.stop()
                with monkeypatch.context() as patch:
                    refused = without_threads(patch, "kvwal-aio-reader")
                    for number in range(8):
                        with pytest.raises(kvwal.RefusedError, match="no thread 'kvwal-aio"):
                            workers.submit(done.append, number)
                    assert len(refused) == 8
                await workers.submit(done.append, 100)
            assert done == [100, 100]
        finally:
            workers.stop()

    run(main())


def test_a_read_for_which_no_further_thread_starts_is_made_by_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        workers = Workers(asyncio.get_running_loop())
        may_end = threading.Event()
        try:
            first = workers.submit(may_end.wait, SLOW_S)
            with monkeypatch.context() as patch:
                refused = without_threads(patch, "kvwal-aio-reader")
                others = [workers.submit(int, number) for number in range(5)]
                assert len(refused) == 5
            may_end.set()
            assert await first
            assert await asyncio.gather(*others) == [0, 1, 2, 3, 4]
        finally:
            may_end.set()
            workers.stop()

    run(main())


@pytest.mark.parametrize("opener", [kvwal.aio.open, kvwal.aio.shared, kvwal.aio.follow])
def test_a_close_for_which_no_thread_starts_is_made_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Any
) -> None:
    async def main() -> None:
        db = await opener(tmp_path / "s")
        with monkeypatch.context() as patch:
            refused = without_threads(patch, "kvwal-aio-task")
            for times in (1, 2):
                with pytest.raises(kvwal.RefusedError, match="no thread 'kvwal-aio-task'"):
                    await db.close()
                assert len(refused) == times
                assert db.closed
            assert not db._store.closed
        with pytest.raises(kvwal.ClosedError):
            await db.first()
        await asyncio.gather(db.close(), db.close())
        assert db._store.closed
        await db.close()
        if opener is not kvwal.aio.follow:
            kvwal.open(tmp_path / "s", "w").close()

    kvwal.open(tmp_path / "s").close()
    run(main())


@pytest.mark.parametrize("opener", [kvwal.aio.open, kvwal.aio.shared, kvwal.aio.follow])
def test_one_whose_close_found_no_thread_says_to_close_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Any
) -> None:
    async def main() -> None:
        db = await opener(tmp_path / "s")
        calls = [lambda: db.get(b"a"), db.first, lambda: db.get_many([b"a"])]
        if opener is not kvwal.aio.follow:
            txn = db.transaction()
            txn.put(b"a", b"")
            calls += [txn.commit, lambda: db.put(b"a", b""), db.sync]
        with monkeypatch.context() as patch:
            without_threads(patch, "kvwal-aio-task")
            with pytest.raises(kvwal.RefusedError):
                await db.close()
        for call in calls:
            with pytest.raises(kvwal.ClosedError, match=r"no thread .* call close\(\) again"):
                await call()
        await db.close()
        # The transaction is over since its commit.
        for call in calls[:3]:
            with pytest.raises(kvwal.ClosedError, match="open it again"):
                await call()

    kvwal.open(tmp_path / "s").close()
    run(main())


@pytest.mark.parametrize("has_started", [False, True])
def test_an_interruption_as_the_thread_of_commits_starts_leaves_no_commit_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_started: bool
) -> None:
    start = threading.Thread.start
    threads: list[threading.Thread] = []

    def interrupt(thread: threading.Thread) -> None:
        if thread.name != "kvwal-aio-committer":
            return start(thread)
        threads.append(thread)
        if has_started or len(threads) > 1:
            start(thread)
        if len(threads) == 1:
            raise KeyboardInterrupt
        return None

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", interrupt)
        async with kvwal.aio.open(tmp_path / "s") as db:
            assert await ended(db.put(b"a", b"1")) == 1
            assert await ended(db.put(b"b", b"2")) == 2

    assert run_again(main()) == 1
    assert len(threads) == 2
    for thread in threads[not has_started :]:
        thread.join(SLOW_S)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_a_forked_child_everything_raises(tmp_path: Path) -> None:
    source = """
import asyncio, os, sys, warnings, kvwal, kvwal.aio
warnings.simplefilter("ignore")
async def main():
    async with kvwal.aio.open(sys.argv[1]) as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        await db.first()
        async with db.batch() as batch:
            for n in range(3):
                batch.put(b"c%d" % n, b"")
        await db.sync()
        feed = db.changes(1)
        assert (await anext(feed)).key == b"c0"
        child = os.fork()
        if not child:
            status = 0
            for use in (lambda: db.put(b"b", b""), lambda: db.get(b"a"), lambda: db.get_many([b"a"]), db.sync,
                        db.first, db.checkpoint, db.count, lambda: anext(feed)):
                try:
                    await use()
                    status = 1
                except kvwal.ForkedError:
                    pass
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        await db.put(b"b", b"2")
        assert await db.count() == 5
        assert (await anext(feed)).key == b"c1"
asyncio.run(main())
"""
    result = python(source, tmp_path / "s")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_close_whose_flush_fails_says_so_once(tmp_path: Path) -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        db = await kvwal.aio.open("/kv", files=disk, durability="os")
        await db.put(b"a", b"1")
        disk.fail("datasync", path="/kv/[0s]*")
        found = await asyncio.gather(db.close(), db.close(), return_exceptions=True)
        assert [type(each) for each in found] == [kvwal.PoisonedError] * 2, "both asked before it was known"
        assert db.closed
        await db.close()

    run(main())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("who", ["a call", "a call of two", "all tasks"])
def test_what_a_cancelled_close_did_not_tell_is_told_by_the_next_one(who: str, fails: bool) -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        gate = Gate()
        files: Any = WrappedFiles(disk, lambda file, name: GatedFile(file, name, gate))
        db = await kvwal.aio.open("/kv", files=files, durability="os", background=False)
        await db.put(b"a", b"1")
        if fails:
            disk.fail("datasync", path="/kv/[0s]*")
        gate.close()
        calls = [asyncio.ensure_future(db.close()) for _ in range(2 if who == "a call of two" else 1)]
        await gate.reached()
        calls[-1].cancel()
        if who == "all tasks":
            closing: Any = db._commits.closing
            closing.cancel()
        await ready()
        gate.open()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert type(found[-1]) is asyncio.CancelledError
        assert db.closed
        if who == "a call of two":
            assert type(found[0]) is (kvwal.PoisonedError if fails else type(None))
        elif fails:
            with pytest.raises(kvwal.PoisonedError):
                await db.close()
        await db.close()

    run(main())


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_close_that_is_cancelled_with_all_tasks_is_made_to_its_end(tmp_path: Path, steps: int) -> None:
    """As the end of `asyncio.run` cancels them: those that wait for the close, and the close itself, at any step."""
    files: Any = GatedFiles()
    gate: Gate = files.gate

    async def main() -> None:
        db = await kvwal.aio.open(tmp_path / "s", files=files, background=False)
        gate.close()
        tasks.append(asyncio.ensure_future(db.put(b"a", b"1")))
        await gate.reached()
        tasks.append(asyncio.ensure_future(db.put(b"b", b"1")))
        await asyncio.sleep(0)
        closes.append(asyncio.ensure_future(db.close()))
        for _ in range(steps):
            await asyncio.sleep(0)
        # What runs when all are cancelled lets the flush go on.
        tasks.append(asyncio.ensure_future(opening()))
        await asyncio.sleep(0)
        stores.append(db)

    async def opening() -> None:
        try:
            await asyncio.sleep(SLOW_S)
        finally:
            gate.open()

    tasks: list[asyncio.Future[Any]] = []
    closes: list[asyncio.Future[None]] = []
    stores: list[AsyncStore] = []
    asyncio.run(main())
    assert closes[0].cancelled()
    assert stores[0].closed
    assert stores[0].store.closed
    with kvwal.open(tmp_path / "s", "r") as db:
        assert dict(db) == {b"a": b"1"}


def test_a_close_whose_task_is_cancelled_before_its_first_step_is_begun_anew(tmp_path: Path) -> None:
    async def main() -> None:
        db = await kvwal.aio.open(tmp_path / "s")
        # What is made by the first step of the close has not begun when that is over.
        closes.append(asyncio.ensure_future(db.close()))
        asyncio.get_running_loop().call_soon(lambda: [each.cancel() for each in asyncio.all_tasks()])
        stores.append(db)
        await asyncio.sleep(SLOW_S)

    closes: list[asyncio.Future[None]] = []
    stores: list[AsyncStore] = []
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert closes[0].cancelled()
    assert stores[0].store.closed
    kvwal.open(tmp_path / "s").close()
