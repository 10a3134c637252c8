"""A commit is published once, also when interrupted anywhere."""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import pytest
from engine_fakes import FakeEngine, FakeTree, make
from store_fixtures import interrupted_at

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine.occ import ReadSet
from kvwal.engine.publish import Publisher
from kvwal.engine.readers import Reader
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk


def _batch(*keys: bytes, value: bytes, clear: bool = False) -> WriteBatch:
    batch = WriteBatch()
    if clear:
        batch.delete_range(b"b", b"d")
    for key in keys:
        batch.put(key, value)
    return batch


def _publish(engine: FakeEngine) -> None:
    batch = _batch(b"a", b"c", value=b"2")
    batch.delete(b"b")
    engine.publisher.publish(Seqno(3), batch, 10)


def _publish_range(engine: FakeEngine) -> None:
    engine.publisher.publish(Seqno(3), _batch(b"a", b"c", value=b"2", clear=True), 10)


def _publish_put(engine: FakeEngine) -> None:
    engine.publisher.publish_put(Seqno(3), b"a", b"2", 222)


def _publish_puts(engine: FakeEngine) -> None:
    engine.publisher.publish_puts(Seqno(5), [b"a", b"c", b"a"], [b"x", b"2", b"2"], 666)


PUBLISHING = [_publish, _publish_range, _publish_put, _publish_puts]


def _published(kind: str, *, small: bool = False) -> tuple[FakeEngine, Reader | None]:
    """A store with two commits, and a reader of it."""
    _, _, engine = make()
    if small:
        engine.state.cache.budget = engine.state.cache._budget_bytes = 0
        engine.publisher._memtable_bytes = 0
    engine.publisher.publish(Seqno(1), _batch(b"a", b"b", b"old", value=b"1"), 10)
    if kind == "after a range":
        engine.publisher.publish(Seqno(2), _batch(b"b", value=b"1", clear=True), 10)
    else:
        engine.publisher.publish_put(Seqno(2), b"b", b"1", 222)
    reader = None if kind == "alone" else engine.reads.moments.reader("test", writer=True)
    return engine, reader


def _content(engine: FakeEngine) -> dict[bytes, bytes | None]:
    return {key: engine.reads.read(key) for key in (b"a", b"b", b"c", b"old")}


@pytest.mark.parametrize("small", [False, True], ids=["with room", "beyond its budget"])
@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
@pytest.mark.parametrize("publish", PUBLISHING)
def test_a_commit_that_is_interrupted_anywhere_and_published_again_is_published_once(
    publish: Callable[[FakeEngine], None], kind: str, small: bool
) -> None:
    once, _ = _published(kind)
    before = _content(once)
    publish(once)
    wanted = _content(once)
    assert wanted != before
    for step in range(1, 1000):
        engine, reader = _published(kind, small=small)
        interrupted = interrupted_at(step, partial(publish, engine)) is not None
        assert not engine.state.lock._is_owned(), step
        if interrupted:
            publish(engine)
        assert _content(engine) == wanted, step
        state = engine.state
        assert state.seqno == state.horizon == state.version.memtable.last_seqno == once.state.seqno, step
        state.version.memtable._check()
        for key, row in state.cache.rows.items():
            assert row == wanted[key], step
        if reader is not None:
            assert {key: engine.reads.read_at(reader, key) for key in before} == before, step
            for key in (b"a", b"c", b"old"):
                changed = wanted[key] != before[key]
                conflict = engine.reads.moments.history.conflict(ReadSet(Seqno(2), {key}, ()))
                assert (conflict is not None) == changed, (step, key)
        if not interrupted:
            return
    raise AssertionError("publishing has no end")


@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
@pytest.mark.parametrize("publish", PUBLISHING)
def test_a_reader_that_comes_while_an_interrupted_commit_is_half_published_keeps_its_moment(
    publish: Callable[[FakeEngine], None], kind: str
) -> None:
    """Another thread may register between the interruption and the second time: the lock is free then."""
    for step in range(1, 1000):
        engine, _reader = _published(kind)
        before = _content(engine)
        interrupted = interrupted_at(step, partial(publish, engine)) is not None
        late = engine.reads.moments.reader("late")
        if interrupted:
            publish(engine)
        wanted = before if late.seqno == 2 else _content(engine)
        assert {key: engine.reads.read_at(late, key) for key in before} == wanted, (step, late.seqno)
        if not interrupted:
            return
    raise AssertionError("publishing has no end")


@pytest.mark.parametrize("method", [Publisher.publish_put, Publisher._publish_put_into, Publisher.publish_writes])
def test_no_second_interruption_comes_before_the_first_one_is_noted(method: FunctionType) -> None:
    """The interpreter looks for signals after calls, as functions begin and where loops go back: there is none."""
    instructions = list(dis.get_instructions(method))
    noted = max(i for i, each in enumerate(instructions) if each.argval == "unfinished")
    caught = max(i for i in range(noted) if instructions[i].opname == "PUSH_EXC_INFO")
    between = [each.opname for each in instructions[caught:noted]]
    assert instructions[noted].opname == "STORE_ATTR"
    assert not [name for name in between if name.startswith(("CALL", "JUMP_BACKWARD", "RESUME"))], between


@pytest.mark.parametrize("way", ["batch", "put", "puts"])
def test_a_commit_that_was_left_half_visible_is_finished_by_the_next_one(way: str) -> None:
    _, _, engine = make()
    state, publisher = engine.state, engine.publisher
    state.unfinished = publisher._publish, (Seqno(1), {b"a": b"1"}, (), 2)
    batch = WriteBatch()
    batch.put(b"b", b"2")
    if way == "batch":
        publisher.publish(Seqno(2), batch, 2)
    elif way == "put":
        publisher.publish_put(Seqno(2), b"b", b"2", 200)
    else:
        publisher.publish_puts(Seqno(2), [b"b"], [b"2"], 200)
    assert [engine.reads.read(key) for key in (b"a", b"b")] == [b"1", b"2"]
    assert state.seqno == 2


@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
def test_puts_that_are_published_together_leave_what_they_leave_one_by_one(kind: str) -> None:
    (together, reader), (single, other) = _published(kind), _published(kind)
    keys, values = [b"a", b"c", b"a", b"d"], [b"x", b"2", b"2", b"3"]
    together.publisher.publish_puts(Seqno(6), keys, values, 4 * 222)
    for seqno, (key, value) in enumerate(zip(keys, values, strict=True), 3):
        single.publisher.publish_put(Seqno(seqno), key, value, 222)
    assert _content(together) == _content(single)
    tables = together.state.version.memtable, single.state.version.memtable
    assert tables[0].latest == tables[1].latest
    assert tables[0].older._by_key == tables[1].older._by_key
    assert tables[0]._written_at == tables[1]._written_at
    assert tables[0].bytes_used == tables[1].bytes_used
    assert together.state.cache.rows == single.state.cache.rows
    assert together.state.cache.bytes_used == single.state.cache.bytes_used
    if reader is not None and other is not None:
        for since in range(2, 7):
            for key in (b"a", b"b", b"c", b"d"):
                histories = together.reads.moments.history, single.reads.moments.history
                found, wanted = (history.conflict(ReadSet(Seqno(since), {key}, ())) for history in histories)
                assert (found and found.seqno) == (wanted and wanted.seqno)


def test_a_value_that_a_read_brings_from_the_tree_does_not_replace_a_newer_one() -> None:
    """A commit may touch the key, or a range that holds it, while the tree is read."""
    for clear in (False, True):
        _, _, engine = make()

        class Tree(FakeTree):
            def get(self, key: bytes, engine: FakeEngine = engine, clear: bool = clear) -> bytes | None:
                engine.publisher.publish(Seqno(1), _batch(*(() if clear else (b"c",)), value=b"new", clear=clear), 4)
                return b"old"

        engine.state.version.tree = Tree()  # type: ignore[assignment]
        assert engine.reads.read(b"c") == b"old", "it was the newest as the call began"
        engine.state.version.tree = FakeTree()  # type: ignore[assignment]
        assert engine.reads.read(b"c") == (None if clear else b"new")


@pytest.mark.parametrize("table", [0, 7])
def test_a_put_goes_the_short_way_as_soon_as_the_last_reader_has_left(
    table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reader = _published("read")
    assert reader is not None
    publisher = engine.publisher
    publish = publisher._publish
    long_way: list[int] = []

    def noted(seqno: Seqno, *commit: object) -> None:
        long_way.append(seqno)
        publish(seqno, *commit)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(publisher, "_publish", noted)
    publisher.publish_put(Seqno(3), b"a", b"3", 222, table)
    assert table or engine.reads.read_at(reader, b"a") == b"1"
    reader.release()
    # This one forgets what was kept for it.
    publisher.publish_put(Seqno(4), b"a", b"4", 222, table)
    assert long_way == [3, 4]
    engine.reads.moments.reader("test").release()
    publisher.publish_put(Seqno(5), b"a", b"5", 222, table)
    engine.reads.moments.reader("test").release()
    publisher.publish_puts(Seqno(7), [b"a", b"c"], [b"6", b"7"], 444)
    assert long_way == [3, 4]
    assert engine.state.seqno == 7


def test_so_does_a_put_into_a_table_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    with kvwal.open("/store", files=SimulatedDisk(), background=False) as db:
        table = db.table("t", bytes, bytes)
        table.index("i", key=lambda value: value, codec=bytes)
        table.put(b"a", b"1")
        publisher: Any = db.engine.queue._publisher
        publish, long_way = publisher._publish, []

        def noted(seqno: Seqno, *commit: object) -> None:
            long_way.append(seqno)
            publish(seqno, *commit)

        monkeypatch.setattr(publisher, "_publish", noted)
        db.snapshot().close()
        table.put(b"b", b"2")
        assert not long_way
        with db.snapshot() as snapshot:
            table.put(b"b", b"3")
            assert len(long_way) == 1
            assert table.within(snapshot)[b"b"] == b"2"
