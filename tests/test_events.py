"""Listeners: each hears its events in order, and one that fails does not disturb the others."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError
from typing import Any, get_args

import pytest

from kvwal import events
from kvwal.events import CommitGroup, Event, Events, Flush, Listener
from kvwal.keys import Seqno

FLUSH = Flush(Seqno(3), 0.5)
GROUP = CommitGroup(Seqno(1), Seqno(3), 300, True, 0.25)


class Recorder(Listener):
    """Hears of groups and flushes."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def commit_group(self, event: CommitGroup) -> None:
        self.heard.append(event)

    def flush(self, event: Flush) -> None:
        self.heard.append(event)


class Failing(Recorder):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def flush(self, event: Flush) -> None:
        super().flush(event)
        raise self.error


def test_each_event_has_one_method_of_the_listener_and_each_method_an_event() -> None:
    assert set(events._METHODS) == set(get_args(Event))
    methods = {name for name in vars(Listener) if not name.startswith("_")}
    assert sorted(events._METHODS.values()) == sorted(methods)


def test_listeners_hear_in_the_order_they_came_and_only_once() -> None:
    told: list[str] = []

    class Named(Listener):
        def __init__(self, name: str) -> None:
            self.name = name

        def flush(self, event: Flush) -> None:
            told.append(self.name)

    one, two = Named("one"), Named("two")
    source = Events()
    for listener in (one, two, one):
        source.add(listener)
    source.tell(FLUSH)
    assert told == ["one", "two"]
    source.remove(one)
    source.remove(one)
    source.tell(FLUSH)
    assert told == ["one", "two", "two"]


def test_what_a_listener_does_not_define_it_does_not_hear() -> None:
    source, recorder = Events(), Recorder()
    source.add(recorder)
    source.tell(events.Stall("memory", 1.0))
    source.tell(GROUP)
    source.tell(FLUSH)
    assert recorder.heard == [GROUP, FLUSH]


def test_without_a_listener_no_event_need_be_made() -> None:
    source, recorder = Events(), Recorder()
    assert not source.listeners
    source.add(recorder)
    assert source.listeners
    source.remove(recorder)
    assert not source.listeners


def test_a_listener_that_raises_is_logged_and_dropped_and_the_others_hear_on(caplog: Any) -> None:
    failing, recorder = Failing(ValueError("broken")), Recorder()
    source = Events()
    source.add(failing)
    source.add(recorder)
    with caplog.at_level(logging.ERROR, "kvwal"):
        source.tell(FLUSH)
        source.tell(FLUSH)
    assert len(failing.heard) == 1
    assert len(recorder.heard) == 2
    assert list(source.listeners.values()) == [recorder]
    (record,) = caplog.records
    assert record.name == "kvwal"
    assert record.levelno == logging.ERROR
    assert "will hear no more" in record.getMessage()
    assert record.exc_info[1] is failing.error


@pytest.mark.filterwarnings("error")
def test_a_listener_that_only_tasks_can_run_is_logged_and_dropped(caplog: Any) -> None:
    class Later(Recorder):
        async def flush(self, event: Flush) -> None:  # type: ignore[override]  # it is the mistake
            self.heard.append(event)

    source = Events([Later()])
    with caplog.at_level(logging.ERROR, "kvwal"):
        source.tell(FLUSH)
    assert not source.listeners
    (record,) = caplog.records
    assert "Later.flush gave a coroutine" in str(record.exc_info[1])


def test_an_interruption_is_no_fault_of_the_listener(caplog: Any) -> None:
    failing = Failing(KeyboardInterrupt())
    source = Events()
    source.add(failing)
    with pytest.raises(KeyboardInterrupt):
        source.tell(FLUSH)
    assert list(source.listeners.values()) == [failing]
    assert not caplog.records


def test_a_listener_may_leave_or_join_while_it_is_told() -> None:
    source, late = Events(), Recorder()

    class Leaving(Recorder):
        def flush(self, event: Flush) -> None:
            super().flush(event)
            source.remove(self)
            source.add(late)

    leaving = Leaving()
    source.add(leaving)
    source.tell(FLUSH)
    assert (leaving.heard, late.heard) == ([FLUSH], [])
    source.tell(FLUSH)
    assert (leaving.heard, late.heard) == ([FLUSH], [FLUSH])


def test_an_event_cannot_be_changed_by_a_listener() -> None:
    with pytest.raises(FrozenInstanceError):
        FLUSH.seconds = 2.0  # type: ignore[misc]
