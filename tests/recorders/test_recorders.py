"""kvwal's recorders for the library `eventsourcing`: what the library's own cases do not ask."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import Aggregate, DomainEventProtocol, event
from eventsourcing.persistence import (
    DataError,
    InfrastructureFactory,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
    StoredEvent,
    Tracking,
    WaitInterruptedError,
)
from eventsourcing.system import MultiThreadedRunner, ProcessApplication, System
from eventsourcing.utils import Environment, get_topic
from group_fixtures import as_one_group
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import interrupted_at

import kvwal
from kvwal.errors import CodecError
from kvwal.events import Listener, Poison
from kvwal.eventsourcing import KvwalFactory, KvwalProcessRecorder, KvwalTrackingRecorder
from kvwal.eventsourcing.datastore import CHUNK, Datastore
from kvwal.eventsourcing.recorders import KvwalSubscription
from kvwal.eventsourcing.rows import (
    dcb_event_of,
    encode_dcb_event,
    encode_id,
    encode_stored_event,
    id_of,
    prefix,
    stored_event_of,
)
from kvwal.testing import SimulatedDisk, crash_every


def opened(path: Path, name: str = "Shop", **variables: str) -> KvwalFactory:
    return KvwalFactory(Environment(name, {"KVWAL_PATH": str(path / "store"), **variables}))


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[KvwalFactory]:
    with opened(tmp_path) as factory:
        yield factory
    factory.close()


@pytest.fixture
def recorder(factory: KvwalFactory) -> KvwalProcessRecorder:
    return process_recorder(factory)


def process_recorder(factory: KvwalFactory) -> KvwalProcessRecorder:
    return cast(KvwalProcessRecorder, factory.process_recorder())


def events(count: int = 1, *, originator: UUID | str | None = None, first: int = 1, topic: str = "t") -> list[Any]:
    originator = uuid4() if originator is None else originator
    return [StoredEvent(originator, first + n, topic, b"%d" % n) for n in range(count)]


def ids(recorder: KvwalProcessRecorder) -> list[int]:
    return [each.id for each in recorder.select_notifications(None, 1 << 40)]


def inside(thread: threading.Thread, function: str) -> bool:
    """Whether a thread is in a function of this name."""
    frame = sys._current_frames().get(cast(int, thread.ident))
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- ids ---------------------------------------------------------------------------------------


def test_ids_are_contiguous_and_in_the_order_of_commits_from_many_threads(recorder: KvwalProcessRecorder) -> None:
    given: list[list[int]] = []

    def insert(number: int) -> None:
        for turn in range(30):
            found = recorder.insert_events(events(1 + (number + turn) % 3), tracking=Tracking(f"up{number}", turn + 1))
            given.append(list(found or ()))

    threads = [threading.Thread(target=insert, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for each in given for number in each) == list(range(1, sum(map(len, given)) + 1))
    assert all(each == list(range(each[0], each[-1] + 1)) for each in given)
    assert ids(recorder) == list(range(1, sum(map(len, given)) + 1))
    # What the feed tells, in the order of the commits, has ascending ids.
    table = recorder._events.table
    told = [table.of(change)[0] for change in recorder.store.changes(0, tables=[table])]
    assert [key[1] for key in told if key[0] == "event"] == ids(recorder)


def test_one_of_many_threads_that_insert_the_same_version_succeeds(recorder: KvwalProcessRecorder) -> None:
    originator = uuid4()
    outcomes: list[object] = []
    ready = threading.Barrier(8)

    def insert() -> None:
        ready.wait()
        for version in range(20):
            try:
                outcomes.append(recorder.insert_events(events(originator=originator, first=version)))
            except IntegrityError as error:
                outcomes.append(error)

    threads = [threading.Thread(target=insert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, list) for each in outcomes) == 20
    assert ids(recorder) == list(range(1, 21))
    assert [each.originator_version for each in recorder.select_events(originator)] == list(range(20))


def test_the_commit_leader_refuses_what_came_after_the_look_before(
    recorder: KvwalProcessRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two sees nothing, and one of them is refused all the same."""
    table = recorder._events
    raw = table._raw
    [taken] = events()
    recorder.insert_events([taken], tracking=Tracking("up", 5))

    class Blind:
        def get(self, key: bytes) -> None:
            return None

        def __getattr__(self, name: str) -> Any:
            return getattr(raw, name)

    monkeypatch.setattr(table, "_raw", Blind())
    with pytest.raises(IntegrityError, match="already"):
        recorder.insert_events([*events(), taken], tracking=Tracking("up", 6))
    for stale in (4, 5):
        with pytest.raises(IntegrityError, match="tracked already"):
            recorder.insert_events(events(), tracking=Tracking("up", stale))
        with pytest.raises(IntegrityError, match="tracked already"):
            recorder.insert_tracking(Tracking("up", stale))
    monkeypatch.undo()
    assert ids(recorder) == [1]
    assert recorder.max_tracking_id("up") == 5


def test_an_insert_that_is_refused_writes_nothing(recorder: KvwalProcessRecorder) -> None:
    first = events(2)
    recorder.insert_events(first, tracking=Tracking("up", 1))
    before = recorder.store.last_seqno
    for refused, tracking in (
        ([*events(), first[1]], Tracking("up", 2)),
        (events(), Tracking("up", 1)),
        (events() * 2, Tracking("up", 2)),
    ):
        with pytest.raises(IntegrityError):
            recorder.insert_events(refused, tracking=tracking)
    assert recorder.insert_events([]) == []
    assert recorder.store.last_seqno == before


def test_an_aggregate_recorder_and_an_application_recorder_of_one_purpose_see_the_same(factory: KvwalFactory) -> None:
    [one], [other] = events(), events()
    assert factory.aggregate_recorder().insert_events([one]) is None
    assert process_recorder(factory).insert_events([other]) == [2]
    assert factory.aggregate_recorder().select_events(other.originator_id) == [other]
    assert factory.aggregate_recorder("snapshots").select_events(one.originator_id) == []
    assert [each.name for each in factory.datastore.store.tables()] == ["eventsourcing/events/Shop"]


def test_notifications_by_every_bound(recorder: KvwalProcessRecorder) -> None:
    for number in range(10):
        recorder.insert_events(events(topic="even" if number % 2 else "odd"))

    def selected(*arguments: Any, **more: Any) -> list[int]:
        return [each.id for each in recorder.select_notifications(*arguments, **more)]

    huge = 1 << 200
    assert selected(None, huge) == selected(-huge, 10) == selected(0, 10) == selected(1, huge, huge) == [*range(1, 11)]
    assert selected(None, 0) == selected(None, -1) == []
    assert selected(huge, 5) == selected(5, 5, 4) == selected(1, 5, -huge) == []
    assert selected(3, 3) == [3, 4, 5]
    assert selected(3, 3, inclusive_of_start=False) == [4, 5, 6]
    assert selected(3, 9, 4) == [3, 4]
    assert selected(3, 2, topics=["even"]) == [4, 6]
    assert selected(1, 9, 6, topics=["even", "odd", "none"]) == [*range(1, 7)]
    assert selected(1, 9, topics=["none"]) == []


def test_events_by_every_bound(recorder: KvwalProcessRecorder) -> None:
    originator = "order/7\0"
    recorder.insert_events(events(2, originator="order/7", first=100))
    recorder.insert_events(events(5, originator=originator, first=-2))

    def selected(**more: Any) -> list[int]:
        return [each.originator_version for each in recorder.select_events(originator, **more)]

    huge = 1 << 200
    assert selected() == selected(gt=-huge, lte=huge) == [-2, -1, 0, 1, 2]
    assert selected(gt=-1, lte=1) == [0, 1]
    assert selected(desc=True, limit=2) == [2, 1]
    assert selected(desc=True, gt=-2, lte=1) == [1, 0, -1]
    assert selected(limit=0) == selected(limit=-1) == selected(gt=5) == selected(gt=1, lte=0) == []
    assert recorder.select_events("order/7\0\0") == []


# -- waiting -----------------------------------------------------------------------------------


def test_a_subscription_sleeps_until_a_commit_wakes_it(recorder: KvwalProcessRecorder) -> None:
    """It looks for events once for each commit, and never between."""
    looks: list[int] = []
    received: list[int] = []
    read_on = recorder.read_on

    def counted(after: int, topics: frozenset[str]) -> Any:
        looks.append(after)
        return read_on(after, topics)

    recorder.read_on = counted  # type: ignore[method-assign]  # put in its place
    subscription = recorder.subscribe(topics=["t"])
    thread = threading.Thread(target=lambda: received.extend(each.id for each in subscription))
    thread.start()
    until(lambda: inside(thread, "wait"))
    before = len(looks)
    time.sleep(0.3)
    assert len(looks) == before
    recorder.insert_events(events(topic="other"))
    until(lambda: len(looks) > before)
    recorder.insert_events(events(3))
    until(lambda: received == [2, 3, 4])
    # What was passed over is not looked at again.
    until(lambda: inside(thread, "wait"))
    assert looks[-1] == 4
    subscription.stop()
    thread.join()
    assert not recorder.store.engine.events.listeners


def test_a_subscription_gets_each_event_once_while_threads_insert(recorder: KvwalProcessRecorder) -> None:
    received: list[int] = []
    done = threading.Event()

    def follow() -> None:
        with recorder.subscribe() as subscription:
            for each in subscription:
                received.append(each.id)
                if each.id == 400:
                    break
        done.set()

    threads = [threading.Thread(target=follow)]
    threads += [
        threading.Thread(target=lambda: [recorder.insert_events(events()) for _ in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert done.wait(60)
    for thread in threads:
        thread.join()
    assert received == list(range(1, 401))


def test_a_subscription_misses_no_commit_that_is_under_way_as_it_begins(
    recorder: KvwalProcessRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a commit is not told to it; so it begins when that is over."""
    flushing, subscribing = threading.Event(), threading.Event()
    log = recorder.store.engine.queue._log
    sync = log.sync

    def slow() -> None:
        flushing.set()
        subscribing.wait(20)
        # Time for the subscription to be there, and to look, if nothing holds it up.
        time.sleep(0.1)
        sync()

    monkeypatch.setattr(log, "sync", slow)
    received: list[int] = []

    def follow() -> None:
        flushing.wait(20)
        subscribing.set()
        with recorder.subscribe() as subscription:
            received.append(next(subscription).id)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    recorder.insert_events(events())
    thread.join(20)
    assert received == [1]


def test_a_subscription_that_is_interrupted_loses_no_more_than_what_it_was_giving(
    recorder: KvwalProcessRecorder,
) -> None:
    last = 4
    recorder.insert_events(events(last))
    for step in count(1):
        subscription = recorder.subscribe(gt=last - 4)
        interruption = interrupted_at(step, partial(next, subscription))
        # One more, so that it has something to give in any case.
        recorder.insert_events(events())
        last += 1
        given = [next(subscription).id]
        while given[-1] < last:
            given.append(next(subscription).id)
        # What was on its way to the caller as it was interrupted is given once.
        assert given[0] - (last - 5) in (1, 2), step
        assert given == list(range(given[0], last + 1))
        subscription.stop()
        if interruption is None:
            assert given[0] - (last - 5) == 2
            break


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
def test_every_durability_wakes(tmp_path: Path, durability: str) -> None:
    factory = opened(tmp_path, KVWAL_DURABILITY=durability)
    recorder = process_recorder(factory)
    with recorder.subscribe() as subscription:
        thread = threading.Thread(target=lambda: recorder.insert_events(events(), tracking=Tracking("up", 7)))
        thread.start()
        assert next(subscription).id == 1
        recorder.wait("up", 7)
        thread.join()
    factory.close()


def test_closing_and_poison_end_a_subscription_with_an_error(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def follow(subscription: KvwalSubscription) -> None:
        try:
            next(subscription)
        except PersistenceError as error:
            raised.append(error)

    factory, other = opened(tmp_path), opened(tmp_path)
    thread = threading.Thread(target=follow, args=(process_recorder(factory).subscribe(),), daemon=True)
    thread.start()
    until(lambda: inside(thread, "wait"))
    # The store stays open, since there is another holder.
    factory.close()
    thread.join()
    assert isinstance(raised.pop(), InterfaceError)
    other.close()

    disk = SimulatedDisk(seed=0)
    datastore = Datastore(kvwal.open("/store", files=disk, background=False))
    recorder = KvwalProcessRecorder(datastore.table("events"))
    recorder.insert_events(events())
    thread = threading.Thread(target=follow, args=(recorder.subscribe(gt=1),), daemon=True)
    thread.start()
    until(lambda: inside(thread, "wait"))
    disk.fail("datasync")
    with pytest.raises(OperationalError):
        recorder.insert_events(events())
    thread.join()
    assert isinstance(raised.pop(), OperationalError)
    datastore.close()


class Poisoned(Listener):
    """Hears that the disk has failed."""

    def __init__(self) -> None:
        self.is_told = False

    def poison(self, event: Poison) -> None:
        self.is_told = True


@pytest.mark.parametrize("is_told", [False, True])
def test_a_close_says_of_a_failed_disk_what_no_subscription_was_told(is_told: bool) -> None:
    disk = SimulatedDisk(seed=0)
    heard = Poisoned()
    store = kvwal.open("/store", files=disk, durability="interval", sync_delay_s=0.01, listeners=[heard])
    datastore = Datastore(store)
    recorder = KvwalProcessRecorder(datastore.table("events"))
    recorder.insert_events(events())
    store.sync()
    subscription = recorder.subscribe(gt=1)
    disk.fail("datasync")
    # Flushed by the background thread.
    recorder.insert_events(events())
    until(lambda: heard.is_told)
    if is_told:
        assert next(subscription).id == 2
        with pytest.raises(OperationalError):
            next(subscription)
    subscription.stop()
    with nullcontext() if is_told else pytest.raises(kvwal.PoisonedError):
        store.close()


def sleeps(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(cast(int, thread.ident))
    return frame is not None and frame.f_code.co_filename.endswith("waking.py") and frame.f_code.co_name == "wait"


WAITS: dict[str, Callable[[KvwalFactory], Callable[[], object]]] = {
    "application": lambda factory: partial(next, factory.application_recorder().subscribe()),
    "dcb": lambda factory: partial(next, factory.dcb_recorder().subscribe()),
    "process": lambda factory: partial(next, factory.process_recorder().subscribe()),
    "tracking": lambda factory: partial(factory.tracking_recorder().wait, "up", 5, timeout=1e6),
}
CLOSES: dict[str, Callable[[KvwalFactory], object]] = {
    "factory": lambda factory: factory.close(),
    "datastore": lambda factory: factory.datastore.close(),
    "store": lambda factory: factory.datastore.store.close(),
    "engine": lambda factory: factory.datastore.store.engine.close(),
}


@pytest.mark.parametrize("close", CLOSES)
@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_ends_when_the_last_holder_closes_the_store(tmp_path: Path, wait: str, close: str) -> None:
    raised: list[BaseException] = []

    def run(waiting: Callable[[], object]) -> None:
        try:
            waiting()
        except PersistenceError as error:
            raised.append(error)

    factory = opened(tmp_path)
    thread = threading.Thread(target=run, args=(WAITS[wait](factory),), daemon=True)
    thread.start()
    until(lambda: sleeps(thread))
    CLOSES[close](factory)
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(raised.pop(), InterfaceError)
    factory.close()


def test_waiting_for_tracking_looks_only_when_a_commit_came(recorder: KvwalProcessRecorder) -> None:
    looks: list[int] = []
    has = recorder.has_tracking_id

    def counted(application_name: str, notification_id: int | None) -> bool:
        looks.append(1)
        return has(application_name, notification_id)

    recorder.has_tracking_id = counted  # type: ignore[method-assign]  # put in its place
    thread = threading.Thread(target=recorder.wait, args=("up", 3), kwargs={"timeout": 60.0})
    thread.start()
    until(lambda: inside(thread, "wait") and len(looks) == 2)
    time.sleep(0.3)
    assert len(looks) == 2
    recorder.insert_tracking(Tracking("up", 2))
    recorder.insert_events(events(), tracking=Tracking("up", 3))
    thread.join(30)
    assert not thread.is_alive()
    assert len(looks) <= 4
    assert not recorder.store.engine.events.listeners


def test_waiting_ends_when_its_time_is_over_or_it_is_interrupted(recorder: KvwalProcessRecorder) -> None:
    for timeout in (0.0, -1.0, 0.01):
        with pytest.raises(TimeoutError):
            recorder.wait("up", 1, timeout=timeout)
    interrupt = threading.Event()
    threading.Timer(0.05, interrupt.set).start()
    with pytest.raises(WaitInterruptedError):
        recorder.wait("up", 1, timeout=60, interrupt=interrupt)


# -- views -------------------------------------------------------------------------------------


def test_a_view_changes_with_what_it_tracks_or_not_at_all(factory: KvwalFactory) -> None:
    view = factory.tracking_recorder()
    totals = view.store.table("totals", str, int)

    def add(txn: Any, fails: bool = False) -> None:
        here = totals.within(txn)
        here["sum"] = (here.get("sum") or 0) + 1
        if fails:
            raise ZeroDivisionError

    view.record(Tracking("up", 1), add)
    with pytest.raises(ZeroDivisionError):
        view.record(Tracking("up", 2), lambda txn: add(txn, fails=True))
    for stale in (0, 1):
        with pytest.raises(IntegrityError):
            view.record(Tracking("up", stale), add)

    async def later(txn: Any) -> None:
        add(txn)

    with pytest.raises(TypeError, match="later gave a coroutine"):
        view.record(Tracking("up", 2), later)
    assert (totals["sum"], view.max_tracking_id("up")) == (1, 1)

    threads = [
        threading.Thread(target=lambda n=n: [view.record(Tracking(f"up{n}", i), add) for i in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals["sum"] == 81


# -- what is hostile ---------------------------------------------------------------------------

TEXTS = ["", "\0", "a\0b", "\U0010ffff", "\u202e", "%s/../x", "e\u0301", "x" * 10_000]


@pytest.mark.parametrize("text", TEXTS)
def test_names_topics_and_aggregates_are_any_text(recorder: KvwalProcessRecorder, text: str) -> None:
    one = StoredEvent(text, 1, text, text.encode())
    recorder.insert_events([one], tracking=Tracking(text, 1))
    assert recorder.select_events(text) == [one]
    assert recorder.select_events(text + "\0") == []
    [found] = recorder.select_notifications(None, 2, topics=[text])
    assert (found.originator_id, found.topic, found.state) == (text, text, text.encode())
    assert recorder.max_tracking_id(text) == 1
    assert recorder.max_tracking_id(text + "\0") is None


def test_what_cannot_be_stored_is_refused_before_anything_is_written(recorder: KvwalProcessRecorder) -> None:
    for wrong in (
        StoredEvent("\ud800", 1, "t", b""),
        StoredEvent("o", 1, "\ud800", b""),
        StoredEvent("x" * 70_000, 1, "t", b""),
        StoredEvent("o", 1 << 63, "t", b""),
    ):
        with pytest.raises(DataError):
            recorder.insert_events([*events(), wrong])
    for odd in (
        StoredEvent(cast(Any, None), 1, "t", b""),
        StoredEvent("o", cast(Any, "1"), "t", b""),
        StoredEvent("o", 1, cast(Any, b"t"), b""),
        StoredEvent("o", 1, "t", cast(Any, "text")),
    ):
        with pytest.raises(TypeError):
            recorder.insert_events([*events(), odd])
    with pytest.raises(DataError):
        recorder.insert_tracking(Tracking("\ud800", 1))
    with pytest.raises(TypeError):
        recorder.insert_tracking(Tracking("up", cast(Any, "1")))
    assert recorder.store.last_seqno == 0


def test_positions_are_ints_of_any_size(recorder: KvwalProcessRecorder) -> None:
    for position in (-(1 << 300), -1, 0, 1, (1 << 64) - 1, 1 << 64, 1 << 300, 1 << 20_000):
        recorder.insert_tracking(Tracking("up", position))
        assert recorder.max_tracking_id("up") == position
        assert recorder.has_tracking_id("up", position)
        assert not recorder.has_tracking_id("up", position + 1)
        with pytest.raises(IntegrityError):
            recorder.insert_tracking(Tracking("up", position))
        with pytest.raises(TimeoutError):
            recorder.wait("up", position + 1, timeout=0)


def test_large_states_come_back_and_bound_what_a_read_holds(recorder: KvwalProcessRecorder) -> None:
    states = [bytes([number]) * (5 << 20) for number in range(4)]
    for number, state in enumerate(states):
        recorder.insert_events([StoredEvent("big", number, "t", state)])
    assert [each.state for each in recorder.select_events("big")] == states
    assert [each.state for each in recorder.select_notifications(1, 9)] == states
    found, position = recorder.read_on(0, frozenset())
    assert (len(found), position) == (2, 2)
    reading = cast(Any, recorder._events.events(0, 4))
    assert next(reading)[0] == 1
    assert len(reading.gi_frame.f_locals["chunk"]) == 2
    with recorder.subscribe() as subscription:
        assert [next(subscription).state for _ in states] == states


def test_more_events_than_one_read_takes(recorder: KvwalProcessRecorder) -> None:
    count = 3 * CHUNK + 1
    recorder.insert_events(events(count, originator="many"))
    assert ids(recorder) == list(range(1, count + 1))
    assert len(recorder.select_events("many")) == count
    with recorder.subscribe(gt=1) as subscription:
        assert [next(subscription).id for _ in range(count - 1)] == list(range(2, count + 1))


def test_damaged_rows_are_errors_of_the_library(recorder: KvwalProcessRecorder) -> None:
    [one] = events()
    recorder.insert_events([one])
    table = recorder.store.table("eventsourcing/events/Shop", tuple[int | str | UUID, ...])
    whole = table["event", 1]
    for damaged in (b"", whole[:10], b"\x09" + whole[1:], whole[:9] + b"\xff\xff\xff\xff" + whole[13:]):
        table["event", 1] = damaged
        with pytest.raises(DataError):
            recorder.select_events(one.originator_id)
        with pytest.raises(DataError):
            recorder.select_notifications(None, 5)
    for nonsense in (b"", b"nonsense", kvwal.codecs.pack(()), *map(encode_id, (-1, 1 << 63, (1 << 8 * 65_535) - 1))):
        table["last",] = nonsense
        with pytest.raises(DataError):
            recorder.insert_events(events())
        with pytest.raises(DataError):
            recorder.max_notification_id()


@given(st.binary(max_size=60))
def test_bytes_that_are_no_rows_are_codec_errors_and_nothing_else(data: bytes) -> None:
    for form in (b"", b"\1", b"\2", b"\3"):
        for decode, encode in ((stored_event_of, encode_stored_event), (dcb_event_of, encode_dcb_event)):
            try:
                found: Any = decode(form + data)
            except CodecError:
                continue
            assert encode(*found) == form + data
    try:
        number = id_of(data)
    except CodecError:
        return
    assert encode_id(number) == data


@given(
    st.uuids() | st.text(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.text(),
    st.binary(),
    st.integers(-(1 << 70), 1 << 70),
    st.lists(st.text()),
)
def test_rows_come_back(
    originator: UUID | str, version: int, topic: str, state: bytes, number: int, tags: list[str]
) -> None:
    value = encode_stored_event(originator, version, topic, state)
    assert stored_event_of(value) == (originator, version, topic, state)
    assert dcb_event_of(encode_dcb_event(topic, tags, state)) == (topic, tags, state)
    assert id_of(encode_id(number)) == number
    # As the library of tuples has it, so that typed keys and these are the same.
    assert encode_id(number) == kvwal.codecs.pack((number,))
    assert prefix("event") + encode_id(number) == kvwal.codecs.pack(("event", number))


# -- the factory -------------------------------------------------------------------------------


def test_the_environment_says_where_the_store_is_and_how_durable(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="SHOP_KVWAL_PATH, KVWAL_PATH"):
        KvwalFactory(Environment("Shop", {}))
    with pytest.raises(OSError, match="KVWAL_DURABILITY"):
        opened(tmp_path, KVWAL_DURABILITY="sometimes")
    with pytest.raises(OSError, match="KVWAL_PATH is the path of a directory, not 5"):
        opened(tmp_path, SHOP_KVWAL_PATH=5)
    with pytest.raises(InterfaceError, match="the directory in which the store is to be does not exist; make that"):
        opened(tmp_path, SHOP_KVWAL_PATH=str(tmp_path / "there" / "is" / "none"))
    with opened(tmp_path, SHOP_KVWAL_PATH=str(tmp_path / "own"), KVWAL_DURABILITY="interval") as factory:
        assert factory.datastore.store.path == str(tmp_path / "own")
        # All that this process holds of one store is as durable.
        with pytest.raises(InterfaceError, match="durability"):
            opened(tmp_path, SHOP_KVWAL_PATH=str(tmp_path / "own"))
    factory.close()


def test_applications_share_a_store_with_each_other_and_with_other_tables(tmp_path: Path) -> None:
    shop, other = opened(tmp_path, "Shop"), opened(tmp_path, "Other")
    [one], [two] = events(), events()
    assert process_recorder(shop).insert_events([one]) == [1]
    assert process_recorder(other).insert_events([two]) == [1]
    store = shop.datastore.store
    store[b"mine"] = b"x"
    store.table("users", str, str)["a"] = "b"
    assert process_recorder(shop).select_notifications(None, 9)[0].originator_id == one.originator_id
    assert process_recorder(other).select_events(one.originator_id) == []
    shop.close()
    with pytest.raises(InterfaceError):
        process_recorder(shop).max_notification_id()
    # Only the last one closes the store.
    assert process_recorder(other).insert_events(events()) == [2]
    other.close()
    with kvwal.open(tmp_path / "store") as db:
        assert db[b"mine"] == b"x"
        assert {each.name: each.keys for each in db.tables()} == {
            "eventsourcing/events/Other": 5,
            "eventsourcing/events/Shop": 3,
            "users": 1,
        }
        assert db.verify().ok


def test_a_factory_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    factory = opened(tmp_path)
    with pytest.raises(ProgrammingError, match="slash"):
        factory.aggregate_recorder("a/b")
    with pytest.raises(ProgrammingError, match="subclass"):
        factory.tracking_recorder(cast(Any, KvwalFactory))
    for name in ("\ud800", "x" * 300):
        with pytest.raises(DataError):
            opened(tmp_path, name).process_recorder()
    factory.datastore.store.table("eventsourcing/events/Shop", str, str)["a"] = "b"
    with pytest.raises(DataError, match="eventsourcing/events/Shop"):
        factory.process_recorder()
    factory.close()
    factory.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistenceError):
        KvwalFactory({"KVWAL_PATH": str(tmp_path / "file")})
    with opened(tmp_path, PERSISTENCE_MODULE="kvwal.eventsourcing:Factory") as named:
        assert isinstance(InfrastructureFactory.construct(named.env), KvwalFactory)
    named.close()


class Own(KvwalProcessRecorder):
    """A subclass that the environment may name."""


def test_the_environment_may_name_recorders(tmp_path: Path) -> None:
    with opened(tmp_path, APPLICATION_RECORDER_TOPIC=get_topic(Own), PROCESS_RECORDER_TOPIC=get_topic(Own)) as factory:
        assert type(factory.process_recorder()) is type(factory.application_recorder()) is Own
    factory.close()


# -- applications ------------------------------------------------------------------------------


class Order(Aggregate):
    @event("Opened")
    def __init__(self) -> None:
        self.items: list[str] = []

    @event("Added")
    def add(self, item: str) -> None:
        self.items.append(item)


class Orders(ProcessApplication[UUID]):
    """Applications of a system are process applications."""

    def policy(self, domain_event: DomainEventProtocol[UUID], processing_event: ProcessingEvent[UUID]) -> None:
        pass


class Counted(Aggregate):
    @event("Began")
    def __init__(self) -> None:
        pass


class Counters(ProcessApplication[UUID]):
    def policy(self, domain_event: DomainEventProtocol[UUID], processing_event: ProcessingEvent[UUID]) -> None:
        if isinstance(domain_event, Order.Added):  # type: ignore[attr-defined]  # the library makes it
            processing_event.collect_events(Counted())


def test_a_system_of_applications_over_one_store_processes_each_event_once(tmp_path: Path) -> None:
    env = {"PERSISTENCE_MODULE": "kvwal.eventsourcing", "KVWAL_PATH": str(tmp_path / "store")}
    for total in (40, 80):
        with MultiThreadedRunner(System(pipes=[[Orders, Counters]]), env) as runner:
            orders, counters = runner.get(Orders), runner.get(Counters)

            def order(app: Orders = orders) -> None:
                one = Order()
                for number in range(10):
                    one.add(str(number))
                app.save(one)

            threads = [threading.Thread(target=order) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            last = orders.recorder.max_notification_id()
            counters.recorder.wait("Orders", last, timeout=60)
            assert counters.recorder.max_notification_id() == total
            assert counters.recorder.max_tracking_id("Orders") == last


class Versioned(Aggregate):
    """As it is today: `text` was `name` in version 1 of its first event."""

    class Made(Aggregate.Created):
        text: str
        class_version = 2

        @staticmethod
        def upcast_v1_v2(state: dict[str, Any]) -> None:
            state["text"] = state.pop("name")

    @event(Made)
    def __init__(self, text: str) -> None:
        self.text = text


def test_the_upcasting_of_the_library_reads_old_events(tmp_path: Path) -> None:
    env = {"PERSISTENCE_MODULE": "kvwal.eventsourcing", "KVWAL_PATH": str(tmp_path / "store")}
    with Application[UUID](env) as app:
        one = Versioned("hello")
        app.save(one)
        table = app.recorder._events.table  # type: ignore[attr-defined]  # a private part, looked at
        key = ("event", 1)
        assert b'"class_version":2' in table[key]
        table[key] = table[key].replace(b'"class_version":2', b'"class_version":1').replace(b'"text":', b'"name":')
    with Application[UUID](env) as app:
        found: Versioned = app.repository.get(one.id)
        assert found.text == "hello"


# -- crashes -----------------------------------------------------------------------------------


def whole(recorder: KvwalProcessRecorder) -> int:
    """How many commits there are, of which each has tracking and events; that nothing else is left of others."""
    commits = recorder.max_tracking_id("up") or 0
    found = recorder.select_notifications(None, 1 << 40)
    assert [each.id for each in found] == list(range(1, len(found) + 1))
    assert recorder.max_notification_id() == (len(found) or None)
    assert [each.originator_id for each in found] == [str(n) for n in range(1, commits + 1) for _ in range(1 + n % 3)]
    for number in range(1, commits + 2):
        there = [each.originator_version for each in recorder.select_events(str(number))]
        assert there == (list(range(1, 2 + number % 3)) if number <= commits else [])
    return commits


def insert(recorder: KvwalProcessRecorder, number: int) -> None:
    recorder.insert_events(events(1 + number % 3, originator=str(number)), tracking=Tracking("up", number))


def test_a_power_cut_leaves_whole_commits_and_all_that_returned() -> None:
    def run(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        datastore = Datastore(kvwal.open("/kv", files=disk, background=False))
        recorder = KvwalProcessRecorder(datastore.table("events"))
        for number in range(1, 5):
            insert(recorder, number)
            acknowledged.append(number)
            if number == 2:
                datastore.store.checkpoint()
        datastore.close()

    def check(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        datastore = Datastore(kvwal.open("/kv", files=disk, background=False))
        recorder = KvwalProcessRecorder(datastore.table("events"))
        commits = whole(recorder)
        assert len(acknowledged) <= commits <= len(acknowledged) + 1
        insert(recorder, commits + 1)
        assert whole(recorder) == commits + 1
        datastore.close()

    crash_every(run, check)


def test_a_full_disk_uses_no_ids() -> None:
    """Inserts of one group, one of which finds no space."""
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False) as db:
        recorder = KvwalProcessRecorder(Datastore(db).table("events"))
        insert(recorder, 1)
        disk.capacity = disk.used_bytes() + 100_000
        big = StoredEvent("big", 1, "t", b"x" * 3_000_000)

        def tried(found: Any, number: int) -> Any:
            try:
                return recorder.insert_events(found, tracking=Tracking("up", number))
            except OperationalError as error:
                return type(error.__cause__)

        results = as_one_group(
            db, [lambda: tried(events(), 2), lambda: tried([big], 3), lambda: tried(events(), 4)]
        )
        assert kvwal.DiskFullError in results
        disk.capacity = None
        found = ids(recorder)
        assert found == list(range(1, len(found) + 1))
        assert found[2:] == [each for result in results if isinstance(result, list) for each in result]
        assert recorder.insert_events(events()) == [len(found) + 1]


@pytest.mark.skipif(sys.platform == "win32", reason="it is killed by a signal")
@pytest.mark.parametrize("wait_s", [0.15, 0.3])
def test_a_kill_leaves_contiguous_ids_and_no_tracking_without_its_event(tmp_path: Path, wait_s: float) -> None:
    program = """
import sys, threading
from eventsourcing.persistence import StoredEvent, Tracking
from kvwal.eventsourcing import KvwalFactory
recorder = KvwalFactory({"KVWAL_PATH": sys.argv[1]}).process_recorder()
def insert(thread):
    for n in range(1, 1 << 30):
        recorder.insert_events([StoredEvent(f"{thread}", n, "t", b"")], tracking=Tracking(f"{thread}", n))
for thread in range(8):
    threading.Thread(target=insert, args=(thread,)).start()
print("began", flush=True)
"""
    path = tmp_path / "store"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait_s)
        child.send_signal(signal.SIGKILL)
    factory = KvwalFactory({"KVWAL_PATH": str(path)})
    recorder = process_recorder(factory)
    found = recorder.select_notifications(None, 1 << 40)
    assert found
    assert [each.id for each in found] == list(range(1, len(found) + 1))
    for thread in map(str, range(8)):
        versions = [each.originator_version for each in found if each.originator_id == thread]
        assert versions == list(range(1, (recorder.max_tracking_id(thread) or 0) + 1))
        assert [each.originator_version for each in recorder.select_events(thread)] == versions
    factory.close()


def test_errors_have_their_kind(recorder: KvwalProcessRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, theirs in (
        (kvwal.ConflictError(None, 1, "x"), OperationalError),
        (kvwal.CorruptionError("data", 0, "x"), InternalError),
        (kvwal.ClosedError("x"), InterfaceError),
        (kvwal.DiskFullError("x"), OperationalError),
    ):

        def fail(error: kvwal.Error = ours) -> int:
            raise error

        monkeypatch.setattr(recorder._events, "last", fail)
        with pytest.raises(PersistenceError) as raised:
            recorder.max_notification_id()
        assert type(raised.value) is theirs
        assert raised.value.__cause__ is ours


def test_a_tracking_recorder_alone_keeps_what_a_process_recorder_of_its_name_has(factory: KvwalFactory) -> None:
    process_recorder(factory).insert_events(events(), tracking=Tracking("up", 3))
    alone: KvwalTrackingRecorder = factory.tracking_recorder()
    assert alone.max_tracking_id("up") == 3
