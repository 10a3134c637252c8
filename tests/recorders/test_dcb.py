"""kvwal's DCB recorder for the library `eventsourcing`: what the library's own cases do not ask."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from eventsourcing.dcb.api import (
    DCBAppendCondition,
    DCBEvent,
    DCBQuery,
    DCBQueryItem,
    DCBSequencedEvent,
)
from eventsourcing.dcb.popo import InMemoryDCBRecorder
from eventsourcing.persistence import DataError, IntegrityError, InterfaceError, ProgrammingError
from hypothesis import given
from hypothesis import strategies as st

import kvwal
from kvwal.eventsourcing import KvwalDCBRecorder, KvwalFactory
from kvwal.eventsourcing.datastore import CHUNK, Datastore
from kvwal.testing import SimulatedDisk, crash_every


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[KvwalFactory]:
    with KvwalFactory({"KVWAL_PATH": str(tmp_path / "store")}) as factory:
        yield factory
    factory.close()


@pytest.fixture
def recorder(factory: KvwalFactory) -> KvwalDCBRecorder:
    return cast(KvwalDCBRecorder, factory.dcb_recorder())


def query(*items: tuple[list[str], list[str]]) -> DCBQuery:
    return DCBQuery([DCBQueryItem(types, tags) for types, tags in items])


def tagged(*tags: str) -> DCBQuery:
    return query(([], list(tags)))


def made(kind: str = "t", *tags: str, data: bytes = b"") -> DCBEvent:
    return DCBEvent(kind, data, list(tags))


def positions(recorder: Any, *arguments: Any, **more: Any) -> list[int]:
    return [each.position for each in recorder.read(*arguments, **more)]


TYPES = st.sampled_from(["a", "b", "c", ""])
TAGS = st.lists(st.sampled_from(["x", "y", "z", ""]), max_size=3)
EVENTS = st.lists(st.builds(DCBEvent, TYPES, st.binary(max_size=3), TAGS), min_size=1, max_size=4)
QUERIES = st.builds(DCBQuery, st.lists(st.builds(DCBQueryItem, st.lists(TYPES, max_size=2), TAGS), max_size=3))
AFTER = st.none() | st.integers(0, 12)


CONDITIONS = st.none() | st.builds(DCBAppendCondition, QUERIES, AFTER)
LIMITS = st.none() | st.integers(0, 3)


@given(st.lists(st.tuples(EVENTS, CONDITIONS, QUERIES, AFTER, LIMITS), max_size=5))
def test_it_answers_as_the_recorder_in_memory_does(steps: list[Any]) -> None:
    model = InMemoryDCBRecorder()
    with kvwal.open("/store", files=SimulatedDisk(seed=0), background=False) as db:
        recorder = KvwalDCBRecorder(Datastore(db).table("dcb"))
        for events, condition, wanted, after, limit in steps:
            outcomes: list[object] = []
            for each in (model, recorder):
                try:
                    outcomes.append(each.append(events, condition))
                except IntegrityError:
                    outcomes.append("refused")
            assert outcomes[0] == outcomes[1]
            expected, found = (each.read(wanted, after=after, limit=limit) for each in (model, recorder))
            assert list(expected) == list(found)
            assert expected.head == found.head


def test_of_many_threads_that_append_under_one_condition_one_succeeds(recorder: KvwalDCBRecorder) -> None:
    outcomes: list[int] = []
    ready = threading.Barrier(8)

    def append(number: int) -> None:
        ready.wait()
        for turn in range(20):
            # Others append what does not matter.
            recorder.append([made("other", f"own{number}")])
            try:
                outcomes.append(recorder.append([made("t", f"seat{turn}")], DCBAppendCondition(tagged(f"seat{turn}"))))
            except IntegrityError:
                pass

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 20
    assert positions(recorder) == list(range(1, 8 * 20 + 21))
    assert positions(recorder, query((["t"], []))) == sorted(outcomes)


def test_the_commit_leader_refuses_what_came_after_the_look_before(
    recorder: KvwalDCBRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that come between the two: few, and more than the leader looks at."""
    for between in (1, 200, 2000):
        for matches in (False, True):
            looks: list[int] = []
            matching = recorder._matching

            def late(
                wanted: Any,
                after: int,
                until: int,
                looks: list[int] = looks,
                between: int = between,
                matches: bool = matches,
                matching: Any = matching,
            ) -> Iterator[DCBSequencedEvent]:
                looks.append(until)
                found = list(matching(wanted, after, until))
                if len(looks) == 1:
                    recorder.append([made("t", "other")] * (between - 1) + [made("t", "seat" if matches else "other")])
                return iter(found)

            monkeypatch.setattr(recorder, "_matching", late)
            last = recorder._events.last()
            condition = DCBAppendCondition(tagged("seat"), after=last)
            if matches:
                with pytest.raises(IntegrityError):
                    recorder.append([made("t", "seat")], condition)
            else:
                assert recorder.append([made("t", "mine")], condition) == last + between + 1
            assert len(looks) == (1 if between == 1 else 2)
            monkeypatch.undo()


def test_what_comes_meanwhile_counts_only_beyond_the_position(
    recorder: KvwalDCBRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.append([made("t", "seat")])

    def late(wanted: Any, after: int, until: int) -> Iterator[DCBSequencedEvent]:
        recorder.append([made("t", "seat")] * 2)
        return iter(())

    monkeypatch.setattr(recorder, "_matching", late)
    assert recorder.append([made("t", "seat")], DCBAppendCondition(tagged("seat"), after=3)) == 4
    with pytest.raises(IntegrityError):
        recorder.append([made("t", "seat")], DCBAppendCondition(tagged("seat"), after=5))


def test_more_events_than_one_read_takes(recorder: KvwalDCBRecorder) -> None:
    count = 3 * CHUNK + 1
    recorder.append([made("t", "all", "odd" if n % 2 else "even") for n in range(count)])
    assert positions(recorder) == positions(recorder, tagged("all")) == list(range(1, count + 1))
    assert positions(recorder, tagged("all", "odd")) == list(range(2, count + 1, 2))
    assert positions(recorder, query((["t"], [])), after=count - 3) == list(range(count - 2, count + 1))
    assert positions(recorder, tagged("none")) == positions(recorder, after=1 << 200) == []
    response = recorder.read(tagged("all"))
    first = next(response)
    recorder.append([made("t", "all")])
    # What it reads later is of the moment of the call.
    assert [first.position, *(each.position for each in response)] == list(range(1, count + 1))
    assert response.head == count
    with recorder.subscribe(tagged("even"), after=2) as subscription:
        assert [next(subscription).position for _ in range(CHUNK)] == list(range(3, 3 + 2 * CHUNK, 2))


@pytest.mark.parametrize("limit", [sys.maxsize, sys.maxsize + 1, 1 << 200])
def test_a_limit_is_an_int_of_any_size(recorder: KvwalDCBRecorder, limit: int) -> None:
    recorder.append([made(), made()])
    assert positions(recorder, limit=limit) == [1, 2]
    assert positions(recorder, limit=-limit) == []


def test_a_subscription_that_nothing_matches_looks_at_each_event_once(recorder: KvwalDCBRecorder) -> None:
    recorder.append([made("t", "other")] * 10)
    looks: list[int] = []
    read_on = recorder.read_on

    def counted(wanted: Any, after: int) -> Any:
        looks.append(after)
        return read_on(wanted, after)

    recorder.read_on = counted  # type: ignore[method-assign]  # put in its place
    received: list[int] = []
    subscription = recorder.subscribe(tagged("mine"))
    thread = threading.Thread(target=lambda: received.extend(each.position for each in subscription), daemon=True)
    thread.start()
    while len(looks) < 1:
        thread.join(0.001)
    recorder.append([made("t", "other")])
    recorder.append([made("t", "mine")])
    while not received:
        thread.join(0.001)
    assert received == [12]
    assert looks[:2] in ([0, 10], [0, 11], [0, 12])
    subscription.stop()
    thread.join()


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\U0010ffff", "x" * 10_000])
def test_types_and_tags_are_any_text(recorder: KvwalDCBRecorder, text: str) -> None:
    recorder.append([made("t", "other"), made(text, text, text, data=b"\0" * 5), made("t", text + "\0")])
    [found] = recorder.read(query(([text], [text])))
    assert found.event == made(text, text, text, data=b"\0" * 5)
    assert positions(recorder, tagged(text)) == positions(recorder, query(([text], []))) == [2]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(recorder: KvwalDCBRecorder) -> None:
    for wrong in (made("\ud800"), made("t", "\ud800"), made("t", "x" * 70_000)):
        with pytest.raises(DataError):
            recorder.append([made(), wrong])
    odd = cast(Any, 1)
    for attempt in (
        lambda: recorder.append([made(), DCBEvent(odd, b"")]),
        lambda: recorder.append([made(), DCBEvent("t", odd)]),
        lambda: recorder.append([made(), DCBEvent("t", b"", [odd])]),
        lambda: recorder.append([made()], DCBAppendCondition(query(([odd], ["tag"])))),
        lambda: recorder.read(query(([], [odd]))),
    ):
        with pytest.raises(TypeError):
            attempt()
    with pytest.raises(ProgrammingError):
        recorder.append([])
    assert recorder.read().head is None


def test_after_a_close_every_call_says_so(factory: KvwalFactory, recorder: KvwalDCBRecorder) -> None:
    recorder.append([made("t")] * (CHUNK + 1))
    response = recorder.read()
    next(response)
    subscription = recorder.subscribe(after=CHUNK + 1)
    factory.close()
    with pytest.raises(InterfaceError):
        recorder.append([made()])
    with pytest.raises(InterfaceError):
        next(subscription)
    with pytest.raises(InterfaceError):
        list(response)


def test_a_power_cut_leaves_events_with_all_their_tags() -> None:
    def run(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            recorder = KvwalDCBRecorder(Datastore(db).table("dcb"))
            for number in range(3):
                seat = f"seat{number}"
                both = [made("a", "x", seat), made("b", seat)]
                acknowledged.append(recorder.append(both, DCBAppendCondition(tagged(seat))))

    def check(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            recorder = KvwalDCBRecorder(Datastore(db).table("dcb"))
            found = positions(recorder)
            assert found == list(range(1, len(found) + 1))
            assert len(found) in (2 * len(acknowledged), 2 * len(acknowledged) + 2)
            assert positions(recorder, tagged("x")) == positions(recorder, query((["a"], []))) == found[::2]
            for number in range(len(found) // 2):
                assert positions(recorder, tagged(f"seat{number}")) == [2 * number + 1, 2 * number + 2]

    crash_every(run, check)
