"""Threads that wait for a flush: it wakes one, and each wakes the next, whatever becomes of those between."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from log_rig import LogRig, simulated_disk
from store_fixtures import DEADLINE_S, wait_until

from kvwal.keys import Seqno
from kvwal.log.waiting import Waiting, _Turn


class Log:
    """How far it is on disk."""

    def __init__(self) -> None:
        self.durable = 0
        self.failure: Exception | None = None
        self.waiting = Waiting(self._is_beyond)
        self.woken: list[int] = []
        self.threads: list[threading.Thread] = []

    def _is_beyond(self, seqno: Seqno) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.durable > seqno

    def follow(self, number: int, timeout_s: float | None = None) -> None:
        def wait() -> None:
            if self.waiting.await_beyond(Seqno(0), timeout_s):
                self.woken.append(number)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        self.threads.append(thread)
        wait_until(lambda: len(self.waiting.those) > number, "a thread that waits")

    def flush(self) -> None:
        self.durable = 1
        self.waiting.wake()

    def end(self) -> None:
        for thread in self.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_flush_wakes_one_thread_and_that_one_the_next(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    wakers: list[int] = []
    turn = _Turn.__call__
    monkeypatch.setattr(_Turn, "__call__", lambda self: (wakers.append(threading.get_ident()), turn(self))[1])
    for number in range(5):
        log.follow(number)
    log.flush()
    log.end()
    assert wakers == [threading.get_ident(), *(thread.ident for thread in log.threads[:4])]
    assert sorted(log.woken) == list(range(5))
    assert not log.waiting


def test_what_is_called_is_called_by_the_flush_itself(log: Log) -> None:
    calls: list[int] = []
    log.follow(0)
    for number in range(3):
        log.waiting.when_beyond(Seqno(0), lambda number=number: calls.append(number))  # type: ignore[misc]
    log.flush()
    assert calls == [0, 1, 2]
    log.end()


@pytest.mark.parametrize("end", ["those", "due", "between"])
def test_a_thread_that_has_waited_for_long_enough_stops_none_behind_it(
    log: Log, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the flush; when it is due; and when the flush has it in its hands."""
    came: list[Callable[[], None]] = []

    def wait(turn: _Turn, timeout_s: float | None) -> None:
        # The first one waits for nothing, and ends when the test says so.
        if timeout_s == 0:
            over = threading.Event()
            came.append(over.set)
            assert over.wait(DEADLINE_S)
        else:
            really(turn, timeout_s)

    really = _Turn.wait
    monkeypatch.setattr(_Turn, "wait", wait)
    log.follow(0, timeout_s=0)
    for number in (1, 2, 3):
        log.follow(number)
    wait_until(lambda: came, "the first one")
    if end == "those":
        came[0]()
        wait_until(lambda: not log.threads[0].is_alive(), "its end")
        log.flush()
    elif end == "due":
        pass_on = Waiting.pass_on
        monkeypatch.setattr(Waiting, "pass_on", lambda waiting: None)
        log.flush()
        monkeypatch.setattr(Waiting, "pass_on", pass_on)
        came[0]()
        wait_until(lambda: not log.threads[0].is_alive(), "its end")
        log.waiting.pass_on()
    else:
        first = log.waiting.those.popleft()
        assert isinstance(first, _Turn)
        came[0]()
        wait_until(lambda: not log.threads[0].is_alive(), "its end")
        log.waiting.due.append(first)
        log.flush()
    log.end()
    assert sorted(log.woken)[-3:] == [1, 2, 3]


def test_one_that_is_interrupted_passes_its_turn_on(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    really = _Turn.wait
    main = threading.current_thread()

    def interrupted(turn: _Turn, timeout_s: float | None) -> None:
        if threading.current_thread() is main:
            for number in (1, 2):
                log.follow(number)
            log.flush()
            raise KeyboardInterrupt
        really(turn, timeout_s)

    monkeypatch.setattr(_Turn, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.waiting.await_beyond(Seqno(0), None)
    log.end()
    assert sorted(log.woken) == [1, 2]


@pytest.mark.parametrize("line", range(1, 24))
def test_a_flush_that_is_interrupted_anywhere_loses_no_thread(log: Log, line: int) -> None:
    """The next one wakes those that it left."""
    for number in range(3):
        log.follow(number)
    log.durable = 1
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code not in (Waiting.wake.__code__, Waiting.pass_on.__code__):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        log.waiting.wake()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    assert lines >= line
    log.waiting.wake()
    log.end()
    assert sorted(log.woken) == [0, 1, 2]


def test_one_that_is_interrupted_before_it_waits_holds_up_no_other() -> None:
    """By a real flush of a log, which has no idle mark after it."""
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create()
    waiting: Any = log._waiting
    woken: list[bool] = []
    is_beyond = waiting._is_beyond

    def interrupted(seqno: Seqno) -> bool:
        raise KeyboardInterrupt

    waiting._is_beyond = interrupted
    with pytest.raises(KeyboardInterrupt):
        waiting.await_beyond(Seqno(0), None)
    waiting._is_beyond = is_beyond
    threads = [threading.Thread(target=lambda: woken.append(waiting.await_beyond(Seqno(0), None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiting.those) == 3, "threads that wait")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Waiting, "pass_on", lambda waiting: None)
        rig.fill(log, 1)
    assert woken == []
    rig.fill(log, 1)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert woken == [True] * 3
    assert not waiting


@pytest.mark.parametrize("by", ["flush", "mark", "waiter"])
def test_a_turn_that_was_lost_is_given_again(log: Log, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between the wait and what follows it in its thread can lose one."""
    for number in (0, 1):
        log.follow(number)
    log.durable = 1
    with monkeypatch.context() as patch:
        patch.setattr(Waiting, "pass_on", lambda waiting: None)
        log.waiting.wake()
    assert log.woken == []
    if by == "flush":
        log.waiting.wake()
    elif by == "mark":
        log.waiting.pass_on()
    else:
        assert log.waiting.await_beyond(Seqno(0), 0)
    log.end()
    assert sorted(log.woken) == [0, 1]


def test_all_are_told_of_a_failure(log: Log) -> None:
    errors: list[Any] = []

    def wait() -> None:
        with pytest.raises(ValueError, match="over"):
            log.waiting.await_beyond(Seqno(0), None)
        errors.append(1)

    log.threads = [threading.Thread(target=wait, daemon=True) for _ in range(4)]
    for thread in log.threads:
        thread.start()
    wait_until(lambda: len(log.waiting.those) == 4, "threads that wait")
    log.failure = ValueError("over")
    log.waiting.wake()
    log.end()
    assert errors == [1] * 4


def test_many_that_wait_and_give_up_at_random_are_never_left(log: Log) -> None:
    """Flushes come as fast as they can, and threads give up while they are being woken."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    over = threading.Event()
    seen = [0] * 6

    def follow(number: int) -> None:
        while seen[number] < 1500:
            timeout_s = None if number < 2 else 1e-5 * (number - 2)
            if log.waiting.await_beyond(Seqno(seen[number]), timeout_s):
                seen[number] += 1

    def flush() -> None:
        while not over.is_set():
            log.durable = min(seen) + 1
            log.waiting.wake()

    try:
        log.threads = [threading.Thread(target=follow, args=(number,), daemon=True) for number in range(6)]
        flusher = threading.Thread(target=flush, daemon=True)
        flusher.start()
        for thread in log.threads:
            thread.start()
        log.end()
    finally:
        over.set()
        sys.setswitchinterval(before)
    flusher.join()
    assert seen == [1500] * 6
