"""What the tests of the upper layers share: a store with tiny settings, and a check of all its rules at once."""

from __future__ import annotations

import dis
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import kvwal
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch
from kvwal.log import extension_of

#: The smallest settings there are, so that freezes, rolls and checkpoints happen within a few commits.
TINY: dict[str, Any] = {
    "memtable_bytes": 16 << 10,
    "segment_bytes": 16 << 10,
    "checkpoint_log_bytes": 4 << 10,
    "cache_bytes": 256 << 10,
}

DEADLINE_S = 20.0


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Poll a condition, with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {DEADLINE_S} s"
        tick.wait(0.002)


def run_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run them at once; their results, in order. The first exception of any is raised."""
    results: list[Any] = [None] * len(functions)
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def work(index: int, function: Callable[[], Any]) -> None:
        try:
            barrier.wait(DEADLINE_S)
            results[index] = function()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread did not come to its end"
    if failures:
        raise failures[0]
    return results


def problems_of(db: kvwal.Store) -> list[str]:
    """What `verify` has to say."""
    return [str(problem) for problem in db.verify().problems]


def readers_in(pins: list[kvwal.Pin]) -> list[kvwal.Pin]:
    """Those of readers: the window is always there."""
    return [pin for pin in pins if pin.thread_name]


def check_store(db: kvwal.Store) -> None:
    """Raise AssertionError where a rule of the engine does not hold. Requires: no commit of a caller is under way."""
    engine = db.engine
    state, queue = engine.state, engine.queue
    # The background thread's flush may be.
    wait_until(lambda: not queue.is_busy(), "the end of the last commit")
    version = state.version
    version.memtable._check()
    if version.frozen is not None:
        version.frozen._check()
        assert version.frozen.last_seqno <= version.memtable.last_seqno
    assert state.horizon == state.seqno
    assert version.memtable.last_seqno <= state.seqno
    assert not queue._queue, "a request is still queued"
    assert queue._group is None, "a group is still under way"
    for lock in (state.lock, queue.lock, queue.queue_lock, version.memtable.order.lock):
        assert lock.acquire(False), "a lock is still held"
        lock.release()
        assert not lock._is_owned(), "a lock is still owned"
    engine._succession.release_pages()
    readers = engine.reads.moments.readers.all()
    assert len(version.readers) == sum(reader.version is version for reader in readers)
    assert len(version.memtable.older.readers) == sum(reader.version.memtable is version.memtable for reader in readers)
    oldest = min((reader.seqno for reader in readers if reader.version.memtable is version.memtable), default=None)
    assert version.memtable.older.readers.oldest() == oldest
    pinned = engine._pages.pins.counts()
    assert set(pinned) == {each.tree.meta.generation for each in (version, *(reader.version for reader in readers))}
    # Invariant: a row is the newest published value of its key.
    tables = {token: table for table, token in state.cache._tokens.items()}
    for row, value in list(state.cache.rows.items()):
        table, key = (tables[row[0]], row[1]) if isinstance(row, tuple) else (0, row)
        newest = engine.reads.part(version, table).get(key, state.seqno)
        assert newest == value, f"the row of {key[:20]!r} in table {table} is not its newest value"


def commit_rows(db: kvwal.Store, batch: kvwal.WriteBatch, meta: Mapping[str, str] | None = None) -> None:
    """Commit a batch that writes to tables of the store's own, as it does itself: no user may."""
    writes = EncodedBatch(batch, extension_of(meta))
    db.engine.commit(CommitRequest(writes, sync=db.engine.wants_sync(None)))


class Interruption(KeyboardInterrupt):
    """What a signal handler raises."""


# Where the interpreter looks for pending signals: at the start of a function, at a jump back, after a call. In
# between no handler runs; a `with` block, for one, is never left before its exit was called.
_CHECKED_AFTER = {"JUMP_BACKWARD", "CALL", "CALL_FUNCTION_EX", "CALL_KW"}


@cache
def _is_ours(name: str) -> bool:
    return ("kvwal" in name and "tests" not in name) or "sortedcontainers" in name


@cache
def _instructions(code: Any) -> tuple[list[str], list[int]]:
    """The name of each instruction, and where an exception goes from there; -1: out of the function."""
    names = [dis.opname[op] for op in code.co_code[::2]]
    handlers = [-1] * len(names)
    # Private, and so not in the stubs; there is no public way to ask where an exception goes.
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        for index in range(entry.start // 2, entry.end // 2):
            handlers[index] = entry.target
    return names, handlers


def interrupted_at(step: int, function: Callable[[], object]) -> Interruption | None:
    """Run the function, raising at the step-th place in kvwal where a signal handler could. None if it ended first."""
    left = step
    before: dict[Any, int] = {}
    finalizers: set[Any] = set()

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        code = frame.f_code
        if not _is_ours(code.co_filename):
            return None
        # What is raised in a finalizer is swallowed by the interpreter, and interrupts no call.
        if code.co_name == "__del__" or frame.f_back in finalizers:
            finalizers.add(frame)
            return None
        frame.f_trace_opcodes = True
        # The start of a function is traced as its call, and not as an instruction. A generator has one start.
        place = event == "call" and frame not in before
        if event == "opcode":
            at = frame.f_lasti // 2
            last = before.get(frame, -1)
            before[frame] = at
            # The interpreter raises at the end of the earlier instruction, tracing at the start of this one: only where
            # the same handler is in charge of both is it the same.
            names, handlers = _instructions(code)
            place = last >= 0 and names[last] in _CHECKED_AFTER and handlers[last] == handlers[at]
        if place:
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Interruption
        return trace

    # No finalizer of what an earlier test left behind may run in between, and be the one that is interrupted.
    gc.disable()
    sys.settrace(trace)
    try:
        function()
    except Interruption as interruption:
        return interruption
    finally:
        sys.settrace(None)
        # They keep the frames alive, and those what they held.
        before.clear()
        finalizers.clear()
        gc.enable()
    # One that came while a generator was collected was swallowed by the interpreter: it ended nothing.
    return None if left > 0 else Interruption()
